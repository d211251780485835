"""Attention spelled out: two products with a softmax between them.

softmax(mask(scale * (q @ k.T) + bias)) @ v
"""

from __future__ import annotations

import math

from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir import ops
from attn_compiler.ir import roles as role
from attn_compiler.ir.axes import Index
from attn_compiler.ir.core import (
    Core,
    Found,
    Operand,
    Scaling,
    assemble,
    between,
    operand,
    program_of,
)
from attn_compiler.ir.expr import DOT, Call, Const, Expr, Var, call, substitute, walk
from attn_compiler.ir.filling import spread
from attn_compiler.ir.no_attention import NotAttention
from attn_compiler.ir.pull import (
    VIEWS,
    Coordinates,
    Leaf,
    Product,
    Puller,
    arguments,
    indices,
    op,
    shape,
    val,
)
from attn_compiler.ir.roles import Naming
from attn_compiler.ir.score import Program
from attn_compiler.ir.soft import (
    Place,
    Softmax,
    find_softmax,
    normalised,
    reads_own_row,
    reduced_dims,
)

# how far behind an operation a product is looked for
_DEEP = 4


def from_product(
    puller: Puller,
    end: fx.Node,
    where: Coordinates,
    found: Product,
    divisor: Place | None = None,
) -> Core:
    """The attention that ends with a product, or with its division by the sum of the weights."""
    refusals: list[NotAttention] = []
    for weights, values in ((found.left, found.right), (found.right, found.left)):
        try:
            soft = (
                find_softmax(puller, *weights)
                if divisor is None
                else normalised(puller, weights, divisor)
            )
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
    logits, sink = _without_row_constants(puller, soft, logits, sink, key)
    if soft.factor != 1:
        logits = call("mul", logits, soft.factor)
        sink = None if sink is None else call("mul", sink, soft.factor)
    for condition in soft.hidden:
        logits = call("where", condition, -math.inf, logits)
    refusals: list[NotAttention] = []
    for product in sorted(_scores(logits, key), key=lambda p: _foreign(p, key, values[1])):
        try:
            return _from_scores(
                puller, Operand(end, indices(where)), soft, key, product, logits, sink, values
            )
        except NotAttention as refusal:
            refusals.append(refusal)
    raise refusals[0]


def _from_scores(
    puller: Puller,
    end: Operand,
    soft: Softmax,
    key: Index,
    product: Product,
    logits: Expr,
    sink: Expr | None,
    values: tuple[fx.Node, Coordinates],
) -> Core:
    sides = sorted((product.left, product.right), key=lambda side: not _runs_along(side, key))
    (k_node, k_at), (q_node, q_at) = sides
    scaling = Scaling()
    q = operand(puller, q_node, q_at, scaling)
    k = operand(puller, k_node, k_at, scaling)
    v = operand(puller, *values, None)
    weights = tuple(w for d, w in enumerate(soft.where) if d != soft.dim)
    told, read = role.told(puller, v.node, v.where, key), (q.where, k.where, v.where)
    roles = role.assign(end.where, weights, key, product.reduced, *read, told)
    naming = Naming(puller, roles)
    dtype = val(soft.logits).dtype
    score = naming(scaling.fold(spread(_with_dot(logits, product), dtype)))
    extra = None if sink is None else naming(sink)
    program, dropout = program_of(naming, score, extra, soft, dtype)
    if soft.unshifted and _is_filled(program):
        raise NotAttention(
            "attention.unshifted",
            "a row that is filled with one large negative number has no exponential but zero",
            product.node,
        )
    if soft.cut and program.sink is None and program.empty in ("nan", "nan_added"):
        raise NotAttention(
            "attention.weights_changed",
            "a row whose exponentials are all set to zero has other gradients than a softmax",
            product.node,
        )
    inner = between(product.node, end.node)
    again = [leaf.node for leaf in naming.reads if leaf.node in inner]
    if again and op(again[0]) in VIEWS:
        raise _hidden(again[0])
    if (soft.moved and program.empty in ("nan", "nan_added")) or any(
        node in inner for node in (*again, *(n for _, n in scaling.factors))
    ):
        raise NotAttention(
            "attention.scores_reduced",
            "a reduction over the scores enters the scores",
            product.node,
        )
    parts = Found(naming, scaling, program, dropout, product.node, inner)
    return assemble(end, (q, k, v), parts)


def _is_filled(program: Program) -> bool:
    """May all scores of a row be one large negative number?"""
    constants = (n.value for n in walk(program.score) if isinstance(n, Const))
    return program.empty in ("uniform", "absorbed") or any(c < -1e3 for c in constants)


def _key_index(soft: Softmax, found: Product) -> tuple[Index, ax.Size]:
    """The index of the sum over values, and where the keys begin among the columns."""
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


