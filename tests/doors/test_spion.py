"""SPION in living models: exact until it has a pattern, then attention over its blocks."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as ac
from attn_compiler.kernels.attention import reference

T, D, H, BLOCK = 96, 24, 3, 16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) * (D // H) ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, mask)
        return x


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def draw(seed: int = 1, batch: int = 2) -> Tensor:
    return torch.randn(batch, T, D, generator=torch.Generator().manual_seed(seed))


SPEC = ac.SPION(block=BLOCK, alpha=0.7, filter=5, max_lost_mass=1.0)
BATCHES = [((draw(seed),), {}) for seed in range(3)]


def sparse(layer: Attention, x: Tensor, zero_logit: bool = False) -> Tensor:
    """What the rewritten layer has to compute, in float64, with its pattern as a T x T mask."""
    double = copy.deepcopy(layer).double()
    q, k, v = (
        y.unflatten(-1, (H, -1)).transpose(1, 2) for y in double.qkv(x.double()).chunk(3, -1)
    )
    kept = layer.attn_blocks_0
    program = f"score: dot; mask: t0[{'h, ' * (kept.dim() == 3)}q // {BLOCK}, k // {BLOCK}]"
    reads = [kept]
    if zero_logit:
        count = kept.double().sum(-1).repeat_interleave(BLOCK, -1) * BLOCK
        program += f"; sink: t1[{'h, ' * (kept.dim() == 3)}q]"
        reads.append((T - count).log())
    out, _ = reference(q, k, v, reads, [], program + "; empty: any", (D // H) ** -0.5)
    return double.out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("softmax", ["neg_inf", "zero_logit"])
@pytest.mark.parametrize("per_head", [False, True])
def test_numbers_and_gradients(model: Model, softmax: Any, per_head: bool) -> None:
    spec = ac.SPION(
        block=BLOCK, alpha=0.7, filter=5, softmax=softmax, per_head=per_head, max_lost_mass=1.0
    )
    new = ac.rewrite(model, (draw(),), to=spec, calibration=BATCHES)
    layer = new.layers[0]
    assert 1 / 6 < layer.attn_blocks_0.float().mean() < 1
    assert layer.attn_blocks_0.shape == ((H, 6, 6) if per_head else (6, 6))
    x = draw(7, batch=3).requires_grad_()
    exact = sparse(layer, x, softmax == "zero_logit")
    ours = layer(x)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
    (wanted,) = torch.autograd.grad(exact, x, weight.double())
    (found,) = torch.autograd.grad(ours, x, weight)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    report = ac.last_report()
    assert all("of the blocks" in s.facts["spion"] for s in report.sites)
    assert {s.decision.fidelity for s in report.sites} == {"calibrated"}


def test_exact_until_it_has_a_pattern(model: Model) -> None:
    x = draw()
    new = ac.rewrite(model, (x,), to=SPEC, calibration="later")
    assert new.layers[0].attn_blocks_0.all()
    torch.testing.assert_close(new(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_layer_that_would_lose_too_much_stays_dense(model: Model) -> None:
    x, spec = draw(), ac.SPION(block=BLOCK, alpha=0.7, filter=5, max_lost_mass=0.01)
    new = ac.rewrite(model, (x,), to=spec, calibration=BATCHES)
    assert all("dense" in s.facts["spion"] for s in ac.last_report().sites)
    torch.testing.assert_close(new(x), model(x), rtol=1e-5, atol=1e-5)
    assert "dense: the pattern" in str(ac.last_report())


def test_a_given_pattern_needs_no_data(model: Model) -> None:
    pattern = torch.eye(6, dtype=torch.bool)
    spec = ac.SPION(pattern={"layers.0": pattern, "layers.1": torch.ones(6, 6, dtype=torch.bool)})
    new = ac.rewrite(model, (draw(),), to=spec)
    assert torch.equal(new.layers[0].attn_blocks_0, pattern)
    assert new.layers[1].attn_blocks_0.all()


def test_the_pattern_is_part_of_the_model(model: Model) -> None:
    x = draw()
    new = ac.rewrite(model, (x,), to=SPEC, calibration=BATCHES)
    expected = new(x)
    assert torch.equal(copy.deepcopy(new)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(new))(x), expected)
    file = io.BytesIO()
    torch.save(new.state_dict(), file)
    file.seek(0)
    other = ac.rewrite(model, (x,), to=SPEC, calibration="later")
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), expected)
    compiled = torch.compile(new, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_padding_joins_the_pattern(model: Model) -> None:
    x, mask = draw(), torch.arange(T) < torch.tensor([[T], [70]])
    new = ac.rewrite(model, (x, mask), to=SPEC, calibration=[((x, mask), {})])
    changed = x.clone()
    changed[1, 70:] += 1.0
    assert new(x, mask).isfinite().all()
    torch.testing.assert_close(new(changed, mask)[1, :64], new(x, mask)[1, :64])


def test_other_lengths_are_refused_and_never_computed_otherwise(model: Model) -> None:
    new = ac.rewrite(model, (draw(),), to=SPEC, calibration=BATCHES)
    assert new(draw(batch=5)).shape == (5, T, D)
    with pytest.raises(ac.UnsupportedCall, match="96 tokens"):
        new(draw()[:, :80])


def test_bad_input_leaves_the_model_as_it_was(model: Model) -> None:
    x, before = draw(), set(model.state_dict())
    with pytest.raises(ac.BadOption, match="calibration is missing"):
        ac.rewrite(model, (x,), to=SPEC, inplace=True)
    with pytest.raises(ac.BadOption, match="shows nothing"):
        ac.rewrite(model, (x,), to=SPEC, calibration=[], inplace=True)
    with pytest.raises(ac.BadOption, match="nothing that is asked for"):
        ac.rewrite(model, (x,), to=ac.Flash(), calibration=BATCHES)
    with pytest.raises(ac.UnsupportedCall):
        ac.rewrite(model, (x,), to=SPEC, calibration=[((x[:, :50],), {})], inplace=True)
    assert set(model.state_dict()) == before and type(model.layers[0]) is Attention


def test_what_keeps_it_out(model: Model) -> None:
    class Cross(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return (q @ k.transpose(-1, -2)).softmax(-1) @ k

    ac.rewrite(Cross(), (draw(), draw(2)[:, :50]), to=SPEC, calibration="later")
    (site,) = ac.last_report().sites
    assert [r.code for r in site.decision.reasons] == ["spion.not_square"]
    ac.rewrite(model, (draw(),), to=ac.SPION(block=128), calibration="later")
    assert _codes() == {"spion.one_block"}
    ac.rewrite(model, (draw(),), to=ac.SPION(pattern=torch.eye(7, dtype=torch.bool)))
    assert _codes() == {"spion.pattern"}


def _codes() -> set[str]:
    return {r.code for site in ac.last_report().sites for r in site.decision.reasons}


def test_explain_says_what_rewrite_would_do(model: Model) -> None:
    report = ac.explain(model, (draw(),), to=SPEC)
    assert [s.decision.variant for s in report.sites] == ["spion", "spion"]
    assert "attn_blocks_0[q // 16, k // 16]" not in report.graph_before
    assert "q // 16, k // 16" in report.graph_after
    assert not [name for name, _ in model.named_buffers()]


def test_a_backend_cannot_install_it(model: Model) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="attn_compiler", options={"to": SPEC, "then": "eager"})
    compiled(draw())
    codes = {r.code for s in ac.last_report().sites for r in s.decision.reasons}
    assert codes == {"needs_rewrite"}


def test_a_training_turns_sparse_without_a_new_trace(model: Model) -> None:
    x = draw()
    new = ac.rewrite(model, (x,), to=SPEC, calibration="later").train()
    schedule = ac.SpionSchedule(new, SPEC, every=2)
    variants = [len(layer._attn_variants) for layer in new.layers]
    optimizer = torch.optim.SGD(new.parameters(), 1e-3)
    turned = None
    for index in range(20):
        optimizer.zero_grad()
        new(draw(index)).square().mean().backward()
        optimizer.step()
        if schedule.step(index):
            turned = index
    assert turned is not None and schedule.sparse and schedule.criterion.looks >= 3
    assert not new.layers[0].attn_blocks_0.all()
    assert [len(layer._attn_variants) for layer in new.layers] == variants
    resumed = ac.SpionSchedule(new, SPEC, every=2)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.sparse and not resumed.step(30)


def test_a_schedule_needs_a_rewritten_model(model: Model) -> None:
    with pytest.raises(ac.BadOption, match="map of blocks"):
        ac.SpionSchedule(model, SPEC)
