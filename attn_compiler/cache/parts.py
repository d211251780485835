"""Attention over x where a cache holds something of each key besides.

    q k^T  =  (q_x gain W_k x^T) * size  +  q_r k_r^T  +  q_x bias^T

k_r are features that are no image of x, such as rotated ones; size and gain are of a norm of the
keys, and bias is its own. The further terms are read by the score's program.

Source: EL-Attention (arXiv 2105.04779), its equations for keys that are rotated in part or
normalised.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from attn_compiler.cache.maps import Maps
from attn_compiler.cache.states import States
from attn_compiler.ir.expr import DOT, Const, Expr, Read, Var, call, substitute
from attn_compiler.ir.score import Program
from attn_compiler.kernels.frame import accumulator

_HALVES = (torch.float16, torch.bfloat16)
# q, w_k, b_k, reads, program
Call = tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, ...], str]


def split_call(states: States, maps: Maps, given: Call, scale: float, key_bias: bool) -> Call:
    """The arguments of the operator with what stands beside x.

    Args:
        states, maps: what the cache holds.
        given: the arguments as if keys were an image of x, without a norm.
        scale: of the scores.
        key_bias: does the softmax see what is added to all scores of a row?
    """
    q, w_k, b_k, reads, program = given
    slots: list[tuple[str, int]] = []
    held = list(states.beside)
    rest: Tensor | None = None
    if maps.beside is not None:
        q, rest = maps.beside.split(q)
    if maps.norm is not None:
        slots.append(("one" if held[-1].shape[1] == 1 else "size", len(reads)))
        reads = (*reads, _sizes(held[-1], states.beams, q.shape[1]))
        gain, bias = maps.gains()
        if bias is not None and key_bias:
            slots.append(("row", len(reads)))
            reads = (*reads, _by_heads(bias, q).mul(q).sum(-1).mul(scale))
        q = q.to(accumulator(q)) if gain is None else _by_heads(gain, q) * q
        q, w_k, b_k = _normalised(maps, q)
    if maps.beside is not None and rest is not None:
        slots.append(("pair", len(reads)))
        reads = (*reads, scores_beside(rest, held[0], scale))
    return q, w_k, b_k, reads, with_terms(program, tuple(slots))


def _normalised(maps: Maps, q: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries, weight and bias whose product is that with keys before they get their size.

    The mean of a key is taken off by queries without one, over all features that are normalised.
    """
    norm = maps.norm
    assert norm is not None
    if not norm.centred:
        w_k, b_k, _, _ = maps.views()
        return q, w_k, b_k
    w_k, b_k = maps.normalised()
    whole = q.new_zeros((*q.shape[:3], w_k.shape[1]))
    whole[..., norm.offset : norm.offset + q.shape[3]] = q
    return whole - whole.mean(-1, keepdim=True), w_k, b_k


def _by_heads(parameter: Tensor, q: Tensor) -> Tensor:
    """[G or 1, d] for queries [B, H, T, d]."""
    groups = parameter.shape[0]
    if groups > 1:
        parameter = parameter.repeat_interleave(q.shape[1] // groups, 0)
    return parameter[:, None]


def _sizes(held: Tensor, beams: int, heads: int) -> Tensor:
    """[rows / beams, G or 1, S, 1] for each row and query head, [B, H or 1, S]."""
    found = held[..., 0]
    found = found if beams == 1 else found.repeat_interleave(beams, 0)
    groups = found.shape[1]
    return found if groups in (1, heads) else found.repeat_interleave(heads // groups, 1)


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
    left = q.reshape(samples, -1, groups, heads // groups * rows, width).transpose(1, 2)
    left = left.reshape(samples * groups, -1, width)
    right = keys.reshape(samples * groups, length, width).transpose(1, 2)
    found = _product(left, right).mul(scale)
    found = found.view(samples, groups, -1, heads // groups, rows, length).transpose(1, 2)
    return found.reshape(batch, heads, rows, length)


def _product(left: Tensor, right: Tensor) -> Tensor:
    dtype = accumulator(left, right)
    learns = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    if left.is_cuda and left.dtype in _HALVES and left.dtype == right.dtype and not learns:
        return torch.bmm(left, right, out_dtype=dtype)
    return torch.bmm(left.to(dtype), right.to(dtype))


_B, _H, _Q, _K = map(Var, "bhqk")
_READ: dict[str, tuple[Expr, ...]] = {
    "size": (_B, _H, _K),
    "one": (_B, Const(0), _K),
    "row": (_B, _H, _Q),
    "pair": (_B, _H, _Q, _K),
}


@torch.compiler.assume_constant_result
def with_terms(program: str, slots: tuple[tuple[str, int], ...]) -> str:
    """A program whose dot is multiplied by a key's size and has more addends.

    Args:
        slots: what is read, and which of the reads it is: "size" [B, H, S] or "one" [B, 1, S]
            multiply; "row" [B, H, T] and "pair" [B, H, T, S] are added behind that.
    """
    return _with_terms(program, slots)


@lru_cache(maxsize=256)
def _with_terms(program: str, slots: tuple[tuple[str, int], ...]) -> str:
    found = Program.parse(program)
    dot: Expr = DOT
    for kind, slot in slots:
        operation = "mul" if kind in ("size", "one") else "add"
        dot = call(operation, dot, Read(slot, _READ[kind]))
    score = substitute(found.score, {DOT: dot})
    return str(Program(score, found.mask, found.sink, found.empty))
