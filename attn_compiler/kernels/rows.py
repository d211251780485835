"""Attention by blocks of rows in plain matrix products: any program, any device, memory linear in the rows.

    s = score(scale * q k^T),  -inf where masked;   p = exp(s - m) / (sum exp(s - m) + exp(sink - m)),  m = max(s, sink)
    out = drop(p) v;   dv = drop(p)^T g;   ds = p * (dp - sum(p * dp)),  dp = drop(g v^T)
    d dot = ds * score'(dot), likewise the reads;   dq = scale * (d dot) k;   dk = scale * (d dot)^T q

B batch, H query heads, G kv heads, T query rows, S key rows, R = H / G heads that share a kv head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_compiler.ir.expr import DOT, Expr, Read, walk
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.layout import Block, Frame, empty_heads
from attn_compiler.kernels.slope import slope

INF = float("inf")
# elements of one block of scores: a few of them stay in the caches of a CPU, and fill a GPU
_BUDGET = {"cpu": 2**20}
_BUDGET_ELSEWHERE = 2**26


@dataclass(frozen=True, slots=True)
class Weights:
    """The probabilities of a block, of its sink, the logarithm of their sum and the rows without any key."""

    p: Tensor
    sink: Tensor | None
    lse: Tensor
    empty: Tensor


def weights(s: Tensor, sink: Tensor | None, empty_rows: str, keys: int) -> Weights:
    """Softmax over the last axis.

    Args:
        s: scores, -inf where masked.
        sink: logit of the extra column, broadcastable to [B, H, rows, 1].
        empty_rows: the program's policy for rows whose scores are all -inf.
        keys: how many keys "uniform" spreads over.
    """
    top = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -INF)
    if sink is not None:
        top = torch.maximum(top, sink)
    dead = top == -INF
    top = top.masked_fill(dead, 0.0)
    p = torch.exp(s - top)
    extra = None if sink is None else torch.exp(sink - top)
    total = p.sum(-1, keepdim=True) if extra is None else p.sum(-1, keepdim=True) + extra
    lse = (top + torch.log(total)).squeeze(-1)
    p = p / (total if empty_rows == "nan" else total.masked_fill(dead, 1.0))
    if empty_rows == "uniform":
        p = torch.where(dead, 1.0 / max(keys, 1), p)
    return Weights(p, None if extra is None else extra / total, lse, dead)


def grouped(x: Tensor, groups: int) -> Tensor:
    """[B, H, rows, n] -> [B, G, R * rows, n]: query heads of one kv head below each other, so that no key is copied."""
    batch, heads, rows, width = x.shape
    return x.reshape(batch, groups, heads // groups * rows, width)


def forward(
    q: Tensor, k: Tensor, v: Tensor, frame: Frame, scale: float, drop: Drop, out: Tensor, lse: Tensor
) -> None:
    """Fill `out` and `lse`."""
    groups = k.shape[1]
    key, value = (x.to(frame.dtype).contiguous() for x in (k, v))
    for block in _blocks(frame):
        rows = slice(block.r0, block.r1)
        work = _Work.at(frame, block, grouped(q[:, :, rows].to(frame.dtype), groups), key, scale)
        p = work.found.p
        factor = _factor(frame, work.block, drop)
        if factor is not None:
            p = p * factor
        part = grouped(p, groups) @ value[:, :, work.block.lo : work.block.hi]
        out[:, :, rows] = part.view(*p.shape[:3], -1)
        lse[:, :, rows] = work.found.lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    frame: Frame,
    scale: float,
    drop: Drop,
    into: Mapping[int, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; those of the reads are added to `into`, by slot."""
    groups, plan = k.shape[1], frame.plan
    key, value = (x.to(frame.dtype).contiguous() for x in (k, v))
    dq, dk, dv = (empty_heads(x, x.shape, frame.dtype).zero_() for x in (q, k, v))
    for start in _blocks(frame):
        rows = slice(start.r0, start.r1)
        query, g = (grouped(x[:, :, rows].to(frame.dtype), groups) for x in (q, grad))
        work = _Work.at(frame, start, query, key, scale)
        cols, found = slice(work.block.lo, work.block.hi), work.found
        dp = (g @ value[:, :, cols].transpose(-1, -2)).view_as(found.p)
        factor = _factor(frame, work.block, drop)
        p = found.p if factor is None else found.p * factor
        dv[:, :, cols] += grouped(p, groups).transpose(-1, -2) @ g
        if factor is not None:
            dp = dp.mul_(factor)
        delta = (found.p * dp).sum(-1, keepdim=True)
        ds = dp.sub_(delta).mul_(found.p)
        if plan.program.empty == "uniform":
            ds = ds.masked_fill(found.empty, 0.0)
        if plan.sink is not None and found.sink is not None:
            pull_back(frame, work.block, plan.sink, work.tensors, into, -found.sink * delta)
        pull_back(frame, work.block, plan.score, work.tensors, into, ds, work.dot)
        if plan.score != DOT:
            ds = ds * frame.value(slope(plan.score, DOT), work.block, work.tensors, work.dot)
        ddot = grouped(ds, groups).mul(scale)
        dq[:, :, rows] = (ddot @ key[:, :, cols]).view(*found.p.shape[:3], -1)
        dk[:, :, cols] += ddot.transpose(-1, -2) @ query
    return dq, dk, dv


