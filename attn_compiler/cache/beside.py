"""Scores of the features that a cache holds besides x: an addend of those that x gives.

    q k^T  =  (q_x W_k) x^T  +  q_r k_r^T          the second term is read by the score's program

Source: EL-Attention (arXiv 2105.04779), for keys of which a part is rotated.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from attn_compiler.ir.expr import DOT, Read, Var, call, substitute
from attn_compiler.ir.score import Program
from attn_compiler.kernels.frame import accumulator

_HALVES = (torch.float16, torch.bfloat16)


def scores_beside(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """scale q keys^T, not rounded to half precision.

    Args:
        q: [B, H, T, r].
        keys: [B / beams, G, S, r]; G divides H.

    Returns:
        [B, H, T, S], float32 or wider.
    """
    batch, heads, rows, width = q.shape
    samples, groups, length, _ = keys.shape
    # beams are neighbours, and so are the heads of a group
    left = q.view(samples, -1, groups, heads // groups * rows, width).transpose(1, 2)
    left = left.reshape(samples * groups, -1, width)
    right = keys.reshape(samples * groups, length, width).transpose(1, 2)
    found = _product(left, right).mul(scale)
    beams = batch // samples
    found = found.view(samples, groups, beams, heads // groups, rows, length).transpose(1, 2)
    return found.reshape(batch, heads, rows, length)


def _product(left: Tensor, right: Tensor) -> Tensor:
    dtype = accumulator(left, right)
    learns = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    if left.is_cuda and left.dtype in _HALVES and left.dtype == right.dtype and not learns:
        return torch.bmm(left, right, out_dtype=dtype)
    return torch.bmm(left.to(dtype), right.to(dtype))


@lru_cache(maxsize=256)
def with_scores_beside(program: str, slot: int) -> str:
    """A program whose dot has one more addend, its read number `slot` of [B, H, T, S]."""
    found = Program.parse(program)
    addend = Read(slot, tuple(map(Var, "bhqk")))
    score = substitute(found.score, {DOT: call("add", DOT, addend)})
    return str(Program(score, found.mask, found.sink, found.empty))
