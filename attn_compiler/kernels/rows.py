"""Attention by blocks of rows in plain products: any program, any device, memory linear in T.

    s = score(scale * q k^T),  -inf where masked;     m = max(s, sink)
    p = exp(s - m) / (sum exp(s - m) + exp(sink - m));     out = drop(p) v

    dv = drop(p)^T g;     dp = drop(g v^T);
    ds = p * (dp - sum(g * out));     dsink = -p_sink * sum(g * out)
    d dot = ds * score'(dot), likewise the reads;
    dq = scale * (d dot) k;     dk = scale * (d dot)^T q

B batch, H query heads, G kv heads, T query rows, S key rows, R = H / G heads that share a kv head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_compiler.ir.evaluate import inside
from attn_compiler.ir.expr import DOT, Const, Expr, Read, walk
from attn_compiler.kernels.frame import Frame, empty_heads, widened
from attn_compiler.kernels.grid import Span, spans
from attn_compiler.kernels.plan import has_dot
from attn_compiler.kernels.slope import ONE, slope

INF = float("inf")
# elements of one block of scores: per thread of a CPU, whose cache holds a few such blocks, and
# on another device
_CPU_BUDGET = 2**18
_BUDGET = 2**26
_GOOD_ROWS = 64


@dataclass(frozen=True, slots=True)
class Block:
    """One block of rows up to its exponentials:  p = e / total,  [B, H, rows, keys] each.

    Attributes:
        span: the rows and keys.
        tensors: of the slots of the local expressions.
        dot: the scaled products, or what became of them where the score does not need them.
        e: exp(s - m).
        total: the sum of `e` and of the sink.
        sink: exp(sink - m).
        lse: natural logarithm of the sum of exp(s) and exp(sink).
        empty: rows whose every score is -inf.
    """

    span: Span
    tensors: list[Tensor]
    dot: Tensor
    e: Tensor
    total: Tensor
    sink: Tensor | None
    lse: Tensor
    empty: Tensor


def forward(frame: Frame, out: Tensor, lse: Tensor) -> None:
    """Fill `out` and `lse`."""
    given, drop = frame.given, frame.given.drop
    key, value = (x.to(frame.dtype).contiguous() for x in (given.k, given.v))
    for start in blocks(frame):
        block = _block(frame, start, _query(frame, given.q, start, given.scale), key)
        span, e = block.span, block.e
        dropped = _dropped(frame, span)
        if dropped is not None:
            e = e.masked_fill_(dropped, 0.0)
        part = grouped(e, key.shape[1]) @ value[span.keys]
        out[span.rows] = part.view(*e.shape[:3], -1).mul_(drop.gain / block.total)
        lse[span.rows] = block.lse


def backward(
    frame: Frame, grad: Tensor, out: Tensor, into: Mapping[int, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; those of the reads are added to `into`, by slot."""
    dq, dk, dv = (empty_heads(x, x.shape, frame.dtype).zero_() for x in frame.given.qkv)
    for _ in backward_steps(frame, grad, out, into, (dq, dk, dv), blocks(frame)):
        pass
    return dq, dk, dv


