"""The truth of a boolean expression as a predicate: every spelling of a comparison in one form.

    q - k > -1         ->  k <= q                       min(k, q) == k      ->  k <= q
    abs(q - k) <= 64   ->  k <= q + 64, k >= q - 64     int(a) * int(b) != 0  ->  a, b

Indices are known to lie within their sizes (0 <= k < S), so that `k >= 0` is true.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from attn_compiler.ir.expr import Call, Const, Expr, Read
from attn_compiler.ir.linear import Integers, Linear, rank
from attn_compiler.ir.predicate import (
    ALWAYS,
    COMPARE,
    NEVER,
    Bound,
    Fact,
    Junction,
    Predicate,
    conjunction,
    decided,
    disjunction,
    negate,
)

_SPLITS = (
    64  # cases that one predicate may be taken apart into; beyond that a comparison stays whole
)
_SWAPPED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}


def truth(
    expr: Expr, kinds: Sequence[str] = (), values: Mapping[str, int] | None = None
) -> Predicate:
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
        if op in COMPARE:
            return self._compare(op, *args)
        if op == "not":
            return negate(self.truth(args[0]))
        if op in ("bool", "float", "neg", "abs") or (
            op == "int" and self.integers.kind(args[0]) in ("bool", "int")
        ):
            return self.truth(args[0])
        if op == "where":
            return self._choice(args[0], self.truth(args[1]), self.truth(args[2]))
        if op == "xor":
            other = self.truth(args[1])
            return self._choice(args[0], negate(other), other)
        if op == "or" or (kind == "bool" and op in ("add", "max")):
            return disjunction(map(self.truth, args))
        if (
            op == "and"
            or (kind == "bool" and op == "min")
            or (kind in ("bool", "int") and op == "mul")
        ):
            return conjunction(map(self.truth, args))
        return None

    def _choice(self, condition: Expr, yes: Predicate, no: Predicate) -> Predicate:
        if yes == no:
            return yes
        asked = self.truth(condition)
        return disjunction((conjunction((asked, yes)), conjunction((negate(asked), no))))

    def _compare(self, op: str, left: Expr, right: Expr) -> Predicate:
        a, b = self.integers.linear(left), self.integers.linear(right)
        if a is not None and b is not None:
            gap = a.plus(b, -1)
            if op in ("gt", "ge"):
                op, gap = _SWAPPED[op], gap.times(-1)
            return (
                self._bound("le", gap.plus(Linear({}, 1))) if op == "lt" else self._bound(op, gap)
            )
        left, right = (s if x is None else x.expr() for s, x in ((left, a), (right, b)))
        if isinstance(left, Call) and left.op == "where" and self._may_split():
            return self._choice(left.args[0], *(self._compare(op, v, right) for v in left.args[1:]))
        if isinstance(right, Call) and right.op == "where" and self._may_split():
            return self._compare(_SWAPPED[op], right, left)
        return self._opaque(op, left, right)

    def _may_split(self) -> bool:
        self.splits += 1
        return self.splits <= _SPLITS

    def _opaque(self, op: str, left: Expr, right: Expr) -> Predicate:
        """A comparison of numbers that need not be integers; NaN is neither less nor not less."""
        if isinstance(left, Const) and isinstance(right, Const):
            return ALWAYS if COMPARE[op](left.value, right.value) else NEVER
        left, right = self.integers.normal(left), self.integers.normal(right)
        if op in ("eq", "ne"):
            return Fact(Call("eq", _equation(left, right)), op == "eq")
        if rank(right) < rank(left):
            op, left, right = _SWAPPED[op], right, left
        return Fact(Call(op, (left, right)), True)

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
        return decided(_canonical(rel, gap))

    def _by_cases(self, rel: str, gap: Linear) -> Predicate | None:
        """where, min, max and abs inside a sum are cases of sums without them."""
        for atom, coefficient in gap.part():
            if (
                not (isinstance(atom, Call) and atom.op in ("where", "min", "max", "abs"))
                or not self._may_split()
            ):
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
            return (
                rest.times(by.const)
                .plus(inner, sign)
                .plus(Linear({}, (1 - by.const) * (sign == 1)))
            )
        return None


def _equation(left: Expr, right: Expr) -> tuple[Expr, Expr]:
    """Both sides in a fixed order, a constant last; `x - y == 0` is `x == y`."""
    if rank(right) < rank(left):
        left, right = right, left
    if isinstance(right, Const) and math.isfinite(right.value) and right.value == int(right.value):
        right = Const(int(right.value))
        if right == Const(0) and isinstance(left, Call) and left.op == "sub":
            return _equation(*left.args)
    return left, right


def _canonical(rel: str, gap: Linear) -> Bound | Junction:
    part, value = gap.part(), -gap.const
    if not part:
        return ALWAYS if COMPARE[rel](0, value) else NEVER
    common = math.gcd(*(c for _, c in part))
    if rel != "le" and value % common:
        return NEVER if rel == "eq" else ALWAYS
    sign = 1 if part[0][1] > 0 else -1
    rel = rel if sign > 0 or rel != "le" else "ge"
    return Bound(tuple((a, sign * c // common) for a, c in part), rel, sign * (value // common))
