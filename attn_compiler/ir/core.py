"""One attention found in a functional region, before it knows its module: operands, axes and
program.

end = sum_k softmax_k(program(scale * q.k)) v
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir.axes import Index, along
from attn_compiler.ir.expr import (
    DOT,
    FALSE,
    TRUE,
    Call,
    Const,
    Expr,
    Read,
    Var,
    call,
    substitute,
    walk,
)
from attn_compiler.ir.filling import all_bounded, never_empty, split
from attn_compiler.ir.mask import normalise
from attn_compiler.ir.no_attention import NotAttention
from attn_compiler.ir.pull import (
    Coordinates,
    Leaf,
    Puller,
    arguments,
    is_tensor,
    op,
    shape,
    val,
)
from attn_compiler.ir.roles import Naming, Roles
from attn_compiler.ir.score import Program
from attn_compiler.ir.soft import Softmax, is_float_cast


@dataclass(frozen=True)
class Operand:
    """A functional node and, per dimension, the index it is read at."""

    node: fx.Node
    where: tuple[Index, ...]
    chain: tuple[tuple[fx.Node, Coordinates], ...] = ()


@dataclass(frozen=True)
class Core:
    """An attention in terms of functional nodes.

    Attributes:
        end: the node whose value it computes, and the axis index of each dimension.
        q, k, v: operands.
        roles: axes by role.
        program: score, mask, sink and empty rows.
        scale: number that q.k is multiplied by.
        factors: nodes of numbers known at run time only; q.k is multiplied by them too ("mul") or
            divided ("div").
        reads: nodes of the tensors that the program reads, by slot.
        ints: symbolic integers the program uses, by slot.
        dropout: probability, 0 in inference.
        inner: nodes between the two products, which nobody else may read.
        dtype: what q, k and v are computed in; `out` is that of the result.
    """

    end: Operand
    q: Operand
    k: Operand
    v: Operand
    roles: Roles
    program: Program
    scale: float
    factors: tuple[tuple[str, fx.Node], ...]
    reads: tuple[fx.Node, ...]
    ints: tuple[Any, ...]
    dropout: float
    inner: frozenset[fx.Node]
    dtype: torch.dtype
    sizes: dict[str, ax.Size]


@dataclass(frozen=True)
class Found:
    """What both ways of finding an attention hand to the record."""

    naming: Naming
    scaling: Scaling
    program: Program
    dropout: float
    product: fx.Node
    inner: frozenset[fx.Node] = frozenset()


class Scaling:
    """Collects what the product of q and k is multiplied by."""

    def __init__(self) -> None:
        self.scale = 1.0
        self.factors: list[tuple[str, fx.Node]] = []

    def take(self, operation: str, factor: Any) -> bool:
        """Take one multiplication off q, k or the scores; False if it is no plain number."""
        if isinstance(factor, bool):
            return False
        if isinstance(factor, int | float):
            if factor == 0 or not math.isfinite(factor):
                return False
            self.scale = self.scale * factor if operation == "mul" else self.scale / factor
            return True
        if isinstance(factor, fx.Node) and (
            not isinstance(val(factor), torch.Tensor) or val(factor).dim() == 0
        ):
            self.factors.append((operation, factor))
            return True
        return False

    def fold(self, score: Expr) -> Expr:
        """Take multiplications by numbers off `dot` itself."""
        while True:
            outer = next((n for n in walk(score) if isinstance(n, Call) and DOT in n.args), None)
            factor = None if outer is None else self._factor(outer)
            if outer is None or factor is None or not self.take(*factor):
                return score
            score = substitute(score, {outer: DOT})

    def _factor(self, outer: Call) -> tuple[str, Any] | None:
        if outer.op == "neg":
            return "mul", -1
        if outer.op not in ("mul", "div") or (outer.op == "div" and outer.args[1] == DOT):
            return None
        other = outer.args[1] if outer.args[0] == DOT else outer.args[0]
        if isinstance(other, Const):
            return outer.op, other.value
        return (outer.op, other.node) if isinstance(other, Leaf) and not other.where else None


def operand(puller: Puller, node: fx.Node, where: Coordinates, scaling: Scaling | None) -> Operand:
    """Peel views, widening casts and (for q and k) multiplications by one number."""
    chain: list[tuple[fx.Node, Coordinates]] = [(node, where)]
    while True:
        further = puller.step(node, where)
        if further is None and is_float_cast(node) and _widens(node):
            further = (arguments(node)["self"], where)
        if further is None and scaling is not None and op(node) in ("mul", "div"):
            further = None if _overwritten(puller, node) else _unscaled(node, where, scaling)
            if further is not None:
                chain.clear()
        if further is None:
            break
        node, where = further
        chain.append(further)
    if not all(isinstance(w, Index) for w in where):
        raise NotAttention(
            "attention.gathered_operand",
            "queries, keys or values are picked by a tensor of indices",
            node,
        )
    final = tuple(w.resolved() for w in where if isinstance(w, Index))
    return Operand(node, final, tuple(reversed(chain)))


def _overwritten(puller: Puller, node: fx.Node) -> bool:
    """Is this made of an input that is written in place? q.mul_(scale) leaves no q to read."""
    while True:
        node, _ = puller.peel(node, tuple(along(puller.new_axis(n)) for n in shape(node)))
        if op(node) not in ("mul", "div") and not is_float_cast(node):
            return bool(node.meta.get("overwritten"))
        inner = arguments(node)["self"]
        if not is_tensor(inner):
            return False
        node = inner


def _widens(node: fx.Node) -> bool:
    before, after = val(arguments(node)["self"]).dtype, val(node).dtype
    return bool(before.itemsize <= after.itemsize)


def _unscaled(
    node: fx.Node, where: Coordinates, scaling: Scaling
) -> tuple[fx.Node, Coordinates] | None:
    args = arguments(node)
    if args.get("rounding_mode") is not None:
        return None
    operation = op(node)
    pairs = [(args["self"], args["other"])] + (
        [(args["other"], args["self"])] if operation == "mul" else []
    )
    for inner, factor in pairs:
        if not is_tensor(inner):
            continue
        if (
            shape(inner) == shape(node)
            and val(inner).dtype == val(node).dtype
            and scaling.take(operation, factor)
        ):
            return inner, where
    return None


def program_of(
    naming: Naming,
    score: Expr,
    sink: Expr | None,
    soft: Softmax,
    dtype: torch.dtype,
    mask: Expr = TRUE,
) -> tuple[Program, float]:
    def is_bool(leaf: Expr) -> bool:
        return isinstance(leaf, Read) and _dtype_of(naming.reads[leaf.slot].node) is torch.bool

    def bounded(leaf: Expr) -> bool:
        if not isinstance(leaf, Read):
            return True
        node = naming.reads[leaf.slot].node
        found = val(node)
        floating = (
            found.dtype.is_floating_point
            if isinstance(found, torch.Tensor)
            else not isinstance(found, int | torch.SymInt)
        )
        # one number for each head is a slope or a temperature, and hides no keys
        along = {part.name for at in leaf.index for part in walk(at) if isinstance(part, Var)}
        return not floating or bool(node.meta.get("bounded")) or along == {"h"}

    rows_in_keys = ax.at_most(naming.sizes["T"], naming.sizes["S"])
    lowest = torch.finfo(soft.dtype or dtype).min
    found = split(score, dtype, bounded, is_bool, rows_in_keys, lowest)
    allowed = found.mask if mask == TRUE else normalise(call("and", mask, found.mask))
    empty = found.empty if found.mask != TRUE else "any"
    if never_empty(allowed, rows_in_keys):
        empty = "any"
    elif soft.safe and (empty != "any" or mask != TRUE):
        empty = "zero"
    if empty == "any" and not all_bounded(found.score, bounded):
        # the score itself may be -inf in a whole row
        empty = "zero" if soft.safe else "nan_added"
    if soft.zeroed:
        empty = "zero"
    return Program(found.score, allowed, sink, empty), _unzeroed(naming, soft, allowed)


def _unzeroed(naming: Naming, soft: Softmax, allowed: Expr) -> float:
    """The dropout, once it is sure that only weights are set to zero that the mask has made zero
    already.
    """
    for condition in soft.zeroed:
        dropped = naming(condition)
        if (
            normalise(call("and", dropped, allowed)) != FALSE
            and normalise(call("not", dropped)) != allowed
        ):
            raise NotAttention(
                "attention.weights_changed", "weights are set to zero where the mask allows the key"
            )
    return soft.dropout


def _dtype_of(node: fx.Node) -> torch.dtype | None:
    found = val(node)
    return found.dtype if isinstance(found, torch.Tensor) else None


def _dtype(product: fx.Node, q: Operand, k: Operand, v: Operand) -> torch.dtype:
    """The narrowest dtype that loses nothing: that of the operands, or of the product under
    autocast.
    """
    widest: torch.dtype = val(q.node).dtype
    for operand in (k, v):
        widest = torch.promote_types(widest, val(operand.node).dtype)
    computed: torch.dtype = val(product).dtype
    return computed if computed.itemsize < widest.itemsize else widest


def between(product: fx.Node, end: fx.Node) -> frozenset[fx.Node]:
    """Nodes on the way from the scores to the end, the end itself left out."""
    after = {product}
    for node in end.graph.nodes:
        if any(argument in after for argument in node.all_input_nodes):
            after.add(node)
    before: set[fx.Node] = set()
    stack = [end]
    while stack:
        for argument in stack.pop().all_input_nodes:
            if argument not in before:
                before.add(argument)
                stack.append(argument)
    return frozenset(after & before)


def assemble(end: Operand, operands: tuple[Operand, Operand, Operand], found: Found) -> Core:
    naming, scaling = found.naming, found.scaling
    q, k, v = map(_resolved, operands)
    return Core(
        end=_resolved(end),
        q=q,
        k=k,
        v=v,
        roles=naming.roles,
        program=found.program,
        scale=scaling.scale,
        factors=tuple(scaling.factors),
        reads=tuple(leaf.node for leaf in naming.reads),
        ints=tuple(naming.ints),
        dropout=found.dropout,
        inner=found.inner,
        dtype=_dtype(found.product, *operands),
        sizes=dict(naming.sizes),
    )


def _resolved(operand: Operand) -> Operand:
    """In the axes as they are split by now."""
    return replace(operand, where=tuple(w.resolved() for w in operand.where))
