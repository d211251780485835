"""Value rules of the contractions: each becomes one `Product`, however it was written."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir.axes import along
from attn_compiler.ir.expr import Expr, call
from attn_compiler.ir.pull import (
    VALUES,
    Coordinate,
    Coordinates,
    Product,
    Puller,
    broadcast,
    op,
    rule,
    shape,
    val,
)

Args = dict[str, Any]


@rule(VALUES, "matmul", "bmm", "mm")
def _matmul(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr | None:
    left, right = args["self"], args.get("other", args.get("mat2"))
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    size_l, size_r = shape(left), shape(right)
    if len(size_l) < 2 or len(size_r) < 2:
        return None
    reduced = puller.new_axis(size_l[-1])
    batch, row, column = where[:-2], where[-2], where[-1]
    at_l = (*broadcast(batch, size_l[:-2]), row, along(reduced))
    at_r = (*broadcast(batch, size_r[:-2]), along(reduced), column)
    return Product(node, where, (left, at_l), (right, at_r), (reduced,))


@rule(VALUES, "linear")
def _linear(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr | None:
    """x @ w.T, where w is no parameter but the keys."""
    given, weight = args["input"], args["weight"]
    if args["bias"] is not None or len(shape(weight)) != 2 or len(shape(given)) < 2:
        return None
    reduced = puller.new_axis(shape(weight)[1])
    left = (*where[:-1], along(reduced))
    right = (where[-1], along(reduced))
    return Product(node, where, (given, left), (weight, right), (reduced,))


@rule(VALUES, "tensordot", "inner")
def _tensordot(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr | None:
    """Sums over pairs of dimensions; `inner` over the last of both."""
    sides = (args["self"], args["other"])
    summed = [
        [d % len(shape(side)) for d in args.get(name) or (-1,)] if shape(side) else []
        for side, name in zip(sides, ("dims_self", "dims_other"), strict=True)
    ]
    if not all(summed) or any(shape(sides[0])[d] == 1 for d in summed[0]):
        return None
    reduced = [puller.new_axis(shape(sides[0])[d]) for d in summed[0]]
    rest = iter(where)
    places = []
    for side, dims in zip(sides, summed, strict=True):
        sums = {d: along(axis) for d, axis in zip(dims, reduced, strict=True)}
        at = tuple(sums[d] if d in sums else next(rest) for d in range(len(shape(side))))
        places.append((side, at))
    return Product(node, where, places[0], places[1], tuple(reduced))


@rule(VALUES, "einsum")
def _einsum(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr | None:
    scalars = [t for t in args["tensors"] if not shape(t)]
    tensors = [t for t in args["tensors"] if shape(t)]
    if scalars:
        terms, arrow, out = args["equation"].replace(" ", "").partition("->")
        kept = ",".join(term for term in terms.split(",") if term)
        found: Expr | None = _einsum(
            puller, node, {"equation": f"{kept}{arrow}{out}", "tensors": tensors}, where
        )
        if found is None:
            return None
        result: Expr = found
        for scalar in scalars:
            result = call("mul", result, puller.expr(scalar, ()))
        return result
    labels = einsum_labels(args["equation"], [len(shape(t)) for t in tensors])
    if labels is None or len(tensors) != 2:
        return None
    inputs, output = labels
    at: dict[Any, Coordinate] = dict(zip(output, where, strict=True))
    reduced: list[ax.Axis] = []
    for tensor, names in zip(tensors, inputs, strict=True):
        for label, size in zip(names, shape(tensor), strict=True):
            if label not in at:
                axis = puller.new_axis(size)
                reduced.append(axis)
                at[label] = along(axis)
    sides = []
    for tensor, names in zip(tensors, inputs, strict=True):
        if len(set(names)) != len(names):
            return None
        broadcasts = [isinstance(label, int) for label in names]
        sides.append(
            (
                tensor,
                tuple(
                    ax.ZERO if wide and size == 1 else at[label]
                    for label, size, wide in zip(names, shape(tensor), broadcasts, strict=True)
                ),
            )
        )
    return Product(node, where, sides[0], sides[1], tuple(reduced)) if reduced else None


def einsum_labels(equation: str, ranks: list[int]) -> tuple[list[list[Any]], list[Any]] | None:
    """Labels of each operand and of the result; the dimensions under an ellipsis are numbered from
    the right.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        return None
    inputs = [_spelled(term, rank) for term, rank in zip(terms, ranks, strict=True)]
    if arrow:
        wide = max(
            rank - len(term.replace("...", "")) if "..." in term else 0
            for term, rank in zip(terms, ranks, strict=True)
        )
        return inputs, _spelled(
            right, len(right.replace("...", "")) + (wide if "..." in right else 0)
        )
    counts = [label for labels in inputs for label in labels]
    wide_labels = sorted({x for x in counts if isinstance(x, int)}, reverse=True)
    return inputs, [
        *wide_labels,
        *sorted(x for x in set(counts) if isinstance(x, str) and counts.count(x) == 1),
    ]


def _spelled(term: str, rank: int) -> list[Any]:
    head, dots, tail = term.partition("...")
    hidden = rank - len(head) - len(tail) if dots else 0
    return [*head, *reversed(range(hidden)), *tail]


@rule(VALUES, "sum")
def _sum(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr | None:
    """mul and sum: a product with broadcasting written out."""
    rank = len(shape(args["self"]))
    dims = args.get("dim")
    if not dims:
        return None
    dims = {d % rank for d in ([dims] if isinstance(dims, int) else dims)}
    inner: list[Coordinate] = []
    reduced: list[ax.Axis] = []
    rest = iter(where)
    for dimension, size in enumerate(shape(args["self"])):
        if dimension not in dims:
            inner.append(next(rest))
            continue
        reduced.append(puller.new_axis(size))
        inner.append(along(reduced[-1]))
        if args.get("keepdim"):
            next(rest)
    factor, at = puller.peel(args["self"], tuple(inner))
    if op(factor) != "mul":
        return None
    left, right = factor.args[:2]
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return None
    if not all(isinstance(val(side), torch.Tensor) and shape(side) for side in (left, right)):
        return None
    sides = [(side, broadcast(at, shape(side))) for side in (left, right)]
    return Product(node, where, sides[0], sides[1], tuple(reduced))
