"""One call of the operator, and how it is cut into blocks of rows.

    for rows r0..r1:   keys lo..hi that the mask allows for these rows
                       reads t0[b, h, q + n, k]  ->  the view  t0[:, :, r0 + n : r1 + n, lo:hi]

B batch, H query heads, G kv heads, T query rows, S key rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from attn_compiler.ir.expr import INDICES, TRUE, Const, Expr, Int, Var, evaluate, walk
from attn_compiler.ir.mask import Causal, Tile
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.plan import Slice, both, plan

# fewer rows than this make slow matrix products
LEAST_ROWS = 16


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: at least float32."""
    return reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def empty_heads(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """[B, heads, rows, ...] in the memory of a contiguous [B, rows, heads, ...].

    This is the layout of every result.
    """
    batch, heads, length, *rest = shape
    return like.new_empty((batch, length, heads, *rest), dtype=dtype).transpose(1, 2)


def in_heads_layout(x: Tensor, dtype: torch.dtype) -> Tensor:
    like = empty_heads(x, x.shape, dtype)
    return x if x.dtype == dtype and x.stride() == like.stride() else like.copy_(x)


def widened(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Narrower floating tensors in `dtype`: a table is computed with as precisely as the scores."""
    return [
        t.to(dtype) if t.is_floating_point() and t.dtype.itemsize < dtype.itemsize else t
        for t in tensors
    ]


@dataclass(frozen=True, slots=True)
class Inputs:
    """The arguments of attn_compiler::attention (see `schema`)."""

    q: Tensor
    k: Tensor
    v: Tensor
    reads: Sequence[Tensor]
    ints: Sequence[int]
    drop: Drop
    program: str
    scale: float

    @staticmethod
    def of(*tensors: Any, program: str, scale: float, dropout: float) -> Inputs:
        """From the arguments as the schema orders them: q, k, v, reads, ints, seed."""
        q, k, v, reads, ints, seed = tensors
        return Inputs(q, k, v, reads, ints, Drop(seed, dropout), program, scale)

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def sizes(self) -> dict[str, int]:
        batch, heads, rows, _ = self.q.shape
        return {"B": batch, "H": heads, "T": rows, "S": self.k.shape[2]}

    @property
    def dtype(self) -> torch.dtype:
        return accumulator(self.q, self.k, self.v)


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


class Frame:
    """A plan together with the tensors and sizes of one call."""

    def __init__(self, given: Inputs) -> None:
        self.given, self.sizes, self.dtype = given, given.sizes, given.dtype
        self.reads, self.ints, self.device = list(given.reads), list(given.ints), given.q.device
        self.plan = plan(given.program)
        if not all(self._in_range(s) for s in self.plan.slices):
            self.plan = plan(given.program, sliced=False)

    def number(self, expr: Expr) -> int:
        if isinstance(expr, Const):
            return int(expr.value)
        if isinstance(expr, Int):
            return int(self.ints[expr.slot])
        return int(evaluate(expr, self.sizes, ints=self.ints).item())

    def _in_range(self, piece: Slice) -> bool:
        """A shift below zero wraps around in a gather and a slice cannot."""
        for (name, shift), size in zip(piece.dims, self.reads[piece.slot].shape, strict=True):
            start = self.number(shift)
            length = 1 if name is None else self.length(name)
            if start < 0 or start + length > size:
                return False
        return True

    def length(self, name: str) -> int:
        return self.sizes[{"b": "B", "h": "H", "q": "T", "k": "S"}[name]]

    def view(self, piece: Slice, tensor: Tensor, span: Span) -> Tensor:
        """The part of a tensor that a block reads, as [b, h, q, k], 1 where it does not vary."""
        ends = {"b": (span.b0, span.b1), "q": (span.r0, span.r1), "k": (span.lo, span.hi)}
        axis = 0
        for name, shift in piece.dims:
            start = self.number(shift)
            if name is None:
                tensor = tensor.select(axis, start)
                continue
            first, last = ends.get(name, (0, self.length(name)))
            tensor = tensor.narrow(axis, first + start, last - first)
            axis += 1
        tensor = tensor.permute(piece.order)
        present = {name for name, _ in piece.dims}
        for position, name in enumerate(INDICES):
            if name not in present:
                tensor = tensor.unsqueeze(position)
        return tensor

    def tensors(self, span: Span) -> list[Tensor]:
        """The tensor of every slot of the local expressions."""
        views = [self.view(s, self.reads[s.slot], span) for s in self.plan.slices]
        return self.reads[: self.plan.base] + views

    def env(self, span: Span) -> dict[str, Tensor | int]:
        def arange(first: int, last: int) -> Tensor:
            return torch.arange(first, last, device=self.device)

        return {
            **self.sizes,
            "b": arange(span.b0, span.b1).view(-1, 1, 1, 1),
            "h": arange(0, self.sizes["H"]).view(-1, 1, 1),
            "q": arange(span.r0, span.r1).view(-1, 1),
            "k": arange(span.lo, span.hi),
        }

    def value(
        self,
        expr: Expr,
        span: Span,
        tensors: Sequence[Tensor] | None = None,
        dot: Tensor | None = None,
    ) -> Tensor:
        """An expression over one block as a 4-D tensor that broadcasts to [B, H, rows, keys]."""
        found = self.tensors(span) if tensors is None else tensors
        result = evaluate(expr, self.env(span), found, self.ints, dot, self.dtype)
        return result.to(self.device)[(None,) * (4 - result.dim())]

    def mask(self, span: Span, tensors: Sequence[Tensor] | None = None) -> Tensor | None:
        """Which keys of the block are allowed, None for all."""
        structural = self.plan.structural.expr if span.masked else TRUE
        expr = both(structural, self.plan.local_loose)
        return None if expr == TRUE else self.value(expr, span, tensors).bool()

    # ------------------------------------------------------------ blocks

    def causal(self) -> bool:
        """Is the structural mask exactly  k <= q ?"""
        structural = self.plan.structural
        if len(structural.terms) != 1 or not isinstance(structural.terms[0], Causal):
            return False
        return self.number(structural.terms[0].offset) == 0

    def whole(self, masked: bool = True) -> Span:
        return Span(0, self.sizes["T"], 0, self.sizes["S"], 0, self.sizes["B"], masked)

    def free(self) -> bool:
        """Does the structural mask allow everything here?"""
        structural, rows, cols = self.plan.structural, (0, self.sizes["T"]), (0, self.sizes["S"])
        return (
            structural.expr == TRUE
            or structural.tile(rows, cols, self.sizes, self.ints) is Tile.FULL
        )

    def spans(
        self, pairs: int, budget: int, most: int, batch: tuple[int, int] | None = None
    ) -> Iterator[Span]:
        """Blocks of rows, as tall as the budget allows, with the keys that the mask leaves them.

        Args:
            pairs: elements that one row and one key cost.
            budget: elements of a block.
            most: rows of a block.
            batch: first and last + 1 batch item, all by default.
        """
        structural, sizes, free = self.plan.structural, self.sizes, self.free()
        items = batch or (0, sizes["B"])

        def keys(first: int, last: int) -> tuple[int, int]:
            if free:
                return 0, sizes["S"]
            lo, hi = structural.key_range((first, last), sizes, self.ints)
            return lo, max(lo, hi)

        def full(rows: tuple[int, int], cols: tuple[int, int]) -> bool:
            found = structural.tile(rows, cols, sizes, self.ints) if cols[0] < cols[1] else None
            return found is Tile.FULL

        r0 = 0
        while r0 < sizes["T"]:
            lo, hi = keys(r0, min(r0 + LEAST_ROWS, sizes["T"]))
            step = min(budget // max(1, pairs * (hi - lo)), most)
            r1 = min(r0 + max(LEAST_ROWS, step), sizes["T"])
            lo, hi = keys(r0, r1)
            yield Span(r0, r1, lo, hi, *items, not (free or full((r0, r1), (lo, hi))))
            r0 = r1

    def spread(self, *exprs: Expr) -> int:
        """How many (batch, head) pairs these expressions differ over."""
        over = {n.name for e in exprs for n in walk(e) if isinstance(n, Var)}
        return (self.sizes["B"] if "b" in over else 1) * (self.sizes["H"] if "h" in over else 1)