def backward_steps(
    frame: Frame,
    grad: Tensor,
    out: Tensor,
    into: Mapping[int, Tensor],
    gradients: tuple[Tensor, Tensor, Tensor],
    order: Iterable[Span],
) -> Iterator[Span]:
    """One block after the other: adds to `gradients` of q, k, v and to `into`; yields each span
    when it is done, with the keys that it really reached.
    """
    given, groups, (dq, dk, dv) = frame.given, frame.given.k.shape[1], gradients
    scale, gain = given.scale, given.drop.gain
    key, value = (x.to(frame.dtype).contiguous() for x in (given.k, given.v))
    for start in order:
        query, g = _query(frame, given.q, start, scale), _query(frame, grad, start, gain)
        block = _block(frame, start, query, key)
        span, p = block.span, block.e.div_(block.total)
        dp = (g @ value[span.keys].transpose(-1, -2)).view_as(p)
        dropped, kept = _dropped(frame, span), p
        if dropped is not None:
            dp, kept = dp.masked_fill_(dropped, 0.0), p.masked_fill(dropped, 0.0)
        dv[span.keys] += grouped(kept, groups).transpose(-1, -2) @ g
        delta = grad[span.rows].to(frame.dtype) * out[span.rows].to(frame.dtype)
        ds = _score_gradient(frame, block, p, dp, delta.sum(-1, keepdim=True), into)
        ddot = grouped(ds, groups)
        dq[span.rows] = (ddot @ key[span.keys]).view(*p.shape[:3], -1).mul_(scale)
        dk[span.keys] += ddot.transpose(-1, -2) @ query
        yield span


def probabilities(frame: Frame) -> Iterator[tuple[Span, Tensor]]:
    """The softmax block by block, [items, H, rows, keys] each; rows without a key are 0."""
    key = frame.given.k.to(frame.dtype).contiguous()
    for start in blocks(frame):
        block = _block(frame, start, _query(frame, frame.given.q, start, frame.given.scale), key)
        yield block.span, block.e.div_(block.total).masked_fill_(block.empty, 0.0)


def _score_gradient(
    frame: Frame, block: Block, p: Tensor, dp: Tensor, delta: Tensor, into: Mapping[int, Tensor]
) -> Tensor:
    """The gradient of the scaled products, written over `dp`; those of the reads go to `into`."""
    plan, span, tensors = frame.plan, block.span, block.tensors
    ds = dp.sub_(delta).mul_(p)
    if plan.program.empty in ("uniform", "nan"):
        ds = ds.masked_fill_(block.empty, 0.0)
    if plan.sink is not None and block.sink is not None:
        dsink = -(block.sink / block.total) * delta
        pull_back(frame, span, plan.sink, dsink, into, tensors)
    pull_back(frame, span, plan.score, ds, into, tensors, block.dot)
    inner = slope(plan.score, DOT)
    return ds if inner == ONE else through(ds, frame.value(inner, span, tensors, block.dot))


def through(grad: Tensor, derivative: Tensor) -> Tensor:
    """The chain rule, written over `grad`; where nothing depends on anything, NaN does not pass."""
    return grad.mul_(derivative).masked_fill_(derivative == 0, 0.0)


