"""Value rules: pointwise operations, constants, factories, gathers and contractions, element by
element.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir.axes import Index
from attn_compiler.ir.expr import Call, Const, Expr, Var, call, walk
from attn_compiler.ir.pointwise import OPS
from attn_compiler.ir.pull import (
    VALUES,
    Coordinate,
    Coordinates,
    Puller,
    number,
    op,
    rule,
    shape,
    shifted,
    to_expr,
    val,
)

Args = dict[str, Any]
_KIND_ORDER = ("bool", "int", "float")


def kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "float"
    return "bool" if dtype is torch.bool else "int"


def cast(expression: Expr, old: torch.dtype, new: torch.dtype) -> Expr:
    """Change of kind only: widths of floats are rounding."""
    before, after = kind(old), kind(new)
    return expression if before == after else call(after, expression)


# ---------------------------------------------------------------- pointwise

_SAME_NAME = frozenset(
    {
        "neg", "abs", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "reciprocal", "sin", "cos",
        "tanh", "sigmoid", "relu", "erf", "floor", "ceil", "trunc", "sign", "square",
    }
)  # fmt: skip
_BINARY = {
    "mul": "mul", "div": "div", "minimum": "min", "maximum": "max", "floor_divide": "floordiv",
    "remainder": "mod",
}  # fmt: skip
_COMPARE = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
_LOGIC = {
    "logical_and": "and", "logical_or": "or", "logical_xor": "xor", "__and__": "and",
    "__or__": "or", "__xor__": "xor", "bitwise_and": "and", "bitwise_or": "or",
    "bitwise_xor": "xor",
}  # fmt: skip


def operands(puller: Puller, node: fx.Node, given: list[Any], where: Coordinates) -> list[Expr]:
    return [puller.operand(a, node, where) for a in given]


def dtype_of(argument: Any) -> torch.dtype | None:
    found = val(argument) if isinstance(argument, fx.Node) else argument
    return found.dtype if isinstance(found, torch.Tensor) else None


def promoted(puller: Puller, node: fx.Node, given: list[Any], where: Coordinates) -> list[Expr]:
    """Operands brought to the kind of the result; plain numbers take it by themselves."""
    result = kind(val(node).dtype)
    found = operands(puller, node, given, where)
    return [
        call(result, e) if _narrower(dtype_of(a), result) else e
        for a, e in zip(given, found, strict=True)
    ]


def _narrower(dtype: torch.dtype | None, result: str) -> bool:
    return dtype is not None and _KIND_ORDER.index(kind(dtype)) < _KIND_ORDER.index(result)


@rule(VALUES, *_SAME_NAME, "rsub", "add", "sub", *_BINARY)
def _arithmetic(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr | None:
    name = op(node)
    if name in _SAME_NAME:
        return call(name, *promoted(puller, node, [args["self"]], where))
    left, right = promoted(puller, node, [args["self"], args["other"]], where)
    if name in ("add", "sub", "rsub"):
        if args.get("alpha", 1) != 1:
            scaled = puller.expr(args["alpha"], ())
            left, right = (
                (call("mul", left, scaled), right)
                if name == "rsub"
                else (left, call("mul", right, scaled))
            )
        return call("sub", right, left) if name == "rsub" else call(name, left, right)
    rounding = args.get("rounding_mode")
    if name == "div" and rounding is not None:
        return (
            call("floordiv", left, right)
            if rounding == "floor"
            else call("trunc", call("div", left, right))
        )
    return call(_BINARY[name], left, right)


@rule(VALUES, "max", "min")
def _extreme(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr | None:
    if "other" not in args:
        return None  # a reduction
    return call(op(node), *promoted(puller, node, [args["self"], args["other"]], where))


@rule(VALUES, *_COMPARE)
def _compare(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr:
    return call(op(node), *operands(puller, node, [args["self"], args["other"]], where))


@rule(VALUES, *_LOGIC)
def _logic(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr | None:
    name = op(node)
    given = [args["self"], args["other"]]
    kinds = [d for a in given if (d := dtype_of(a)) is not None]
    if not name.startswith("logical") and any(d is not torch.bool for d in kinds):
        return None
    found = operands(puller, node, given, where)
    truths = [
        e if dtype_of(a) in (torch.bool, None) else call("bool", e)
        for a, e in zip(given, found, strict=True)
    ]
    return call(_LOGIC[name], *truths)


@rule(VALUES, "logical_not", "bitwise_not")
def _not(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr | None:
    dtype = dtype_of(args["self"])
    if dtype is not torch.bool and "bitwise" in str(node.target):
        return None
    inner = puller.operand(args["self"], node, where)
    return call("not", inner if dtype is torch.bool else call("bool", inner))


@rule(VALUES, "pow")
def _pow(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr:
    return call("pow", *promoted(puller, node, [args["self"], args["exponent"]], where))


@rule(VALUES, "clamp", "clip", "clamp_min", "clamp_max")
def _clamp(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr:
    result = promoted(puller, node, [args["self"]], where)[0]
    for bound, operation in ((args.get("min"), "max"), (args.get("max"), "min")):
        if bound is not None:
            result = call(operation, result, *promoted(puller, node, [bound], where))
    return result


@rule(VALUES, "where")
def _where(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr | None:
    if "self" not in args:
        return None
    condition = puller.operand(args["condition"], node, where)
    if dtype_of(args["condition"]) is not torch.bool:
        condition = call("bool", condition)
    sides = promoted(puller, node, [args["self"], args["other"]], where)
    return call("where", condition, *(as_stored(side, val(node).dtype) for side in sides))


@rule(VALUES, "masked_fill")
def _masked_fill(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr:
    mask, value, old = operands(puller, node, [args["mask"], args["value"], args["self"]], where)
    value = as_stored(value, val(node).dtype)
    return call(
        "where", mask if dtype_of(args["mask"]) is torch.bool else call("bool", mask), value, old
    )


@rule(VALUES, "to", "_to_copy", "type_as", "float", "double", "half", "bfloat16", "int", "long", "bool", "_autocast_to_full_precision", "_autocast_to_reduced_precision")  # fmt: skip  # noqa: E501
def _to(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr:
    inner = args["self"]
    return cast(puller.expr(inner, where), val(inner).dtype, val(node).dtype)


@rule(VALUES, "detach")
def _detach(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr | None:
    # numbers that have gradients must not be read past the point where those are cut
    inner = puller.expr(args["self"], where)
    bare = all(isinstance(n, Call | Const | Var) for n in walk(inner))
    return inner if bare or not val(node).dtype.is_floating_point else None


@rule(VALUES, "fill")
def _fill(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr:
    return puller.expr(args["value"], ())


@rule(VALUES, "copy")
def _copy(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr:
    inner = puller.operand(args["src"], node, where)
    return cast(inner, dtype_of(args["src"]) or val(node).dtype, val(node).dtype)


# ---------------------------------------------------------------- factories

_FILL = {"zeros": 0, "ones": 1, "zeros_like": 0, "ones_like": 1, "new_zeros": 0, "new_ones": 1}


@rule(VALUES, *_FILL, "full", "full_like", "new_full", "scalar_tensor")
def _full(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr:
    name = op(node)
    given = _FILL[name] if name in _FILL else args.get("fill_value", args.get("s"))
    if not isinstance(given, fx.Node):
        given = {"bool": bool, "int": int, "float": float}[kind(val(node).dtype)](given)
        if isinstance(given, float) and math.isfinite(given):
            given = _rounded(given, val(node).dtype)
    return puller.expr(given, ())


def as_stored(value: Expr, dtype: torch.dtype) -> Expr:
    """A number as it reads once it lies in a tensor of this dtype."""
    if isinstance(value, Const) and isinstance(value.value, float) and dtype.is_floating_point:
        return Const(_rounded(value.value, dtype))
    return value


def _rounded(value: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=dtype).item())


@rule(VALUES, "arange")
def _arange(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr:
    position = to_expr(where[0])
    step, start = args.get("step", 1), args.get("start", 0)
    result = position if step == 1 else call("mul", position, puller.expr(step, ()))
    if start is not None and start != 0:
        result = call("add", result, puller.expr(start, ()))
    return cast(result, torch.int64, val(node).dtype)


@rule(VALUES, "eye")
def _eye(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr:
    same = call("eq", to_expr(where[0]), to_expr(where[1]))
    return same if val(node).dtype is torch.bool else call(kind(val(node).dtype), same)


@rule(VALUES, "tril", "triu")
def _triangle(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr:
    row, column = to_expr(where[-2]), to_expr(where[-1])
    diagonal = puller.expr(args["diagonal"], ())
    lower = "tril" in node.target._schema.name  # type: ignore[union-attr]
    keep = call("le" if lower else "ge", column, call("add", row, diagonal))
    inner = puller.expr(args["self"], where)
    zero: bool | int | float = {"bool": False, "int": 0, "float": 0.0}[kind(val(node).dtype)]
    return (
        call("and", keep, inner)
        if val(node).dtype is torch.bool
        else call("where", keep, inner, zero)
    )


# ---------------------------------------------------------------- joins


@rule(VALUES, "cat", "concat", "concatenate")
def _cat(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr | None:
    tensors = [t for t in args["tensors"] if not _is_empty_vector(t)]
    at = (args["dim"] if "dim" in args else args["axis"]) % len(where)
    sizes = [shape(t)[at] for t in tensors]
    if piece(where[at], sizes) is None and _too_wide(node):
        return None
    return joined(puller, tensors, sizes, where, at)


def _is_empty_vector(node: fx.Node) -> bool:
    return shape(node) == (0,)


def _too_wide(node: fx.Node) -> bool:
    # features are joined by rotary embeddings; as expressions they would only grow
    return bool(val(node).dtype.is_floating_point)


def joined(
    puller: Puller, tensors: list[fx.Node], sizes: list[ax.Size], where: Coordinates, at: int
) -> Expr:
    """Element of the pieces put one after the other."""
    chosen = piece(where[at], sizes)
    if chosen is not None:
        which, offset = chosen
        inside = (*where[:at], shifted(where[at], ax.simple(-offset)), *where[at + 1 :])
        return puller.expr(tensors[which], inside)
    position = to_expr(where[at])
    total = ax.simple(sum(sizes))
    result: Expr | None = None
    for tensor, size in zip(reversed(tensors), reversed(sizes), strict=True):
        total = ax.simple(total - size)
        inner = puller.expr(
            tensor, (*where[:at], shifted(where[at], ax.simple(-total)), *where[at + 1 :])
        )
        result = (
            inner
            if result is None
            else call("where", call("lt", position, number(ax.simple(total + size))), inner, result)
        )
    assert result is not None
    return result


def piece(coordinate: Coordinate, sizes: list[ax.Size]) -> tuple[int, ax.Size] | None:
    """Which of the joined pieces the index certainly lies in, and where that piece begins."""
    if not isinstance(coordinate, Index):
        return None
    found = coordinate.resolved()
    if any(isinstance(c, int) and c < 0 for _, c in found.terms):
        return None
    begin: ax.Size = 0
    for position, size in enumerate(sizes):
        end = ax.simple(begin + size)
        if ax.at_most(begin, found.const) and ax.at_most(found.largest(), ax.simple(end - 1)):
            return position, begin
        begin = end
    return None


@rule(VALUES, "stack")
def _stack(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr | None:
    at = args["dim"] % len(where)
    chosen = where[at]
    if (
        not isinstance(chosen, Index)
        or chosen.resolved().terms
        or not isinstance(chosen.const, int)
    ):
        return None
    return puller.expr(args["tensors"][chosen.const], (*where[:at], *where[at + 1 :]))


@rule(VALUES, "constant_pad_nd", "pad")
def _pad(puller: Puller, node: fx.Node, args: Args, where: Coordinates) -> Expr | None:
    if args.get("mode", "constant") != "constant":
        return None
    widths = args["pad"]
    if not all(isinstance(w, int) for w in widths):
        return None
    source, value = args["self"], args.get("value")
    outside = puller.expr(0.0 if value is None else value, ())
    inside: list[Expr] = []
    moved = list(where)
    for pair in range(len(widths) // 2):
        before, after = widths[2 * pair], widths[2 * pair + 1]
        at = len(where) - 1 - pair
        size = shape(source)[at]
        moved[at] = shifted(where[at], -before)
        chosen = piece(where[at], [before, size, after])
        if chosen is not None and chosen[0] != 1:
            return outside
        if chosen is None and before > 0:
            inside.append(call("ge", to_expr(moved[at]), 0))
        if chosen is None and after > 0:
            inside.append(call("lt", to_expr(moved[at]), number(size)))
    inner = puller.expr(source, tuple(moved))
    for condition in inside:
        inner = call("where", condition, inner, outside)
    return inner


assert _SAME_NAME <= OPS
