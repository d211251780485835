"""Which keys count for linear attention, read from the mask of the attention that it replaces.

    (k <= q + S - T) & t0[b, k]    ->   causal, and valid[b, k] = t0[b, k]
    t0[b, 0, q, k]                 ->   valid[b, k] = t0[b, 0, T - 1, k], once every row is compared

A sum over keys has no place for a mask by rows: a row sees the keys up to its own, without those
that count for nobody. A mask that is a tensor over rows and keys may say just that; only its
numbers tell, and they are looked at in every call, all T x S of them. Rows of padding that
see all keys or none are not compared.
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
def _kind(text: str) -> tuple[Literal["none", "first", "last"], Literal["all", "keys", "look"]]:
    """Where the program says by itself that a row's last key stands, and what else it asks of keys:
    nothing, something of each key, or what only the numbers of a tensor tell.
    """
    program = Program.parse(text)
    terms = classify(program.mask).terms
    causal = [term for term in terms if isinstance(term, Causal)]
    end: Literal["none", "first", "last"] = "none"
    if len(causal) == 1:
        end = "last" if causal[0].offset == _LAST else "first"
    others = [term for term in terms if term not in causal]
    if program.score != DOT or len(causal) > 1 or any(depends(t.expr, "q") for t in others):
        return end, "look"
    return end, "keys" if others else "all"


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
    end, asked = _kind(program)
    known = end == "last" or (end == "first" and rows == keys) or (end == "none" and rows == 1)
    if known and asked == "all":
        return None
    found: Tensor = _looked_up(program, reads, ints, shape, known and asked == "keys")
    return found


@torch.compiler.disable
def _looked_up(
    text: str,
    reads: Sequence[Tensor],
    ints: Sequence[int],
    shape: tuple[int, int, int],
    trusted: bool,
) -> Tensor:
    """The keys that the last row sees; unless the program is trusted, all rows are compared."""
    program, (batch, rows, keys) = Program.parse(text), shape
    device = next((x.device for x in reads), torch.device("cpu"))
    env: dict[str, Any] = {"B": batch, "T": rows, "S": keys}
    env["b"] = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    env["q"] = torch.arange(rows - 1 if trusted else 0, rows, device=device).view(-1, 1)
    env["k"] = torch.arange(keys, device=device)
    whole = (batch, 1, len(env["q"]), keys)
    allowed = evaluate(program.mask, env, reads, ints).to(device).bool().expand(whole).squeeze(1)
    valid = allowed[:, -1]
    if trusted:
        return valid
    wrong = allowed != (env["k"] <= env["q"] + (keys - rows)) & valid[:, None]
    if program.score != DOT:
        zero = torch.zeros((), device=device)
        added = evaluate(program.score, env, reads, ints, zero).to(device)
        wrong |= allowed & (added != 0).expand(whole).squeeze(1)
    # a row of padding sees all or nothing, as libraries write it, and does not matter
    alike = allowed.all(-1) | ~allowed.any(-1)
    wrong &= (valid[:, keys - rows :] | ~alike).unsqueeze(-1)
    text = "a row that sees the keys up to its own, and adds nothing to their scores"
    if device.type == "cpu":
        require(not bool(wrong.any()), f"{text}: LinearAttention sums up all others")
    else:
        torch._assert_async(~wrong.any(), text)
    return valid
