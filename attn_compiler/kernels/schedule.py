"""Which tiles a block visits, by the structural part of the mask: numbers alone.

    k <= q,  tiles of 64 x 64,  rows 128..191   ->   full tiles 0..1, cut tile 2, the rest never

For each block of rows one contiguous run of key tiles (`by_rows`), or for each block of keys one of
row tiles (`by_keys`); in it one run of tiles in which every row sees every key. What lies between
is computed with the mask, so any predicate is right, and the runs only save work. Blocks with the
most tiles come first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from attn_compiler.ir.mask import Tile
from attn_compiler.kernels.grid import Grid, is_free
from attn_compiler.kernels.plan import plan


@dataclass(frozen=True, slots=True)
class Visit:
    """Tiles lo..hi of one block, of which full_lo..full_hi need no mask."""

    block: int
    lo: int
    full_lo: int
    full_hi: int
    hi: int


@lru_cache(maxsize=256)
def by_rows(grid: Grid, rows: int, keys: int, heads: int = 1) -> tuple[Visit, ...] | None:
    """Blocks of rows in the order they should start; None where nothing is masked by structure.

    Args:
        grid: the program and its sizes.
        rows: rows of a block.
        keys: keys of a tile.
        heads: how many rows of a block are one query row of different heads.
    """
    if is_free(grid):
        return None
    mask, found = plan(grid.program).structural, []
    for block in range(-(-grid.T * heads // rows)):
        span = block * rows // heads, min(((block + 1) * rows - 1) // heads + 1, grid.T)

        def kind(first: int, last: int, span: tuple[int, int] = span) -> Tile:
            return mask.tile(span, (first * keys, last * keys), grid.sizes, grid.ints)

        reach = mask.key_range(span, grid.sizes, grid.ints)
        found.append(_visit(block, reach, keys, grid.S // keys, kind))
    return tuple(sorted(found, key=lambda v: v.lo - v.hi))


@lru_cache(maxsize=256)
def by_keys(grid: Grid, rows: int, keys: int) -> tuple[Visit, ...] | None:
    """Blocks of keys in the order they should start, and the tiles of rows that see them."""
    if is_free(grid):
        return None
    mask, found = plan(grid.program).structural, []
    for block in range(-(-grid.S // keys)):
        span = block * keys, min((block + 1) * keys, grid.S)

        def kind(first: int, last: int, span: tuple[int, int] = span) -> Tile:
            return mask.tile((first * rows, last * rows), span, grid.sizes, grid.ints)

        reach = mask.row_range(span, grid.sizes, grid.ints)
        found.append(_visit(block, reach, rows, grid.T // rows, kind))
    return tuple(sorted(found, key=lambda v: v.lo - v.hi))


def _visit(
    block: int, reach: tuple[int, int], size: int, whole: int, kind: Callable[[int, int], Tile]
) -> Visit:
    """The longest run of full tiles in reach; a tile over the edge of the grid is not full."""
    lo = reach[0] // size
    hi = max(-(-reach[1] // size), lo)
    runs: list[tuple[int, int]] = []
    stack = [(lo, min(hi, whole))]
    while stack:
        first, last = stack.pop()
        if first >= last:
            continue
        found = kind(first, last)
        if found is Tile.PARTIAL and last - first > 1:
            middle = (first + last) // 2
            stack += [(middle, last), (first, middle)]
        elif found is Tile.FULL:
            joined = bool(runs) and runs[-1][1] == first
            runs = [*runs[:-1], (runs[-1][0], last)] if joined else [*runs, (first, last)]
    return Visit(block, lo, *max(runs, key=lambda r: r[1] - r[0], default=(lo, lo)), hi)
