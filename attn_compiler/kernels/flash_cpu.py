"""Attention whose score is a sum  dot + bias,  by PyTorch's flash kernel for CPUs.

    mask    ->   a bias of 0 and -inf          k <= q   ->   is_causal
    sink    ->   out * sigmoid(lse - sink),  lse' = log(exp(lse) + exp(sink))

In one call, or in one call per block of rows where a mask lets keys be skipped or a bias would be
large; where a map of blocks says which keys count, in calls on gathered tiles. The kernel, as tried
on torch 2.13: fewer kv heads than query heads need no copies; a bias of [B, 1, 1, S] or of any
stride is read in place, also beside is_causal, which aligns top-left; a row without keys gives out
0 and lse 0, and the backward would be NaN if -inf stood there; it wants one head dim for q, k and v
and a dense feature axis, and dies of an empty axis.

B batch, H query heads, G kv heads, T query rows, S key rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import chain

import torch
from torch import Tensor
from torch.nn.functional import pad

from attn_compiler.ir.expr import TRUE, Expr
from attn_compiler.kernels import gathered_cpu, tiles_cpu
from attn_compiler.kernels.frame import Frame, Inputs, empty_heads, in_heads_layout, widened
from attn_compiler.kernels.gathered_cpu import BACKWARD, FORWARD
from attn_compiler.kernels.grid import Span, is_causal, is_free, spans
from attn_compiler.kernels.rows import pull_back

INF = float("inf")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# exp(score - lse) is then no better than 1e-4
_LARGE = 2.0**10
# elements of a bias that is built for one call
_BIAS_BUDGET = 2**20
# and of one that is built for all rows, where that was measured to be faster
_LARGEST_BIAS = 2**25
# rows of a block where the mask lets keys be skipped, and elsewhere
_SKIP_ROWS = 128
_ROWS = 1024


def fits(frame: Frame) -> bool:
    given, plan = frame.given, frame.plan
    if given.scale <= 0:  # the kernel multiplies its -inf by it
        return False
    same = given.q.device.type == given.k.device.type == given.v.device.type == "cpu"
    return same and _common(given) in _DTYPES and plan.additive and given.drop.rate == 0


def fits_backward(frame: Frame, lse: Tensor, wanted: Mapping[int, Tensor]) -> bool:
    """The kernel gives no gradient of its bias, none that is NaN, none of a row without keys, and a
    wrong one where lse has no room for the logarithm of the number of keys beside finfo.min.
    """
    if not fits(frame) or frame.plan.score_slots & wanted.keys():
        return False
    if frame.plan.biased and bool(((lse.abs() > _LARGE) & lse.isfinite()).any()):
        return False
    return frame.plan.program.empty not in ("nan", "nan_added", "absorbed") or not bool(
        (lse == -INF).any()
    )


def ways(frame: Frame) -> list[str]:
    """The calls that a band or a bias may be cut into, the usual one first."""
    usual, _ = next(_pieces(frame, _common(frame.given)))
    if usual.r1 == frame.grid.T:
        return ["whole"]
    varies, grid = frame.plan.varies, frame.grid
    pairs = (grid.B if "b" in varies else 1) * (grid.H if "h" in varies else 1)
    small = pairs * grid.T * grid.S <= _LARGEST_BIAS
    return ["blocked", "whole"] if small else ["blocked"]


def forward(frame: Frame, way: str = "") -> tuple[Tensor, Tensor]:
    """out and lse in the layout of `empty_heads`.

    Args:
        way: one of `ways`; "whole" is one call for all rows. By default a map of blocks, or else
            the sizes, decide.
    """
    call, tiles = _call(frame), None if way else tiles_cpu.lists(frame)
    if tiles is None:
        out, lse = _spans(frame, call, way == "whole")
    else:
        out, lse = gathered_cpu.forward(frame, tiles, call.qkv)
    if frame.plan.sink is not None:
        sink = _sink(frame, frame.plan.sink).squeeze(-1)
        # the difference of the two lse would have lost the digits that a large lse has not
        out, lse = out.mul_(torch.sigmoid(lse - sink).unsqueeze(-1)), torch.logaddexp(lse, sink)
    v = frame.given.v
    out = out if out.shape[-1] == v.shape[-1] else out[..., : v.shape[-1]]
    return in_heads_layout(out, v.dtype), in_heads_layout(lse, frame.dtype)


def backward(
    frame: Frame, grad: Tensor, saved: tuple[Tensor, Tensor], into: Mapping[int, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; that of the sink is added to `into`, by slot."""
    given, call, (out, lse) = frame.given, _call(frame), saved
    dead, tiles = lse == -INF, tiles_cpu.lists(frame)
    results = call.fit(grad), call.fit(out), lse.masked_fill(dead, 0.0)
    if tiles is None:
        found = _sum_pieces(frame, call, results)
    else:
        found = gathered_cpu.backward(frame, tiles, call.qkv, results)
    dq, dk, dv = (g[..., : x.shape[-1]] for g, x in zip(found, given.qkv, strict=True))
    if frame.plan.sink is not None:
        # d sink = -p_sink * sum(g * out),  p_sink = exp(sink - lse)
        span = frame.grid.whole()
        delta = (grad.to(frame.dtype) * out.to(frame.dtype)).sum(-1, keepdim=True)
        ds = -torch.exp(_sink(frame, frame.plan.sink) - lse.unsqueeze(-1)) * delta
        pull_back(frame, span, frame.plan.sink, ds, into, frame.tensors(span))
    elif frame.plan.program.empty == "uniform" and bool(dead.any()):
        spread = torch.where(dead.unsqueeze(-1), grad.to(frame.dtype), 0.0).sum(2)
        groups = spread.view(spread.shape[0], given.k.shape[1], -1, spread.shape[-1]).sum(2)
        dv = dv + groups.unsqueeze(2) / frame.grid.S
    return dq, dk, dv


