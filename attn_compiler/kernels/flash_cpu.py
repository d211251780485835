"""Attention whose score is a sum  dot + bias,  by PyTorch's flash kernel for CPUs: in one call, or one per block of rows.

    mask  ->  bias of 0 and -inf;   k <= q  ->  is_causal;   sink  ->  out * exp(lse - lse'),  lse' = log(e^lse + e^sink)

The kernel, as tried on torch 2.13: fewer kv heads than query heads need no copies; a bias of [B, 1, 1, S] or any stride
is read in place, also beside is_causal, which aligns top-left; a row without keys gives out 0 and lse 0; with -inf taken
for that lse the backward would be NaN; one head dim for q, k and v; the feature axis must be dense; no axis may be empty.

B batch, H query heads, G kv heads, T query rows, S key rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor
from torch.nn.functional import pad

from attn_compiler.ir.expr import TRUE, Call, Read, depends
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.layout import NO_BIAS, Span, Frame, empty_heads, in_heads_layout
from attn_compiler.kernels.rows import pull_back

INF = float("inf")
_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# elements of a bias that is built for one call, and rows of a block where the mask lets keys be skipped
_BIAS_BUDGET = 2**20
_SKIP_ROWS = 128
_ROWS = 1024


def fits(q: Tensor, k: Tensor, v: Tensor, frame: Frame, drop: Drop) -> bool:
    same = q.device.type == k.device.type == v.device.type == "cpu"
    return same and _common(q, k, v) in _DTYPES and frame.plan.bias is not None and drop.rate == 0


def fits_backward(
    q: Tensor, k: Tensor, v: Tensor, frame: Frame, drop: Drop, lse: Tensor, wanted: Mapping[int, Tensor]
) -> bool:
    """The kernel gives no gradient of its bias, and none that is NaN."""
    if not fits(q, k, v, frame, drop) or frame.plan.score_slots & wanted.keys():
        return False
    return frame.plan.program.empty != "nan" or not bool((lse == -INF).any())


def forward(q: Tensor, k: Tensor, v: Tensor, frame: Frame, scale: float) -> tuple[Tensor, Tensor]:
    query, key, value = _prepared(q, k, v)
    shape = (*q.shape[:3], v.shape[-1])
    results = (
        (span, *_piece(query, key, value, frame, span, causal, scale)) for span, causal in _pieces(frame, query.dtype)
    )
    span, out, lse = next(results)
    if span.r1 < shape[2]:
        first, out, lse = (span, out, lse), empty_heads(query, query.shape), empty_heads(lse, shape[:3])
        for span, part, part_lse in chain([first], results):
            out[span.rows], lse[span.rows] = part, part_lse
    if frame.plan.sink is not None:
        out, lse = _with_sink(out, lse, frame)
    return in_heads_layout(out[..., : shape[3]], v.dtype), in_heads_layout(lse, frame.dtype)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    frame: Frame,
    scale: float,
    saved: tuple[Tensor, Tensor],
    into: Mapping[int, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; that of the sink is added to `into`, by slot."""
    query, key, value = _prepared(q, k, v)
    lse = saved[1]
    g, out = (_dense(pad(x.to(query.dtype), (0, query.shape[-1] - x.shape[-1]))) for x in (grad, saved[0]))
    dead = lse == -INF
    finite = lse.masked_fill(dead, 0.0)
    dq, dk, dv = _sum_pieces(g, query, key, value, frame, scale, out, finite)
    dq, dk, dv = dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]
    if frame.plan.sink is not None:
        _sink_gradient(grad, saved, frame, into)
    elif frame.plan.program.empty == "uniform" and bool(dead.any()):
        spread = torch.where(dead.unsqueeze(-1), grad.to(frame.dtype), 0.0).sum(2)
        groups = spread.view(spread.shape[0], k.shape[1], -1, spread.shape[-1]).sum(2)
        dv = dv + groups.unsqueeze(2) / k.shape[2]
    return dq, dk, dv


# ---------------------------------------------------------------- arguments


