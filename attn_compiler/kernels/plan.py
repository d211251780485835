"""What can be said about an attention program without seeing a tensor.

    dot + t0[b, h, q + n0, k]   ->   bias  t0[b, h, q + n0, k],  a slice of its tensor
    mask                        ->   structural (rows and columns alone) & loose (the rest)

A read whose index is plain variables, shifts of them or numbers is a slice of its tensor; a gather
by four broadcast index tensors would cost more than the attention. Any other read keeps its index.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from attn_compiler.ir.expr import (
    DOT,
    INDICES,
    TRUE,
    Call,
    Const,
    Dot,
    Expr,
    Read,
    Var,
    call,
    depends,
    slots,
    substitute,
    walk,
)
from attn_compiler.ir.mask import Mask, classify
from attn_compiler.ir.score import Program

NO_BIAS = Const(0.0)


@dataclass(frozen=True, slots=True)
class Slice:
    """A read that is a view of its tensor, laid out as [b, h, q, k].

    Attributes:
        slot: the tensor.
        dims: per dimension of it the variable (None for a number) and its shift.
        order: positions of the variables of `dims` in the order b h q k.
        missing: which of b h q k do not occur.
    """

    slot: int
    dims: tuple[tuple[str | None, Expr], ...]
    order: tuple[int, ...]
    missing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What can be said about a program without seeing a tensor.

    Attributes:
        program: the program as written.
        additive: is the score a sum of the dot product and `bias`?
        biased: is there such a bias?
        one_read: is it one slice of one tensor?
        varies: indices that the bias and the mask beyond `structural` vary with.
        structural: the part of the mask over rows and columns alone.
        score, sink, bias, loose, mask: as the program has them (loose: the mask beyond
            `structural`), with slots from `base` on for sliced reads.
        slices: the views behind these slots.
        base: first slot that is a view.
        score_slots: tensors that the score reads.
    """

    program: Program
    additive: bool
    biased: bool
    one_read: bool
    varies: frozenset[str]
    structural: Mask
    score: Expr
    sink: Expr | None
    bias: Expr
    loose: Expr
    mask: Expr
    slices: tuple[Slice, ...]
    base: int
    score_slots: frozenset[int]


@lru_cache(maxsize=512)
def plan(text: str, sliced: bool = True) -> Plan:
    """Analyse a program's text; `sliced=False` leaves every read a gather."""
    program = Program.parse(text)
    structural, key_only, other = classify(program.mask).split()
    loose, addend = _both(key_only, other), _addend(program.score)
    parts = [program.score, addend or NO_BIAS, loose, program.sink or NO_BIAS]
    reads = list(dict.fromkeys(n for part in parts for n in walk(part) if isinstance(n, Read)))
    base = 1 + max((n.slot for n in reads), default=-1)
    found = {read: piece for read in reads if sliced and (piece := _as_slice(read)) is not None}
    table: dict[Expr, Expr] = {read: Read(base + i, ()) for i, read in enumerate(found)}
    score, bias, local_loose, sink = (substitute(part, table) for part in parts)
    return Plan(
        program=program,
        additive=addend is not None,
        biased=bias != NO_BIAS,
        one_read=isinstance(_uncast(bias), Read) and _uncast(bias) in table.values(),
        varies=frozenset(i for i in INDICES if depends(parts[1], i) or depends(loose, i)),
        structural=classify(structural),
        score=score,
        sink=None if program.sink is None else sink,
        bias=bias,
        loose=local_loose,
        mask=_both(structural, local_loose),
        slices=tuple(found.values()),
        base=base,
        score_slots=frozenset(slots(program.score)),
    )


def _uncast(expr: Expr) -> Expr:
    return expr.args[0] if isinstance(expr, Call) and expr.op == "float" else expr


def _both(left: Expr, right: Expr) -> Expr:
    return right if left == TRUE else left if right == TRUE else call("and", left, right)


def _addend(score: Expr) -> Expr | None:
    """The `e` of  dot + e,  None for any other score."""
    if score == DOT:
        return NO_BIAS
    if not isinstance(score, Call) or score.op not in ("add", "sub"):
        return None
    left, right = score.args
    if not has_dot(right):
        inner = _addend(left)
        term = call("neg", right) if score.op == "sub" else right
    elif score.op == "add" and not has_dot(left):
        inner, term = _addend(right), left
    else:
        return None
    if inner is None:
        return None
    return term if inner == NO_BIAS else call("add", inner, term)


def has_dot(expr: Expr) -> bool:
    return any(isinstance(n, Dot) for n in walk(expr))


def _as_slice(read: Read) -> Slice | None:
    dims = tuple(_affine(index) for index in read.index)
    names = [d[0] for d in dims if d is not None and d[0] is not None]
    if not dims or None in dims or len(set(names)) < len(names):
        return None
    order = tuple(names.index(i) for i in INDICES if i in names)
    missing = tuple(n for n, i in enumerate(INDICES) if i not in names)
    return Slice(read.slot, tuple(d for d in dims if d is not None), order, missing)


def _affine(index: Expr) -> tuple[str | None, Expr] | None:
    """(variable, shift) of  v + shift,  (None, number) of a number, None of anything else."""
    if _is_number(index):
        return None, index
    if isinstance(index, Var):
        return index.name, Const(0)
    if not isinstance(index, Call) or index.op not in ("add", "sub"):
        return None
    left, right = index.args
    if isinstance(left, Var) and left.name in INDICES and _is_number(right):
        return left.name, right if index.op == "add" else call("neg", right)
    if index.op == "add" and isinstance(right, Var) and right.name in INDICES and _is_number(left):
        return right.name, left
    return None


def _is_number(expr: Expr) -> bool:
    """An integer that is the same for all elements."""
    return not depends(expr, *INDICES) and not any(isinstance(n, Read | Dot) for n in walk(expr))
