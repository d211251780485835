"""attn_compiler::attention on any device, and what it means.

    out = dropout(softmax_k(where(mask, score(scale * q k^T), -inf))) v;   lse = log sum_k exp(score), with the sink

`reference` is the specification: a few differentiable lines that build the T x S matrix. `forward` and `backward` never
do. Where the score is a sum  dot + bias  (a mask is a bias, a sink is a factor afterwards) a CPU runs its flash kernel,
in one call or one per block of rows; everything else is `rows`.

Rows whose scores are all -inf and that have no sink follow `Program.empty`; "any" gives 0. B batch, H query heads,
G kv heads, T query rows, S key rows, d head dim of q and k, dv of v.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_compiler.ir.expr import TRUE, evaluate
from attn_compiler.ir.score import Program
from attn_compiler.kernels import flash_cpu as flash
from attn_compiler.kernels import rows
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.layout import Frame, accumulator, empty_heads, in_heads_layout, sizes_of

INF = float("inf")


# ---------------------------------------------------------------- the specification


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reads: Sequence[Tensor],
    ints: Sequence[int],
    program: str | Program,
    scale: float,
    dropout_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator in plain PyTorch, differentiable to any order.

    Args:
        dropout_mask: what the probabilities are multiplied with, [B, H, T, S]: 0 or 1 / (1 - dropout).

    Returns:
        out [B, H, T, dv] and lse [B, H, T].
    """
    program = Program.parse(program) if isinstance(program, str) else program
    dtype, shape = accumulator(q, k, v), (*q.shape[:3], k.shape[2])
    key, value = (x.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    dot = q.to(dtype) @ key.transpose(-1, -2) * scale
    env: dict[str, Tensor | int] = dict(zip("BHTS", shape, strict=True))
    env |= {n: torch.arange(m, device=q.device) for n, m in zip("bhqk", shape, strict=True)}
    env |= {n: env[n].view((-1,) + (1,) * i) for n, i in (("b", 3), ("h", 2), ("q", 1))}  # type: ignore[union-attr]
    s = evaluate(program.score, env, reads, ints, dot, dtype).to(dtype).expand(shape)
    if program.mask != TRUE:
        allowed = evaluate(program.mask, env, reads, ints).to(q.device).bool()
        # "nan" stands for adding -inf, whose derivative is NaN in such a row too
        s = s + torch.zeros_like(s).masked_fill(~allowed, -INF) if program.empty == "nan" else torch.where(allowed, s, -INF)
    if program.sink is not None:
        sink = evaluate(program.sink, env, reads, ints, None, dtype).to(q.device, dtype)
        s = torch.cat([s, sink.expand(*shape[:3], 1)], -1)
    empty = (s == -INF).all(-1, keepdim=True)
    lse = torch.logsumexp(s, -1)
    if program.empty != "nan":
        s = s.masked_fill(empty, 0.0)
    p = torch.softmax(s, -1)[..., : shape[3]]
    if program.empty in ("zero", "any"):
        p = p.masked_fill(empty, 0.0)
    if dropout_mask is not None:
        p = p * dropout_mask
    return (p @ value).to(v.dtype), lse


# ---------------------------------------------------------------- the implementation


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reads: Sequence[Tensor],
    ints: Sequence[int],
    drop: Drop,
    program: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out and lse, both in the layout of `empty_heads`."""
    dtype = accumulator(q, k, v)
    out = (*q.shape[:3], v.shape[-1])
    if _no_elements(q, k, v):
        return empty_heads(v, out).zero_(), empty_heads(q, q.shape[:3], dtype).fill_(-INF)
    frame = Frame(program, sizes_of(q, k), reads, ints, dtype, q.device)
    if flash.fits(q, k, v, frame, drop):
        return flash.forward(q, k, v, frame, scale)
    result = empty_heads(v, out), empty_heads(q, q.shape[:3], dtype)
    rows.forward(q, k, v, frame, scale, drop, *result)
    return result


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reads: Sequence[Tensor],
    ints: Sequence[int],
    drop: Drop,
    saved: tuple[Tensor, Tensor],
    needs: Sequence[bool],
    program: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of q, k, v and of the reads that `needs` marks, recomputing what the forward did not keep."""
    dtype = accumulator(q, k, v)
    wanted = [i for i, need in enumerate(needs) if need]
    into = {i: torch.zeros(reads[i].shape, dtype=dtype, device=reads[i].device) for i in wanted}
    if _no_elements(q, k, v):
        found = tuple(torch.zeros_like(x) for x in (q, k, v))
    else:
        frame = Frame(program, sizes_of(q, k), reads, ints, dtype, q.device)
        if flash.fits_backward(q, k, v, frame, drop, saved[1], into):
            found = flash.backward(grad, q, k, v, frame, scale, saved, into)
        else:
            found = rows.backward(grad, q, k, v, frame, scale, drop, saved[0], into)
    dq, dk, dv = (in_heads_layout(g, x.dtype) for g, x in zip(found, (q, k, v), strict=True))
    return dq, dk, dv, [into[i].to(reads[i].dtype) for i in wanted]


def _no_elements(*tensors: Tensor) -> bool:
    return any(x.numel() == 0 for x in tensors)
