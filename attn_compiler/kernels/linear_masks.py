"""Which keys count for linear attention, read from the mask of the attention that it replaces.

    (k <= q + S - T) & t0[b, k]    ->   causal, and valid[b, k] = t0[b, k]
    t0[b, 0, q, k]                 ->   valid[b, k] = t0[b, 0, T - 1, k], once every row is compared

A sum over keys has no place for a mask by rows: a row sees the keys up to its own, without those
that count for nobody. A mask that is a tensor over rows and keys may say just that; only its
numbers tell, and they are looked at in every call. Rows of padding are not compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from attn_compiler.errors import require
from attn_compiler.ir.evaluate import evaluate
from attn_compiler.ir.expr import DOT, Call, Expr, depends, parse
from attn_compiler.ir.mask import Causal, classify
from attn_compiler.ir.mask import Tensor as TensorMask
from attn_compiler.ir.score import Program
from attn_compiler.kernels.selecting import added_masks

_LAST = parse("S - T")
_FIRST = parse("0")


@lru_cache(maxsize=512)
def plain_score(program: Program) -> bool:
    """Is the score q.k alone, but for tensors by row and key that may be masks?"""
    left, dots = [program.score], 0
    masks = added_masks(program)
    while left:
        term = left.pop()
        if isinstance(term, Call) and term.op == "add":
            left.extend(term.args)
        elif term == DOT:
            dots += 1
        elif term not in masks or depends(term, "h"):
            return False
    return dots == 1


@lru_cache(maxsize=512)
def plain_mask(mask: Expr) -> bool:
    """Is it causal, a condition on keys alone, or a tensor that may be these?"""
    for term in classify(mask).terms:
        by_rows = depends(term.expr, "q") and not isinstance(term, TensorMask)
        if isinstance(term, Causal):
            by_rows = term.offset not in (_LAST, _FIRST)
        if by_rows or depends(term.expr, "h"):
            return False
    return True


def says_causal(mask: Expr) -> bool:
    """Does the mask say so by itself, or may its tensors say so?"""
    return any(isinstance(term, Causal | TensorMask) for term in classify(mask).terms)


@torch.compiler.assume_constant_result
def _kind(text: str) -> Literal["none", "first", "last", "look"]:
    """How far the program tells which keys a row sees, without looking at tensors."""
    program = Program.parse(text)
    terms = classify(program.mask).terms
    if program.score != DOT or len(terms) > 1:
        return "look"
    if not terms:
        return "none"
    term = terms[0]
    if not isinstance(term, Causal):
        return "look"
    return "last" if term.offset == _LAST else "first"


def counted(
    program: str, reads: Sequence[Tensor], ints: Sequence[int], shape: tuple[int, int, int]
) -> Tensor | None:
    """The keys that count for anybody.

    Args:
        program: of the attention, its mask saying what added numbers forbid.
        reads, ints: what it reads.
        shape: batch, rows, keys; the rows are the last of the keys.

    Returns:
        [B, S] bool; None for all.

    Raises:
        UnsupportedCall: rows see other keys than those up to their own; on a GPU the device says
            so.
    """
    _, rows, keys = shape
    kind = _kind(program)
    if kind == "last" or (kind == "first" and rows == keys) or (kind == "none" and rows == 1):
        return None
    found: Tensor = _looked_up(program, reads, ints, shape)
    return found


@torch.compiler.disable
def _looked_up(
    text: str, reads: Sequence[Tensor], ints: Sequence[int], shape: tuple[int, int, int]
) -> Tensor:
    program, (batch, rows, keys) = Program.parse(text), shape
    device = next((x.device for x in reads), torch.device("cpu"))
    env: dict[str, Any] = {"B": batch, "T": rows, "S": keys}
    for name, size, place in (
        ("b", batch, (-1, 1, 1, 1)),
        ("q", rows, (-1, 1)),
        ("k", keys, (-1,)),
    ):
        env[name] = torch.arange(size, device=device).view(place)
    whole = (batch, 1, rows, keys)
    allowed = evaluate(program.mask, env, reads, ints).to(device).bool().expand(whole).squeeze(1)
    valid = allowed[:, -1]
    wrong = allowed != (env["k"] <= env["q"] + (keys - rows)) & valid[:, None]
    if program.score != DOT:
        zero = torch.zeros((), device=device)
        added = evaluate(program.score, env, reads, ints, zero).to(device)
        wrong |= allowed & (added != 0).expand(whole).squeeze(1)
    # what a row of padding sees does not matter
    wrong &= valid[:, keys - rows :, None]
    text = "a row that sees the keys up to its own, and adds nothing to their scores"
    if device.type == "cpu":
        require(not bool(wrong.any()), f"{text}: LinearAttention sums up all others")
    else:
        torch._assert_async(~wrong.any(), text)
    return valid