# ---------------------------------------------------------------- arguments


def _common(given: Inputs) -> torch.dtype:
    return reduce(torch.promote_types, (x.dtype for x in given.qkv))


@dataclass(frozen=True, slots=True)
class _Call:
    """q, k and v as the kernel reads them."""

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def fit(self, x: Tensor) -> Tensor:
        return _fit(x, self.q.dtype, self.q.shape[-1])

    def of(self, frame: Frame, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        """Their part that a block of rows needs."""
        if span == frame.grid.whole(span.masked):
            return self.q, self.k, self.v
        return self.q[span.rows], self.k[span.keys], self.v[span.keys]


def _call(frame: Frame) -> _Call:
    given = frame.given
    dtype, width = _common(given), max(given.q.shape[-1], given.v.shape[-1])
    return _Call(*(_fit(x, dtype, width) for x in given.qkv))


def _fit(x: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """One dtype, one head dim (a feature of zeros changes no product), a dense feature axis."""
    x = x.to(dtype)
    x = x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _pieces(frame: Frame, dtype: torch.dtype) -> Iterator[tuple[Span, bool]]:
    """The calls: a block of rows each, and whether the structural mask is left to is_causal."""
    grid, varies = frame.grid, frame.plan.varies
    free = is_free(grid)
    causal = not free and is_causal(grid)
    pairs = (grid.B if "b" in varies else 1) * (grid.H if "h" in varies else 1)
    small = "q" not in varies or pairs * grid.T * grid.S <= _BIAS_BUDGET
    if (free or causal) and (small or _in_place(frame, dtype)):
        yield grid.whole(masked=False), causal
        return
    for span in spans(grid, pairs, _BIAS_BUDGET, _ROWS if free else _SKIP_ROWS):
        yield span, False


def _in_place(frame: Frame, dtype: torch.dtype) -> bool:
    """Does the kernel take the bias as it lies in memory?"""
    plan = frame.plan
    if plan.loose != TRUE or not plan.one_read:
        return False
    return frame.reads[min(plan.score_slots)].dtype in (dtype, frame.dtype)


def added(frame: Frame, span: Span, dtype: torch.dtype) -> Tensor | None:
    """What is added to the dot products, -inf where the mask forbids a key; None for nothing."""
    tensors = frame.tensors(span)
    mask = frame.mask(span, tensors)
    bias = None
    if frame.plan.biased:
        found = tensors if frame.plan.one_read else widened(tensors, frame.dtype)
        bias = frame.value(frame.plan.bias, span, found)
        if bias.dtype not in (dtype, frame.dtype):
            bias = bias.to(frame.dtype)
    if mask is None:
        return bias
    if bias is None:
        return torch.zeros(mask.shape, dtype=frame.dtype).masked_fill_(~mask, -INF)
    return torch.where(mask, bias, -INF)


# ---------------------------------------------------------------- forward


def _spans(frame: Frame, call: _Call, whole: bool = False) -> tuple[Tensor, Tensor]:
    """out and lse without the sink, by blocks of rows."""
    pieces = _pieces(frame, call.q.dtype)
    first = next(pieces)
    if whole and first[0].r1 < frame.grid.T:
        first, pieces = (frame.grid.whole(), False), iter(())
    results = (
        (span, *_piece(frame, call, span, causal)) for span, causal in chain([first], pieces)
    )
    span, out, lse = next(results)
    if span.r1 < frame.grid.T:
        done = (span, out, lse)
        out, lse = empty_heads(call.q, call.q.shape), empty_heads(lse, call.q.shape[:3])
        for span, part, part_lse in chain([done], results):
            out[span.rows], lse[span.rows] = part, part_lse
    return out, lse


def _piece(frame: Frame, call: _Call, span: Span, causal: bool) -> tuple[Tensor, Tensor]:
    """out and lse of one block of rows."""
    query, key, value = call.of(frame, span)
    if span.lo == span.hi:
        out, lse = torch.zeros_like(query), query.new_zeros(query.shape[:3], dtype=frame.dtype)
        empty = torch.ones_like(lse, dtype=torch.bool)
    else:
        bias, scale = added(frame, span, query.dtype), frame.given.scale
        out, lse = FORWARD(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
        # a sum of exponentials is one by accident or because there is none
        if bias is None or not bool((lse == 0).any()):
            return out, lse
        empty = _rows_without_keys(bias, causal, span).expand(lse.shape)
    lse.masked_fill_(empty, -INF)
    policy = "zero" if frame.plan.sink is not None else frame.plan.program.empty
    if policy in ("nan", "nan_added"):
        out.masked_fill_(empty.unsqueeze(-1), float("nan"))
    elif policy in ("uniform", "absorbed"):
        mean = call.v.mean(2, keepdim=True, dtype=frame.dtype)
        mean = mean.repeat_interleave(out.shape[1] // mean.shape[1], 1)
        out.copy_(torch.where(empty.unsqueeze(-1), mean.to(out.dtype), out))
    return out, lse


def _rows_without_keys(bias: Tensor, causal: bool, span: Span) -> Tensor:
    """Rows whose every score is -inf, as [b, h, rows]."""
    dead = bias == -INF
    if not causal:
        return dead.all(-1)
    rows, keys = span.r1 - span.r0, span.hi - span.lo
    if dead.shape[2] > 1:
        later = torch.ones(rows, keys, dtype=torch.bool).triu_(1)
        return (dead | later).all(-1)
    # dead up to its own column: no matrix is needed
    run = dead[:, :, 0].expand(*dead.shape[:2], keys).to(torch.uint8).cummin(-1).values
    return run[..., torch.arange(rows).clamp_(max=keys - 1)].bool()


def _sink(frame: Frame, sink: Expr) -> Tensor:
    """The logit of the extra column as [b, h, rows, 1]."""
    whole = frame.grid.whole()
    tensors = widened(frame.tensors(whole, sink), frame.dtype)
    return frame.value(sink, whole, tensors).to(frame.dtype)


# ---------------------------------------------------------------- backward


def _sum_pieces(
    frame: Frame, call: _Call, results: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the kernel's q, k, v, given the gradient of out, out, and a finite lse."""
    q, k, v, scale = call.q, call.k, call.v, frame.given.scale

    def piece(span: Span, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        grad, out, lse = (x[span.rows] for x in results)
        bias = added(frame, span, q.dtype)
        args = (grad, *call.of(frame, span), out, lse, 0.0, causal)
        found: tuple[Tensor, Tensor, Tensor] = BACKWARD(*args, attn_mask=bias, scale=scale)
        return found

    pieces = _pieces(frame, q.dtype)
    first, causal = next(pieces)
    if first == frame.grid.whole(first.masked):
        return piece(first, causal)
    dq = empty_heads(q, q.shape).zero_()
    dk, dv = (empty_heads(x, x.shape, frame.dtype).zero_() for x in (k, v))
    for span in chain([first], (span for span, _ in pieces)):
        if span.lo == span.hi:
            continue
        dq[span.rows], dk_part, dv_part = piece(span, False)
        dk[span.keys] += dk_part
        dv[span.keys] += dv_part
    return dq, dk, dv
