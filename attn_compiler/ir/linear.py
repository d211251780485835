"""Integer expressions as sums: the common form under every comparison of a mask.

    q - k + 0 >= 0   ->   {k: -1, q: 1} + 0           (k // 8) * 8 + k % 8   ->   {k: 1} + 0

A sum is made of atoms: variables, sizes, run-time integers, and whatever is an integer but not a
sum (`k // 128`, `t0[b]`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from attn_compiler.ir.expr import Call, Const, Expr, Int, Read, Var, children, depends

_BOOLEAN = frozenset(("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not", "bool"))
_SAME_KIND = frozenset(
    ("add", "sub", "mul", "min", "max", "mod", "floordiv", "neg", "abs", "relu", "square")
)
_ALSO_BOOLEAN = frozenset(
    ("add", "mul", "min", "max", "where")
)  # of booleans they are or, and, and, or, a choice
_ROUNDING = frozenset(("floor", "ceil", "trunc"))


class Linear:
    """sum(coefficient * atom) + const, a value."""

    __slots__ = ("const", "terms")

    def __init__(self, terms: Mapping[Expr, int], const: int = 0) -> None:
        self.terms = terms
        self.const = const

    def plus(self, other: Linear, factor: int = 1) -> Linear:
        terms = dict(self.terms)
        for atom, coefficient in other.terms.items():
            total = terms.pop(atom, 0) + factor * coefficient
            if total:
                terms[atom] = total
        return Linear(terms, self.const + factor * other.const)

    def times(self, factor: int) -> Linear:
        return Linear(
            {a: c * factor for a, c in self.terms.items()} if factor else {}, self.const * factor
        )

    def replace(self, atom: Expr, value: Linear) -> Linear:
        rest = {a: c for a, c in self.terms.items() if a != atom}
        return Linear(rest, self.const).plus(value, self.terms[atom])

    def part(self) -> tuple[tuple[Expr, int], ...]:
        """The terms in their fixed order."""
        return tuple(sorted(self.terms.items(), key=lambda term: rank(term[0])))

    def expr(self) -> Expr:
        return total(self.part(), self.const)


@lru_cache(maxsize=8192)
def rank(expr: Expr) -> tuple[int, str]:
    """The order of terms and of the sides of a comparison: first what moves with the key column."""
    for place, name in enumerate("kqhb"):
        if expr == Var(name):
            return 2 * place, ""
        if depends(expr, name):
            return 2 * place + 1, str(expr)
    return (9 if isinstance(expr, Const) else 8), str(expr)


def total(part: Iterable[tuple[Expr, int]], const: int = 0) -> Expr:
    """The sum as an expression, positive terms first."""
    ordered = sorted(part, key=lambda term: term[1] < 0)
    result: Expr | None = None
    if const > 0 and (not ordered or ordered[0][1] < 0):
        result, const = Const(const), 0
    for atom, coefficient in ordered:
        size = abs(coefficient)
        piece = atom if size == 1 else Call("mul", (Const(size), atom))
        if result is None:
            result = piece if coefficient > 0 else Call("neg", (piece,))
        else:
            result = Call("add" if coefficient > 0 else "sub", (result, piece))
    if result is None:
        return Const(const)
    return Call("add" if const > 0 else "sub", (result, Const(abs(const)))) if const else result


class Integers:
    """Reads integer expressions as sums.

    Args:
        kinds: "bool", "int" or "float" for the tensor of each slot; missing or "" = not known.
        values: sizes (by name) and run-time integers (`n0`) that are known now.
    """

    def __init__(self, kinds: Sequence[str] = (), values: Mapping[str, int] | None = None) -> None:
        self.kinds = kinds
        self.values = values or {}
        # by identity, since shared nodes are common; the node is kept so that its id stays its own
        self._linear: dict[int, tuple[Expr, Linear | None]] = {}
        self._kind: dict[int, tuple[Expr, str]] = {}

    def kind(self, expr: Expr) -> str:
        """ "bool", "int", "float", or "" where it depends on a tensor of unknown kind."""
        if id(expr) not in self._kind:
            self._kind[id(expr)] = (expr, self._kind_of(expr))
        return self._kind[id(expr)][1]

    def _kind_of(self, expr: Expr) -> str:
        if isinstance(expr, Const):
            return type(expr.value).__name__
        if isinstance(expr, Var | Int):
            return "int"
        if isinstance(expr, Read):
            return self.kinds[expr.slot] if expr.slot < len(self.kinds) else ""
        if not isinstance(expr, Call):
            return "float"
        if expr.op in _BOOLEAN:
            return "bool"
        if expr.op in ("int", "float"):
            return expr.op
        if expr.op == "where" or expr.op in _SAME_KIND:
            joint = _joint(self.kind(a) for a in expr.args[expr.op == "where" :])
            return "" if joint == "bool" and expr.op not in _ALSO_BOOLEAN else joint
        if expr.op in _ROUNDING and self.kind(expr.args[0]) == "int":
            return "int"
        return "float"

    def linear(self, expr: Expr) -> Linear | None:
        """The sum, or None where the value need not be an integer."""
        if id(expr) not in self._linear:
            self._linear[id(expr)] = (expr, self._linear_of(expr))
        return self._linear[id(expr)][1]

    def normal(self, expr: Expr) -> Expr:
        """The same value with every integer sum in its fixed form."""
        if isinstance(expr, Const) or not children(expr):
            return expr
        kind = self.kind(expr)
        if kind == "int" and (found := self.linear(expr)) is not None:
            return found.expr()
        if isinstance(expr, Read):
            return Read(expr.slot, tuple(map(self.normal, expr.index)))
        assert isinstance(expr, Call)
        return Call(expr.op, tuple(map(self.normal, expr.args)))

    def shorter(self, value: Linear) -> Linear:
        """x - x % c  ->  c * (x // c), where that leaves fewer terms."""
        for atom in [a for a in value.terms if isinstance(a, Call) and a.op == "mod"]:
            assert isinstance(atom, Call)
            inner, by = map(self.linear, atom.args)
            if inner is None or by is None or by.terms:
                continue
            other = value.replace(atom, inner.plus(_quotient(inner, by.const), -by.const))
            if len(other.terms) < len(value.terms):
                value = other
        return value

    def _linear_of(self, expr: Expr) -> Linear | None:
        if isinstance(expr, Const):
            return (
                Linear({}, int(expr.value))
                if math.isfinite(expr.value) and expr.value == int(expr.value)
                else None
            )
        if isinstance(expr, Var | Int):
            known = self.values.get(str(expr))
            return Linear({expr: 1}) if known is None else Linear({}, known)
        if self.kind(expr) == "bool":
            return Linear({Call("where", (expr, Const(1), Const(0))): 1})
        if isinstance(expr, Read) and self.kind(expr) == "int":
            return Linear({Read(expr.slot, tuple(map(self.normal, expr.index))): 1})
        return self._call(expr) if isinstance(expr, Call) else None

    def _call(self, expr: Call) -> Linear | None:
        if expr.op in ("floor", "ceil", "trunc", "int"):
            found = self._rounded(expr)
        elif expr.op == "where":
            found = self._where(expr)
        else:
            args = [found for a in expr.args if (found := self.linear(a)) is not None]
            whole = len(args) == len(expr.args)
            found = (
                (self._product(*args) if expr.op == "mul" else _arithmetic(expr.op, args))
                if whole
                else None
            )
        if found is None and self.kind(expr) == "int":
            return Linear({Call(expr.op, tuple(map(self.normal, expr.args))): 1})
        return found

    def _product(self, left: Linear, right: Linear) -> Linear:
        if not left.terms or not right.terms:
            return right.times(left.const) if not left.terms else left.times(right.const)
        for one, other in ((left, right), (right, left)):
            atom = next(iter(one.terms))
            if len(one.terms) == 1 and isinstance(atom, Call) and atom.op == "where":
                # where(c, x, y) * z  ->  where(c, x * z, y * z): of conditions as 0 and 1 the `and`
                values = [
                    one.replace(atom, v) for a in atom.args[1:] if (v := self.linear(a)) is not None
                ]
                yes, no = (self._product(v, other).expr() for v in values)
                return Linear({Call("where", (atom.args[0], yes, no)): 1})
        return Linear({Call("mul", tuple(sorted((left.expr(), right.expr()), key=str))): 1})

    def _where(self, expr: Call) -> Linear | None:
        yes, no = self.linear(expr.args[1]), self.linear(expr.args[2])
        if yes is None or no is None:
            return None
        branches = (yes.expr(), no.expr())
        return (
            yes
            if branches[0] == branches[1]
            else Linear({Call("where", (expr.args[0], *branches)): 1})
        )

    def _rounded(self, expr: Call) -> Linear | None:
        """A rounded quotient of integers; rounding what is an integer already does nothing."""
        inner = expr.args[0]
        while isinstance(inner, Call) and inner.op == "float":
            inner = inner.args[0]
        if not (isinstance(inner, Call) and inner.op == "div"):
            return self.linear(inner)
        above, below = (self.linear(a) for a in inner.args)
        if above is None or below is None or below.terms or below.const <= 0:
            return None
        if expr.op == "ceil":
            return _quotient(above.times(-1), below.const).times(-1)
        return _quotient(above, below.const) if expr.op == "floor" or _not_negative(above) else None


def _joint(kinds: Iterable[str]) -> str:
    found = set(kinds)
    for kind in ("float", "", "int"):
        if kind in found:
            return kind
    return "bool"


def _not_negative(value: Linear) -> bool:
    return value.const >= 0 and all(c > 0 and isinstance(a, Var) for a, c in value.terms.items())


def _arithmetic(op: str, args: list[Linear]) -> Linear | None:
    first = args[0]
    if op == "float":
        return first
    if op in ("add", "sub"):
        return first.plus(args[1], 1 if op == "add" else -1)
    if op == "neg":
        return first.times(-1)
    if op == "relu":
        return _extreme("max", first, Linear({}, 0))
    if op == "abs":
        return _magnitude(first)
    if op in ("min", "max"):
        return _extreme(op, first, args[1])
    if op in ("floordiv", "mod") and not args[1].terms and args[1].const:
        return (
            _quotient(first, args[1].const)
            if op == "floordiv"
            else _remainder(first, args[1].const)
        )
    return None


def _extreme(op: str, left: Linear, right: Linear) -> Linear:
    gap = left.plus(right, -1)
    if not gap.terms:
        return left if (gap.const >= 0) == (op == "max") else right
    return Linear({Call(op, tuple(sorted((left.expr(), right.expr()), key=str))): 1})


def _magnitude(value: Linear) -> Linear:
    if not value.terms:
        return Linear({}, abs(value.const))
    return Linear(
        {Call("abs", ((value if value.part()[0][1] > 0 else value.times(-1)).expr(),)): 1}
    )


def _quotient(value: Linear, by: int) -> Linear:
    """value // by, whole multiples taken out: (8 * k + q + 9) // 8 = k + (q + 1) // 8 + 1"""
    if by < 0:
        value, by = value.times(-1), -by
    whole = Linear({a: c // by for a, c in value.terms.items() if c % by == 0}, value.const // by)
    rest = Linear({a: c for a, c in value.terms.items() if c % by}, value.const % by)
    if not rest.terms:
        return whole
    common = math.gcd(by, *rest.terms.values())
    rest = Linear({a: c // common for a, c in rest.terms.items()}, rest.const // common)
    return whole.plus(Linear({Call("floordiv", (rest.expr(), Const(by // common))): 1}))


def _remainder(value: Linear, by: int) -> Linear | None:
    if by < 0:
        return None
    rest = Linear({a: c % by for a, c in value.terms.items() if c % by}, value.const % by)
    return Linear({Call("mod", (rest.expr(), Const(by))): 1}) if rest.terms else rest
