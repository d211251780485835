"""Boolean expressions in one form, whatever way they were spelled.

    ~(k > q) & (q - k + 3 >= 0) & True      ->  k <= q
    where(k > q, False, t0[b, k] == 0)      ->  (k <= q) & (t0[b, k] == 0)

A predicate is a tree of `and` and `or` over two kinds of leaves: a bound on a sum of integers (linear.py), and a fact
that is or is not so. Negation goes into the leaves; a part that follows from its neighbours is dropped. Indices are
known to lie within their sizes (0 <= k < S), so that `k >= 0` is true.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

from attn_compiler.ir.expr import FALSE, INDICES, SIZES, TRUE, Call, Const, Expr, Read, Var
from attn_compiler.ir.linear import Integers, Linear, total

_SPLITS = 64  # cases that one predicate may be taken apart into; beyond that a comparison stays whole
_OPPOSITE = {"le": "ge", "ge": "le", "eq": "ne", "ne": "eq"}
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
_SWAPPED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}


@dataclass(frozen=True, slots=True)
class Bound:
    """sum(part)  le / ge / eq / ne  value; the first coefficient is positive, all have no common divisor."""

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
        return _COMPARE[wanted](value, limit)
    if wanted == "ne":
        return (rel == "le" and value < limit) or (rel == "ge" and value > limit)
    return rel == wanted and rel != "ne" and _COMPARE[rel](value, limit)


def conjunction(parts: Iterable[Predicate]) -> Predicate:
    todo = _flat(parts)
    while True:
        kept = _prune(todo)
        if kept is None:
            return NEVER
        todo = list(kept)
        for i, part in enumerate(todo):  # one after another: two parts must not each rely on the other
            todo[i] = _reduced(part, todo[:i] + todo[i + 1 :])
        todo = _flat(todo)
        if todo == kept:
            return kept[0] if len(kept) == 1 else _junction("and", kept)


def disjunction(parts: Iterable[Predicate]) -> Predicate:
    joint = negate(conjunction(map(negate, parts)))
    options = disjuncts(joint)
    # (a & x) | (a & y)  ->  a & (x | y): what every option demands is a conjunct of its own
    shared = [p for p in conjuncts(options[0]) if all(p in conjuncts(o) for o in options[1:])] if options else []
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
                return [*rest, Bound(a.part, "eq", a.value)]
            if b.rel == "ne":
                return [*rest, Bound(a.part, a.rel, a.value + (1 if a.rel == "ge" else -1))]
    return parts


def _reduced(p: Predicate, others: Sequence[Predicate]) -> Predicate:
    """Of a choice: no options that its neighbours exclude, and in an option nothing that they already demand."""
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


# ---------------------------------------------------------------- reading


def predicate(expr: Expr, kinds: Sequence[str] = (), values: Mapping[str, int] | None = None) -> Predicate:
    """The truth of `expr` in its one form; `kinds` and `values` as for `linear.Integers`."""
    return _Reader(Integers(kinds, values)).truth(expr)


class _Reader:
    def __init__(self, integers: Integers) -> None:
        self.integers = integers
        self.splits = 0
        self.done: dict[int, tuple[Expr, Predicate]] = {}

    def truth(self, expr: Expr) -> Predicate:
        if id(expr) not in self.done:
            self.done[id(expr)] = (expr, self._truth(expr))
        return self.done[id(expr)][1]

    def _truth(self, expr: Expr) -> Predicate:
        if isinstance(expr, Const):
            return ALWAYS if expr.value else NEVER
        kind = self.integers.kind(expr)
        if isinstance(expr, Read) and kind == "bool":
            return Fact(self.integers.normal(expr), True)
        if isinstance(expr, Call) and (found := self._logic(expr, kind)) is not None:
            return found
        return self._compare("ne", expr, Const(0))

    def _logic(self, expr: Call, kind: str) -> Predicate | None:
        op, args = expr.op, expr.args
        if op in _COMPARE:
            return self._compare(op, *args)
        if op == "not":
            return negate(self.truth(args[0]))
        if op in ("bool", "float", "neg", "abs") or (op == "int" and self.integers.kind(args[0]) in ("bool", "int")):
            return self.truth(args[0])
        if op == "where":
            return self._choice(args[0], self.truth(args[1]), self.truth(args[2]))
        if op == "xor":
            other = self.truth(args[1])
            return self._choice(args[0], negate(other), other)
        if op == "or" or (kind == "bool" and op in ("add", "max")):
            return disjunction(map(self.truth, args))
        if op == "and" or (kind == "bool" and op == "min") or (kind in ("bool", "int") and op == "mul"):
            return conjunction(map(self.truth, args))
        return None

    def _choice(self, condition: Expr, yes: Predicate, no: Predicate) -> Predicate:
        if yes == no:
            return yes
        asked = self.truth(condition)
        return disjunction((conjunction((asked, yes)), conjunction((negate(asked), no))))

    def _compare(self, op: str, left: Expr, right: Expr) -> Predicate:
        if isinstance(left, Call) and left.op == "where" and self._may_split():
            return self._choice(left.args[0], *(self._compare(op, v, right) for v in left.args[1:]))
        if isinstance(right, Call) and right.op == "where" and self._may_split():
            return self._compare(_SWAPPED[op], right, left)
        a, b = self.integers.linear(left), self.integers.linear(right)
        if a is None or b is None:
            return self._opaque(op, left, right)
        gap = a.plus(b, -1)
        if op in ("gt", "ge"):
            op, gap = _SWAPPED[op], gap.times(-1)
        return self._bound("le", gap.plus(Linear({}, 1))) if op == "lt" else self._bound(op, gap)

    def _may_split(self) -> bool:
        self.splits += 1
        return self.splits <= _SPLITS

    def _opaque(self, op: str, left: Expr, right: Expr) -> Predicate:
        """A comparison of numbers that need not be integers; NaN is neither less nor not less."""
        if isinstance(left, Const) and isinstance(right, Const):
            return ALWAYS if _COMPARE[op](left.value, right.value) else NEVER
        if op in ("eq", "ne"):
            a, b = _equation(self.integers.normal(left), self.integers.normal(right))
            return Fact(Call("eq", (a, b)), op == "eq")
        if isinstance(left, Const) or (op in ("gt", "ge") and not isinstance(right, Const)):
            op, left, right = _SWAPPED[op], right, left
        return Fact(Call(op, (self.integers.normal(left), self.integers.normal(right))), True)

    # ------------------------------------------------------------ bounds

    def _bound(self, rel: str, gap: Linear) -> Predicate:
        """gap  rel  0"""
        gap = self.integers.shorter(gap)
        if rel == "le" and (common := math.gcd(*gap.terms.values())) > 1:
            gap = Linear({a: c // common for a, c in gap.terms.items()}, -(-gap.const // common))
        if (found := self._by_cases(rel, gap)) is not None:
            return found
        if rel == "le" and (longer := self._no_quotient(gap)) is not None:
            return self._bound("le", longer)
        return _decided(_canonical(rel, gap))

    def _by_cases(self, rel: str, gap: Linear) -> Predicate | None:
        """where, min, max and abs inside a sum are cases of sums without them."""
        for atom, coefficient in gap.part():
            if not (isinstance(atom, Call) and atom.op in ("where", "min", "max", "abs")) or not self._may_split():
                continue
            if atom.op == "where":
                yes, no = (self._bound(rel, self._replaced(gap, atom, v)) for v in atom.args[1:])
                return self._choice(atom.args[0], yes, no)
            if rel != "le":
                both = conjunction((self._bound("le", gap), self._bound("le", gap.times(-1))))
                return both if rel == "eq" else negate(both)
            values = atom.args if atom.op != "abs" else (*atom.args, Call("neg", atom.args))
            cases = [self._bound("le", self._replaced(gap, atom, v)) for v in values]
            return (conjunction if (atom.op == "min") != (coefficient > 0) else disjunction)(cases)
        return None

    def _replaced(self, gap: Linear, atom: Expr, value: Expr) -> Linear:
        found = self.integers.linear(value)
        assert found is not None
        return gap.replace(atom, found)

    def _no_quotient(self, gap: Linear) -> Linear | None:
        """x // c + r <= 0  ->  x <= c * -r + c - 1;   r - x // c <= 0  ->  x >= c * r"""
        for atom, sign in gap.part():
            if not (isinstance(atom, Call) and atom.op == "floordiv" and sign in (1, -1)):
                continue
            inner, by = map(self.integers.linear, atom.args)
            if inner is None or by is None or by.terms or by.const <= 0:
                continue
            rest = gap.replace(atom, Linear({}))
            return rest.times(by.const).plus(inner, sign).plus(Linear({}, (1 - by.const) * (sign == 1)))
        return None


