"""LinearAttention in living models: against its definition, an ordinary module, taught, refused."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from doors.living import CausalAttention
from doors.test_selective import Attention, D, H, Model, T, draw
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import attn_compiler as ac
from attn_compiler.errors import BadOption, UnsupportedCall
from attn_compiler.kernels.feature_maps import FeatureMaps
from attn_compiler.kernels.linear_attention import reference
from attn_compiler.train.distill import Recipe
from attn_compiler.variants.linear_attention import legality

WINDOW, SPEC = 5, ac.LinearAttention(window=5)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    found = Model()
    for parameter in found.parameters():
        parameter.data *= 2  # logits that say something
    return found


def rewritten(model: nn.Module, x: Tensor, spec: ac.LinearAttention = SPEC) -> Any:
    return ac.rewrite(model, (x,), to=spec, on_reject="raise")


def moved(new: nn.Module) -> dict[str, FeatureMaps]:
    """The maps, no longer as they start."""
    torch.manual_seed(3)
    found = ac.feature_maps(new)
    for parameter in (p for maps in found.values() for p in maps.parameters()):
        parameter.data += 0.3 * torch.randn_like(parameter)
    return found


def linear(layer: Attention, maps: FeatureMaps, x: Tensor) -> Tensor:
    """The definition, by the operator's specification."""
    q, k, v = layer.parts(x)
    options = {"window": WINDOW, "scale": (D // H) ** -0.5}
    out = reference(q, k, v, maps.queries(q), maps.keys(k), None, None, **options)[0]
    return layer.out(out.transpose(1, 2).flatten(2))


def test_numbers_and_gradients(model: Model) -> None:
    new = rewritten(model, draw())
    maps = moved(new)["layers.0"]
    x = draw(5, 37).requires_grad_()  # another length than the example's
    double = copy.deepcopy(maps).double()
    exact = linear(copy.deepcopy(model.layers[0]).double(), double, x.double())
    ours = new.layers[0](x)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, model.layers[0](x), atol=1e-3)
    wanted = torch.autograd.grad(exact.square().sum(), [x, *double.parameters()])
    found = torch.autograd.grad(ours.square().sum(), [x, *maps.parameters()])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=1e-4, atol=1e-4)
    site = ac.last_report().sites[0]
    assert site.decision.variant == "linear" and site.decision.fidelity == "retrained"
    assert "no kernel of its own" in site.facts["linear"] and site.facts["plan"]


def test_a_window_of_all_tokens_changes_nothing(model: Model) -> None:
    x = draw()
    new = rewritten(model, x, ac.LinearAttention(window=T))
    torch.testing.assert_close(new(x), model(x), rtol=1e-5, atol=1e-5)


def test_every_prefix_has_the_rows_of_the_whole(model: Model) -> None:
    new, x = rewritten(model, draw()), draw(3, 17)
    moved(new)
    whole = new(x)
    for length in range(1, 17):
        torch.testing.assert_close(new(x[:, :length]), whole[:, :length], rtol=1e-5, atol=1e-5)


def test_an_ordinary_module(model: Model) -> None:
    x = draw(3)
    new = rewritten(model, x)
    moved(new)
    expected = new(x)
    assert torch.equal(copy.deepcopy(new)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(new))(x), expected)
    names = {f"layers.{i}.attn_far_0.{name}" for i in range(2) for name in ("w_q", "w_k", "weight")}
    assert set(new.state_dict()) == set(model.state_dict()) | names
    other = rewritten(model, x)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(new.state_dict())
    assert torch.equal(other(x), expected)
    assert list(ac.feature_maps(new)) == ["layers.0", "layers.1"] and not ac.feature_maps(model)


@pytest.mark.slow
def test_in_one_compiled_graph(model: Model) -> None:
    new, x = rewritten(model, draw()), draw(3)
    torch._dynamo.reset()
    compiled = torch.compile(new, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), new(x))


