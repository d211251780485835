"""Values of expressions for many elements at once, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_compiler.ir.expr import (
    Call,
    Const,
    Dot,
    Expr,
    Int,
    Read,
    Var,
)
from attn_compiler.ir.pointwise import apply


def evaluate(
    expr: Expr,
    env: Mapping[str, Tensor | int],
    reads: Sequence[Tensor] = (),
    ints: Sequence[int] = (),
    dot: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The value of `expr` for many elements at once, in plain PyTorch (differentiable in `dot` and
    `reads`).

    Args:
        expr: the expression.
        env: a value for each variable used: sizes as integers, indices as integer tensors that
            broadcast together,
            by custom b [B,1,1,1], h [H,1,1], q [T,1], k [S].
        reads: the tensor of each slot.
        ints: the integer of each `n` slot.
        dot: the scaled products, broadcastable with the indices.
        dtype: of constants with a fraction and of integers turned into numbers.

    Returns:
        A tensor that broadcasts to the joint shape of the indices.
    """
    done: dict[Expr, Any] = {}

    def value(node: Expr) -> Any:
        if node not in done:
            done[node] = compute(node)
        return done[node]

    def compute(node: Expr) -> Any:
        if isinstance(node, Const):
            return torch.tensor(node.value, dtype=dtype if isinstance(node.value, float) else None)
        if isinstance(node, Var):
            return torch.as_tensor(env[node.name])
        if isinstance(node, Int):
            return torch.tensor(ints[node.slot])
        if isinstance(node, Dot):
            return dot
        if isinstance(node, Read):
            return _read(reads[node.slot], [value(i) for i in node.index])
        assert isinstance(node, Call)
        return apply(node.op, [value(a) for a in node.args], dtype)

    result = value(expr)
    assert isinstance(result, Tensor)
    return result


def _read(tensor: Tensor, index: list[Tensor]) -> Tensor:
    return tensor[inside(tensor, index)] if index else tensor


def inside(tensor: Tensor, index: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The index as one that is valid everywhere.

    Negative numbers count from the end, as in PyTorch. What is still outside is only ever the
    branch of a `where` that is not taken (both are computed).
    """
    found = (i.to(tensor.device, torch.int64) for i in index)
    return tuple(
        torch.where(i < 0, i + size, i).clamp(0, max(size - 1, 0))
        for i, size in zip(found, tensor.shape, strict=True)
    )