def grouped(x: Tensor, groups: int) -> Tensor:
    """[B, H, rows, n] -> [B, G, R * rows, n]: heads that share a key stand below each other."""
    batch, heads, rows, width = x.shape
    return x.reshape(batch, groups, heads // groups * rows, width)


def _query(frame: Frame, x: Tensor, span: Span, scale: float) -> Tensor:
    """The rows of a span, scaled, grouped by kv head."""
    rows = x[span.rows].to(frame.dtype)
    return grouped(rows if scale == 1 else rows * scale, frame.given.k.shape[1])


def _dropped(frame: Frame, span: Span) -> Tensor | None:
    shape = (frame.grid.H, frame.grid.T)
    return frame.given.drop.dropped(
        shape, (span.b0, span.b1), (span.r0, span.r1), (span.lo, span.hi)
    )


def blocks(frame: Frame) -> Iterator[Span]:
    """Blocks of few batch items rather than of few rows, large enough for every thread."""
    grid = frame.grid
    budget = _CPU_BUDGET * torch.get_num_threads() if frame.device.type == "cpu" else _BUDGET
    items = min(grid.B, max(1, budget // (grid.H * grid.S * _GOOD_ROWS)))
    for first in range(0, grid.B, items):
        last = min(first + items, grid.B)
        yield from spans(grid, (last - first) * grid.H, budget, 512, (first, last))


def _block(frame: Frame, span: Span, query: Tensor, key: Tensor) -> Block:
    """`query` [B, G, R * rows, d] of the span's rows, times the scale; `key` [B, G, S, d]."""
    grid = frame.grid
    shape = (span.b1 - span.b0, grid.H, span.r1 - span.r0, span.hi - span.lo)
    block = weighed(frame, span, (query @ key[span.keys].transpose(-1, -2)).view(shape))
    reaches_all = frame.plan.program.empty in ("uniform", "absorbed", "nan", "nan_added")
    if reaches_all and shape[3] < grid.S and bool(block.empty.any()):
        # such a row reaches all keys, not only those that the span kept
        return _block(frame, replace(span, lo=0, hi=grid.S, masked=True), query, key)
    return block


def weighed(frame: Frame, span: Span, dot: Tensor) -> Block:
    """The block whose scaled products [B, H, rows, keys] are `dot`, which may be written over."""
    plan, shape = frame.plan, dot.shape
    tensors = widened(frame.tensors(span), frame.dtype)
    s = _masked_scores(frame, span, tensors, dot)
    sink = None if plan.sink is None else frame.value(plan.sink, span, tensors).to(frame.dtype)
    top = s.amax(-1, keepdim=True) if shape[3] else s.new_full((*shape[:3], 1), -INF)
    top = top if sink is None else torch.maximum(top, sink)
    dead = top == -INF
    top = top.masked_fill(dead, 0.0)
    policy = plan.program.empty
    e = s.sub_(top).exp_()
    extra = None if sink is None else torch.exp(sink - top)
    total = e.sum(-1, keepdim=True) if extra is None else e.sum(-1, keepdim=True) + extra
    lse = (top + torch.log(total)).squeeze(-1)
    if policy in ("uniform", "absorbed"):
        e.masked_fill_(dead, 1 / frame.grid.S)
    # an empty row stays 0 / 0 where the program says so
    total = total if policy in ("nan", "nan_added") else total.masked_fill(dead, 1.0)
    return Block(span, tensors, dot, e, total, extra, lse, dead)


def _masked_scores(frame: Frame, span: Span, tensors: list[Tensor], dot: Tensor) -> Tensor:
    """A tensor of its own, or `dot` itself where nothing else needs it."""
    score = frame.plan.score
    s = dot
    if score != DOT:
        s = frame.value(score, span, tensors, dot).to(frame.dtype).expand(dot.shape)
    if not has_dot(score):
        s = s.clone(memory_format=torch.contiguous_format)
    mask = frame.mask(span, tensors)
    return s if mask is None else s.masked_fill_(~mask, -INF)


def pull_back(
    frame: Frame,
    span: Span,
    expr: Expr,
    grad: Tensor,
    into: Mapping[int, Tensor],
    tensors: Sequence[Tensor],
    dot: Tensor | None = None,
) -> None:
    """Add to `into` the gradients of the reads of a score or a sink, given its own."""
    plan = frame.plan
    for read in dict.fromkeys(n for n in walk(expr) if isinstance(n, Read)):
        piece = plan.slices[read.slot - plan.base] if read.slot >= plan.base else None
        slot = read.slot if piece is None else piece.slot
        if slot not in into:
            continue
        inner = slope(expr, read)
        if piece is not None and isinstance(inner, Const):
            # what is added to a score needs no other pass than the sum
            target = frame.view(piece, into[slot], span)
            target.add_(grad.sum_to_size(target.shape), alpha=inner.value)
            continue
        part = through(grad.clone(), frame.value(inner, span, tensors, dot))
        if piece is not None:
            target = frame.view(piece, into[slot], span)
            target.add_(part.sum_to_size(target.shape))
        elif not read.index:
            into[slot].add_(part.sum())
        else:
            index = torch.broadcast_tensors(*(frame.value(i, span, tensors) for i in read.index))
            index = inside(into[slot], index)
            into[slot].index_put_(index, part.sum_to_size(index[0].shape), accumulate=True)