def _common(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _prepared(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One dtype, one head dim (a feature of zeros changes no product), a dense feature axis."""
    dtype, width = _common(q, k, v), max(q.shape[-1], v.shape[-1])
    query, key, value = (
        _dense(x.to(dtype) if x.shape[-1] == width else pad(x.to(dtype), (0, width - x.shape[-1]))) for x in (q, k, v)
    )
    return query, key, value


def _pieces(frame: Frame, dtype: torch.dtype) -> Iterator[tuple[Span, bool]]:
    """The calls: a block of rows each, and whether the structural mask is left to is_causal."""
    plan, sizes = frame.plan, frame.sizes
    free = frame.free()
    causal = not free and frame.causal()
    bias = plan.bias or NO_BIAS
    rows = sizes["T"] if depends(bias, "q") or depends(plan.loose, "q") else 1
    pairs = frame.spread(bias, plan.loose)
    small = rows == 1 or pairs * rows * sizes["S"] <= _BIAS_BUDGET
    if (free or causal) and (small or _in_place(frame, dtype)):
        yield frame.whole(masked=False), causal
        return
    for span in frame.spans(pairs, _BIAS_BUDGET, _ROWS if free else _SKIP_ROWS):
        yield span, False


def _in_place(frame: Frame, dtype: torch.dtype) -> bool:
    """Is the bias a read that the kernel takes as it lies in memory?"""
    bias = frame.plan.local_bias
    if isinstance(bias, Call) and bias.op == "float":
        bias = bias.args[0]
    if frame.plan.loose != TRUE or not isinstance(bias, Read) or bias.slot < frame.plan.base:
        return False
    return frame.reads[frame.plan.slices[bias.slot - frame.plan.base].slot].dtype in (dtype, frame.dtype)


def _bias(frame: Frame, span: Span, dtype: torch.dtype) -> Tensor | None:
    """What is added to the dot products of a span, -inf where the mask forbids a key; None for nothing."""
    tensors = frame.tensors(span)
    mask = frame.mask(span, tensors)
    bias = None
    if frame.plan.bias != NO_BIAS:
        bias = frame.value(frame.plan.local_bias, span, tensors)
        if bias.dtype not in (dtype, frame.dtype):
            bias = bias.to(frame.dtype)
    if mask is None:
        return bias
    if bias is None:
        return torch.zeros(mask.shape, dtype=frame.dtype).masked_fill_(~mask, -INF)
    return torch.where(mask, bias, -INF)


# ---------------------------------------------------------------- forward


def _piece(
    q: Tensor, k: Tensor, v: Tensor, frame: Frame, span: Span, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    query = q[span.rows]
    if span.lo == span.hi:
        out, lse = torch.zeros_like(query), query.new_zeros(query.shape[:3], dtype=frame.dtype)
        empty = torch.ones_like(lse, dtype=torch.bool)
    else:
        bias = _bias(frame, span, q.dtype)
        out, lse = _FORWARD(query, k[span.keys], v[span.keys], 0.0, causal, attn_mask=bias, scale=scale)
        # a sum of exponentials is one by accident or because there is none
        if bias is None or not bool((lse == 0).any()):
            return out, lse
        empty = _rows_without_keys(bias, causal, span).expand(lse.shape)
    lse.masked_fill_(empty, -INF)
    policy = "zero" if frame.plan.sink is not None else frame.plan.program.empty
    if policy == "nan":
        out.masked_fill_(empty.unsqueeze(-1), float("nan"))
    elif policy == "uniform":
        mean = v.mean(2, keepdim=True, dtype=frame.dtype).repeat_interleave(q.shape[1] // v.shape[1], 1)
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


def _sink(frame: Frame) -> tuple[Tensor, Span, list[Tensor]]:
    span = frame.whole()
    tensors = frame.tensors(span)
    assert frame.plan.sink is not None
    return frame.value(frame.plan.sink, span, tensors).to(frame.dtype).squeeze(-1), span, tensors


def _with_sink(out: Tensor, lse: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
    total = torch.logaddexp(lse, _sink(frame)[0])
    return out.mul_(torch.exp(lse - total).unsqueeze(-1)), total


# ---------------------------------------------------------------- backward


def _sum_pieces(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, frame: Frame, scale: float, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    def piece(span: Span, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        args = (g[span.rows], q[span.rows], k[span.keys], v[span.keys], out[span.rows], lse[span.rows])
        bias = _bias(frame, span, q.dtype)
        found: tuple[Tensor, Tensor, Tensor] = _BACKWARD(*args, 0.0, causal, attn_mask=bias, scale=scale)
        return found

    pieces = _pieces(frame, q.dtype)
    first, causal = next(pieces)
    if first == frame.whole(first.masked):
        return piece(first, causal)
    dq = empty_heads(q, q.shape).zero_()
    dk, dv = (empty_heads(x, x.shape, frame.dtype).zero_() for x in (k, v))
    for span, causal in chain([(first, causal)], pieces):
        if span.lo == span.hi:
            continue
        dq[span.rows], dk_part, dv_part = piece(span, causal)
        dk[span.keys] += dk_part
        dv[span.keys] += dv_part
    return dq, dk, dv


def _sink_gradient(grad: Tensor, saved: tuple[Tensor, Tensor], frame: Frame, into: Mapping[int, Tensor]) -> None:
    """d sink = -p_sink * sum(g * out),  p_sink = exp(sink - lse)."""
    out, lse = saved
    sink, span, tensors = _sink(frame)
    assert frame.plan.sink is not None
    delta = (grad.to(frame.dtype) * out.to(frame.dtype)).sum(-1)
    pull_back(frame, span, frame.plan.sink, tensors, into, -(torch.exp(sink - lse) * delta).unsqueeze(-1))
