"""The tiles that a kernel visits against the mask itself, element by element."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_compiler.ir.evaluate import evaluate
from attn_compiler.ir.expr import parse
from attn_compiler.ir.score import Program
from attn_compiler.kernels.grid import Grid
from attn_compiler.kernels.schedule import Visit, by_keys, by_rows

ATOMS = (
    "k <= q", "k <= q + (S - T)", "k > q - n0", "k < n1", "k >= n0", "k // 8 == q // 8",
    "abs(q - k) <= n0", "q < n1", "(k - q) % 3 == 0", "k != q",
)  # fmt: skip


@st.composite
def predicates(draw: st.DrawFn) -> str:
    parts = draw(st.lists(st.sampled_from(ATOMS), min_size=1, max_size=3))
    text = f"({parts[0]})"
    for part in parts[1:]:
        text = f"({text} {draw(st.sampled_from('&|'))} ({part}))"
    return text


def allowed(grid: Grid, mask: str) -> torch.Tensor:
    env = {**grid.sizes, "q": torch.arange(grid.T)[:, None], "k": torch.arange(grid.S)}
    return evaluate(parse(mask), env, ints=grid.ints).bool().expand(grid.T, grid.S)


def claim(visits: tuple[Visit, ...], seen: list[torch.Tensor], size: int, length: int) -> None:
    """`seen[i]`: what block i may see, [., length], in tiles of `size` along the last axis."""
    assert sorted(v.block for v in visits) == list(range(len(seen)))
    assert [v.hi - v.lo for v in visits] == sorted((v.hi - v.lo for v in visits), reverse=True)
    for v in visits:
        assert 0 <= v.lo <= v.full_lo <= v.full_hi <= v.hi <= -(-length // size)
        block = seen[v.block]
        assert not block[:, : v.lo * size].any() and not block[:, v.hi * size :].any()
        assert block[:, v.full_lo * size : v.full_hi * size].all()
        assert v.full_hi * size <= length


@given(
    mask=predicates(),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    ints=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    tile=st.sampled_from([(4, 8), (8, 4), (16, 16)]),
    heads=st.sampled_from([1, 3]),
)
def test_nothing_is_missed_and_full_tiles_are_full(
    mask: str, sizes: tuple[int, int], ints: tuple[int, int], tile: tuple[int, int], heads: int
) -> None:
    grid = Grid(str(Program(mask=parse(mask))), 1, 3, *sizes, ints)
    (rows, keys), table = tile, allowed(grid, mask)
    over_keys, over_rows = by_rows(grid, rows, keys, heads), by_keys(grid, rows, keys)
    if over_keys is None or over_rows is None:
        assert table.all()
        return
    claim(over_keys, list(table.repeat_interleave(heads, 0).split(rows)), keys, grid.S)
    claim(over_rows, list(table.T.split(keys)), rows, grid.T)


def test_causal_tiles_are_those_of_the_triangle() -> None:
    grid = Grid(str(Program(mask=parse("k <= q"))), 1, 1, 256, 256, ())
    assert by_rows(grid, 64, 64) == tuple(Visit(i, 0, 0, i, i + 1) for i in (3, 2, 1, 0))
    assert by_keys(grid, 64, 64) == (
        *(Visit(i, i, i + 1, 4, 4) for i in range(3)),
        Visit(3, 3, 3, 3, 4),
    )


@pytest.mark.parametrize("length", [32768])
def test_a_long_sequence_is_scheduled_without_looking_at_elements(length: int) -> None:
    grid = Grid(str(Program(mask=parse("(k <= q) & (k > q - n0)"))), 1, 1, length, length, (1024,))
    visits = by_rows(grid, 128, 64)
    assert visits is not None and max(v.hi - v.lo for v in visits) == 18
