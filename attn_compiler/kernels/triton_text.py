"""A score program as statements of Triton.

    30.0 * tanh(dot / 30.0)   ->   v0 = s / 30.0
                                   v1 = _tanh(v0)
                                   v2 = 30.0 * v1

Names in the generated text: `b` a number, `h` a number or one per row, `q` [rows, 1], `k`
[1, keys], sizes B H T S, integers n0 ..., `s` the scaled products [rows, keys] in float32, and per
tensor of slot i its pointer t0, its strides t0_s0 ... and its lengths t0_l0 ....

What depends neither on the product nor on the index that a loop runs over stands before the loop.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from attn_compiler.ir.expr import (
    Call,
    Const,
    Dot,
    Expr,
    Int,
    Read,
    Var,
    depends,
    walk,
)
from attn_compiler.ir.pointwise import REAL

Kind = Literal["bool", "int", "float"]
_ORDER: tuple[Kind, ...] = ("bool", "int", "float")
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_LOGIC = {"and": "&", "or": "|", "xor": "^"}
_ARITHMETIC = {"add": "+", "sub": "-", "mul": "*"}
_CALLS = {
    "abs": "tl.abs", "exp": "tl.exp", "exp2": "tl.exp2", "log": "tl.log", "log2": "tl.log2",
    "sqrt": "tl.sqrt", "rsqrt": "tl.rsqrt", "sin": "tl.sin", "cos": "tl.cos",
    "sigmoid": "tl.sigmoid", "erf": "tl.erf", "tanh": "_tanh", "sign": "_sign",
}  # fmt: skip
_TYPES = {"int": "tl.int32", "float": "tl.float32"}
# floor and its kind leave integers as they are
_ROUNDING = {"floor": "tl.floor", "ceil": "tl.ceil", "trunc": "_trunc"}
UNPRINTABLE = frozenset({"pow"})


@dataclass
class Lines:
    """Statements in order: `outer` stand before the loop over the indices `inner`, `body` in it.

    The read of slot `made` is no load: the kernel holds it as `made`, and its gradient in a tensor
    of the rows from `first_row` on.
    """

    kinds: Sequence[Kind]
    inner: str = "k"
    outer: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    _outer_names: dict[Expr, str] = field(default_factory=dict)
    _body_names: dict[Expr, str] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    made: int | None = None

    def name(self, expr: Expr) -> str:
        """The name (or the literal) that holds the value of `expr`; adds what computes it.

        Raises:
            KeyError: an operation that has no text, see `UNPRINTABLE`.
        """
        names = self._body_names if self._in_loop(expr) else self._outer_names
        if expr not in names:
            names[expr] = self._print(expr)
        return names[expr]

    def fork(self) -> Lines:
        """Other statements in the loop, the same before it."""
        outer, numbers = self._outer_names, self._numbers
        return Lines(self.kinds, self.inner, self.outer, [], outer, {}, numbers, self.made)

    def _in_loop(self, expr: Expr) -> bool:
        return depends(expr, *self.inner) or any(isinstance(node, Dot) for node in walk(expr))

    def _print(self, expr: Expr) -> str:
        if isinstance(expr, Const):
            return _number(expr.value)
        if isinstance(expr, Var):
            return expr.name
        if isinstance(expr, Int):
            return f"n{expr.slot}"
        if isinstance(expr, Dot):
            return "s"
        if isinstance(expr, Read) and expr.slot == self.made:
            return "made"
        text = self._read(expr) if isinstance(expr, Read) else self._call(expr)
        name = f"v{next(self._numbers)}"
        (self.body if self._in_loop(expr) else self.outer).append(f"{name} = {text}")
        return name

    # ------------------------------------------------------------ reads

    def _read(self, read: Read) -> str:
        tensor, checks = f"t{read.slot}", self.edges(read)
        terms = [f"{i} * {tensor}_s{axis}" for axis, i in enumerate(self.indices(read))]
        mask = f", mask={' & '.join(checks)}, other=0" if checks else ""
        value = f"tl.load({' + '.join([tensor, *terms])}{mask})"
        kind = self.kinds[read.slot]
        if kind == "bool":
            return f"{value} != 0"
        return f"tl.cast({value}, tl.float32)" if kind == "float" else value

    def indices(self, read: Read) -> list[str]:
        """Where a read looks, one name per dimension of its tensor."""
        return [
            index.name
            if isinstance(index, Var) and index.name in "bhqk"
            else f"_inside({self.name(index)}, t{read.slot}_l{axis})"
            for axis, index in enumerate(read.index)
        ]

    @staticmethod
    def edges(read: Read) -> list[str]:
        """Conditions that keep a read inside of its tensor at the edge of the grid."""
        return [
            f"({name} < {size})"
            for name, size in (("q", "T"), ("k", "S"))
            if any(index == Var(name) for index in read.index)
        ]

    def accumulate(self, read: Read, gradient: str) -> list[str]:
        """Statements that add a gradient [rows, keys] to where a read looked, dt0 for t0."""
        tensor = f"dt{read.slot}"
        looks = self.indices(read)
        if read.slot == self.made:
            looks = ["(q - first_row)" if name == "q" else name for name in looks]
        terms = [f"{i} * {tensor}_s{axis}" for axis, i in enumerate(looks)]
        axes = [axis for axis, name in enumerate("qk") if not depends(read, name)]
        for axis in axes:
            gradient = f"tl.sum({gradient}, {axis}, keep_dims=True)"
        place = " + ".join([tensor, *terms])
        if len(axes) == 2:
            place = f"{place} + tl.zeros((1, 1), tl.int32)"
        checks = self.edges(read)
        mask = f", mask={' & '.join(checks)}" if checks else ""
        return [f'tl.atomic_add({place}, {gradient}{mask}, sem="relaxed")']

    # ------------------------------------------------------------ operations

    def _call(self, expr: Expr) -> str:
        assert isinstance(expr, Call)
        op = expr.op
        for table, text in _TEXTS:
            if op in table:
                return text(self, expr)
        raise KeyError(op)

    def as_kind(self, expr: Expr, kind: Kind) -> str:
        """The value of `expr` as a number of this kind or a wider one, or as a condition."""
        name, own = self.name(expr), kind_of(expr, self.kinds)
        if kind == "bool":
            return name if own == "bool" else f"({name} != 0)"
        if _ORDER.index(own) >= _ORDER.index(kind) and own != "bool":
            return name
        if isinstance(expr, Const):
            return _number(float(expr.value) if kind == "float" else int(expr.value))
        return f"tl.cast({name}, {_TYPES[kind]})"

    def _joint(self, expr: Call) -> tuple[Kind, list[str]]:
        kind = max((kind_of(a, self.kinds) for a in expr.args), key=_ORDER.index)
        return kind, [self.as_kind(a, kind if kind != "bool" else "int") for a in expr.args]

    def _infix(self, expr: Call) -> str:
        _, (left, right) = self._joint(expr)
        return f"{left} {(_ARITHMETIC | _COMPARE)[expr.op]} {right}"

    def _logical(self, expr: Call) -> str:
        left, right = (self.as_kind(a, "bool") for a in expr.args)
        return f"{left} {_LOGIC[expr.op]} {right}"

    def _division(self, expr: Call) -> str:
        kind, (left, right) = self._joint(expr)
        if expr.op == "div":
            left, right = (self.as_kind(a, "float") for a in expr.args)
            return f"{left} / {right}"
        if kind == "float":
            whole = f"tl.floor({left} / {right})"
            return whole if expr.op == "floordiv" else f"{left} - {right} * {whole}"
        return f"_{expr.op}({left}, {right})"

    def _extreme(self, expr: Call) -> str:
        _, (left, right) = self._joint(expr)
        return f"tl.{expr.op}imum({left}, {right}, propagate_nan=tl.PropagateNan.ALL)"

    def _choice(self, expr: Call) -> str:
        condition, *sides = expr.args
        kind = max((kind_of(a, self.kinds) for a in sides), key=_ORDER.index)
        yes, no = (self.as_kind(a, kind) for a in sides)
        return f"tl.where({self.as_kind(condition, 'bool')}, {yes}, {no})"

    def _unary(self, expr: Call) -> str:
        (inner,) = expr.args
        op, kind = expr.op, kind_of(inner, self.kinds)
        if op == "not":
            return f"{self.as_kind(inner, 'bool')} == 0"
        if op in ("bool", "int", "float"):
            return self._cast(op, inner)  # type: ignore[arg-type]
        if op in _ROUNDING:
            return f"{_ROUNDING[op]}({self.name(inner)})" if kind == "float" else self.name(inner)
        name = self.as_kind(inner, "float" if op in REAL else "int")
        if op in _CALLS:
            return f"{_CALLS[op]}({name})"
        return {
            "neg": f"-{name}",
            "square": f"{name} * {name}",
            "reciprocal": f"1.0 / {name}",
            "relu": f"tl.maximum({name}, {_number(0.0 if kind == 'float' else 0)},"
            " propagate_nan=tl.PropagateNan.ALL)",
        }[op]

    def _cast(self, kind: Kind, inner: Expr) -> str:
        if kind == "bool":
            return self.as_kind(inner, "bool")
        name = self.name(inner)
        return name if kind_of(inner, self.kinds) == kind else f"tl.cast({name}, {_TYPES[kind]})"


_UNARY = frozenset(
    {"not", "neg", "square", "reciprocal", "relu", "bool", "int", "float", *_CALLS, *_ROUNDING}
)
_TEXTS: tuple[tuple[Collection[str], Callable[[Lines, Call], str]], ...] = (
    (_ARITHMETIC.keys() | _COMPARE.keys(), Lines._infix),
    (_LOGIC.keys(), Lines._logical),
    (frozenset({"div", "floordiv", "mod"}), Lines._division),
    (frozenset({"min", "max"}), Lines._extreme),
    (frozenset({"where"}), Lines._choice),
    (_UNARY, Lines._unary),
)


def kind_of(expr: Expr, kinds: Sequence[Kind]) -> Kind:
    """What `expr` computes; tensors are of the kinds given per slot."""
    if isinstance(expr, Const):
        return (
            "bool"
            if isinstance(expr.value, bool)
            else "float"
            if isinstance(expr.value, float)
            else "int"
        )
    if isinstance(expr, Read):
        return kinds[expr.slot]
    if isinstance(expr, Dot):
        return "float"
    if not isinstance(expr, Call):
        return "int"
    if expr.op in _COMPARE or expr.op in _LOGIC or expr.op in ("not", "bool"):
        return "bool"
    if expr.op in REAL or expr.op == "float":
        return "float"
    if expr.op == "int":
        return "int"
    args = expr.args[1:] if expr.op == "where" else expr.args
    found = max((kind_of(a, kinds) for a in args), key=_ORDER.index)
    return "int" if found == "bool" and expr.op != "where" else found


def _number(value: bool | int | float) -> str:
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return f"({value!r})" if value < 0 else repr(value)
