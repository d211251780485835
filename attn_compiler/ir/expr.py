"""The expression language of score programs and masks.

Between q.k^T and its softmax, one attention computes one expression over

    b h q k        index variables: batch, query head, query row, key column
    B H T S        sizes: batch, query heads, query rows, key columns
    dot            the scaled product  scale * sum_d q[b,h,q,d] * k[b,g,k,d]
    n0, n1, ...    integers known when the operator runs
    t0[b, k], ...  a read of a tensor: one index expression per dimension

and it is written as a Python expression, so that people, operators and caches share one text:

    where((k <= q) & t0[b, k], 30.0 * tanh(dot / 30.0), -inf)

Arithmetic on indices is exact; `//` and `%` round towards minus infinity as in Python.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from attn_compiler.ir.pointwise import BINARY, KINDS, OPS, apply

INDICES = ("b", "h", "q", "k")
SIZES = ("B", "H", "T", "S")

_INFIX = {
    "eq": ("==", 1),
    "ne": ("!=", 1),
    "lt": ("<", 1),
    "le": ("<=", 1),
    "gt": (">", 1),
    "ge": (">=", 1),
    "or": ("|", 2),
    "xor": ("^", 3),
    "and": ("&", 4),
    "add": ("+", 6),
    "sub": ("-", 6),
    "mul": ("*", 7),
    "div": ("/", 7),
    "floordiv": ("//", 7),
    "mod": ("%", 7),
}
_PREFIX = {"not": "~", "neg": "-"}


class Expr:
    """A node of the tree; `str()` is its text and `parse` reads it back."""

    __slots__ = ()

    def __str__(self) -> str:
        return _text(self, 0)


@dataclass(frozen=True, slots=True, eq=False)
class Const(Expr):
    value: bool | int | float

    # 1, 1.0 and True are three different constants
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Const) and repr(other.value) == repr(self.value)

    def __hash__(self) -> int:
        return hash(repr(self.value))

    __str__ = Expr.__str__


@dataclass(frozen=True, slots=True)
class Var(Expr):
    """An index variable (b h q k) or a size (B H T S)."""

    name: str
    __str__ = Expr.__str__


@dataclass(frozen=True, slots=True)
class Int(Expr):
    """An integer handed to the operator at run time."""

    slot: int
    __str__ = Expr.__str__


@dataclass(frozen=True, slots=True)
class Dot(Expr):
    """The scaled product of the query row and the key row."""

    __str__ = Expr.__str__


@dataclass(frozen=True, slots=True)
class Read(Expr):
    """One element of the tensor in `slot`, one index expression per dimension."""

    slot: int
    index: tuple[Expr, ...]
    __str__ = Expr.__str__


@dataclass(frozen=True, slots=True)
class Call(Expr):
    """A pointwise operation of `OPS`."""

    op: str
    args: tuple[Expr, ...]
    __str__ = Expr.__str__


DOT = Dot()
TRUE = Const(True)
FALSE = Const(False)
B_, H_, Q_, K_ = (Var(n) for n in INDICES)


def call(op: str, *args: Expr | bool | int | float) -> Expr:
    """Build a call; plain numbers become constants, constants are folded."""
    if op not in OPS:
        raise KeyError(op)
    nodes = tuple(a if isinstance(a, Expr) else Const(a) for a in args)
    if all(isinstance(a, Const) for a in nodes):
        folded = _fold(op, [a.value for a in nodes if isinstance(a, Const)])
        if folded is not None:
            return folded
    simpler = _chosen(*nodes) if op == "where" else _decided(op, nodes)
    if simpler is not None:
        return simpler
    neutral = _NEUTRAL.get(op)
    if neutral is not None:
        if isinstance(nodes[1], Const) and nodes[1].value == neutral:
            return nodes[0]
        if op in _COMMUTATIVE and isinstance(nodes[0], Const) and nodes[0].value == neutral:
            return nodes[1]
    return Call(op, nodes)


def _chosen(condition: Expr, then: Expr, other: Expr) -> Expr | None:
    """where() without what decides nothing. A rectangle that is written into a tensor keeps the old
    value in two places, where(rows, where(columns, new, old), old): once is enough.
    """
    if isinstance(condition, Const):
        return then if condition.value else other
    if then == other:
        return then
    if (then, other) in ((TRUE, FALSE), (FALSE, TRUE)):
        return condition if then == TRUE else call("not", condition)
    if isinstance(other, Call) and other.op == "where" and other.args[0] == condition:
        return call("where", condition, then, other.args[2])
    if isinstance(then, Call) and then.op == "where" and then.args[2] == other:
        return call("where", call("and", condition, then.args[0]), then.args[1], other)
    return None


def _decided(op: str, nodes: tuple[Expr, ...]) -> Expr | None:
    """A question about a choice between two numbers: where(c, 1.0, 0.0) == 0 is not c."""
    if op not in _DECIDES:
        return None
    for position, node in enumerate(nodes):
        before, after = nodes[:position], nodes[position + 1 :]
        if not (isinstance(node, Call) and node.op == "where"):
            continue
        if all(isinstance(n, Const) for n in (*before, *node.args[1:], *after)):
            yes, no = (call(op, *before, side, *after) for side in node.args[1:])
            return call("where", node.args[0], yes, no)
    return None


_DECIDES = frozenset({"bool", "eq", "ne", "lt", "le", "gt", "ge"})
_NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1, "and": True, "or": False}
_COMMUTATIVE = frozenset({"add", "mul", "and", "or"})


def _fold(op: str, values: Sequence[bool | int | float]) -> Const | None:
    if op in KINDS:
        return (
            Const({"int": int, "float": float, "bool": bool}[op](values[0]))
            if _finite(values[0])
            else None
        )
    if op == "where":
        return Const(values[1] if values[0] else values[2])
    tensors = [
        torch.tensor(v, dtype=torch.float64 if isinstance(v, float) else None) for v in values
    ]
    try:
        result = apply(op, tensors, torch.float64)
    except RuntimeError:
        return None
    return Const(result.item())


def _finite(value: bool | int | float) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def walk(expr: Expr) -> Iterator[Expr]:
    """The nodes of the tree, the root first; a shared node comes once."""
    seen: set[int] = set()
    stack = [expr]
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        stack.extend(children(node))


def weight(expr: Expr, known: dict[int, int]) -> int:
    """Nodes of the tree, a shared one as often as it is used: the length of the text, about.

    Args:
        expr: the root.
        known: weights by identity; those of new nodes are entered.
    """
    stack = [expr]
    while stack:
        node = stack[-1]
        missing = [] if id(node) in known else [c for c in children(node) if id(c) not in known]
        if not missing:
            known[id(node)] = known.get(id(node)) or 1 + sum(known[id(c)] for c in children(node))
            stack.pop()
        stack.extend(missing)
    return known[id(expr)]


def children(expr: Expr) -> tuple[Expr, ...]:
    if isinstance(expr, Call):
        return expr.args
    # reads of other kinds, whose tensor is no slot yet, have an index as well
    return getattr(expr, "index", ())


def substitute(expr: Expr, table: Mapping[Expr, Expr]) -> Expr:
    """Replace whole sub-expressions, from the root down; constants are folded again."""
    if expr in table:
        return table[expr]
    if isinstance(expr, Call):
        return call(expr.op, *(substitute(a, table) for a in expr.args))
    if isinstance(expr, Read):
        return Read(expr.slot, tuple(substitute(i, table) for i in expr.index))
    return expr


def slots(expr: Expr) -> list[int]:
    """The tensor slots that are read, in increasing order."""
    return sorted({n.slot for n in walk(expr) if isinstance(n, Read)})


def depends(expr: Expr, *names: str) -> bool:
    """Does the value change with any of these variables?"""
    return any(isinstance(n, Var) and n.name in names for n in walk(expr))


# ---------------------------------------------------------------- text


def _text(expr: Expr, outer: int) -> str:
    if isinstance(expr, Call):
        return _call_text(expr, outer)
    if isinstance(expr, Read):
        return f"t{expr.slot}[{', '.join(map(str, expr.index)) or '()'}]"
    if isinstance(expr, Const):
        # a negative number binds like a unary minus
        return f"({expr.value!r})" if outer > 7 and _negative(expr.value) else repr(expr.value)
    if isinstance(expr, Int):
        return f"n{expr.slot}"
    return expr.name if isinstance(expr, Var) else "dot"


def _negative(value: bool | int | float) -> bool:
    return not isinstance(value, bool) and math.copysign(1, value) < 0


def _call_text(expr: Call, outer: int) -> str:
    if expr.op in _INFIX:
        sign, level = _INFIX[expr.op]
        # comparisons do not chain, the rest groups to the left
        left, right = (_text(expr.args[0], level + (level == 1)), _text(expr.args[1], level + 1))
        inner = f"{left} {sign} {right}"
        return f"({inner})" if level < outer else inner
    if expr.op in _PREFIX:
        inner = _PREFIX[expr.op] + _text(expr.args[0], 9)
        return f"({inner})" if outer > 8 else inner
    return f"{expr.op}({', '.join(_text(a, 0) for a in expr.args)})"


_AST_BINARY: dict[type[ast.AST], str] = {
    ast.BitOr: "or",
    ast.BitXor: "xor",
    ast.BitAnd: "and",
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
    ast.Eq: "eq",
    ast.NotEq: "ne",
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
}


_AST_PREFIX: dict[type[ast.AST], str] = {ast.USub: "neg", ast.Invert: "not", ast.Not: "not"}


@lru_cache(maxsize=4096)
def parse(text: str) -> Expr:
    """Read what `str()` wrote.

    Raises:
        ValueError: `text` is not an expression of this language.
    """
    try:
        return _from_ast(ast.parse(text, mode="eval").body)
    except (SyntaxError, KeyError, AttributeError) as error:
        raise ValueError(f"not a score expression: {text!r} ({error})") from None


def _from_ast(node: ast.AST) -> Expr:
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        return Const(node.value)
    if isinstance(node, ast.Name):
        return _from_name(node.id)
    if isinstance(node, ast.UnaryOp):
        inner = _from_ast(node.operand)
        if isinstance(node.op, ast.USub) and isinstance(inner, Const):
            return Const(-inner.value)
        sign = _AST_PREFIX.get(type(node.op))
        return inner if sign is None else Call(sign, (inner,))
    if isinstance(node, ast.BinOp):
        return Call(_AST_BINARY[type(node.op)], (_from_ast(node.left), _from_ast(node.right)))
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        op = _AST_BINARY[type(node.ops[0])]
        return Call(op, (_from_ast(node.left), _from_ast(node.comparators[0])))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _from_call(node.func.id, node.args)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        index = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id[:1] == "t" and node.value.id[1:].isdigit():
            return Read(int(node.value.id[1:]), tuple(map(_from_ast, index)))
    raise KeyError(ast.dump(node)[:60])


def _from_call(op: str, args: Sequence[ast.AST]) -> Expr:
    wanted = 3 if op == "where" else 2 if op in BINARY else 1
    if op not in OPS or len(args) != wanted:
        raise KeyError(f"{op} of {len(args)}")
    return Call(op, tuple(map(_from_ast, args)))


def _from_name(name: str) -> Expr:
    if name == "dot":
        return DOT
    if name in ("inf", "nan"):
        return Const(float(name))
    if name in INDICES or name in SIZES:
        return Var(name)
    if name[:1] == "n" and name[1:].isdigit():
        return Int(int(name[1:]))
    raise KeyError(name)
