"""The operations of the expression language, as what they do to tensors.

apply("where", [c, a, b], float32)   ->   torch.where(c, a, b)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "not": torch.logical_not,
    "neg": torch.neg,
    "abs": torch.abs,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": torch.log,
    "log2": torch.log2,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "erf": torch.erf,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "sign": torch.sign,
    "square": torch.square,
}
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "xor": torch.logical_xor,
    "min": torch.minimum,
    "max": torch.maximum,
    "pow": torch.pow,
}
REAL = frozenset(
    (
        "div",
        "exp",
        "exp2",
        "log",
        "log2",
        "sqrt",
        "rsqrt",
        "reciprocal",
        "sin",
        "cos",
        "tanh",
        "sigmoid",
        "erf",
    )
)
# int/float/bool change the kind of a number and nothing else; widths of floats are rounding and are
# not written down
KINDS = {"int": torch.int64, "float": None, "bool": torch.bool}
OPS = frozenset(UNARY) | frozenset(BINARY) | frozenset(KINDS) | {"where"}


def apply(op: str, args: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The operation on numbers held in tensors; `dtype` is that of integers that become floats."""
    if op == "where":
        return torch.where(args[0].bool(), args[1], args[2])
    if op == "float":
        return args[0] if args[0].is_floating_point() else args[0].to(dtype)
    if op in KINDS:
        return args[0].to(KINDS[op])
    if op in ("min", "max"):
        common = reduce(torch.promote_types, (a.dtype for a in args))
        args = [a.to(common) for a in args]
    if op in REAL and not any(a.is_floating_point() for a in args):
        args = [a.to(dtype) for a in args]  # torch would take its default dtype
    return (UNARY.get(op) or BINARY[op])(*args)
