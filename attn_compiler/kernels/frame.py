"""One call of the operator: its arguments, and what a block of rows sees of them.

    reads t0[b, h, q + n, k] of rows r0..r1 and keys lo..hi   ->   t0[:, :, r0 + n : r1 + n, lo:hi]

B batch, H query heads, G kv heads, T query rows, S key rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from attn_compiler.ir.evaluate import evaluate
from attn_compiler.ir.expr import TRUE, Expr, slots
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.grid import Grid, Span
from attn_compiler.kernels.plan import Slice, plan


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: at least float32."""
    return reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def empty_heads(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """[B, heads, rows, ...] in the memory of a contiguous [B, rows, heads, ...].

    This is the layout of every result.
    """
    batch, heads, length, *rest = shape
    return like.new_empty((batch, length, heads, *rest), dtype=dtype).transpose(1, 2)


def empty_lse(q: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, T], as PyTorch's own kernels of the device lay it out."""
    if q.device.type == "cuda":
        return q.new_empty(q.shape[:3], dtype=dtype)
    return empty_heads(q, q.shape[:3], dtype)


def in_heads_layout(x: Tensor, dtype: torch.dtype) -> Tensor:
    heads, length, width = x.shape[1], x.shape[2], x.shape[3] if x.dim() == 4 else 1
    strides = (length * heads * width, width, heads * width, 1)[: x.dim()]
    if x.dtype == dtype and x.stride() == strides:
        return x
    return empty_heads(x, x.shape, dtype).copy_(x)


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
    def dtype(self) -> torch.dtype:
        return accumulator(self.q, self.k, self.v)


class _Env(dict[str, Tensor | int]):
    """Sizes, and the index tensors of a block, made when one is asked for."""

    def __init__(self, grid: Grid, span: Span, device: torch.device) -> None:
        super().__init__(grid.sizes)
        self._grid, self._span, self._device = grid, span, device

    def __missing__(self, name: str) -> Tensor:
        found = torch.arange(*self._span.ends(name, self._grid.H), device=self._device)
        # b [B, 1, 1, 1], h [H, 1, 1], q [T, 1], k [S]
        self[name] = found = found.view((-1,) + (1,) * "kqhb".index(name))
        return found


@dataclass(frozen=True, slots=True)
class Made:
    """F of Selective attention where kernels make it inside; see `kernels.masking`.

    Attributes:
        slot: of the read that stands for it.
        alone: the selecting head as an attention of its own.
        past: keys before row 0.
        protected: keys that nobody masks, [B, S], int8.
        carries: F in the first row of every `rows` rows, [B, tiles, S], float32.
        rows: see `carries`.
        gate: what F is multiplied with, or None.
    """

    slot: int
    alone: Inputs
    past: int
    protected: Tensor
    carries: Tensor
    rows: int
    gate: Tensor | None


class Frame:
    """A plan together with the tensors and sizes of one call."""

    # may all reads be looked at anywhere, or only by blocks of rows from above?
    random_access = True

    def __init__(self, given: Inputs, made: Made | None = None) -> None:
        self.made = made
        (batch, heads, rows, _), ints = given.q.shape, tuple(given.ints)
        self.given, self.dtype, self.device = given, given.dtype, given.q.device
        self.grid = Grid(given.program, batch, heads, rows, given.k.shape[2], ints)
        self.reads = list(given.reads)
        self.plan = plan(given.program)
        if not all(self._in_range(s) for s in self.plan.slices):
            self.plan = plan(given.program, sliced=False)

    def _in_range(self, piece: Slice) -> bool:
        """A shift below zero wraps around in a gather and a slice cannot."""
        for (name, shift), size in zip(piece.dims, self.reads[piece.slot].shape, strict=True):
            start = self.grid.number(shift)
            if start < 0 or start + (1 if name is None else self.grid.length(name)) > size:
                return False
        return True

    def view(self, piece: Slice, tensor: Tensor, span: Span) -> Tensor:
        """The part of a tensor that a block reads, as [b, h, q, k], 1 where it does not vary."""
        axis = 0
        for name, shift in piece.dims:
            start = self.grid.number(shift)
            if name is None:
                tensor = tensor.select(axis, start)
                continue
            first, last = span.ends(name, self.grid.H)
            if start + first > 0 or last - first < tensor.shape[axis]:
                tensor = tensor.narrow(axis, first + start, last - first)
            axis += 1
        tensor = tensor.permute(piece.order)
        for position in piece.missing:
            tensor = tensor.unsqueeze(position)
        return tensor

    def tensors(self, span: Span, expr: Expr | None = None) -> list[Tensor]:
        """The tensor of every slot of the local expressions, or of one of them: what that does not
        read is not cut.
        """
        wanted = None if expr is None else slots(expr)
        views = [
            self.view(piece, self.reads[piece.slot], span)
            if wanted is None or self.plan.base + i in wanted
            else self.reads[piece.slot]
            for i, piece in enumerate(self.plan.slices)
        ]
        return self.reads[: self.plan.base] + views

    def value(
        self, expr: Expr, span: Span, tensors: Sequence[Tensor], dot: Tensor | None = None
    ) -> Tensor:
        """An expression over one block as a 4-D tensor that broadcasts to [B, H, rows, keys]."""
        env = _Env(self.grid, span, self.device)
        result = evaluate(expr, env, tensors, self.grid.ints, dot, self.dtype)
        return result.to(self.device)[(None,) * (4 - result.dim())]

    def mask(self, span: Span, tensors: Sequence[Tensor]) -> Tensor | None:
        """Which keys of the block are allowed, None for all."""
        expr = self.plan.mask if span.masked else self.plan.loose
        return None if expr == TRUE else self.value(expr, span, tensors).bool()
