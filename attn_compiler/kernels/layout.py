"""How an attention program is cut into blocks of rows.

    for rows r0..r1:   keys lo..hi that the mask allows for these rows
                       reads t0[b, h, q + n, k]  ->  the view  t0[:, :, r0 + n : r1 + n, lo:hi]

A read whose index is plain variables, shifts of them or numbers is a slice of its tensor; a gather by four broadcast
index tensors would cost more than the attention. Every other read keeps its index and is gathered block by block.

B batch, H query heads, G kv heads, T query rows, S key rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
from torch import Tensor

from attn_compiler.ir.expr import (
    DOT,
    INDICES,
    TRUE,
    Call,
    Const,
    Dot,
    Expr,
    Int,
    Read,
    Var,
    call,
    depends,
    evaluate,
    slots,
    substitute,
    walk,
)
from attn_compiler.ir.mask import Causal, Mask, Tile, classify
from attn_compiler.ir.score import Program

NO_BIAS = Const(0.0)
# fewer rows than this make slow matrix products
LEAST_ROWS = 16


@dataclass(frozen=True, slots=True)
class Slice:
    """A read that is a view: per dimension the variable (None for a number) and its shift."""

    slot: int
    dims: tuple[tuple[str | None, Expr], ...]

    @property
    def order(self) -> tuple[int, ...]:
        """Positions of the sliced dimensions among the variables that occur, in the order b h q k."""
        names = [name for name, _ in self.dims if name is not None]
        return tuple(names.index(i) for i in INDICES if i in names)


@dataclass(frozen=True, slots=True)
class Plan:
    """What can be said about a program without seeing a tensor.

    Attributes:
        program: the program as written.
        bias: what is added to the dot product when the score is a sum, else None.
        structural: the part of the mask over rows and columns alone.
        loose: the rest of the mask.
        score, sink, local_bias, local_loose: the same with sliced reads replaced by slots from `base` on.
        slices: the views behind these slots.
        base: first slot that is a view.
    """

    program: Program
    bias: Expr | None
    structural: Mask
    loose: Expr
    score: Expr
    sink: Expr | None
    local_bias: Expr
    local_loose: Expr
    slices: tuple[Slice, ...]
    base: int

    @property
    def score_slots(self) -> frozenset[int]:
        return frozenset(slots(self.program.score))


@lru_cache(maxsize=512)
def plan(text: str, sliced: bool = True) -> Plan:
    """Analyse a program's text; `sliced=False` leaves every read a gather."""
    program = Program.parse(text)
    structural, key_only, other = classify(program.mask).split()
    loose = _both(key_only, other)
    bias = _addend(program.score)
    parts = [program.score, bias or NO_BIAS, loose, program.sink or NO_BIAS]
    reads = list(dict.fromkeys(n for part in parts for n in walk(part) if isinstance(n, Read)))
    base = 1 + max((n.slot for n in reads), default=-1)
    table: dict[Expr, Expr] = {}
    slices: list[Slice] = []
    for read in reads:
        found = _as_slice(read) if sliced else None
        if found is not None:
            table[read] = Read(base + len(slices), ())
            slices.append(found)
    score, local_bias, local_loose, sink = (substitute(part, table) for part in parts)
    return Plan(
        program=program,
        bias=bias,
        structural=classify(structural),
        loose=loose,
        score=score,
        sink=None if program.sink is None else sink,
        local_bias=local_bias,
        local_loose=local_loose,
        slices=tuple(slices),
        base=base,
    )


def _both(left: Expr, right: Expr) -> Expr:
    return right if left == TRUE else left if right == TRUE else call("and", left, right)


def _addend(score: Expr) -> Expr | None:
    """The `e` of  dot + e,  None for any other score."""
    if score == DOT:
        return NO_BIAS
    if not isinstance(score, Call) or score.op not in ("add", "sub"):
        return None
    left, right = score.args
    if not has_dot(right):
        inner = _addend(left)
        term = call("neg", right) if score.op == "sub" else right
    elif score.op == "add" and not has_dot(left):
        inner, term = _addend(right), left
    else:
        return None
    if inner is None:
        return None
    return term if inner == NO_BIAS else call("add", inner, term)


def has_dot(expr: Expr) -> bool:
    return any(isinstance(n, Dot) for n in walk(expr))


def _as_slice(read: Read) -> Slice | None:
    dims = tuple(_affine(index) for index in read.index)
    names = [d[0] for d in dims if d is not None and d[0] is not None]
    if not dims or None in dims or len(set(names)) < len(names):
        return None
    return Slice(read.slot, tuple(d for d in dims if d is not None))