def _factor(frame: Frame, block: Block, drop: Drop) -> Tensor | None:
    shape = (frame.sizes["B"], frame.sizes["H"], frame.sizes["T"])
    return drop.factor(shape, (block.r0, block.r1), (block.lo, block.hi), frame.dtype)


def _blocks(frame: Frame) -> Iterator[Block]:
    budget = _BUDGET.get(frame.device.type, _BUDGET_ELSEWHERE)
    return frame.blocks(frame.sizes["B"] * frame.sizes["H"], budget, 512)


@dataclass(frozen=True, slots=True)
class _Work:
    """One block, computed up to its probabilities."""

    block: Block
    tensors: list[Tensor]
    dot: Tensor
    found: Weights

    @staticmethod
    def at(frame: Frame, block: Block, query: Tensor, key: Tensor, scale: float) -> _Work:
        """`query` [B, G, R * rows, d] of the block's rows, `key` [B, G, S, d]."""
        plan, sizes = frame.plan, frame.sizes
        shape = (sizes["B"], sizes["H"], block.r1 - block.r0, block.hi - block.lo)
        dot = (query @ key[:, :, block.lo : block.hi].transpose(-1, -2)).mul_(scale).view(shape)
        tensors = frame.tensors(block)
        s = frame.value(plan.score, block, tensors, dot).to(frame.dtype).expand(shape)
        mask = frame.mask(block, tensors)
        if mask is not None:
            s = s.masked_fill(~mask, -INF)
        sink = None if plan.sink is None else frame.value(plan.sink, block, tensors).to(frame.dtype)
        found = weights(s, sink, plan.program.empty, sizes["S"])
        if plan.program.empty == "uniform" and shape[3] < sizes["S"] and bool(found.empty.any()):
            # such a row spreads over all keys, not over those that the block kept
            return _Work.at(frame, Block(block.r0, block.r1, 0, sizes["S"], True), query, key, scale)
        return _Work(block, tensors, dot, found)


def pull_back(
    frame: Frame,
    block: Block,
    expr: Expr,
    tensors: Sequence[Tensor],
    into: Mapping[int, Tensor],
    grad: Tensor,
    dot: Tensor | None = None,
) -> None:
    """Add to `into` the gradients of the reads of a score or a sink whose own gradient over the block is `grad`."""
    plan = frame.plan
    for read in dict.fromkeys(n for n in walk(expr) if isinstance(n, Read)):
        piece = plan.slices[read.slot - plan.base] if read.slot >= plan.base else None
        slot = read.slot if piece is None else piece.slot
        if slot not in into:
            continue
        part = grad * frame.value(slope(expr, read), block, tensors, dot)
        if piece is not None:
            target = frame.view(piece, into[slot], block)
            target.add_(part.sum_to_size(target.shape))
        elif not read.index:
            into[slot].add_(part.sum())
        else:
            index = torch.broadcast_tensors(*(frame.value(i, block, tensors) for i in read.index))
            into[slot].index_put_(index, part.sum_to_size(index[0].shape), accumulate=True)