def test_a_mask_that_is_a_buffer() -> None:
    """Only its numbers say that it is causal; they are looked at in every call."""
    torch.manual_seed(0)
    own, x = CausalAttention(0.0).eval(), torch.randn(2, 13, 32)
    new = rewritten(own, x, ac.LinearAttention(window=13))
    torch.testing.assert_close(new(x), own(x), rtol=1e-5, atol=1e-5)
    new.bias.fill_(1.0)
    with pytest.raises(UnsupportedCall, match="sees the keys up to its own"):
        new(x)


def test_dropout_is_never_left_out_silently() -> None:
    """In training mode nothing may replace it, and the original computes something else."""
    own, x = CausalAttention(0.5).eval(), torch.randn(2, 13, 32)
    new = rewritten(own, x)
    with pytest.raises(UnsupportedCall, match=r"no original[\s\S]*linear\.dropout"):
        new.train()(x)
    new.attn_dropout.p = 0.0
    new(x).sum().backward()


def test_it_is_taught_by_the_original(model: Model) -> None:
    """The maps alone move, and each layer's error falls."""
    x = draw()
    new = rewritten(model, x)
    new.requires_grad_(False)
    for maps in ac.feature_maps(new).values():
        maps.requires_grad_(True)
    before = copy.deepcopy(new.state_dict())
    batches = [((draw(seed),), {}) for seed in (3, 4)]
    found = ac.distill(new, model, batches, steps=(12, 0), lr=0.05, recipe=Recipe(progress=False))
    losses = found.losses["layers"]
    assert found.layers == ("layers.0", "layers.1")
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    changed = {n for n, v in new.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {n for n in before if "attn_far" in n}


def test_the_report_says_what_it_costs_a_model() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner = nn.Embedding(31, D), Model()

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(self.table(ids)) @ self.table.weight.T

    ids = torch.randint(31, (2, 13))
    ac.rewrite(Words().eval(), (ids,), to=SPEC, calibration=[((ids,), {})])
    for site in ac.last_report().sites:
        assert " before, " in site.facts["calibration"]
    with pytest.raises(BadOption, match="nothing that is asked for is fitted"):
        ac.rewrite(Words(), (ids,), to=SPEC, calibration="later")


# ---------------------------------------------------------------- what keeps it out


def codes_of_last() -> set[str]:
    return {r.code for site in ac.last_report().sites for r in site.decision.reasons}


class Core(Attention):
    """With something done to the scores, or with the last rows alone."""

    def __init__(self, change: Any = None, rows: int = T, causal: bool = True) -> None:
        super().__init__()
        self.change, self.rows, self.causal = change, rows, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        if self.change is None:
            y = scaled_dot_product_attention(q[:, :, -self.rows :], k, v, is_causal=self.causal)
        else:
            scores = self.change(q @ k.mT).masked_fill(outside(T), -torch.inf)
            y = scores.softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


def outside(width: int) -> Tensor:
    rows, keys = torch.arange(T)[:, None], torch.arange(T)
    return (keys > rows) | (keys <= rows - width)


REFUSED: dict[str, Core] = {
    "linear.not_square": Core(rows=7),
    "linear.not_causal": Core(causal=False),
    "linear.score": Core(lambda s: 5 * torch.tanh(s / 5)),
    "linear.mask": Core(lambda s: s.masked_fill(outside(4), -torch.inf)),
}


@pytest.mark.parametrize("code", REFUSED)
def test_it_is_refused(code: str) -> None:
    new = ac.rewrite(REFUSED[code], (draw(),), to=SPEC)
    assert code in codes_of_last() and type(new) is Core


def test_what_a_site_has_to_say(model: Model) -> None:
    rewritten(model, draw())
    (site, _) = ac.last_report().sites
    assert not list(legality(site, SPEC))
    assert {r.code for r in legality(replace(site, query_heads=None), SPEC)} == {"linear.heads"}
    assert {r.code for r in legality(replace(site, dropout=0.1), SPEC)} == {"linear.dropout"}


def test_a_backend_has_nowhere_to_put_maps(model: Model) -> None:
    torch._dynamo.reset()
    torch.compile(model, backend="attn_compiler", options={"to": SPEC, "then": "eager"})(draw())
    assert codes_of_last() == {"needs_rewrite"}
