"""Reading a functional graph backwards: the value of one element, as an expression over the axes.

    pull(where(arange(S) <= arange(T)[:, None], s, -inf))[b, h, q, k]   ->   where(k <= q, s[b, h,
    q, k], -inf)

`Puller.step` follows views, which only move indices. `Puller.expr` follows pointwise operations,
constants, factories
and gathers as well; what it does not understand stays a `Leaf`, a read of that node's tensor. A
contraction of two
operands becomes a `Product` leaf with the indices of both sides.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir import ops
from attn_compiler.ir.axes import CannotSplit, Index, along
from attn_compiler.ir.expr import Call, Const, Expr, Var, call, weight

# of the tree of an element; beyond, its tensor is read
_HEAVIEST = 2**12

Coordinate = Index | Expr
Coordinates = tuple[Coordinate, ...]


@dataclass(frozen=True)
class Leaf(Expr):
    """A read of the tensor (or number) that `node` computes."""

    node: fx.Node
    index: tuple[Expr, ...]
    where: Coordinates
    __str__ = object.__repr__


@dataclass(frozen=True)
class Symbol(Expr):
    """A symbolic integer: a size, or a number the model computed."""

    value: Any
    __str__ = object.__repr__


@dataclass(frozen=True)
class Product(Expr):
    """sum over `reduced` of left[...] * right[...]."""

    node: fx.Node
    where: Coordinates
    left: tuple[fx.Node, Coordinates]
    right: tuple[fx.Node, Coordinates]
    reduced: tuple[ax.Axis, ...]
    __str__ = object.__repr__


def val(node: fx.Node) -> Any:
    return node.meta.get("val")


def is_tensor(argument: Any) -> TypeGuard[fx.Node]:
    """Is it a node that holds a tensor, not a number known when the model runs?"""
    return isinstance(argument, fx.Node) and isinstance(val(argument), torch.Tensor)


def shape(node: fx.Node) -> tuple[ax.Size, ...]:
    return tuple(ax.size_of(s) for s in val(node).shape)


def op(node: fx.Node) -> str:
    """Bare ATen name, `add` for aten.add.Tensor, `mul` for aten.multiply.Tensor."""
    if node.op != "call_function":
        return ""
    if not isinstance(node.target, torch._ops.OpOverload):
        return "getitem" if node.target is operator.getitem else ""
    name = node.target._schema.name.removeprefix("aten::")
    if name.startswith("prims::") and _is_elementwise(node):
        name = name.removeprefix("prims::")
    return ops.ALIASES.get(name, name)


def _is_elementwise(node: fx.Node) -> bool:
    """Is this the same for floating tensors as the ATen operation of its name? A scripted function
    is traced in such operations.
    """
    named = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    found = val(node)
    floating = isinstance(found, torch.Tensor) and found.is_floating_point()
    return floating and named in (["self"], ["self", "other"])


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by schema name, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    found: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            found[argument.name] = node.args[position]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def to_expr(coordinate: Coordinate) -> Expr:
    """An index as an expression over the names of its axes."""
    if isinstance(coordinate, Expr):
        return coordinate
    found = coordinate.resolved()
    total: Expr | None = None
    for axis, coefficient in found.terms:
        term: Expr = Var(axis.name)
        if coefficient != 1:
            term = call("mul", term, number(coefficient))
        total = term if total is None else call("add", total, term)
    if total is None:
        return number(found.const)
    return total if found.const == 0 else call("add", total, number(found.const))


def number(value: Any) -> Expr:
    """A constant, or a Symbol for a symbolic size."""
    if isinstance(value, bool | int | float):
        return Const(value)
    size = ax.size_of(value)
    return Const(size) if isinstance(size, int) else Symbol(size)


def shifted(coordinate: Coordinate, offset: ax.Size) -> Coordinate:
    if isinstance(coordinate, Index):
        return coordinate.plus(offset)
    return coordinate if offset == 0 else call("add", coordinate, number(offset))


def indices(where: Coordinates) -> tuple[Index, ...]:
    """The coordinates, all of which must be affine.

    Raises:
        CannotSplit: a tensor decides one of them.
    """
    found = tuple(w for w in where if isinstance(w, Index))
    if len(found) != len(where):
        raise CannotSplit("an index that a tensor decides")
    return found


class Puller:
    """Pulls elements of one functional graph; keeps what it has already expanded.

    Attributes:
        module: owner of the graph's constants.
        bound: inputs whose value is known as an expression, or which stand for a node of another
            graph.
    """

    def __init__(self, module: fx.GraphModule | None = None) -> None:
        self.module = module
        self.bound: dict[fx.Node, Expr | fx.Node] = {}
        self._axes: list[ax.Axis] = []
        self._done: dict[tuple[fx.Node, Coordinates], Expr] = {}
        self._weights: dict[int, int] = {}
        self._heavy: list[Expr] = []

    def new_axis(self, extent: ax.Size) -> ax.Axis:
        self._axes.append(ax.Axis(extent))
        return self._axes[-1]

    # ------------------------------------------------------------ views

    def step(self, node: fx.Node, where: Coordinates) -> tuple[fx.Node, Coordinates] | None:
        """One view further back, or None if `node` is no view."""
        rule = VIEWS.get(op(node))
        if rule is None or node.meta.get("no_grad"):
            return None
        try:
            found: tuple[fx.Node, Coordinates] | None = rule(self, node, arguments(node), where)
            return found
        except CannotSplit:
            return None

    def peel(self, node: fx.Node, where: Coordinates) -> tuple[fx.Node, Coordinates]:
        """Through all views."""
        while (further := self.step(node, where)) is not None:
            node, where = further
        return node, where

    # ------------------------------------------------------------ values

    def expr(self, node: Any, where: Coordinates) -> Expr:
        """The element at `where` (numbers are themselves)."""
        if not isinstance(node, fx.Node):
            return number(node)
        key = (node, where)
        if key not in self._done:
            found = self._expand(node, where)
            # as a text, what is shared comes as often as it is used
            if weight(found, self._weights) > _HEAVIEST:
                self._heavy.append(found)  # weights go by identity
                found = self.leaf(node, where)
            self._done[key] = found
        return self._done[key]

    def _expand(self, node: fx.Node, where: Coordinates) -> Expr:
        known = self.bound.get(node)
        if isinstance(known, Expr):
            return known
        if known is not None:
            return self.expr(known, where)
        found = val(node)
        if not isinstance(found, torch.Tensor):
            return self._scalar(node, found)
        further = self.step(node, where)
        if further is not None:
            return self.expr(*further)
        rule = None if node.meta.get("no_grad") else VALUES.get(op(node))
        try:
            result = rule(self, node, arguments(node), where) if rule is not None else None
        except CannotSplit:
            result = None
        return result if result is not None else self.leaf(node, where)

    def _scalar(self, node: fx.Node, found: Any) -> Expr:
        if isinstance(found, bool | int | float):
            return Const(found)
        if isinstance(found, torch.SymInt):
            return number(found)
        return Leaf(node, (), ())

    def leaf(self, node: fx.Node, where: Coordinates) -> Expr:
        constant = self._constant(node)
        if constant is not None:
            return Const(constant)
        # a dimension of extent one is always read at zero
        kept = tuple(
            ax.ZERO if size == 1 else (w.resolved() if isinstance(w, Index) else w)
            for w, size in zip(where, shape(node), strict=True)
        )
        return Leaf(node, tuple(to_expr(w) for w in kept), kept)

    def _constant(self, node: fx.Node) -> float | int | bool | None:
        if node.op != "get_attr" or self.module is None:
            return None
        tensor = getattr(self.module, str(node.target), None)
        if (
            not isinstance(tensor, torch.Tensor)
            or tensor.numel() != 1
            or type(tensor) is not torch.Tensor
        ):
            return None
        return tensor.item()

    def operand(self, argument: Any, like: fx.Node, where: Coordinates) -> Expr:
        """Element of a pointwise operand, broadcast from the right to the shape of `like`."""
        if not is_tensor(argument):
            return self.expr(argument, ())
        sizes = shape(argument)
        return self.expr(argument, broadcast(where, sizes))

    def affine(self, expression: Expr) -> Coordinate:
        """The expression as an Index where it is one."""
        found = self._affine(expression)
        return expression if found is None else found

    def _affine(self, expression: Expr) -> Index | None:
        if isinstance(expression, Const) and not isinstance(expression.value, bool | float):
            return Index((), expression.value)
        if isinstance(expression, Symbol):
            return Index((), expression.value)
        if isinstance(expression, Var):
            axis = ax.by_name(expression.name)
            return None if axis is None else along(axis)
        if not isinstance(expression, Call) or expression.op not in ("add", "sub", "mul", "int"):
            return None
        parts = [self._affine(a) for a in expression.args]
        if any(p is None for p in parts):
            return None
        return _combine(expression.op, [p for p in parts if p is not None])


def _combine(operation: str, parts: Sequence[Index]) -> Index | None:
    if operation == "int":
        return parts[0]
    left, right = parts
    if operation == "add":
        return left.plus(right)
    if operation == "sub":
        return left.plus(right.times(-1))
    if not right.terms:
        return left.times(right.const)
    return right.times(left.const) if not left.terms else None


def broadcast(where: Coordinates, sizes: Sequence[ax.Size]) -> Coordinates:
    """Coordinates into a tensor that is broadcast, from the right, to where `where` points."""
    tail = where[len(where) - len(sizes) :] if sizes else ()
    return tuple(
        ax.ZERO if size == 1 and not _unit(w) else w for w, size in zip(tail, sizes, strict=True)
    )


def _unit(coordinate: Coordinate) -> bool:
    """Does it run along axes of extent one only? Then it stays, so that one row is still a row."""
    if not isinstance(coordinate, Index) or coordinate.const != 0:
        return False
    return all(axis.extent == 1 for axis, _ in coordinate.resolved().terms)


Rule = Callable[[Puller, fx.Node, dict[str, Any], Coordinates], Any]
VIEWS: dict[str, Rule] = {}
VALUES: dict[str, Rule] = {}


def rule(table: dict[str, Rule], *names: str) -> Callable[[Rule], Rule]:
    """Enter a rule under the ATen names it serves."""

    def enter(function: Rule) -> Rule:
        table.update(dict.fromkeys(names, function))
        return function

    return enter


def product_at(puller: Puller, node: fx.Node, where: Coordinates) -> Product | None:
    """The product that a node is, if it is one."""
    rule = VALUES.get(op(node))
    found = rule(puller, node, arguments(node), where) if rule is not None else None
    return found if isinstance(found, Product) else None
