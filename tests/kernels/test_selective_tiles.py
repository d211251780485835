"""Which tiles of Selective attention are left out, and that none is that counts."""

from __future__ import annotations

import pytest
import torch
from attention_cases import text

from attn_compiler.kernels import selective_tiles
from attn_compiler.kernels.frame import Inputs

SIDE, KEYS = 4, 11


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selective_tiles, "SIDE", SIDE)


def test_the_first_row_of_a_tile_has_its_smallest() -> None:
    """F only grows from row to row; tiles at the ends have fewer rows and keys."""
    steps = torch.rand(3, 7, KEYS, generator=torch.Generator().manual_seed(0))
    amount = steps.cumsum(1)
    brute = [[x.amin((1, 2)) for x in y.split(SIDE, 2)] for y in amount.split(SIDE, 1)]
    exact = torch.stack([torch.stack(row, -1) for row in brute], -2)
    assert torch.equal(selective_tiles._smallest(amount[:, ::SIDE]), exact)


@pytest.mark.parametrize(("gate", "left"), [(None, 1), (0.5, 1), (0.0, 1), (-0.5, 0), (-9.0, 0)])
def test_small_keys_are_left_out_unless_a_gate_may_raise_them(
    gate: float | None, left: int
) -> None:
    """The first keys are far below what rows give to their own; a negative gate adds F to them."""
    q = torch.zeros(1, 1, KEYS, 2)
    k = torch.zeros(1, 1, KEYS, 2)
    q[..., 0], k[..., 0] = 10, 10
    k[:, :, :SIDE] /= 100
    program = text(mask="(k <= q)")
    given = Inputs.of(q, k, k, [], [], None, program=program, scale=1.0, dropout=0.0)
    least = torch.full((1, 3, 3), 3.0)
    factor = None if gate is None else torch.tensor([gate])
    kept = selective_tiles._kept(given, least, 0, factor)
    assert kept[..., 1:].all() and kept[..., :1, :].all()
    assert (~kept[0, 0, 1:, 0]).sum() == 2 * left
