"""The T x S grid of one call, and how its structural mask cuts it: numbers alone, no tensors.

    k <= q, q - k < 256   ->   rows 0..128 see keys 0..128, rows 128..256 see keys 0..256, ...

What is found is remembered: all layers of a model, forward and backward, ask the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from attn_compiler.ir.evaluate import evaluate
from attn_compiler.ir.expr import TRUE, Const, Expr, Int
from attn_compiler.ir.mask import Causal, Tile
from attn_compiler.kernels.plan import plan

# fewer rows than this make slow matrix products
LEAST_ROWS = 16


@dataclass(frozen=True, slots=True)
class Span:
    """A block: rows r0..r1 of the batch items b0..b1, the keys lo..hi that they may see.

    `masked` says that the structural mask still cuts inside.
    """

    r0: int
    r1: int
    lo: int
    hi: int
    b0: int
    b1: int
    masked: bool

    @property
    def rows(self) -> tuple[slice, slice, slice]:
        """Where a [B, heads, T, ...] tensor holds them."""
        return slice(self.b0, self.b1), slice(None), slice(self.r0, self.r1)

    @property
    def keys(self) -> tuple[slice, slice, slice]:
        """Where a [B, heads, S, ...] tensor holds them."""
        return slice(self.b0, self.b1), slice(None), slice(self.lo, self.hi)

    def ends(self, index: str, heads: int) -> tuple[int, int]:
        """From where to where an index runs in this block; over `heads` all of them."""
        if index == "q":
            return self.r0, self.r1
        if index == "k":
            return self.lo, self.hi
        return (self.b0, self.b1) if index == "b" else (0, heads)


@dataclass(frozen=True, slots=True)
class Grid:
    """A program with the sizes and integers of one call."""

    program: str
    B: int
    H: int
    T: int
    S: int
    ints: tuple[int, ...]

    @property
    def sizes(self) -> dict[str, int]:
        return {"B": self.B, "H": self.H, "T": self.T, "S": self.S}

    def length(self, index: str) -> int:
        """How far b, h, q or k runs."""
        return (
            self.B
            if index == "b"
            else self.H
            if index == "h"
            else self.T
            if index == "q"
            else self.S
        )

    def number(self, expr: Expr) -> int:
        """The value of an expression without indices."""
        if isinstance(expr, Const):
            return int(expr.value)
        return self.ints[expr.slot] if isinstance(expr, Int) else _number(self, expr)

    def whole(self, masked: bool = True) -> Span:
        return Span(0, self.T, 0, self.S, 0, self.B, masked)


@lru_cache(maxsize=4096)
def _number(grid: Grid, expr: Expr) -> int:
    return int(evaluate(expr, grid.sizes, ints=grid.ints).item())


@lru_cache(maxsize=4096)
def is_free(grid: Grid) -> bool:
    """Does the structural mask allow everything?"""
    structural, rows, cols = plan(grid.program).structural, (0, grid.T), (0, grid.S)
    if structural.expr == TRUE:
        return True
    return structural.tile(rows, cols, grid.sizes, grid.ints) is Tile.FULL


@lru_cache(maxsize=4096)
def is_causal(grid: Grid) -> bool:
    """Is the structural mask exactly  k <= q ?"""
    terms = plan(grid.program).structural.terms
    if len(terms) != 1 or not isinstance(terms[0], Causal):
        return False
    return grid.number(terms[0].offset) == 0


@lru_cache(maxsize=1024)
def spans(
    grid: Grid, pairs: int, budget: int, most: int, batch: tuple[int, int] | None = None
) -> tuple[Span, ...]:
    """Blocks of rows, as tall as the budget allows, with the keys that the mask leaves them.

    Args:
        grid: what to cut.
        pairs: elements that one row and one key cost.
        budget: elements of a block.
        most: rows of a block.
        batch: first and last + 1 batch item, all by default.
    """
    structural, free, items = plan(grid.program).structural, is_free(grid), batch or (0, grid.B)

    def keys(first: int, last: int) -> tuple[int, int]:
        if free:
            return 0, grid.S
        lo, hi = structural.key_range((first, last), grid.sizes, grid.ints)
        return lo, max(lo, hi)

    found = []
    r0 = 0
    while r0 < grid.T:
        lo, hi = keys(r0, min(r0 + LEAST_ROWS, grid.T))
        step = min(budget // max(1, pairs * (hi - lo)), most)
        r1 = min(r0 + max(LEAST_ROWS, step), grid.T)
        lo, hi = keys(r0, r1)
        while r1 - r0 > LEAST_ROWS and pairs * (r1 - r0) * (hi - lo) > budget:
            r1 = max(r0 + LEAST_ROWS, r1 - -(-(r1 - r0) // 8))  # more rows may see more keys
            lo, hi = keys(r0, r1)
        cut = not free and lo < hi
        if cut:
            cut = structural.tile((r0, r1), (lo, hi), grid.sizes, grid.ints) is not Tile.FULL
        found.append(Span(r0, r1, lo, hi, *items, cut))
        r0 = r1
    return tuple(found)
