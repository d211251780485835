"""Index rules of the view operations: which element of the input an element of the output is."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir.axes import Index
from attn_compiler.ir.pull import (
    VIEWS,
    Coordinate,
    Coordinates,
    Puller,
    arguments,
    indices,
    op,
    rule,
    shape,
    shifted,
    val,
)

Args = dict[str, Any]
Step = tuple[fx.Node, Coordinates] | None


def source(args: Args) -> fx.Node:
    node = args.get("self", args.get("input"))
    assert isinstance(node, fx.Node)
    return node


def placed(where: Coordinates, at: int, coordinate: Coordinate) -> Coordinates:
    return (*where[:at], coordinate, *where[at + 1 :])


@rule(
    VIEWS, "view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as",
    "_reshape_alias", "view_copy",
)  # fmt: skip
def _reshape(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Step:
    if val(node).dtype != val(source(args)).dtype:
        return None
    new, old = list(shape(node)), list(shape(source(args)))
    # dimensions that both shapes share at their ends need no arithmetic, so any index may stand
    # there
    head = 0
    while head < min(len(new), len(old)) and ax.equal(new[head], old[head]):
        head += 1
    tail = 0
    while tail < min(len(new), len(old)) - head and ax.equal(new[-1 - tail], old[-1 - tail]):
        tail += 1
    end_new, end_old = len(new) - tail, len(old) - tail
    middle = ax.reshape(indices(where[head:end_new]), new[head:end_new], old[head:end_old])
    return source(args), (*where[:head], *middle, *where[end_new:])


@rule(VIEWS, "permute")
def _permute(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Step:
    rank = len(where)
    back: list[Coordinate] = [ax.ZERO] * rank
    for position, dimension in enumerate(args["dims"]):
        back[dimension % rank] = where[position]
    return source(args), tuple(back)


@rule(VIEWS, "movedim", "moveaxis")
def _movedim(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Step:
    rank = len(where)
    as_list = lambda x: [x] if isinstance(x, int) else list(x)  # noqa: E731
    moved = [d % rank for d in as_list(args["source"])]
    target = [d % rank for d in as_list(args["destination"])]
    rest = iter(d for d in range(rank) if d not in moved)
    placed_at = dict(zip(target, moved, strict=True))
    order = [placed_at[d] if d in placed_at else next(rest) for d in range(rank)]
    back: list[Coordinate] = [ax.ZERO] * rank
    for position, dimension in enumerate(order):
        back[dimension] = where[position]
    return source(args), tuple(back)


@rule(VIEWS, "transpose", "t", "numpy_T", "mT", "swapaxes", "swapdims", "adjoint", "matrix_H")
def _transpose(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Step:
    rank = len(where)
    if rank < 2:
        return source(args), where
    if op(node) == "numpy_T":
        return source(args), tuple(reversed(where))
    first, second = (
        next((args[name] for name in names if name in args), last)
        for names, last in ((("dim0", "axis0"), -2), (("dim1", "axis1"), -1))
    )
    back = list(where)
    back[first], back[second] = where[second], where[first]
    return source(args), tuple(back)


@rule(VIEWS, "expand", "expand_as", "broadcast_to", "expand_copy")
def _expand(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Step:
    old, new = shape(source(args)), shape(node)
    tail = where[len(where) - len(old) :] if old else ()
    sizes = new[len(new) - len(old) :]
    return source(args), tuple(
        ax.ZERO if o == 1 and not ax.equal(o, n) else w
        for w, o, n in zip(tail, old, sizes, strict=True)
    )


@rule(VIEWS, "unsqueeze")
def _unsqueeze(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Step:
    at = args["dim"] % len(where)
    return source(args), (*where[:at], *where[at + 1 :])


@rule(VIEWS, "squeeze")
def _squeeze(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Step:
    old = shape(source(args))
    wanted = args.get("dim")
    dims = range(len(old)) if wanted is None else [wanted] if isinstance(wanted, int) else wanted
    gone = {d % len(old) for d in dims if old[d % len(old)] == 1}
    rest = iter(where)
    return source(args), tuple(ax.ZERO if d in gone else next(rest) for d in range(len(old)))


@rule(VIEWS, "slice", "narrow")
def _slice(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Step:
    at = args["dim"] % len(where)
    size = shape(source(args))[at]
    start, step = args.get("start"), args.get("step", 1)
    begin = 0 if start is None else _value(start)
    if isinstance(begin, int) and begin < 0:
        begin = ax.simple(begin + size)
    if isinstance(begin, int) and isinstance(size, int):
        begin = min(begin, size)
    if not isinstance(step, int):
        return None
    coordinate = where[at]
    if step != 1:
        if not isinstance(coordinate, Index):
            return None
        coordinate = coordinate.times(step)
    return source(args), placed(where, at, shifted(coordinate, begin))


def _value(argument: Any) -> ax.Size:
    return ax.size_of(val(argument) if isinstance(argument, fx.Node) else argument)


@rule(VIEWS, "select")
def _select(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Step:
    size = shape(source(args))
    at = args["dim"] % len(size)
    chosen = _value(args["index"])
    if isinstance(chosen, int) and chosen < 0:
        chosen = ax.simple(chosen + size[at])
    return source(args), (*where[:at], Index((), chosen), *where[at:])


@rule(VIEWS, "flip")
def _flip(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Step:
    size = shape(node)
    for dimension in args["dims"]:
        at = dimension % len(where)
        where = placed(where, at, indices(where)[at].times(-1).plus(ax.simple(size[at] - 1)))
    return source(args), where


@rule(VIEWS, "repeat", "tile")
def _repeat(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Step:
    old, new = shape(source(args)), shape(node)
    tail, sizes = where[len(where) - len(old) :], new[len(new) - len(old) :]
    back: list[Coordinate] = []
    for coordinate, o, n in zip(tail, old, sizes, strict=True):
        if ax.equal(o, n):
            back.append(coordinate)
        elif o == 1:
            back.append(ax.ZERO)
        else:
            back.append(ax.divide(indices((coordinate,))[0], o)[1])
    return source(args), tuple(back)


@rule(VIEWS, "repeat_interleave")
def _repeat_interleave(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Step:
    repeats = args["repeats"]
    if args.get("dim") is None or (
        isinstance(repeats, fx.Node) and isinstance(val(repeats), torch.Tensor)
    ):
        return None
    at = args["dim"] % len(where)
    return source(args), placed(where, at, ax.divide(indices(where)[at], _value(repeats))[0])


@rule(
    VIEWS, "clone", "contiguous", "alias", "lift_fresh", "lift_fresh_copy", "lift",
    "positive", "_conj", "resolve_conj", "resolve_neg", "pin_memory",
)  # fmt: skip
def _same(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Step:
    return source(args), where


_SPLITS = (
    "split",
    "split_with_sizes",
    "chunk",
    "unbind",
    "tensor_split",
    "unsafe_chunk",
    "unsafe_split",
    "hsplit",
)


@rule(VIEWS, "getitem")
def _getitem(puller: Puller, node: fx.Node, _: Args, where: Coordinates) -> Step:
    """One piece of a split: its index is shifted by the pieces before it."""
    pieces, number = node.args
    assert isinstance(pieces, fx.Node) and isinstance(number, int)
    called = op(pieces)
    if called not in _SPLITS or not isinstance(val(pieces), tuple | list):
        return None
    args = arguments(pieces)
    whole = source(args)
    at = args.get("dim", args.get("axis", 0)) % len(shape(whole))
    number %= len(val(pieces))
    if called == "unbind":
        return whole, (*where[:at], Index((), number), *where[at:])
    before = [ax.size_of(piece.shape[at]) for piece in val(pieces)[:number]]
    offset = ax.simple(sum(before)) if before else 0
    return whole, placed(where, at, shifted(where[at], offset))