def _affine(index: Expr) -> tuple[str | None, Expr] | None:
    """(variable, shift) of  v,  v + shift,  v - shift;  (None, number) of a number; None of anything else."""
    if _is_number(index):
        return None, index
    if isinstance(index, Var):
        return index.name, Const(0)
    if not isinstance(index, Call) or index.op not in ("add", "sub"):
        return None
    left, right = index.args
    if isinstance(left, Var) and left.name in INDICES and _is_number(right):
        return left.name, right if index.op == "add" else call("neg", right)
    if index.op == "add" and isinstance(right, Var) and right.name in INDICES and _is_number(left):
        return right.name, left
    return None


def _is_number(expr: Expr) -> bool:
    """An integer that is the same for all elements."""
    return not depends(expr, *INDICES) and not any(isinstance(n, Read | Dot) for n in walk(expr))


# ---------------------------------------------------------------- tensors


def sizes_of(q: Tensor, k: Tensor) -> dict[str, int]:
    return {"B": q.shape[0], "H": q.shape[1], "T": q.shape[2], "S": k.shape[2]}


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: at least float32."""
    return reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def empty_heads(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """[B, heads, rows, ...] in the memory of a contiguous [B, rows, heads, ...]: the layout of every result."""
    batch, heads, length, *rest = shape
    return like.new_empty((batch, length, heads, *rest), dtype=dtype).transpose(1, 2)


def in_heads_layout(x: Tensor, dtype: torch.dtype) -> Tensor:
    like = empty_heads(x, x.shape, dtype)
    return x if x.dtype == dtype and x.stride() == like.stride() else like.copy_(x)


# ---------------------------------------------------------------- one call


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
    """A plan together with the tensors and sizes of one call.

    Args:
        text: the program.
        sizes: B, H, T, S.
        reads: the tensor of each slot.
        ints: the integer of each `n` slot.
        dtype: of the arithmetic.
        device: where index tensors live.
    """

    def __init__(
        self,
        text: str,
        sizes: Mapping[str, int],
        reads: Sequence[Tensor],
        ints: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.sizes, self.ints, self.dtype, self.device = dict(sizes), list(ints), dtype, device
        self.reads = list(reads)
        self.plan = plan(text)
        if not all(self._in_range(s) for s in self.plan.slices):
            self.plan = plan(text, sliced=False)

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
        """The part of a tensor that a block reads, as [b, h, q, k] with 1 where the read does not vary."""
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
        self, expr: Expr, span: Span, tensors: Sequence[Tensor] | None = None, dot: Tensor | None = None
    ) -> Tensor:
        """An expression over one block as a 4-D tensor that broadcasts to [B, H, rows, keys]."""
        found = self.tensors(span) if tensors is None else tensors
        result = evaluate(expr, self.env(span), found, self.ints, dot, self.dtype)
        return result.to(self.device)[(None,) * (4 - result.dim())]

    def mask(self, span: Span, tensors: Sequence[Tensor] | None = None) -> Tensor | None:
        """Which keys of the block are allowed, None for all."""
        structural = self.plan.structural.expr if span.masked else TRUE
        expr = _both(structural, self.plan.local_loose)
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
        return structural.expr == TRUE or structural.tile(rows, cols, self.sizes, self.ints) is Tile.FULL

    def spans(self, pairs: int, budget: int, most: int, batch: tuple[int, int] | None = None) -> Iterator[Span]:
        """Blocks of rows, as tall as the budget allows, each with the keys that the structural mask leaves.

        Args:
            pairs: elements that one row and one key cost.
            budget: elements of a block.
            most: rows of a block.
            batch: first and last + 1 batch item, all by default.
        """
        structural, sizes, free = self.plan.structural, self.sizes, self.free()
        items = batch or (0, sizes["B"])

        def keys(first: int, last: int) -> tuple[int, int]:
            lo, hi = (0, sizes["S"]) if free else structural.key_range((first, last), sizes, self.ints)
            return lo, max(lo, hi)

        r0 = 0
        while r0 < sizes["T"]:
            lo, hi = keys(r0, min(r0 + LEAST_ROWS, sizes["T"]))
            step = min(budget // max(1, pairs * (hi - lo)), most)
            r1 = min(r0 + max(LEAST_ROWS, step), sizes["T"])
            lo, hi = keys(r0, r1)
            full = free or lo < hi and structural.tile((r0, r1), (lo, hi), sizes, self.ints) is Tile.FULL
            yield Span(r0, r1, lo, hi, *items, not full)
            r0 = r1

    def spread(self, *exprs: Expr) -> int:
        """How many (batch, head) pairs these expressions differ over."""
        over = {n.name for e in exprs for n in walk(e) if isinstance(n, Var)}
        return (self.sizes["B"] if "b" in over else 1) * (self.sizes["H"] if "h" in over else 1)
