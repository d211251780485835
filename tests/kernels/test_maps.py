"""Sums of attention maps against the probabilities themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import Largest, Shape, draw, padding, tensors, text
from torch import Tensor

from attn_compiler.errors import BadOption
from attn_compiler.kernels import rows
from attn_compiler.kernels.attention import reference
from attn_compiler.kernels.maps import add_blocks, add_map
from attn_compiler.kernels.pooled import BlockMap

SHAPE = Shape(H=6, G=2, T=53, S=53)
SCALE = 0.35


def probabilities(q: Tensor, k: Tensor, reads: list[Tensor], program: str) -> Tensor:
    """The operator of values that are unit vectors."""
    unit = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return reference(q, k, unit, reads, [], program, SCALE)[0].nan_to_num(0.0)


PROGRAMS: dict[str, Any] = {
    "none": (text(), lambda s: []),
    "causal & padding": (text(mask="(k <= q) & t0[b, k]", empty="nan"), lambda s: [padding(s)]),
    "bias": (text("dot + t0[0, h, q, k]"), lambda s: [draw(1, s.H, s.T, s.S).double()]),
    "softcap and sink": (
        text("2.0 * tanh(dot / 2.0)", "k <= q", "t0[h]"),
        lambda s: [draw(s.H).double()],
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_sums_of_two_batches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_CPU_BUDGET", 2**8)
    program, make = PROGRAMS[name]
    reads = make(SHAPE)
    found, heads = torch.zeros(53, 53).double(), torch.zeros(6, 53, 53).double()
    pooled = BlockMap.zeros(53, block=5, filter=7)
    each = BlockMap.zeros(53, block=5, filter=7, heads=(6,))
    exact = torch.zeros(6, 53, 53).double()
    for size in (1.0, 3.0):
        q, k, _ = tensors(SHAPE, torch.float64, size)
        for into in (found, heads):
            add_map(q, k, reads, [], program=program, scale=SCALE, into=into)
        for sums in (pooled, each):
            add_blocks(q, k, reads, [], program=program, scale=SCALE, into=sums)
        exact += probabilities(q, k, reads, program).sum(0)
    torch.testing.assert_close(heads, exact)
    torch.testing.assert_close(found, exact.sum(0))
    for sums, wanted in ((pooled, exact.sum(0)), (each, exact)):
        direct = BlockMap.of(wanted, block=5, filter=7)
        torch.testing.assert_close(sums.convolved, direct.convolved)
        torch.testing.assert_close(sums.plain, direct.plain)


def test_low_precision_and_autocast() -> None:
    q, k, _ = tensors(SHAPE, torch.bfloat16)
    found, exact = torch.zeros(53, 53), torch.zeros(53, 53).double()
    with torch.autocast("cpu", torch.bfloat16):
        add_map(q, k, [], [], program=text(), scale=SCALE, into=found)
    add_map(q.double(), k.double(), [], [], program=text(), scale=SCALE, into=exact)
    assert (found - exact).abs().max() <= 64 * torch.finfo(torch.float32).eps * exact.max()


def test_mass_outside_a_pattern() -> None:
    a = draw(2, 23, 23).double().softmax(-1)
    kept = draw(2, 5, 5) > 0
    full = kept.repeat_interleave(5, 1).repeat_interleave(5, 2)[:, :23, :23]
    sums = BlockMap.of(a, block=5)
    torch.testing.assert_close(sums.lost(kept), 1 - (a * full).sum((1, 2)) / 23)
    one = BlockMap.of(a.mean(0), block=5)
    torch.testing.assert_close(one.lost(kept[0]), 1 - (a.mean(0) * full[0]).sum() / 23)
    assert float(one.lost(torch.ones(5, 5, dtype=torch.bool))) == pytest.approx(0, abs=1e-12)
    assert float(one.lost(torch.zeros(5, 5, dtype=torch.bool))) == 1
    assert float(BlockMap.zeros(23, block=5).lost(kept[0])) == 0


def test_no_map_of_a_sample_is_kept() -> None:
    s = Shape(H=4, G=4, T=1536, S=1536, d=8, dv=8)
    q, k, _ = tensors(s, torch.float32)
    pooled = BlockMap.zeros(1536, block=64)
    with Largest() as seen:
        add_blocks(q, k, [], [], program=text(), scale=SCALE, into=pooled)
    assert seen.elements <= 2**21 < 2 * 4 * 1536**2 // 8
    # each row of each head of each sample sums to one
    assert float(pooled.plain.sum()) * 64**2 == pytest.approx(2 * 4 * 1536, rel=1e-5)


@pytest.mark.parametrize("shape", [(53, 52), (53,), (2, 53, 53)])
def test_sums_of_another_shape(shape: tuple[int, ...]) -> None:
    q, k, _ = tensors(SHAPE, torch.float32)
    with pytest.raises(BadOption, match="do not fit"):
        add_map(q, k, [], [], program=text(), scale=1.0, into=torch.zeros(shape))


@pytest.mark.parametrize(
    "into", [BlockMap.zeros(52, block=4), BlockMap.zeros(53, block=4, heads=(2,))]
)
def test_another_length_than_the_calibrated(into: BlockMap) -> None:
    q, k, _ = tensors(SHAPE, torch.float32)
    with pytest.raises(BadOption, match="do not fit"):
        add_blocks(q, k, [], [], program=text(), scale=1.0, into=into)
