"""From the product with the values back to the softmax, however it was written.

    p = softmax(x)      exp(x) / sum(exp(x))      exp(x - logsumexp(x))      exp(log_softmax(x))

Between the softmax and the product only views, casts of float width, dropout and a zeroing of
masked positions may
stand; anything else means that this is not (only) attention, and says so by a reason code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir.axes import Index, along
from attn_compiler.ir.expr import Const, Expr, call
from attn_compiler.ir.filling import truth_of
from attn_compiler.ir.gathers import put
from attn_compiler.ir.no_attention import NotAttention
from attn_compiler.ir.pull import (
    Coordinate,
    Coordinates,
    Leaf,
    Puller,
    arguments,
    broadcast,
    is_tensor,
    op,
    shape,
    val,
)

CASTS = frozenset({"to", "_to_copy", "type_as", "float", "double", "half", "bfloat16"})
_ZEROING = frozenset({"where", "masked_fill", "index_put"})
_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})


@dataclass
class Softmax:
    """A softmax reached from the product with the values.

    Attributes:
        logits: functional node of its input.
        where: coordinates into it, the key index at `dim`.
        dim: the dimension that is normalised.
        sink: extra term of the denominator, a logit, or None.
        dropout: probability that a weight is dropped.
        zeroed: condition under which a weight is set to zero afterwards.
        safe: rows without any key give zero.
        factor: number the logits are multiplied by first (2**x is exp(x * log 2)).
        unshifted: exponentials of the logits as they are, which may all be zero.
        moved: the logits were shifted in a way that a row without keys does not survive.
        hidden: conditions under which the exponential is set to zero before the sum.
        cut: whether gradients stop where it is, also those of a row without keys.
        dtype: what it computes in, None for that of the logits.
    """

    logits: fx.Node
    where: Coordinates
    dim: int
    sink: Expr | None = None
    dropout: float = 0.0
    zeroed: list[Expr] = field(default_factory=list)
    safe: bool = False
    factor: float = 1.0
    unshifted: bool = False
    moved: bool = False
    hidden: list[Expr] = field(default_factory=list)
    cut: bool = False
    dtype: torch.dtype | None = None


def is_float_cast(node: fx.Node) -> bool:
    if op(node) not in CASTS:
        return False
    inner = arguments(node)["self"]
    return bool(val(inner).dtype.is_floating_point and val(node).dtype.is_floating_point)


def through_casts(puller: Puller, node: fx.Node, where: Coordinates) -> tuple[fx.Node, Coordinates]:
    """Back through views and casts of float width."""
    while True:
        node, where = puller.peel(node, where)
        if not is_float_cast(node):
            return node, where
        node = arguments(node)["self"]


def find_softmax(puller: Puller, node: fx.Node, where: Coordinates) -> Softmax:
    """Walk back from the operand that should hold the probabilities.

    Raises:
        NotAttention: something else than a softmax, or something in between that changes the
            weights.
    """
    dropout = 0.0
    zeroed: list[Expr] = []
    cleared = False
    while True:
        node, where = through_casts(puller, node, where)
        args = arguments(node)
        name = op(node)
        if name == "dropout" or name == "native_dropout":
            if args["train"] is not False and args["p"] != 0:
                if dropout:
                    raise NotAttention(
                        "attention.two_dropouts", "the weights are dropped out twice", node
                    )
                dropout = float(args["p"])
            node = args["input"]
        elif name == "nan_to_num" and not args["nan"]:
            # weights are finite but in rows without any key
            cleared, node = True, args["self"]
        elif name in _ZEROING and (kept := _zeroing(puller, node, args, where)) is not None:
            condition, node = kept
            where = broadcast(where, shape(node))
            zeroed.append(condition)
        else:
            found = _softmax_at(puller, node, args, where)
            found.dropout, found.zeroed = dropout, zeroed
            found.safe = found.safe or cleared
            return found


def _zeroing(
    puller: Puller, node: fx.Node, args: dict[str, Any], where: Coordinates
) -> tuple[Expr, fx.Node] | None:
    """where(keep, p, 0), p.masked_fill(drop, 0) or p[drop] = 0: the condition of being set to
    zero, and p.
    """
    if op(node) == "index_put":
        found = put(puller, node, args, where) if _is_zero(puller, args["values"]) else None
        return None if found is None else (found[0], args["self"])
    if op(node) == "masked_fill":
        return (
            (puller.operand(args["mask"], node, where), args["self"])
            if _is_zero(puller, args["value"])
            else None
        )
    condition = puller.operand(args["condition"], node, where)
    if _is_zero(puller, args["other"]):
        return call("not", condition), args["self"]
    return (condition, args["other"]) if _is_zero(puller, args["self"]) else None


def _is_zero(puller: Puller, argument: Any) -> bool:
    if isinstance(argument, fx.Node):
        found = val(argument)
        zeros = (ax.ZERO,) * (found.dim() if hasattr(found, "dim") else 0)
        value = puller.expr(argument, zeros)
        return isinstance(value, Const) and value.value == 0
    return bool(argument == 0)


def _softmax_at(puller: Puller, node: fx.Node, args: dict[str, Any], where: Coordinates) -> Softmax:
    name = op(node)
    if name in _SOFTMAX:
        dim = args["dim"] % len(where)
        safe = name == "_safe_softmax"
        return Softmax(args["self"], where, dim, safe=safe, dtype=val(node).dtype)
    if name in ("div", "mul"):
        found = _by_hand(puller, node, where)
        if found is not None:
            return found
    if name == "exp":
        found = _by_logsumexp(puller, args["self"], where)
        if found is not None:
            return found
    if name == "log_softmax":
        raise NotAttention(
            "not_attention.log_softmax", "logarithms of probabilities are multiplied", node
        )
    if name in _ZEROING or name in ("mul", "add", "sub", "pow", "clamp", "sigmoid", "relu"):
        raise NotAttention(
            "attention.weights_changed",
            f"`{name}` stands between the softmax and the product with the values",
            node,
        )
    raise NotAttention(
        "not_attention.no_softmax",
        f"the weights come from `{name or node.op}`, not from a softmax",
        node,
    )


def _by_hand(puller: Puller, node: fx.Node, where: Coordinates) -> Softmax | None:
    """exp(x) / (sum(exp(x)) + extra)."""
    parts = quotient(puller, node, where)
    return None if parts is None else _normalised(puller, *parts)


Place = tuple[fx.Node, Coordinates]


def quotient(puller: Puller, node: fx.Node, where: Coordinates) -> tuple[Place, Place] | None:
    """x and y of x / y or x * y.reciprocal(), and where they are read."""
    args = arguments(node)
    top, bottom = args["self"], args["other"]
    if not is_tensor(bottom) or not is_tensor(top):
        return None
    if op(node) == "mul":
        inverse, _ = through_casts(puller, bottom, broadcast(where, shape(bottom)))
        if op(inverse) != "reciprocal":
            return None
        bottom = arguments(inverse)["self"]
    return (
        through_casts(puller, top, broadcast(where, shape(top))),
        through_casts(puller, bottom, broadcast(where, shape(bottom))),
    )


def normalised(puller: Puller, weights: Place, divisor: Place) -> Softmax:
    """The softmax whose division comes after the product with the values.

    Raises:
        NotAttention: `not_attention.no_softmax`.
    """
    found = _normalised(puller, weights, divisor)
    if found is None:
        raise NotAttention(
            "not_attention.no_softmax",
            "the product is divided by something else than the sum of its weights",
            divisor[0],
        )
    return found


def _normalised(puller: Puller, top: Place, bottom: Place) -> Softmax | None:
    """The softmax of exp(x) at one place, and sum(exp(x)) + extra at another; a softmax is an
    exponential, too, once it is normalised again.
    """
    summed, (total, total_at) = through_casts(puller, *top), bottom
    (exponential, at), hidden, cut = _uncovered(puller, *summed)
    again = op(exponential) in _SOFTMAX and bool(hidden)
    if op(exponential) not in ("exp", "exp2") and not again:
        return None
    extra: Expr | None = None
    if op(total) == "add":
        total, total_at, extra = _with_extra(puller, total, total_at)
    if op(total) != "sum":
        return None
    dims, args = reduced_dims(total), arguments(exponential)
    if len(dims) != 1 or not _reduces(puller, total, total_at, *summed, dims[0]):
        return None
    if again and (extra is not None or args["dim"] % len(at) != dims[0]):
        return None
    factor = math.log(2) if op(exponential) == "exp2" else 1.0
    sink = None if extra is None else call("log", extra)
    return Softmax(
        args["self"],
        at,
        dims[0],
        sink=sink,
        factor=factor,
        unshifted=not again,
        hidden=hidden,
        cut=cut,
    )


def _uncovered(puller: Puller, node: fx.Node, where: Coordinates) -> tuple[Place, list[Expr], bool]:
    """Through where(keep, x, 0) and x * keep: x, when it is hidden, and whether by a choice."""
    hidden: list[Expr] = []
    cut = False
    while True:
        args, kept = arguments(node), None
        if op(node) in _ZEROING:
            kept = _zeroing(puller, node, args, where)
            cut |= kept is not None
        elif op(node) == "mul":
            kept = _times_truth(puller, node, args, where)
        if kept is None:
            return (node, where), hidden, cut
        hidden.append(kept[0])
        node, where = through_casts(puller, kept[1], broadcast(where, shape(kept[1])))


def _times_truth(
    puller: Puller, node: fx.Node, args: dict[str, Any], where: Coordinates
) -> tuple[Expr, fx.Node] | None:
    """x * keep, where keep is one or zero: the condition of being set to zero, and x."""
    for inner, factor in ((args["self"], args["other"]), (args["other"], args["self"])):
        if is_tensor(inner) and is_tensor(factor) and shape(inner) == shape(node):
            keep = truth_of(puller.operand(factor, node, where), _is_bool)
            if keep is not None:
                return call("not", keep), inner
    return None


def _is_bool(expression: Expr) -> bool:
    return isinstance(expression, Leaf) and val(expression.node).dtype is torch.bool


def _reduces(
    puller: Puller,
    total: fx.Node,
    total_at: Coordinates,
    source: fx.Node,
    at: Coordinates,
    dim: int,
) -> bool:
    """Is `total` read where it holds the reduction of `source` along its own row?"""
    inner = arguments(total)["self"]
    own = tuple(along(puller.new_axis(size)) for size in shape(source))
    if len(shape(inner)) != len(own):
        return False
    same = through_casts(puller, inner, own) == (source, own)
    if not same and puller.expr(inner, own) != puller.expr(source, own):
        return False
    return reads_own_row(total, total_at, at, dim)


def reads_own_row(reduction: fx.Node, at: Coordinates, where: Coordinates, dim: int) -> bool:
    """Is a reduction over `dim` (or more) of a tensor read, at `at`, in the row of `where`?"""
    args = arguments(reduction)
    sizes = shape(args["self"])
    dims = reduced_dims(reduction)
    kept = [d for d in range(len(sizes)) if d not in dims]
    found = [at[d] for d in kept] if args.get("keepdim") else list(at)
    return (
        dim in dims
        and len(found) == len(kept)
        and all(sizes[d] == 1 or _same(one, where[d]) for one, d in zip(found, kept, strict=True))
    )


def reduced_dims(reduction: fx.Node) -> tuple[int, ...]:
    """The dimensions that a reduction runs over; None and () are all of them."""
    args = arguments(reduction)
    rank, dims = len(shape(args["self"])), args.get("dim")
    listed = [dims] if isinstance(dims, int) else list(dims or range(rank))
    return tuple(d % rank for d in listed)


def _same(left: Coordinate, right: Coordinate) -> bool:
    if isinstance(left, Index) and isinstance(right, Index):
        return left.resolved() == right.resolved()
    return left == right


def _with_extra(
    puller: Puller, node: fx.Node, where: Coordinates
) -> tuple[fx.Node, Coordinates, Expr | None]:
    """1 + sum(exp(x)): the sum, and the other addend."""
    args = arguments(node)
    for one, other in ((args["self"], args["other"]), (args["other"], args["self"])):
        if not is_tensor(one):
            continue
        total, at = through_casts(puller, one, broadcast(where, shape(one)))
        if op(total) == "sum":
            extra = puller.operand(other, node, where)
            return (
                total,
                at,
                None if extra == Const(0.0) else extra,
            )
    return node, where, None


def _by_logsumexp(puller: Puller, inner: fx.Node, where: Coordinates) -> Softmax | None:
    node, at = through_casts(puller, inner, where)
    args = arguments(node)
    if op(node) == "log_softmax":
        return Softmax(args["self"], at, args["dim"] % len(at))
    if op(node) != "sub" or not is_tensor(args["other"]) or args.get("alpha", 1) != 1:
        return None
    norm, norm_at = through_casts(puller, args["other"], broadcast(at, shape(args["other"])))
    if op(norm) != "logsumexp" or not is_tensor(args["self"]):
        return None
    logits, logits_at = args["self"], broadcast(at, shape(args["self"]))
    dims = reduced_dims(norm)
    if len(dims) != 1 or not _reduces(puller, norm, norm_at, logits, logits_at, dims[0]):
        return None
    return Softmax(logits, logits_at, dims[0])
