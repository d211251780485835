"""attn_compiler::attention on any device, and what it means.

    s = score(scale * q k^T),  -inf where masked
    out = dropout(softmax_k(s)) v;     lse = log sum_k exp(s)

`reference` is the specification: a few differentiable lines that build the T x S matrix. `forward`
and `backward` never do. Where the score is a sum  dot + bias  (a mask is a bias, a sink a factor
afterwards) a CPU runs its flash kernel; everything else is `rows`.

Rows whose scores are all -inf and that have no sink follow `Program.empty`; "any" gives 0.
B batch, H query heads, G kv heads, T query rows, S key rows, d head dim of q and k, dv of v.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_compiler.ir.evaluate import evaluate
from attn_compiler.ir.expr import TRUE
from attn_compiler.ir.score import Program
from attn_compiler.kernels import flash_cpu as flash
from attn_compiler.kernels import measured, rows
from attn_compiler.kernels.frame import (
    Frame,
    Inputs,
    accumulator,
    empty_heads,
    empty_lse,
    in_heads_layout,
)
from attn_compiler.kernels.tiles_cpu import without_full_maps

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
        dropout_mask: factors of the probabilities, [B, H, T, S], 0 or 1 / (1 - dropout).

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
    plain = s
    if program.mask != TRUE:
        allowed = evaluate(program.mask, env, reads, ints).to(q.device).bool()
        # the derivative of adding -inf is NaN in such a row too
        s = (
            s + torch.zeros_like(s).masked_fill(~allowed, -INF)
            if program.empty == "nan_added"
            else torch.where(allowed, s, -INF)
        )
    if program.sink is not None:
        sink = evaluate(program.sink, env, reads, ints, None, dtype).to(q.device, dtype)
        s = torch.cat([s, sink.expand(*shape[:3], 1)], -1)
    empty = (s == -INF).all(-1, keepdim=True)
    lse = torch.logsumexp(s, -1)
    if program.empty == "absorbed":
        # finfo.min swallows the scores but not their gradients
        s = torch.where(empty, plain - plain.detach(), s)
    elif program.empty not in ("nan", "nan_added"):
        s = s.masked_fill(empty, 0.0)
    p = torch.softmax(s, -1)[..., : shape[3]]
    if program.empty in ("zero", "any"):
        p = p.masked_fill(empty, 0.0)
    if dropout_mask is not None:
        p = p * dropout_mask
    return (p @ value).to(v.dtype), lse


# ---------------------------------------------------------------- the implementation


def forward(given: Inputs) -> tuple[Tensor, Tensor]:
    """out and lse, in the layouts of `empty_heads` and `empty_lse`."""
    shape = (*given.q.shape[:3], given.v.shape[-1])
    if _no_elements(given):
        out, lse = empty_heads(given.v, shape), empty_lse(given.q, given.dtype)
        return out.zero_(), lse.fill_(-INF)
    given = without_full_maps(given)
    frame = Frame(given)
    found = measured.fastest(given, "forward") if given.q.device.type == "cpu" else None
    if found is not None and found.name in ways(frame):
        return by(given, found.name)
    return flash.forward(frame) if flash.fits(frame) else _by_rows(frame)


def by(given: Inputs, way: str) -> tuple[Tensor, Tensor]:
    """The same in one of its `ways` on a CPU."""
    frame = Frame(given)
    return _by_rows(frame) if way == "rows" else flash.forward(frame, way)


def ways(frame: Frame) -> list[str]:
    """What a CPU can do for a call whose sizes say what there is to do, the usual one first."""
    return [*(flash.ways(frame) if flash.fits(frame) else ()), "rows"]


def _by_rows(frame: Frame) -> tuple[Tensor, Tensor]:
    given = frame.given
    out = empty_heads(given.v, (*given.q.shape[:3], given.v.shape[-1]))
    lse = empty_lse(given.q, given.dtype)
    rows.forward(frame, out, lse)
    return out, lse


def backward(
    given: Inputs, grad: Tensor, saved: tuple[Tensor, Tensor], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of q, k, v and of the reads that `needs` marks.

    What the forward did not keep is computed again; `saved` is its out and lse.
    """
    into = {
        i: torch.zeros(read.shape, dtype=given.dtype, device=read.device)
        for i, (read, need) in enumerate(zip(given.reads, needs, strict=True))
        if need
    }
    if _no_elements(given):
        dq, dk, dv = (torch.zeros_like(x) for x in given.qkv)
    else:
        frame = Frame(without_full_maps(given))
        if flash.fits_backward(frame, saved[1], into):
            dq, dk, dv = flash.backward(frame, grad, saved, into)
        else:
            dq, dk, dv = rows.backward(frame, grad, saved[0], into)
    dq, dk, dv = (in_heads_layout(g, x.dtype) for g, x in zip((dq, dk, dv), given.qkv, strict=True))
    return dq, dk, dv, [grad.to(given.reads[i].dtype) for i, grad in into.items()]


def _no_elements(given: Inputs) -> bool:
    return any(x.numel() == 0 for x in given.qkv)
