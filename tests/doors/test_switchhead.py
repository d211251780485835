"""SwitchHead in living models: whole layers are replaced, whatever way they are written."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as ac
from attn_compiler.train.distill import Recipe
from tests.doors import switched
from tests.doors.switched import D, below, causal, draw, expected

SPEC = ac.SwitchHead(heads=2, experts=3, k=2, head_dim=11)
NAMES = {"w_q", "w_k", "w_v", "w_o", "w_s", "w_d"}


def rewritten(model: nn.Module, *args: Any, to: Any = SPEC) -> nn.Module:
    torch.manual_seed(5)
    new = ac.rewrite(model, args or (draw(),), to=to)
    report = ac.last_report()
    assert report.sites and all(s.decision.accepted for s in report.sites), str(report)
    return new  # type: ignore[no-any-return]


def close(ours: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=2e-6)


SPELLED = {
    "separate": switched.Separate,
    "fused": switched.Fused,
    "grouped": switched.Grouped,
    "einsums": switched.Einsums,
    "transposed": switched.Transposed,
    "rotary": switched.Rotary,
}


@pytest.mark.parametrize("name", SPELLED)
def test_it_computes_the_layer_of_the_paper(name: str) -> None:
    new = rewritten(SPELLED[name]())
    assert {n for n, _ in new.named_parameters()} == NAMES
    shapes = {n: tuple(p.shape) for n, p in new.named_parameters()}
    assert shapes["w_q"] == shapes["w_k"] == (2, D, 11) and shapes["w_s"] == (6, D)
    assert shapes["w_v"] == (6, D, 11) and shapes["w_o"] == (6, 11, D)
    for x in (draw(2), draw(3, batch=5, length=17)):
        close(new(x), expected(new, x, x, SPEC, below(x.shape[1]), name == "rotary"))
    assert ac.last_report().sites[0].decision.fidelity == "retrained"


def test_the_output_projection_of_a_module_beside() -> None:
    model = switched.Elsewhere()
    new = rewritten(model)
    assert {n for n, _ in new.inner.named_parameters()} == NAMES
    assert [n for n, _ in new.after.named_parameters()] == ["norm.weight", "norm.bias"]
    x = draw(2)
    y = expected(new.inner, x, x, SPEC, below(11))
    close(new(x), model.double().after.norm(y + x.double()))


def test_torchs_own_module() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(D, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]

    new = rewritten(Model())
    assert {n for n, _ in new.attention.named_parameters()} == NAMES
    x = draw(2)
    close(new(x), expected(new.attention, x, x, SPEC))


class Cross(switched.Separate):
    def scores(self, dot: Tensor) -> Tensor:
        return dot


def test_two_sequences() -> None:
    new = rewritten(Cross(), draw(), draw(2, length=5))
    x, y = draw(3), draw(4, length=7)
    close(new(x, y), expected(new, x, y, SPEC))


class Padded(switched.Separate):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self.sides(x, x)
        scores = (q @ k.mT).masked_fill(~mask[:, None, None], -1e9)
        return self.result(scores.softmax(-1) @ v)


def test_the_mask_stays() -> None:
    x, mask = draw(), torch.ones(3, 11, dtype=torch.bool)
    mask[1, 4:] = False
    new = rewritten(Padded(), x, mask)
    close(new(x, mask), expected(new, x, x, SPEC, mask[:, None, None]))
    assert str(ac.last_report().sites[0].mask) == "padding(mask)"


@pytest.mark.parametrize(
    ("on", "shared"),
    [(("o",), False), (("v",), True), (("q", "k"), False), (("q", "k", "v", "o"), True)],
)
def test_experts_where_they_are_wanted(on: tuple[str, ...], shared: bool) -> None:
    spec = ac.SwitchHead(
        heads=2, experts=3, k=2, head_dim=11, experts_on=on, shared_selection=shared
    )
    new = rewritten(switched.Separate(), to=spec)
    rows = {n: p.shape[0] for n, p in new.named_parameters()}
    assert all(rows[f"w_{n}"] == (6 if n in on else 2) for n in "qkvo")
    x = draw(2).requires_grad_()
    new(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in new.parameters())


def test_experts_are_dropped_in_training_alone() -> None:
    spec = ac.SwitchHead(heads=2, experts=3, k=1, head_dim=11, expert_dropout=0.5)
    new = rewritten(switched.Separate().eval(), to=spec)
    x = draw(2)
    assert torch.equal(new(x), new(x))
    close(new(x), expected(new, x, x, spec, below(11)))
    new.train()
    assert not torch.equal(new(x), new(x))
    torch.manual_seed(0)
    first = new(x)
    torch.manual_seed(0)
    assert torch.equal(first, new(x))


class Dropping(switched.Separate):
    def scores(self, dot: Tensor) -> Tensor:
        return nn.functional.dropout(causal(dot).softmax(-1), 0.5, self.training)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        q, k, v = self.sides(x, x)
        return self.result(self.scores(q @ k.mT) @ v)


def test_dropout_of_the_weights_stays() -> None:
    new = rewritten(Dropping().eval())
    x = draw(2)
    close(new(x), expected(new, x, x, SPEC, below(11)))
    new.train()
    torch.manual_seed(0)
    first, second = new(x), new(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(new(x), first)


# ---------------------------------------------------------------- the model around it


def test_open_sizes_cost_what_is_replaced() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(412, 1230), nn.Linear(410, 412)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                t.unflatten(-1, (10, 41)).transpose(1, 2) for t in self.qkv(x).split(410, -1)
            )
            out = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    model = Wide()
    new = rewritten(model, torch.randn(1, 3, 412), to=ac.SwitchHead())
    ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (new, model))
    assert abs(ours - theirs) <= 0.01 * theirs
    spec = ac.last_report().sites[0].decision.spec
    assert (spec.heads, spec.experts, spec.k) == (2, 5, 3)
    text = str(ac.last_report())
    assert f"2 heads {spec.head_dim} wide, 3 of 5 experts on v, o; {ours:,} parameters" in text


def test_a_stack_is_copied_saved_and_moved() -> None:
    new = rewritten(switched.Stack(switched.Fused))
    x = draw(2)
    want = new(x)
    assert len(new.state_dict()) == 12 and not any("qkv" in n for n in new.state_dict())
    stream = io.BytesIO()
    torch.save(new.state_dict(), stream)
    stream.seek(0)
    for found in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(found(x), want)
        with torch.no_grad():
            for p in found.parameters():
                p.zero_()
        assert not torch.equal(found(x), want)
        found.load_state_dict(torch.load(stream, weights_only=True))
        stream.seek(0)
        assert torch.equal(found(x), want)
    wide = copy.deepcopy(new).double()
    torch.testing.assert_close(wide(x.double()).float(), want, rtol=1e-4, atol=1e-5)


def test_other_calls_are_analysed_or_refused() -> None:
    class Choice(switched.Separate):
        def forward(self, x: Tensor, y: Tensor | None = None, bare: bool = False) -> Tensor:
            if bare:
                return self.out(self.q(x))  # type: ignore[no-any-return]
            return super().forward(x, y)

    new = rewritten(Choice(), draw())
    x, y = draw(2), draw(3)
    causal = below(11)
    close(new(x, y), expected(new, x, y, SPEC, causal))
    with pytest.raises(ac.UnsupportedCall):
        new(x, bare=True)


def test_other_calls_under_torch_compile() -> None:
    """A library may hand over another mask while it is traced: the graph ends, once."""
    torch._dynamo.reset()
    new, x, y = rewritten(switched.Separate(), draw()), draw(2), draw(3)
    whole = {"backend": "eager", "fullgraph": True}
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a call unlike the example"):
        torch.compile(new, **whole)(x, y)
    with pytest.raises(ac.UnsupportedCall):
        torch.export.export(new, (x, y), strict=False)
    want = expected(new, x, y, SPEC, below(11))
    close(torch.compile(new, backend="eager")(x, y), want)
    torch._dynamo.reset()
    close(torch.compile(new, **whole)(x, y), want)


@pytest.mark.slow
def test_no_kind_of_call_is_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_compiler.install._MOST_VARIANTS", 2)
    new = rewritten(switched.Separate(), draw())
    x = draw(2)
    want = expected(new, x, x, SPEC, below(11))
    for _ in range(2):
        close(new(x, draw(2)), want)
        close(new(x, y=None), want)
        with torch.autocast("cpu", torch.bfloat16):
            assert new(x).dtype is torch.bfloat16
        assert len(new._attn_variants) == 2


def test_it_trains() -> None:
    torch.manual_seed(0)
    new = rewritten(switched.Stack(switched.Rotary))
    optimizer = torch.optim.Adam(new.parameters(), lr=3e-3)
    x, target = draw(2), draw(3)
    losses = []
    for _ in range(25):
        loss = (new(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in new.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_an_outer_compiler_and_an_exporter_see_it() -> None:
    new = rewritten(switched.Rotary()).eval()
    x = draw(2)
    torch._dynamo.reset()
    compiled = torch.compile(new, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), new(x), rtol=1e-5, atol=1e-6)
    program = torch.export.export(new, (x,))
    torch.testing.assert_close(program.module()(x), new(x), rtol=1e-5, atol=1e-6)


def test_hooks_of_the_owner_stay() -> None:
    model = switched.Separate()
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    new = ac.rewrite(model, (draw(),), to=SPEC, inplace=True)
    seen.clear()
    new(draw())
    assert new is model and seen == [1]


def test_what_is_refused_leaves_the_model_as_it_was() -> None:
    model = switched.Stack(switched.Fused)
    state, x = copy.deepcopy(model.state_dict()), draw(2)
    want = model(x)
    with pytest.raises(ac.BadOption, match="no attention"):
        ac.rewrite(model, (draw(),), to={"layers.0": SPEC, "other": SPEC}, inplace=True)
    assert list(model.state_dict()) == list(state)
    assert torch.equal(model(x), want) and type(model.layers[0]) is switched.Fused


# ---------------------------------------------------------------- before and after


def test_explain_tells_and_changes_nothing() -> None:
    model = switched.Stack(switched.Separate)
    names = list(model.state_dict())
    report = ac.explain(model, (draw(),), to=ac.SwitchHead())
    assert report.rewritten == 2 and list(model.state_dict()) == names
    assert "does not pay at 11 tokens" in str(report) and "switchhead: 2 heads" in str(report)


def test_a_backend_cannot_install_it() -> None:
    torch._dynamo.reset()
    options = {"to": SPEC, "then": "eager"}
    torch.compile(switched.Separate(), backend="attn_compiler", options=options)(draw())
    (site,) = ac.last_report().sites
    assert [r.code for r in site.decision.reasons] == ["needs_rewrite"]


def test_it_learns_from_the_original() -> None:
    torch.manual_seed(0)
    model = switched.Stack(switched.Separate)
    new = rewritten(model)
    batches = [((draw(seed),), {}) for seed in range(4)]
    quiet = Recipe(progress=False)
    found = ac.distill(new, model, batches, steps=(25, 0), lr=2e-2, recipe=quiet)
    assert found.layers == ("layers.0", "layers.1")
    losses = found.losses["layers"]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
