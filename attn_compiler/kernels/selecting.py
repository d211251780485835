"""The programs of Selective attention, made from the program of the attention it replaces.

    dot - t0[h] * float(q - k)   ->   dot                                         what selects
                                 ->   dot - t0[h] * float(q - k) - t1[b, q, k]    with F as t1

The selecting logits of a score with a soft-cap are capped; an additive bias is left out of them
unless it is asked for. F is subtracted after everything else. A tensor of zeros and large negative
numbers that is added is a mask, and only its numbers tell.

Source: Selective Attention (arXiv 2410.02703); it is silent about biases and caps.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from attn_compiler.ir.expr import (
    TRUE,
    Call,
    Const,
    Dot,
    Expr,
    Int,
    Read,
    Var,
    call,
    substitute,
    walk,
)
from attn_compiler.ir.score import Program
from attn_compiler.kernels.plan import NO_BIAS, has_dot

# no key with this added has a weight: exp(-9000) is 0. Models write -10000 (in bfloat16 -9984), the
# lowest number of float16, -1e9, the lowest of their dtype and -inf
_HIDDEN = -9000.0


@lru_cache(maxsize=512)
def selecting(program: str, head: int, heads: int, select_from: str) -> str:
    """The program of one head alone whose scores are the logits that select.

    Args:
        program: of the attention.
        head: the number that reads by head see.
        heads: how many heads the attention has.
        select_from: "qk" leaves additive biases out, "logits" keeps them.
    """
    own = Program.parse(program)
    table: dict[Expr, Expr] = {Var("h"): Const(head), Var("H"): Const(heads)}
    score = unbiased(own.score) if select_from == "qk" else own.score
    return str(Program(substitute(score, table), substitute(own.mask, table)))


def forbidding(program: Program) -> Program:
    """The program whose mask also says what added numbers forbid.

    score: dot + t0[b, 0, q, k]            ->   mask: t0[b, 0, q, k] > -9000
    score: dot + where(k <= q, t0, -1e9)   ->   score: dot + t0; mask: (k <= q) & (t0 > -9000)

    Rows that see no key stay as they are where a number swallows their logits: all keys alike.
    """
    conditions: list[Expr] = []
    score = _without_fills(program.score, conditions)
    conditions += (call("gt", term, _HIDDEN) for term in added_masks(replace(program, score=score)))
    if not conditions:
        return program
    mask = program.mask
    for allowed in conditions:
        mask = allowed if mask == TRUE else call("and", mask, allowed)
    empty = "uniform" if program.empty in ("any", "nan_added") else program.empty
    return replace(program, score=score, mask=mask, empty=empty)


def _without_fills(score: Expr, conditions: list[Expr]) -> Expr:
    """The score without numbers that stand where a bias may not be seen; adds where it may."""
    if not isinstance(score, Call):
        return score
    if score.op == "add":
        return call("add", *(_without_fills(term, conditions) for term in score.args))
    if score.op == "where" and not has_dot(score):
        condition, yes, no = score.args
        for allowed, bias, fill in ((condition, yes, no), (call("not", condition), no, yes)):
            if isinstance(fill, Const) and fill.value <= _HIDDEN:
                conditions.append(allowed)
                return _without_fills(bias, conditions)
    return score


def added_masks(program: Program) -> tuple[Read, ...]:
    """Tensors over keys that are added to the score as they are, and so may forbid keys; where
    there is one row and one key, they name neither.
    """
    found, left = [], [program.score]
    while left:
        term = left.pop()
        if isinstance(term, Call) and term.op == "add":
            left.extend(term.args)
        elif isinstance(term, Read) and (_over_keys(term) or _of_one_key(term)):
            found.append(term)
    return tuple(found)


def _over_keys(term: Read) -> bool:
    return any(Var("k") in walk(index) for index in term.index)


def _of_one_key(term: Read) -> bool:
    return all(index == Var("b") or isinstance(index, Const) for index in term.index)


@lru_cache(maxsize=512)
def subtracting(program: str, slot: int) -> str:
    """The program with F, a tensor [B, T, S] in `slot`, subtracted from its score."""
    own = Program.parse(program)
    index = (Var("b"), Var("q"), Var("k"))
    return str(replace(own, score=call("sub", own.score, Read(slot, index))))


@lru_cache(maxsize=512)
def lower(program: str, number: int) -> str:
    """The program of some rows alone, numbered from 0.

    k <= q   ->   k <= q + n0        T   ->   n1

    Args:
        program: of all rows.
        number: of the first of two integers: the first of these rows, and how many there are in
            all.
    """
    own, table = Program.parse(program), dict[Expr, Expr]()
    table[Var("q")], table[Var("T")] = call("add", Var("q"), Int(number)), Int(number + 1)
    sink = None if own.sink is None else substitute(own.sink, table)
    made = replace(own, score=substitute(own.score, table), mask=substitute(own.mask, table))
    return str(replace(made, sink=sink))


@lru_cache(maxsize=512)
def pruned(program: str, slot: int) -> str:
    """The program without evicted keys: the row that evicts each one stands in `slot`, [B, S]."""
    own = Program.parse(program)
    alive = call("lt", Var("q"), Read(slot, (Var("b"), Var("k"))))
    return str(replace(own, mask=call("and", own.mask, alive)))


@lru_cache(maxsize=512)
def in_slots(program: str, slot: int, number: int, subtract: bool) -> str:
    """The program of one row over the slots of a cache instead of over positions.

    Args:
        program: over positions.
        slot: of an integer tensor [B, slots], the position that each slot holds, -1 for none.
        number: of the first of three integers: which row this is, how many rows and how many
            positions the program speaks of.
        subtract: F, a tensor [B, slots] in the slot after it, is subtracted.
    """
    own, index = Program.parse(program), (Var("b"), Var("k"))
    position = Read(slot, index)
    row, rows, positions = (Int(number + i) for i in range(3))
    table: dict[Expr, Expr] = {
        Var("k"): position,
        Var("q"): call("add", Var("q"), row),
        Var("T"): rows,
        Var("S"): positions,
    }
    score, mask = substitute(own.score, table), substitute(own.mask, table)
    if subtract:
        score = call("sub", score, Read(slot + 1, index))
    sink = None if own.sink is None else substitute(own.sink, table)
    return str(Program(score, call("and", mask, call("ge", position, 0)), sink, own.empty))


def unbiased(expr: Expr) -> Expr:
    """The score without what is added to its dot product, also under a soft-cap."""
    if isinstance(expr, Dot):
        return expr
    if not isinstance(expr, Call) or not has_dot(expr):
        return NO_BIAS
    if expr.op in ("add", "sub"):
        left, right = expr.args
        if not has_dot(right):
            return unbiased(left)
        if not has_dot(left):
            inner = unbiased(right)
            return inner if expr.op == "add" else call("neg", inner)
    return call(expr.op, *(unbiased(arg) if has_dot(arg) else arg for arg in expr.args))
