"""Boolean expressions in one form, whatever way they were spelled.

    ~(k > q) & (q - k + 3 >= 0) & True      ->  k <= q
    where(k > q, False, t0[b, k] == 0)      ->  (k <= q) & (t0[b, k] == 0)

A predicate is a tree of `and` and `or` over two kinds of leaves: a bound on a sum of integers
(linear.py), and a fact that is or is not so. Negation goes into the leaves; a part that follows
from its neighbours is dropped. truth.py makes predicates of expressions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

from attn_compiler.ir.expr import FALSE, INDICES, SIZES, TRUE, Call, Const, Expr, Var
from attn_compiler.ir.linear import total
from attn_compiler.ir.pointwise import BINARY

_OPPOSITE = {"le": "ge", "ge": "le", "eq": "ne", "ne": "eq"}
COMPARE: dict[str, Callable[[float, float], bool]] = {
    op: BINARY[op] for op in ("eq", "ne", "lt", "le", "gt", "ge")
}


@dataclass(frozen=True, slots=True)
class Bound:
    """sum(part)  le / ge / eq / ne  value; coefficients without a divisor, the first positive."""

    part: tuple[tuple[Expr, int], ...]
    rel: str
    value: int


@dataclass(frozen=True, slots=True)
class Fact:
    """An expression of any other kind that `holds` or does not."""

    expr: Expr
    holds: bool


@dataclass(frozen=True, slots=True)
class Junction:
    """All (`and`) or at least one (`or`) of the parts."""

    op: str
    parts: tuple[Predicate, ...]


Predicate = Bound | Fact | Junction
ALWAYS = Junction("and", ())
NEVER = Junction("or", ())


def negate(p: Predicate) -> Predicate:
    if isinstance(p, Fact):
        return Fact(p.expr, not p.holds)
    if isinstance(p, Junction):
        return _junction("or" if p.op == "and" else "and", map(negate, p.parts))
    step = {"le": 1, "ge": -1}.get(p.rel, 0)
    return Bound(p.part, _OPPOSITE[p.rel], p.value + step)


@lru_cache(maxsize=8192)
def to_expr(p: Predicate) -> Expr:
    if isinstance(p, Junction):
        if not p.parts:
            return TRUE if p.op == "and" else FALSE
        return reduce(lambda a, b: Call(p.op, (a, b)), map(to_expr, p.parts))
    if isinstance(p, Fact):
        if isinstance(p.expr, Call) and p.expr.op == "eq" and not p.holds:
            return Call("ne", p.expr.args)
        return p.expr if p.holds else Call("not", (p.expr,))
    (first, size), *rest = p.part
    left = first if size == 1 else Call("mul", (Const(size), first))
    return Call(p.rel, (left, total([(a, -c) for a, c in rest], p.value)))


def conjuncts(p: Predicate) -> tuple[Predicate, ...]:
    return p.parts if isinstance(p, Junction) and p.op == "and" else (p,)


def disjuncts(p: Predicate) -> tuple[Predicate, ...]:
    return p.parts if isinstance(p, Junction) and p.op == "or" else (p,)


# ---------------------------------------------------------------- what the ranges say


def decided(p: Bound | Junction) -> Predicate:
    """True or false if the ranges of the indices already say so: 0 <= k < S."""
    if isinstance(p, Junction):
        return p
    high, low = _most(p.part), -_most([(a, -c) for a, c in p.part])
    if p.rel in ("eq", "ne"):
        same, apart = low == high == p.value, high < p.value or low > p.value
    else:
        same, apart = (
            (high <= p.value, low > p.value) if p.rel == "le" else (low >= p.value, high < p.value)
        )
    if p.rel == "ne":
        same, apart = apart, same
    return ALWAYS if same else NEVER if apart else p


def _most(part: Iterable[tuple[Expr, int]]) -> float:
    """The largest value of a sum, for every size of at least one."""
    sizes: dict[str, int] = {}
    result = 0
    for atom, c in part:
        if isinstance(atom, Var) and atom.name in SIZES:
            sizes[atom.name] = sizes.get(atom.name, 0) + c
        elif isinstance(atom, Var):
            size = SIZES[INDICES.index(atom.name)]
            sizes[size] = sizes.get(size, 0) + max(c, 0)
            result -= max(c, 0)
        elif isinstance(atom, Call) and atom.op == "mod" and isinstance(atom.args[1], Const):
            result += max(c, 0) * (int(atom.args[1].value) - 1)
        else:
            return math.inf
    return math.inf if any(c > 0 for c in sizes.values()) else result + sum(sizes.values())


# ---------------------------------------------------------------- what follows from what


def implies(a: Predicate, b: Predicate) -> bool:
    """Provably so; False means "not seen"."""
    if a == b:
        return True
    if isinstance(a, Junction) and a.op == "or":
        return all(implies(x, b) for x in a.parts)
    if isinstance(b, Junction) and b.op == "and":
        return all(implies(a, x) for x in b.parts)
    if isinstance(a, Junction) or isinstance(b, Junction):
        return any(implies(x, b) for x in conjuncts(a) if x is not a) or any(
            implies(a, x) for x in disjuncts(b) if x is not b
        )
    if not (isinstance(a, Bound) and isinstance(b, Bound)) or a.part != b.part:
        return False
    return _range_implies(a.rel, a.value, b.rel, b.value)


def _range_implies(rel: str, value: int, wanted: str, limit: int) -> bool:
    if rel == "eq":
        return COMPARE[wanted](value, limit)
    if wanted == "ne":
        return (rel == "le" and value < limit) or (rel == "ge" and value > limit)
    return rel == wanted and rel != "ne" and COMPARE[rel](value, limit)


def conjunction(parts: Iterable[Predicate]) -> Predicate:
    todo = _flat(parts)
    while True:
        kept = _prune(todo)
        if kept is None:
            return NEVER
        todo = list(kept)
        for i, part in enumerate(
            todo
        ):  # one after another: two parts must not each rely on the other
            todo[i] = _reduced(part, todo[:i] + todo[i + 1 :])
        todo = _flat(todo)
        if todo == kept:
            return kept[0] if len(kept) == 1 else _junction("and", kept)


def disjunction(parts: Iterable[Predicate]) -> Predicate:
    joint = negate(conjunction(map(negate, parts)))
    options = disjuncts(joint)
    # (a & x) | (a & y)  ->  a & (x | y): what every option demands is a conjunct of its own
    shared = (
        [p for p in conjuncts(options[0]) if all(p in conjuncts(o) for o in options[1:])]
        if options
        else []
    )
    if len(options) < 2 or not shared:
        return joint
    rest = (conjunction(p for p in conjuncts(o) if p not in shared) for o in options)
    return conjunction([*shared, disjunction(rest)])


def _junction(op: str, parts: Iterable[Predicate]) -> Junction:
    return Junction(op, tuple(sorted(parts, key=_rank)))


@lru_cache(maxsize=8192)
def _rank(p: Predicate) -> tuple[int, str]:
    return (Bound, Fact, Junction).index(type(p)), str(to_expr(p))


def _flat(parts: Iterable[Predicate]) -> list[Predicate]:
    result: list[Predicate] = []
    for part in parts:
        result.extend(p for p in conjuncts(part) if p not in result)
    return result


def _prune(parts: list[Predicate]) -> list[Predicate] | None:
    """Without the parts that follow from another; None if two exclude each other."""
    kept: list[Predicate] = []
    for part in parts:
        opposite = negate(part)
        if part == NEVER or any(implies(k, opposite) for k in kept):
            return None
        if any(implies(k, part) for k in kept):
            continue
        kept = [k for k in kept if not implies(part, k)]
        kept.append(part)
    met = _meet(kept)
    return kept if met == kept else _prune(met)


def _meet(parts: list[Predicate]) -> list[Predicate]:
    """x <= c and x >= c  ->  x == c;  x <= c and x != c  ->  x <= c - 1"""
    bounds = [p for p in parts if isinstance(p, Bound)]
    for a in bounds:
        for b in bounds:
            if a.part != b.part or a.value != b.value or a.rel not in ("le", "ge"):
                continue
            rest = [p for p in parts if p != a and p != b]
            if b.rel == _OPPOSITE[a.rel]:
                return [*rest, decided(Bound(a.part, "eq", a.value))]
            if b.rel == "ne":
                step = 1 if a.rel == "ge" else -1
                return [*rest, decided(Bound(a.part, a.rel, a.value + step))]
    return parts


def _reduced(p: Predicate, others: Sequence[Predicate]) -> Predicate:
    """A choice without options that its neighbours exclude, and without what they demand anyway."""
    if not (isinstance(p, Junction) and p.op == "or"):
        return p
    options: list[Predicate] = []
    for option in p.parts:
        if any(implies(o, negate(option)) for o in others):
            continue
        wanted = [c for c in conjuncts(option) if not any(implies(o, c) for o in others)]
        if any(implies(o, negate(c)) for c in wanted for o in others):
            continue
        options.append(conjunction(wanted) if len(wanted) != len(conjuncts(option)) else option)
    return p if tuple(options) == p.parts else disjunction(options)
