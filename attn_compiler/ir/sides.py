"""How keys, or values, are made: back through views to the linear map, and which of its outputs.

    cat([rotate(k[..., :8]), k[..., 8:]], -1), k = norm(W_k(x).view(...))   ->   x, W_k, which rows

Between the linear map and the cache only views may stand, and before keys a norm; what else is
found there is named.

Source: EL-Attention (arXiv 2105.04779).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir import ops
from attn_compiler.ir.affine import Blocked, LinearMap, between, linear_map
from attn_compiler.ir.axes import Axis, Index, along
from attn_compiler.ir.key_norm import Norm, norm_of
from attn_compiler.ir.key_parts import Beside, linear_part
from attn_compiler.ir.pull import Puller, op, shape
from attn_compiler.ir.region import FunctionalRegion, cut, functionalise, is_boundary, order
from attn_compiler.ir.trace import Region, RegionError, fake_mode

State = Mapping[fx.Node, tuple[Any, ...]]


@dataclass(frozen=True)
class KeyNorm:
    """How keys are normalised.

    Attributes:
        norm: over z.
        rows: z as outputs of the linear map, as in `Side`: each head by itself, or one that is all.
        offset, step: feature f of head g of the keys is feature offset + g * step + f of z, where z
            is one for all heads; offset + f where step is 0.
    """

    norm: Norm
    rows: tuple[int, int, int, int, bool]
    offset: int
    step: int


@dataclass(frozen=True)
class Side:
    """How keys, or values, are made.

    Attributes:
        map: from x [B, S, D] to all that it gives.
        rows: start, step, heads, features, transposed: feature f of head g is output
            start + g * step + f of the map; transposed where the weight is [D, outputs].
        nodes: what is dead once nobody asks for them.
        given: what the cache is given.
        beside: of keys whose `rows` are not all of their features, the rest.
        norm: of keys that are normalised; `rows` are those of what is.
    """

    map: LinearMap
    rows: tuple[int, int, int, int, bool]
    nodes: frozenset[fx.Node]
    given: fx.Node
    beside: Beside | None = None
    norm: KeyNorm | None = None


@dataclass(frozen=True)
class Followed:
    """A way back through views.

    Attributes:
        functional, nodes: the region in between.
        made: the host node at its start, None if no views lead to one.
        where: the coordinates read there, along `axes`.
        axes: batch, head, key and feature of what was followed; of its linear features alone where
            others stand beside them.
        beside: those.
    """

    functional: FunctionalRegion | None
    nodes: frozenset[fx.Node]
    made: fx.Node | None
    where: tuple[Index, ...]
    axes: tuple[Axis, ...]
    beside: Beside | None = None


def side(given: Any, update: fx.Node, state: State, name: str) -> Side:
    """How what the cache is given is made."""
    if not isinstance(given, fx.Node) or not isinstance(ops.value(given), torch.Tensor):
        raise Blocked(update, ("no_projection", f"the {name} are no tensor of this module"))
    followed = follow(given, state, name)
    nodes, made = followed.nodes, followed.made
    norm: Norm | None = None
    if made is not None and name == "keys" and (norm := norm_of(made)) is not None:
        whole, offset, step = _normalised(followed, norm, state, made)
        nodes, made = nodes | {made} | whole.nodes, whole.made
    else:
        whole, offset, step = followed, 0, None
    if made is None:
        raise between(whole.functional, name, given)
    mapped = linear_map(made, name)
    if {ops.value(node).dtype for node in (made, given)} != {ops.value(mapped.x).dtype}:
        raise Blocked(made, ("dtype", f"the {name} have another dtype than what they are made of"))
    if ops.value(mapped.x).dim() != 3 or not _is_batch_first(whole.where, whole.axes):
        text = f"what the {name} are made of is not [batch, keys, features]"
        raise Blocked(given, ("head_layout", text))
    rows = _rows(whole.where, whole.axes, mapped.transposed)
    if rows is None:
        raise Blocked(given, ("head_layout", f"the {name} of a head are not neighbours"))
    _check_unwritten(mapped.x, made, update)
    found = Side(mapped, rows, nodes | {made}, given, followed.beside)
    if norm is None:
        return found
    heads, features = (axis.extent for axis in followed.axes[1::2])
    part = (rows[0] + offset, step or rows[1], heads, features, rows[4])
    return replace(found, rows=part, norm=KeyNorm(norm, rows, offset, step or 0))


def _normalised(
    followed: Followed, norm: Norm, state: State, at: fx.Node
) -> tuple[Followed, int, int | None]:
    """What is normalised, followed back to what makes it; offset and step of the keys in it."""
    _, g, _, f = followed.axes
    last = followed.where[-1].resolved()
    steps = {axis: step for axis, step in last.terms if axis.extent != 1}
    step = steps.pop(g, None)
    strange = steps.pop(f, 1) != 1 or bool(steps) or not isinstance(last.const, int)
    inner = {axis for index in followed.where[:-1] for axis in index.axes()}
    strange |= f in inner or (step is not None and g in inner)
    if strange or (step is not None and (norm.centred or not isinstance(step, int))):
        text = "a normalisation over more than the features of a head stands before the keys"
        raise Blocked(at, ("key_norm", text))
    feature = Axis(ax.size_of(ops.value(norm.x).shape[-1]))
    head = g if step is None else Axis(1)
    axes = (followed.axes[0], head, followed.axes[2], feature)
    where = (*followed.where[:-1], along(feature))
    return follow(norm.x, state, "values", (where, axes)), last.const, step


def follow(
    given: fx.Node,
    state: State,
    name: str,
    read: tuple[tuple[Index, ...], tuple[Axis, ...]] | None = None,
) -> Followed:
    """Through views back to the host node that makes it, and the coordinates read there.

    Args:
        given: host node.
        name: of it.
        read: coordinates in it, and the axes that they run along; None for all of it.
    """
    if is_boundary(given):
        axes = tuple(Axis(ax.size_of(n)) for n in ops.value(given).shape)
        first, axes = read or (tuple(map(along, axes)), axes)
        return Followed(None, frozenset(), given, first, axes)
    graph = given.graph
    region = cut(given, order(graph), [n for n in graph.nodes if ops.written(n)])
    try:
        # what is learnt about sizes here must not rename those that the core is written in
        with _unlearnt(region):
            functional = functionalise(region, state)
    except RegionError as error:
        raise Blocked(
            given, ("no_projection", f"the {name} cannot be analysed: {error.text}")
        ) from error
    puller = Puller(functional.module)
    axes = tuple(puller.new_axis(size) for size in shape(functional.end))
    start, axes = read or (tuple(map(along, axes)), axes)
    node, where = puller.peel(functional.end, start)
    beside: Beside | None = None
    if name == "keys" and op(node) == "cat":
        part = linear_part(puller, functional, node, where, axes)
        if part is not None:
            node, where, axes, beside = part
    found = functional.read.get(node)
    indices = tuple(w.resolved() for w in where if isinstance(w, Index))
    if len(indices) != len(where):
        found = None
    return Followed(functional, frozenset(region.nodes), found, indices, axes, beside)


def _unlearnt(region: Region) -> AbstractContextManager[Any]:
    env = fake_mode(ops.value(node) for node in (region.end, *region.inputs)).shape_env
    return nullcontext() if env is None else env.suppress_guards()


def _is_batch_first(where: tuple[Index, ...], axes: tuple[Axis, ...]) -> bool:
    """Is [b, g, s, f] read at [b, s, outputs] of the map?"""
    if len(axes) != 4 or len(where) != 3:
        return False
    b, _, s, _ = axes
    return is_whole(where[0], (b,), b.extent) and is_whole(where[1], (s,), s.extent)


def _rows(
    where: tuple[Index, ...], axes: tuple[Axis, ...], transposed: bool
) -> tuple[int, int, int, int, bool] | None:
    """Which outputs of the map [b, s, outputs] are read as [b, g, s, f]."""
    _, g, _, f = axes
    steps = {axis: step for axis, step in where[2].terms if axis.extent != 1}
    start, step = where[2].const, steps.pop(g, f.extent)
    numbers = (start, step, g.extent, f.extent)
    if not all(isinstance(n, int) for n in numbers) or steps.pop(f, 1) != 1 or steps:
        return None
    inside = step == f.extent or (step > f.extent and start % step + f.extent <= step)
    return (*numbers, transposed) if inside else None


def _check_unwritten(x: fx.Node, made: fx.Node, update: fx.Node) -> None:
    """Nobody may write to x between the map and the cache."""
    node, held = made, ops.storages(x)
    while node is not update:
        if any(ops.storages(target) & held for target in ops.written(node)):
            raise Blocked(node, ("overwritten", "what keys and values are made of is overwritten"))
        node = node.next


def is_whole(index: Index, group: Iterable[Axis], size: ax.Size | None) -> bool:
    wanted = [axis for axis in group if axis.extent != 1]
    terms = [(a, c) for a, c in index.resolved().terms if a.extent != 1]
    if [a for a, _ in terms] != wanted or index.const != 0:
        return False
    stride: ax.Size = 1
    for axis, coefficient in reversed(terms):
        if not ax.equal(coefficient, stride):
            return False
        stride = ax.simple(stride * axis.extent)
    return size is None or ax.equal(stride, size)