def _without_row_constants(
    puller: Puller, soft: Softmax, logits: Expr, sink: Expr | None, key: Index
) -> tuple[Expr, Expr | None]:
    """softmax(x - max(x)) is softmax(x): drop what is the same for a whole row and sink."""
    if sink is None and isinstance(logits, Call) and logits.op in ("mul", "div"):
        # (x / 32 - max(x / 32)) * 32
        inner, factor = logits.args
        if isinstance(factor, Const) and factor.value > 0 and math.isfinite(factor.value):
            inner, _ = _without_row_constants(puller, soft, inner, None, key)
            return Call(logits.op, (inner, factor)), None
    names = {leaf.name for axis, _ in key.terms for leaf in axis.leaves()}
    while isinstance(logits, Call) and logits.op in ("sub", "add"):
        left, right = logits.args
        if logits.op == "add" and not _varies(left, names):
            left, right = right, left
        if _varies(right, names) or not _is_safe_shift(puller, soft, right, left):
            return logits, sink
        if sink is not None:
            sink = _same_shift(logits.op, left, right, sink)
            # without a floor the maximum of a row without keys is -inf, and the sink NaN
            soft.moved |= not _above_floor(right)[1]
        logits = left
    return logits, sink


def _same_shift(operation: str, left: Expr, right: Expr, sink: Expr) -> Expr:
    if isinstance(sink, Call) and sink.op == operation and sink.args[1] == right:
        return sink.args[0]
    inverse = right
    if operation == "sub":
        times = Call("mul", (right, Const(-1)))
        inverse = times if times in walk(sink) else Call("neg", (right,))
    shifted = call("exp", inverse)
    if sink == inverse or sink == Call("log", (shifted,)):
        return Const(0.0)
    # a factor of the exponential, never of a logit
    inner = sink.args[0] if isinstance(sink, Call) and sink.op == "log" else None
    if isinstance(inner, Call) and inner.op == "mul" and inner.args[0] == shifted:
        number = inner.args[1]
        if isinstance(number, Const) and number.value > 0:
            return Const(math.log(number.value))
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


def _is_safe_shift(puller: Puller, soft: Softmax, constant: Expr, scores: Expr) -> bool:
    """Is it a number, or the largest of the row of scores it shifts? Anything else may be infinite
    where the row is not (a mean is, or the largest of a part, beside a forbidden key), or learned.
    """
    if isinstance(constant, Const):
        return math.isfinite(constant.value)
    largest, _ = _above_floor(constant)
    if not isinstance(largest, Leaf):
        return False
    node = largest.node
    while op(node) in ("getitem", "detach"):
        node = node.all_input_nodes[0]
    if op(node) not in ("amax", "max", "logsumexp"):
        return False
    soft.unshifted = False
    # through the gradient of a maximum over several rows the NaN of one reaches the others
    soft.moved |= len(reduced_dims(node)) > 1
    source = arguments(node)["self"]
    return (
        shape(source) == shape(soft.logits)
        and reads_own_row(node, largest.where, soft.where, soft.dim)
        and puller.expr(source, soft.where) == scores
    )


def _above_floor(constant: Expr) -> tuple[Expr, bool]:
    """x of max(x, number) or of its negative, and whether there is such a number."""
    if isinstance(constant, Call) and constant.op == "neg":
        constant = constant.args[0]
    if isinstance(constant, Call) and constant.op == "max":
        for one, other in (constant.args, constant.args[::-1]):
            if isinstance(other, Const) and math.isfinite(other.value):
                return one, True
    return constant, isinstance(constant, Const)


def _runs_along(side: tuple[fx.Node, Coordinates], key: Index) -> bool:
    wanted = {leaf for axis, _ in key.terms for leaf in axis.leaves()}
    return bool(wanted & set(role.leaves(side[1])))


def _foreign(product: Product, key: Index, values: Coordinates) -> int:
    """How many axes run through the keys of a product and not through the values: q.r[q - k], of
    relative positions, is a bias beside q.k.
    """
    keys = product.left if _runs_along(product.left, key) else product.right
    features = {leaf for axis in product.reduced for leaf in axis.leaves()}
    return len(set(role.leaves(keys[1])) - set(role.leaves(values)) - features)


def _scores(logits: Expr, key: Index) -> list[Product]:
    """The products among the terms of the logits that run from queries to keys."""
    products = [n for n in walk(logits) if isinstance(n, Product)]
    found = [p for p in products if _runs_along(p.left, key) != _runs_along(p.right, key)]
    if found:
        return found
    if products:
        raise NotAttention(
            "not_attention.scores",
            "no product in the scores runs from queries to keys",
            products[0].node,
        )
    hidden = next((n.node for n in walk(logits) if isinstance(n, Leaf) and _hides(n.node)), None)
    if hidden is not None:
        raise _hidden(hidden)
    raise NotAttention(
        "not_attention.no_scores", "the softmax is not taken over products of queries and keys"
    )


def _hidden(node: fx.Node) -> NotAttention:
    text = f"`{op(node)}`, which is not read through, stands between a product and the softmax"
    return NotAttention("attention.scores_hidden", text, node)


def _hides(node: fx.Node) -> bool:
    """Is this no product itself, but made of one?"""
    if op(node) in ops.CONTRACTION:
        return False
    front = [node]
    for _ in range(_DEEP):
        front = [argument for n in front for argument in n.all_input_nodes]
        if any(op(n) in ops.CONTRACTION for n in front):
            return True
    return False


def _with_dot(logits: Expr, product: Product) -> Expr:
    """The product becomes `dot`."""
    for node in walk(logits):
        if isinstance(node, Product) and node is not product and node.node is product.node:
            raise NotAttention(
                "attention.scores_twice", "the scores enter the softmax in two places", node.node
            )
    return substitute(logits, {product: DOT})
