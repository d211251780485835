"""Value rules that pick elements: writes made functional, and gathers by tensors of indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir.axes import Index, along
from attn_compiler.ir.expr import FALSE, Call, Const, Expr, Var, call, substitute, walk
from attn_compiler.ir.mask import normalise
from attn_compiler.ir.pull import (
    VALUES,
    Coordinate,
    Coordinates,
    Leaf,
    Puller,
    arguments,
    broadcast,
    number,
    op,
    rule,
    shape,
    shifted,
    to_expr,
    val,
)
from attn_compiler.ir.values import dtype_of, joined, kind

Args = dict[str, Any]


# ---------------------------------------------------------------- writes, made functional


_SCATTERS = frozenset({"select_scatter", "slice_scatter"})
# more writes than this, a row at a time, are no formula: the tensor is read as it is
_MOST_WRITES = 32


def _written_often(node: fx.Node) -> bool:
    for _ in range(_MOST_WRITES):
        if op(node) not in _SCATTERS:
            return False
        inner = arguments(node)["self"]
        assert isinstance(inner, fx.Node)
        node = inner
    return True


@rule(VALUES, "select_scatter")
def _select_scatter(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr | None:
    if _written_often(node):
        return None
    at = args["dim"] % len(where)
    size = shape(node)[at]
    chosen = puller.affine(puller.expr(args["index"], ()))
    hit = call("eq", to_expr(where[at]), to_expr(wrapped(chosen, size)))
    written = puller.expr(args["src"], (*where[:at], *where[at + 1 :]))
    return call("where", hit, written, puller.expr(args["self"], where))


@rule(VALUES, "slice_scatter")
def _slice_scatter(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr | None:
    at = args["dim"] % len(where)
    size, length = shape(node)[at], shape(args["src"])[at]
    if args["step"] != 1 or _written_often(node):
        return None
    start = wrapped(puller.affine(puller.expr(args["start"] or 0, ())), size)
    begin = start.const if isinstance(start, Index) and not start.terms else None
    if begin is None:
        return None
    old, inner = puller.expr(args["self"], where), shifted(where[at], ax.simple(-begin))
    written = puller.expr(args["src"], (*where[:at], inner, *where[at + 1 :]))
    if begin != 0:
        written = call("where", call("ge", to_expr(where[at]), number(begin)), written, old)
    if ax.equal(ax.simple(begin + length), size):
        return written
    end = number(ax.simple(begin + length))
    return call("where", call("lt", to_expr(where[at]), end), written, old)


@rule(VALUES, "diagonal_scatter")
def _diagonal_scatter(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr | None:
    """x.diagonal().fill_(number)"""
    first, second = (args[name] % len(where) for name in ("dim1", "dim2"))
    written = puller.expr(args["src"], (ax.ZERO,) * len(shape(args["src"])))
    if not isinstance(written, Const):
        return None
    row, column = to_expr(where[first]), to_expr(where[second])
    hit = call("eq", column, call("add", row, puller.expr(args["offset"], ())))
    return call("where", hit, written, puller.expr(args["self"], where))


@rule(VALUES, "index_put", "_unsafe_index_put")
def _index_put(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr | None:
    """x[mask] = number; x[..., i, i] = number."""
    found = put(puller, node, args, where)
    return None if found is None else call("where", *found, puller.expr(args["self"], where))


def put(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> tuple[Expr, Expr] | None:
    """Whether a place is among those that are written, and the one number that is written there;
    a mask has the last indexed dimensions.
    """
    mask, value = args["indices"][-1], args["values"]
    before = len(args["indices"]) - 1
    if args["accumulate"] or any(size != 1 for size in shape(value)):
        return None
    if all(i is None for i in args["indices"][:-1]) and dtype_of(mask) is torch.bool:
        hit = puller.expr(mask, where[before : before + len(shape(mask))])
    else:
        found = _picked(puller, args["indices"], shape(node), where)
        if found is None:
            return None
        hit = found
    return hit, puller.expr(value, (ax.ZERO,) * len(shape(value)))


def _picked(
    puller: Puller, indices: list[Any], sizes: tuple[ax.Size, ...], where: Coordinates
) -> Expr | None:
    """Whether a place is among those that lists of indices name: one of them counts up, and says
    where the others are to be looked up.
    """
    used = [(d, i) for d, i in enumerate(indices) if i is not None]
    lengths = [shape(i) for _, i in used]
    if any(
        dtype_of(i) is torch.bool or len(n) != 1 for (_, i), n in zip(used, lengths, strict=True)
    ):
        return None
    if any(not ax.equal(n[0], lengths[0][0]) for n in lengths):
        return None
    triangle = _triangle(puller, used, sizes, where)
    if triangle is not None:
        return triangle
    for dimension, index in used:
        axis = puller.new_axis(lengths[0][0])
        counted = puller.affine(puller.expr(index, (along(axis),)))
        if not isinstance(counted, Index) or counted.terms != ((axis, 1),):
            continue
        if not isinstance(counted.const, int) or counted.const < 0:
            continue
        place = shifted(where[dimension], ax.simple(-counted.const))
        hit: Expr = call("ge", to_expr(place), 0)
        hit = call("and", hit, call("lt", to_expr(place), number(axis.extent)))
        for other, found in used:
            if other != dimension:
                at = puller.expr(found, (place,))
                end = call("add", at, number(sizes[other]))
                at = call("where", call("lt", at, 0), end, at)  # as Python counts
                hit = call("and", hit, call("eq", to_expr(where[other]), at))
        return hit if all(not isinstance(n, Leaf) for n in walk(hit)) else None
    return None


def _triangle(
    puller: Puller,
    used: list[tuple[int, fx.Node]],
    sizes: tuple[ax.Size, ...],
    where: Coordinates,
) -> Expr | None:
    """Whether a place is among those of triu_indices or tril_indices."""
    named: dict[ax.Size, int] = {}
    nodes = set()
    for dimension, index in used:
        count = along(puller.new_axis(shape(index)[0]))
        node, at = puller.peel(index, (count,))
        if op(node) not in ("triu_indices", "tril_indices") or at[1] != count:
            return None
        named[at[0].const if isinstance(at[0], Index) and not at[0].terms else -1] = dimension
        nodes.add(node)
    if len(nodes) != 1 or named.keys() != {0, 1}:
        return None
    args = arguments(node)
    for which, name in enumerate(("row", "col")):
        size = val(args[name]) if isinstance(args[name], fx.Node) else args[name]
        if not ax.equal(sizes[named[which]], ax.size_of(size)):
            return None
    row, column = (to_expr(where[named[n]]) for n in (0, 1))
    diagonal = call("add", row, puller.expr(args["offset"], ()))
    return call("ge" if op(node) == "triu_indices" else "le", column, diagonal)


@rule(VALUES, "diff")
def _diff(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr | None:
    if args["n"] != 1 or args.get("append") is not None or val(node).dtype is torch.bool:
        return None
    at = args["dim"] % len(where)
    tensors = [t for t in (args.get("prepend"), args["self"]) if t is not None]
    sizes = [shape(t)[at] for t in tensors]
    late = (*where[:at], shifted(where[at], 1), *where[at + 1 :])
    return call("sub", *(joined(puller, tensors, sizes, place, at) for place in (late, where)))


@rule(VALUES, "cumsum")
def _cumsum(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr | None:
    """A running sum of nothing but zeros (document numbers of a batch that is one document)."""
    at = args["dim"] % len(where)
    inner = args["self"]
    names = iter(("q", "b", "h"))
    fresh = [puller.new_axis(size) for size in shape(inner)]
    element = puller.expr(inner, tuple(along(axis) for axis in fresh))
    if len(fresh) > 4:
        return None
    table: dict[Expr, Expr] = {
        Var(axis.name): Var("k" if position == at else next(names))
        for position, axis in enumerate(fresh)
    }
    element = substitute(element, table)
    if any(not isinstance(n, Call | Const | Var) for n in walk(element)):
        return None
    nothing = element if kind(val(inner).dtype) == "bool" else call("ne", element, 0)
    return Const(0) if normalise(nothing) == FALSE else None


# ---------------------------------------------------------------- gathers


@rule(VALUES, "index", "_unsafe_index")
def _index(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr | None:
    chosen = list(args["indices"])
    used = [p for p, i in enumerate(chosen) if i is not None]
    if any(dtype_of(chosen[p]) is torch.bool for p in used):
        return None
    rank = max(len(shape(chosen[p])) for p in used)
    adjacent = used == list(range(used[0], used[-1] + 1))
    begin = used[0] if adjacent else 0
    looked_up = where[begin : begin + rank]
    rest = iter((*where[:begin], *where[begin + rank :]))
    back: list[Coordinate] = []
    for dimension in range(len(shape(args["self"]))):
        index = chosen[dimension] if dimension < len(chosen) else None
        if index is None:
            back.append(next(rest))
            continue
        found = puller.expr(index, broadcast(looked_up, shape(index)))
        back.append(wrapped(puller.affine(found), shape(args["self"])[dimension]))
    return puller.expr(args["self"], tuple(back))


def wrapped(coordinate: Coordinate, size: ax.Size) -> Coordinate:
    """Negative constants count from the end."""
    if not isinstance(coordinate, Index) or coordinate.terms:
        return coordinate
    negative = isinstance(coordinate.const, int) and coordinate.const < 0
    return Index((), ax.simple(coordinate.const + size)) if negative else coordinate


@rule(VALUES, "index_select")
def _index_select(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr:
    at = args["dim"] % len(where)
    found = puller.affine(puller.expr(args["index"], (where[at],)))
    return puller.expr(args["self"], (*where[:at], found, *where[at + 1 :]))
