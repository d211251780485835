"""What each axis is for: batch, head, query, key or feature, decided by which operands it runs
through.

in k and v, not summed over    batch or head           in q alone      query rows, or the heads that
share k and v
summed over with v             key                     in v alone      value features
summed over with q             features
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sympy
from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir.axes import Axis, Index, along
from attn_compiler.ir.expr import Call, Const, Expr, Int, Var, call
from attn_compiler.ir.no_attention import NotAttention
from attn_compiler.ir.pull import (
    Coordinates,
    Leaf,
    Product,
    Puller,
    Symbol,
    arguments,
    op,
    product_at,
    shape,
    to_expr,
)

Leaves = tuple[Axis, ...]


@dataclass(frozen=True)
class Roles:
    """Axes by role, the slowest first within each; query heads are (kv heads, repeats)."""

    batch: Leaves
    heads: Leaves
    repeats: Leaves
    query: Leaves
    key: Leaves
    feature: Leaves
    value: Leaves

    @property
    def query_heads(self) -> Leaves:
        return self.heads + self.repeats


def leaves(where: Coordinates) -> dict[Axis, None]:
    """The axes of the coordinates, in order."""
    found: dict[Axis, None] = {}
    for coordinate in where:
        if isinstance(coordinate, Index):
            found.update(dict.fromkeys(axis for axis, _ in coordinate.resolved().terms))
    return found


def extent(group: Iterable[Axis]) -> ax.Size:
    return ax.product(axis.extent for axis in group)


def assign(
    end: Coordinates,
    weights: Coordinates,
    key: Index,
    feature: Iterable[Axis],
    q: Coordinates,
    k: Coordinates,
    v: Coordinates,
    told: Leaves,
) -> Roles:
    """Roles of all axes.

    Args:
        end: coordinates of the output.
        weights: coordinates into the tensor that the softmax normalises, without the key dimension.
        key: the index the values are summed over.
        feature: the axes that q and k are summed over.
        q, k, v: coordinates into the operands, peeled as far as views go.
        told: axes that are no batches, wherever they stand.

    Raises:
        NotAttention: the axes do not play the roles of an attention.
    """
    in_q, in_k, in_v, in_w = leaves(q), leaves(k), leaves(v), leaves(weights)
    keys = tuple(axis for axis, _ in key.resolved().terms)
    features = tuple(leaf for axis in feature for leaf in axis.leaves())
    _check_operands(in_q, in_k, in_v, keys, features)
    rest = [axis for axis in leaves(end) if axis not in keys]
    value = tuple(
        a for a in rest if a in in_v and a not in in_q and a not in in_k and a not in in_w
    )
    free = [a for a in (*in_w, *(r for r in rest if r not in in_w)) if a in rest and a not in value]
    rows = [a for a in free if a in in_q and a not in in_k and a not in in_v]
    query = _query(weights, rows, q, k, keys, features)
    outer = [a for a in free if a not in rows]
    if any(a.extent != 1 and a not in in_q and (a in in_k) != (a in in_v) for a in outer):
        raise NotAttention(
            "not_attention.kv_axes", "keys and values do not run along the same batches and heads"
        )
    heads = _heads(outer, q, k, features) or _last(outer, told)
    return Roles(
        batch=tuple(a for a in outer if a not in heads),
        heads=heads,
        repeats=tuple(a for a in rows if a not in query),
        query=query,
        key=keys,
        feature=features,
        value=value,
    )


def _check_operands(
    q: Mapping[Axis, None],
    k: Mapping[Axis, None],
    v: Mapping[Axis, None],
    keys: Leaves,
    features: Leaves,
) -> None:
    if not keys or any(a.extent != 1 and (a not in k or a not in v) for a in keys):
        raise NotAttention(
            "not_attention.no_key_axis",
            "the axis summed over does not run through both keys and values",
        )
    if any(a in q for a in keys):
        raise NotAttention(
            "not_attention.key_in_query", "the query depends on the key axis as well"
        )
    if any(a in v for a in features):
        raise NotAttention(
            "not_attention.feature_in_value",
            "the values depend on the axis of the query-key product",
        )


def _query(
    weights: Coordinates,
    rows: Sequence[Axis],
    q: Coordinates,
    k: Coordinates,
    keys: Leaves,
    features: Leaves,
) -> Leaves:
    """The query rows: the last dimension of the weights, before the keys, that only the query runs
    through and that holds no heads; one as long as the keys rather than another one.
    """
    dims = (tuple(leaves((coordinate,))) for coordinate in reversed(weights))
    found = [
        dim
        for dim in dims
        if dim
        and all(axis in rows for axis in dim)
        and not _heads_as_rows(dim, q, k, keys, features)
        and not _beside_the_row(dim, q, k, keys)
    ]
    if not found or extent(found[0]) == 1:
        return found[0] if found else ()
    return next((dim for dim in found if ax.equal(extent(dim), extent(keys))), found[0])


def _heads_as_rows(
    query: Leaves, q: Coordinates, k: Coordinates, keys: Leaves, features: Leaves
) -> bool:
    """Are these no rows but heads that share keys? One row of H heads is often written as H / G
    rows of G heads: in what the queries are a view of, they lie right of G in its dimension, or, as
    G is 1, left of the features in theirs. Rows lie like that in the first dimension, right of the
    batches: B T tokens of a projection. Where keys lie right of G in their dimension too, the rows
    are channels of each head, and the keys others.
    """
    if not all(isinstance(axis.extent, int) for axis in query):
        return False
    in_k = leaves(k)
    for coordinate in q[1:]:
        found = list(leaves((coordinate,)))
        if all(axis in found for axis in query):
            before = [a for a in found[: found.index(query[0])] if a in in_k and a.extent != 1]
            beside = any(_with(keys, before, leaves((where,))) for where in k)
            return (bool(before) and not beside) or any(axis in features for axis in found)
    return False


def _with(keys: Leaves, heads: Sequence[Axis], found: Mapping[Axis, None]) -> bool:
    return any(axis in found for axis in keys) and any(axis in found for axis in heads)


def _beside_the_row(query: Leaves, q: Coordinates, k: Coordinates, keys: Leaves) -> bool:
    """Do these stand in another dimension of the queries than keys do in theirs, and there is one
    row in that? Heads that share one kv head, then, when a cache is asked by one token.
    """
    if len(q) != len(k) or not all(isinstance(axis.extent, int) for axis in query):
        return False
    row = [i for i, where in enumerate(k) if any(axis in keys for axis in leaves((where,)))]
    if len(row) != 1 or any(axis in leaves((q[row[0]],)) for axis in query):
        return False
    return all(axis.extent == 1 for axis in leaves((q[row[0]],)))


def _heads(outer: Sequence[Axis], q: Coordinates, k: Coordinates, features: Leaves) -> Leaves:
    """The heads that are cut out of the same dimension as the features."""
    beside: dict[Axis, None] = {}
    for where in (q, k):
        for coordinate in where:
            found = leaves((coordinate,))
            if any(axis in features for axis in found):
                beside.update(found)
    return tuple(a for a in outer if a in beside)


def _last(outer: Sequence[Axis], told: Leaves) -> Leaves:
    """The last of several outer axes that may be heads. The number of heads is the model's: beside
    an axis of known size, one of unknown size is a batch.
    """
    wide = [a for a in outer if a.extent != 1] if len(outer) > 2 else list(outer)
    if len(wide) < 2 and not (len(outer) >= 2 and len(wide) == 1):
        return ()
    outer = [a for a in outer if a in told and a.extent != 1] or outer
    known = [a for a in outer if isinstance(a.extent, int)]
    return (known[-1],) if any(a.extent != 1 for a in known) else (outer[-1],)


def told(puller: Puller, node: fx.Node, where: Coordinates, key: Index) -> Leaves:
    """Axes of the values that are heads whatever their order: those of weights that tokens are
    multiplied by, and what counts the pieces of one tensor, joined in another dimension.
    """
    if (made := product_at(puller, node, where)) is not None:
        keys = leaves((key,))
        sides = (leaves(made.left[1]), leaves(made.right[1]))
        tokens, weights = sides if any(a in sides[0] for a in keys) else sides[::-1]
        return tuple(a for a in weights if a not in tokens)
    if op(node) != "cat":
        return ()
    args = arguments(node)
    pieces, joined = args["tensors"], where[args["dim"] % len(where)]
    sizes = shape(pieces[0])
    if not isinstance(joined, Index) or any(shape(piece) != sizes for piece in pieces):
        return ()
    own = tuple(along(puller.new_axis(size)) for size in sizes)
    if len({puller.peel(piece, own)[0] for piece in pieces}) != 1:
        return ()
    length = sizes[args["dim"] % len(where)]
    return tuple(a for a, stride in joined.resolved().terms if ax.equal(stride, length))


# ---------------------------------------------------------------- expressions in roles


class Naming:
    """Rewrites expressions over axes into expressions over b, h, q, k, sizes, and numbered reads
    and integers.

    Attributes:
        reads: the leaves in the order of their slots.
        ints: the symbols in the order of their slots.
    """

    def __init__(self, puller: Puller, roles: Roles) -> None:
        self.puller = puller
        self.roles = roles
        self.groups = (
            ("b", roles.batch),
            ("h", roles.query_heads),
            ("q", roles.query),
            ("k", roles.key),
        )
        self.sizes = {n: extent(g) for n, (_, g) in zip("BHTS", self.groups, strict=True)}
        self.reads: list[Leaf] = []
        self.ints: list[sympy.Expr] = []
        self._done: dict[Expr, Expr] = {}

    def __call__(self, expression: Expr) -> Expr:
        if expression not in self._done:
            self._done[expression] = self._named(expression)
        return self._done[expression]

    def _named(self, expression: Expr) -> Expr:
        if isinstance(expression, Symbol):
            return self.size(expression.value)
        if isinstance(expression, Var | Call):
            found = self.puller.affine(expression)
            if isinstance(found, Index):
                return self.index(found)
        if isinstance(expression, Call):
            return call(expression.op, *map(self, expression.args))
        if isinstance(expression, Leaf):
            return self._read(expression)
        if isinstance(expression, Product):  # a bias made of tables, say
            index = tuple(to_expr(w) for w in expression.where)
            return self._read(Leaf(expression.node, index, expression.where))
        return expression

    def _read(self, leaf: Leaf) -> Expr:
        from attn_compiler.ir.expr import Read

        index = tuple(
            self.index(w) if isinstance(w, Index) else self(e)
            for w, e in zip(leaf.where, leaf.index, strict=True)
        )
        slot = next(
            (s for s, known in enumerate(self.reads) if known.node is leaf.node), len(self.reads)
        )
        if slot == len(self.reads):
            self.reads.append(leaf)
        return Read(slot, index)

    def index(self, index: Index) -> Expr:
        """An index as a sum over b, h, q, k; an axis of extent one counts as zero."""
        terms = {axis: c for axis, c in index.resolved().terms if axis.extent != 1}
        total: Expr | None = None
        for name, group in self.groups:
            for part in self._group(name, [a for a in group if a.extent != 1], terms):
                total = part if total is None else call("add", total, part)
        if terms:
            raise NotAttention(
                "attention.mask_axis",
                "a mask or bias depends on an axis that is not of the attention",
            )
        const = self.size(index.const)
        if total is None:
            return const
        return total if const == Const(0) else call("add", total, const)

    def _group(self, name: str, group: list[Axis], terms: dict[Axis, ax.Size]) -> Iterable[Expr]:
        present = [a for a in group if a in terms]
        if not present:
            return
        if present == group:
            step = terms[group[-1]]
            stride = step
            for axis in reversed(group):
                if not ax.equal(terms[axis], stride):
                    break
                stride = ax.simple(stride * axis.extent)
            else:
                for axis in group:
                    del terms[axis]
                yield self._times(Var(name), step)
                return
        inner: ax.Size = 1
        for axis in reversed(group):
            if axis in terms:
                digit: Expr = (
                    Var(name) if inner == 1 else call("floordiv", Var(name), self.size(inner))
                )
                if axis is not group[0]:
                    digit = call("mod", digit, self.size(axis.extent))
                yield self._times(digit, terms.pop(axis))
            inner = ax.simple(inner * axis.extent)

    def _times(self, expression: Expr, factor: ax.Size) -> Expr:
        return expression if factor == 1 else call("mul", expression, self.size(factor))

    def size(self, size: ax.Size) -> Expr:
        """A size as B, H, T, S or S - T (the keys before the rows), a constant, or a numbered
        integer.
        """
        if isinstance(size, int):
            return Const(size)
        for name in "TSBH":
            if ax.equal(self.sizes[name], size):
                return Var(name)
        if ax.equal(self.sizes["S"] - self.sizes["T"], size):
            return call("sub", Var("S"), Var("T"))
        if isinstance(size, sympy.Add | sympy.Mul):
            parts = [self.size(ax.simple(part)) for part in size.args]
            result = parts[0]
            for part in parts[1:]:
                result = call("add" if isinstance(size, sympy.Add) else "mul", result, part)
            return result
        if size not in self.ints:
            self.ints.append(size)
        return Int(self.ints.index(size))
