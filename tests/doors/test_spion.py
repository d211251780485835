"""SPION in living models: exact until it has a pattern, then attention over its blocks."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from spion_cases import BLOCK, Attention, D, H, Model, T, draw
from torch import Tensor, nn

import attn_compiler as ac
from attn_compiler.kernels.attention import reference


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


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
    assert all("of the blocks" in s.facts["spion"]["text"] for s in report.sites)
    assert {s.decision.fidelity for s in report.sites} == {"calibrated"}


def test_exact_until_it_has_a_pattern(model: Model) -> None:
    x = draw()
    new = ac.rewrite(model, (x,), to=SPEC, calibration="later")
    assert new.layers[0].attn_blocks_0.all()
    torch.testing.assert_close(new(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_layer_that_would_lose_too_much_stays_dense(model: Model) -> None:
    x, spec = draw(), ac.SPION(block=BLOCK, alpha=0.7, filter=5, max_lost_mass=0.01)
    new = ac.rewrite(model, (x,), to=spec, calibration=BATCHES)
    facts = [s.facts["spion"] for s in ac.last_report().sites]
    assert all(f["text"].startswith("dense") and f["lost_mass"] > 0.01 for f in facts)
    assert all(layer.attn_blocks_0.all() for layer in new.layers)
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


@pytest.mark.parametrize("per_head", [False, True])
def test_the_report_holds_what_a_picture_needs(model: Model, per_head: bool) -> None:
    spec = dataclasses.replace(SPEC, per_head=per_head)
    new = ac.rewrite(model, (draw(),), to=spec, calibration=BATCHES)
    sites = json.loads(ac.last_report().to_json())["sites"]
    for layer, site, seen in zip(new.layers, sites, ac.last_report().sites, strict=True):
        facts = site["facts"]["spion"]
        assert facts == seen.facts["spion"] and facts["text"] in str(ac.last_report())
        assert facts["block"] == BLOCK and facts["of"] == (H if per_head else 1)
        blocks = layer.attn_blocks_0.view(-1, 6, 6)
        assert facts["kept"] == blocks.sum(0).tolist()
        assert facts["density"] == pytest.approx(float(blocks.float().mean()), abs=1e-3)
        pooled = torch.tensor(facts["pooled"])
        # a row gives 1 in all: 5 diagonals of it go into the sum, less where they leave the map
        assert pooled.shape == (6, 6) and 4 < float(pooled.sum() * BLOCK / 6) < 5
        assert 0 < facts["lost_mass"] < 1


def test_lost_mass_is_what_a_mask_would_take(model: Model) -> None:
    x = draw()
    new = ac.rewrite(model, (x,), to=SPEC, calibration=[((x,), {})])
    layer = model.layers[0].requires_grad_(False)
    q, k, _ = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in layer.qkv(x).chunk(3, -1))
    probabilities = (q @ k.transpose(-1, -2) * (D // H) ** -0.5).softmax(-1)
    kept = new.layers[0].attn_blocks_0.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    lost = 1 - float((probabilities * kept).sum() / probabilities.sum())
    assert ac.last_report().sites[0].facts["spion"]["lost_mass"] == pytest.approx(lost, rel=5e-3)


def test_patterns_go_to_a_file_and_into_another_model(model: Model, tmp_path: Path) -> None:
    x = draw()
    new = ac.rewrite(model, (x,), to=SPEC, calibration=BATCHES)
    torch.save(ac.spion_patterns(new), tmp_path / "patterns.pt")
    patterns = torch.load(tmp_path / "patterns.pt")
    assert set(patterns) == {"layers.0", "layers.1"}
    other = ac.rewrite(model, (x,), to=ac.SPION(pattern=patterns))
    assert torch.equal(other(x), new(x))
    facts = ac.last_report().sites[0].facts["spion"]
    assert facts["text"].endswith("as given")
    assert facts["pooled"] is None and facts["lost_mass"] is None
    assert facts["kept"] == patterns["layers.0"].int().tolist()
    with pytest.raises(ac.BadOption, match="map of blocks"):
        ac.spion_patterns(model)


def test_calibration_shows_where_it_is(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    ac.rewrite(model, (draw(),), to=SPEC, calibration=BATCHES)
    assert "calibration 3/3" in capsys.readouterr().err
    ac.rewrite(model, (draw(),), to=SPEC, calibration=iter(BATCHES))
    assert capsys.readouterr().err.split("\n")[:2] == ["calibration 1", "calibration 2"]


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
    with pytest.raises(ac.UnsupportedCall, match="96 tokens"):
        ac.rewrite(model, (x,), to=SPEC, calibration=[((x[:, :50],), {})], inplace=True)
    for batch in (x, (x,), ((x,), x)):
        with pytest.raises(ac.BadOption, match=r"pair \(args, kwargs\)"):
            ac.rewrite(model, (x,), to=SPEC, calibration=[batch], inplace=True)
    nothing = torch.zeros(2, T, dtype=torch.bool)
    with pytest.raises(ac.BadOption, match="forbids every key"):
        ac.rewrite(model, (x, nothing), to=SPEC, calibration=[((x, nothing), {})], inplace=True)
    with pytest.raises(ac.BadOption, match="between 0 and 1"):
        ac.rewrite(model, (x,), to=ac.SPION(alpha=1.5), calibration=BATCHES, inplace=True)
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


class BothWays(nn.Module):
    """One module that a pass calls for a sequence by itself, and for two sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        alone, _ = self.inner(x, x, x, need_weights=False)
        return self.inner(alone[:, :5], x, x, need_weights=False)[0]


def test_a_module_that_is_also_called_for_two_sequences_is_left_alone() -> None:
    model, x = BothWays(), torch.randn(2, 16, 8)
    new = ac.rewrite(model, (x,), to=ac.SPION(pattern=torch.eye(4, dtype=torch.bool), block=4))
    assert not any(site.decision.accepted for site in ac.last_report().sites)
    torch.testing.assert_close(new(x), model(x), rtol=0.0, atol=0.0)
