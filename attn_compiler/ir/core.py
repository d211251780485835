"""One attention found in a functional region, before it knows its module: operands, axes and program.

end = sum_k softmax_k(program(scale * q.k)) v
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir import roles as role
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
from attn_compiler.ir.filling import never_empty, split
from attn_compiler.ir.mask import normalise
from attn_compiler.ir.pull import (
    VALUES,
    Coordinates,
    Leaf,
    Product,
    Puller,
    arguments,
    broadcast,
    op,
    shape,
    to_expr,
    val,
)
from attn_compiler.ir.region import FunctionalRegion
from attn_compiler.ir.roles import Naming, Roles
from attn_compiler.ir.score import Program
from attn_compiler.ir.soft import NotAttention, Softmax, find_softmax, is_float_cast, through_casts


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
        factors: nodes of numbers known at run time only; q.k is multiplied by them too ("mul") or divided ("div").
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


def recognise(region: FunctionalRegion) -> Core:
    """The attention whose output is the region's end.

    Raises:
        NotAttention: it is none, or one that cannot be rewritten; with code, sentence and node.
    """
    from attn_compiler.ir import values, views  # noqa: F401  (enter their rules)

    puller = Puller(region.module)
    end = region.end
    where: Coordinates = tuple(along(puller.new_axis(size)) for size in shape(end))
    node, at = through_casts(puller, end, where)
    if op(node) == "scaled_dot_product_attention":
        return _from_sdpa(puller, end, where, node, at)
    rule = VALUES.get(op(node))
    found = rule(puller, node, arguments(node), at) if rule is not None else None
    if not isinstance(found, Product):
        raise NotAttention(
            "not_attention.no_value_product", "the weights are not summed over with values", node
        )
    return _from_product(puller, end, where, found)


# ---------------------------------------------------------------- softmax spelled out


def _from_product(puller: Puller, end: fx.Node, where: Coordinates, found: Product) -> Core:
    refusals: list[NotAttention] = []
    for weights, values in ((found.left, found.right), (found.right, found.left)):
        try:
            soft = find_softmax(puller, *weights)
        except NotAttention as refusal:
            refusals.append(refusal)
            continue
        return _from_softmax(puller, end, where, found, soft, values)
    # a walk that met a softmax-like thing says more than one that met none
    refusals.sort(key=lambda r: r.code.startswith("not_attention.no_softmax"))
    raise refusals[0]


def _from_softmax(
    puller: Puller,
    end: fx.Node,
    where: Coordinates,
    found: Product,
    soft: Softmax,
    values: tuple[fx.Node, Coordinates],
) -> Core:
    key, offset = _key_index(soft, found)
    logits = puller.expr(soft.logits, soft.where)
    sink = _sink(puller, soft, key, offset)
    logits, sink = _without_row_constants(logits, sink, key)
    product = _scores(logits, key)
    sides = sorted((product.left, product.right), key=lambda side: not _runs_along(side, key))
    (k_node, k_at), (q_node, q_at) = sides
    scaling = _Scaling()
    q = _operand(puller, q_node, q_at, scaling)
    k = _operand(puller, k_node, k_at, scaling)
    v = _operand(puller, *values, None)
    weights = tuple(w for d, w in enumerate(soft.where) if d != soft.dim)
    roles = role.assign(where, weights, key, product.reduced, q.where, k.where, v.where)
    naming = Naming(puller, roles)
    score = naming(scaling.fold(_with_dot(logits, product)))
    extra = None if sink is None else naming(sink)
    program, dropout = _program(naming, score, extra, soft, val(soft.logits).dtype)
    inner = _between(product.node, end)
    if any(node in inner for node in (*(leaf.node for leaf in naming.reads), *(n for _, n in scaling.factors))):
        raise NotAttention("attention.scores_reduced", "a reduction over the scores enters the scores", product.node)
    dtype = _dtype(product.node, q, k, v)
    return _core(end, where, q, k, v, roles, program, scaling, naming, dropout, inner, dtype)


def _key_index(soft: Softmax, found: Product) -> tuple[Index, ax.Size]:
    """The index the values are summed over, and where the keys begin among the normalised columns."""
    index = soft.where[soft.dim]
    if not isinstance(index, Index) or not index.resolved().terms:
        raise NotAttention(
            "not_attention.softmax_axis",
            "the softmax runs over another axis than the sum with the values",
        )
    index = index.resolved()
    reduced = {leaf for axis in found.reduced for leaf in axis.leaves()}
    terms = [axis for axis, _ in index.terms]
    if set(terms) != reduced:
        raise NotAttention(
            "not_attention.softmax_axis",
            "the softmax runs over another axis than the sum with the values",
        )
    stride: ax.Size = 1
    for axis, coefficient in reversed(index.terms):
        if not ax.equal(coefficient, stride):
            raise NotAttention(
                "attention.key_order",
                "the keys are taken in another order than they are normalised in",
            )
        stride = ax.simple(stride * axis.extent)
    return Index(index.terms), index.const


def _sink(puller: Puller, soft: Softmax, key: Index, offset: ax.Size) -> Expr | None:
    columns, keys = shape(soft.logits)[soft.dim], role.extent(a for a, _ in key.terms)
    if ax.equal(columns, keys):
        return soft.sink
    if soft.sink is not None or not ax.equal(columns, ax.simple(keys + 1)) or offset not in (0, 1):
        raise NotAttention(
            "attention.columns_dropped",
            "columns that the softmax normalises over never meet a value",
        )
    column = Index((), keys if offset == 0 else 0)
    where = (*soft.where[: soft.dim], column, *soft.where[soft.dim + 1 :])
    return puller.expr(soft.logits, where)


def _without_row_constants(logits: Expr, sink: Expr | None, key: Index) -> tuple[Expr, Expr | None]:
    """softmax(x - max(x)) is softmax(x): drop what is the same for a whole row (and for its sink)."""
    names = {leaf.name for axis, _ in key.terms for leaf in axis.leaves()}
    while isinstance(logits, Call) and logits.op in ("sub", "add"):
        left, right = logits.args
        if logits.op == "add" and not _varies(left, names):
            left, right = right, left
        if _varies(right, names) or _has_product(right):
            return logits, sink
        if sink is not None:
            sink = _same_shift(logits.op, left, right, sink)
        logits = left
    return logits, sink


def _same_shift(operation: str, left: Expr, right: Expr, sink: Expr) -> Expr:
    if isinstance(sink, Call) and sink.op == operation and sink.args[1] == right:
        return sink.args[0]
    inverse = Call("neg", (right,)) if operation == "sub" else right
    if sink == inverse or (
        isinstance(sink, Call) and sink.op == "log" and sink.args[0] == call("exp", inverse)
    ):
        return Const(0.0)
    raise NotAttention(
        "attention.sink_shift", "the extra column is shifted differently from the others"
    )


def _varies(expression: Expr, names: set[str]) -> bool:
    for node in walk(expression):
        if isinstance(node, Product):
            return True
        if isinstance(node, Leaf) and any(_named(i, names) for i in node.index):
            return True
    return _named(expression, names)


def _named(expression: Expr, names: set[str]) -> bool:
    for node in walk(expression):
        axis = ax.by_name(node.name) if isinstance(node, Var) else None
        if axis is not None and {leaf.name for leaf in axis.leaves()} & names:
            return True
    return False


def _has_product(expression: Expr) -> bool:
    return any(isinstance(node, Product) for node in walk(expression))


def _runs_along(side: tuple[fx.Node, Coordinates], key: Index) -> bool:
    wanted = {axis for axis, _ in key.terms}
    return bool(wanted & set(role.leaves(side[1])))


def _scores(logits: Expr, key: Index) -> Product:
    """The product of queries and keys among the terms of the logits."""
    products = [n for n in walk(logits) if isinstance(n, Product)]
    for product in products:
        if _runs_along(product.left, key) != _runs_along(product.right, key):
            return product
    if products:
        raise NotAttention(
            "not_attention.scores",
            "no product in the scores runs from queries to keys",
            products[0].node,
        )
    raise NotAttention(
        "not_attention.no_scores", "the softmax is not taken over products of queries and keys"
    )


def _with_dot(logits: Expr, product: Product) -> Expr:
    """The product becomes `dot`, any other product a read of the tensor it makes."""
    table: dict[Expr, Expr] = {product: DOT}
    for node in walk(logits):
        if isinstance(node, Product) and node is not product:
            if node.node is product.node:
                raise NotAttention(
                    "attention.scores_twice",
                    "the scores enter the softmax in two places",
                    node.node,
                )
            table[node] = Leaf(node.node, tuple(to_expr(w) for w in node.where), node.where)
    return substitute(logits, table)


# ---------------------------------------------------------------- fused attention


def _from_sdpa(
    puller: Puller, end: fx.Node, where: Coordinates, node: fx.Node, at: Coordinates
) -> Core:
    args = arguments(node)
    query, key_, value = args["query"], args["key"], args["value"]
    masked: Expr = TRUE
    logits: Expr = DOT
    batch, row = at[:-2], at[-2]
    keys = puller.new_axis(shape(key_)[-2])
    if args["is_causal"]:
        masked = call("le", to_expr(along(keys)), to_expr(row))
    if args["attn_mask"] is not None:
        given = args["attn_mask"]
        element = puller.operand(given, node, (*batch, row, along(keys)))
        if val(given).dtype is torch.bool:
            masked = element
        else:
            logits = call("add", DOT, element)
    scale = args["scale"] if args["scale"] is not None else 1 / math.sqrt(int(shape(query)[-1]))
    operands = (query, key_, value)
    fused = Fused(
        operands, keys, bool(args["enable_gqa"]), scale, logits, masked, float(args["dropout_p"])
    )
    return from_fused(puller, Operand(end, where), at, fused)


@dataclass(frozen=True)
class Fused:
    """An attention that is one call already: operands [..., rows, features], score over `dot`, and mask."""

    operands: tuple[fx.Node, fx.Node, fx.Node]
    keys: ax.Axis
    grouped: bool
    scale: Any
    logits: Expr
    mask: Expr
    dropout: float = 0.0


def from_fused(puller: Puller, end: Operand, at: Coordinates, fused: Fused) -> Core:
    """The core of a fused call whose result is read at `at`."""
    query, key_, value = fused.operands
    batch, row, column = at[:-2], at[-2], at[-1]
    reduced = puller.new_axis(shape(query)[-1])
    kv_batch = _grouped(batch, shape(query), shape(key_)) if fused.grouped else batch
    scaling = _Scaling()
    if not scaling.take("mul", fused.scale):
        raise NotAttention(
            "attention.scale", "the scale is neither a number nor known when the model runs"
        )
    features, keys = along(reduced), along(fused.keys)
    q = _operand(puller, query, (*broadcast(batch, shape(query)[:-2]), row, features), scaling)
    k = _operand(puller, key_, (*broadcast(kv_batch, shape(key_)[:-2]), keys, features), scaling)
    v = _operand(puller, value, (*broadcast(kv_batch, shape(value)[:-2]), keys, column), None)
    roles = role.assign(end.where, (*batch, row), keys, (reduced,), q.where, k.where, v.where)
    naming = Naming(puller, roles)
    soft = Softmax(query, (), 0, dropout=fused.dropout, safe=True)
    score = naming(scaling.fold(fused.logits))
    program, dropout = _program(
        naming, score, None, soft, val(query).dtype, normalise(naming(fused.mask))
    )
    dtype = _dtype(query, q, k, v)
    return _core(
        end.node, end.where, q, k, v, roles, program, scaling, naming, dropout, frozenset(), dtype
    )


def _grouped(
    batch: Coordinates, query: tuple[ax.Size, ...], keys: tuple[ax.Size, ...]
) -> Coordinates:
    repeat = ax.quotient(query[-3], keys[-3])
    head = batch[-1]
    assert isinstance(head, Index) and repeat is not None
    return (*batch[:-1], head if repeat == 1 else ax.divide(head, repeat)[0])


# ---------------------------------------------------------------- parts of both


class _Scaling:
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


def _operand(
    puller: Puller, node: fx.Node, where: Coordinates, scaling: _Scaling | None
) -> Operand:
    """Peel views, widening casts and (for q and k) multiplications by one number."""
    chain: list[tuple[fx.Node, Coordinates]] = [(node, where)]
    while True:
        further = puller.step(node, where)
        if further is None and is_float_cast(node) and _widens(node):
            further = (arguments(node)["self"], where)
        if (
            further is None
            and scaling is not None
            and op(node) in ("mul", "div", "true_divide", "multiply")
        ):
            further = _unscaled(node, where, scaling)
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


def _widens(node: fx.Node) -> bool:
    before, after = val(arguments(node)["self"]).dtype, val(node).dtype
    return bool(before.itemsize <= after.itemsize)


def _unscaled(
    node: fx.Node, where: Coordinates, scaling: _Scaling
) -> tuple[fx.Node, Coordinates] | None:
    args = arguments(node)
    if args.get("rounding_mode") is not None:
        return None
    operation = "mul" if op(node) in ("mul", "multiply") else "div"
    pairs = [(args["self"], args["other"])] + (
        [(args["other"], args["self"])] if operation == "mul" else []
    )
    for inner, factor in pairs:
        if not isinstance(inner, fx.Node) or not isinstance(val(inner), torch.Tensor):
            continue
        if (
            shape(inner) == shape(node)
            and val(inner).dtype == val(node).dtype
            and scaling.take(operation, factor)
        ):
            return inner, where
    return None


def _program(
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
        found = _dtype_of(node)
        return found is None or not found.is_floating_point or bool(node.meta.get("bounded"))

    found = split(score, dtype, bounded, is_bool)
    allowed = found.mask if mask == TRUE else normalise(call("and", mask, found.mask))
    empty = found.empty if found.mask != TRUE else "any"
    if never_empty(allowed):
        return Program(found.score, allowed, sink), _unzeroed(naming, soft, allowed)
    if soft.safe and allowed != TRUE and (empty != "any" or mask != TRUE):
        empty = "zero"
    if soft.zeroed:
        empty = "zero"
    return Program(found.score, allowed, sink, empty), _unzeroed(naming, soft, allowed)


def _unzeroed(naming: Naming, soft: Softmax, allowed: Expr) -> float:
    """The dropout, once it is sure that only weights are set to zero that the mask has made zero already."""
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
    """The narrowest dtype that loses nothing: that of the operands, or of the product under autocast."""
    widest = val(q.node).dtype
    for operand in (k, v):
        widest = torch.promote_types(widest, val(operand.node).dtype)
    computed = val(product).dtype
    return computed if computed.itemsize < widest.itemsize else widest


def _between(product: fx.Node, end: fx.Node) -> frozenset[fx.Node]:
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


def _core(
    end: fx.Node,
    where: Coordinates,
    q: Operand,
    k: Operand,
    v: Operand,
    roles: Roles,
    program: Program,
    scaling: _Scaling,
    naming: Naming,
    dropout: float,
    inner: frozenset[fx.Node],
    dtype: torch.dtype,
) -> Core:
    indices = tuple(w for w in where if isinstance(w, Index))
    return Core(
        end=_resolved(Operand(end, indices)),
        q=_resolved(q),
        k=_resolved(k),
        v=_resolved(v),
        roles=roles,
        program=program,
        scale=scaling.scale,
        factors=tuple(scaling.factors),
        reads=tuple(leaf.node for leaf in naming.reads),
        ints=tuple(naming.ints),
        dropout=dropout,
        inner=inner,
        dtype=dtype,
        sizes=dict(naming.sizes),
    )


def _resolved(operand: Operand) -> Operand:
    """In the axes as they are split by now."""
    return replace(operand, where=tuple(w.resolved() for w in operand.where))