def _equation(left: Expr, right: Expr) -> tuple[Expr, Expr]:
    """Both sides in a fixed order, a constant last; `x - y == 0` is `x == y`."""
    if isinstance(left, Const):
        left, right = right, left
    if isinstance(right, Const) and math.isfinite(right.value) and right.value == int(right.value):
        right = Const(int(right.value))
        if right == Const(0) and isinstance(left, Call) and left.op == "sub":
            return _equation(*left.args)
    elif not isinstance(right, Const) and str(right) < str(left):
        left, right = right, left
    return left, right


def _canonical(rel: str, gap: Linear) -> Bound | Junction:
    part, value = gap.part(), -gap.const
    if not part:
        return ALWAYS if _COMPARE[rel](0, value) else NEVER
    common = math.gcd(*(c for _, c in part))
    if rel != "le" and value % common:
        return NEVER if rel == "eq" else ALWAYS
    sign = 1 if part[0][1] > 0 else -1
    rel = rel if sign > 0 or rel != "le" else "ge"
    return Bound(tuple((a, sign * c // common) for a, c in part), rel, sign * (value // common))


def _decided(p: Bound | Junction) -> Predicate:
    """True or false if the ranges of the indices already say so."""
    if isinstance(p, Junction):
        return p
    high, low = _most(p.part), -_most([(a, -c) for a, c in p.part])
    if p.rel in ("eq", "ne"):
        same, apart = low == high == p.value, high < p.value or low > p.value
    else:
        same, apart = (high <= p.value, low > p.value) if p.rel == "le" else (low >= p.value, high < p.value)
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
