"""What keys and values are made of, where a cache hands them to an attention.

    key = W_k(x).view(...).transpose(1, 2); k, v = cache.update(key, value, 3); attention(q, k, v)
        ->   update, and for each side: x, the weight, which of its outputs are whose features

Or they come from a layer of a cache as it is: k, v = layer.keys, layer.values. Between the linear
map and the cache only views may stand; what else is found there is named.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir import ops
from attn_compiler.ir.affine import Blocked, between, linear_map
from attn_compiler.ir.core import Core, Operand
from attn_compiler.ir.provenance import location, sources
from attn_compiler.ir.pull import shape
from attn_compiler.ir.region import FunctionalRegion
from attn_compiler.ir.sides import Side, State, follow, is_whole, side
from attn_compiler.ir.site import Reason

_NAMES = ("keys", "values")


@dataclass(frozen=True)
class Kept:
    """Keys and values that a cache hands over.

    Attributes:
        places: host nodes that hold keys and values.
        update: the call of the cache that takes new ones and gives all, or None.
        layer: otherwise, the node of the layer that is read.
        key, value: with `update`, how the new ones are made.
        cross: do they come from something else than the queries do?
        length: how many keys are read, the first ones, where it is not all of them.
    """

    places: tuple[fx.Node, fx.Node]
    update: fx.Node | None
    layer: fx.Node | None
    key: Side | None
    value: Side | None
    cross: bool
    length: ax.Size | None = None


@dataclass(frozen=True)
class Found:
    """What was found, or why it is no such thing: all reasons."""

    kept: Kept | None
    obstacles: tuple[Reason, ...]


def find_states(
    region_end: fx.Node, functional: FunctionalRegion, core: Core, state: State
) -> Found:
    """Where the keys and values of an attention come from.

    Args:
        region_end: host node of the attention's end.
        functional: its region.
        core: what was recognised in it.
        state: `ambient(graph)`.
    """
    obstacles: list[Reason] = []
    places = [_place(functional, operand) for operand in (core.k, core.v)]
    calls = [node.meta.get("opaque") if node is not None else None for node in places]
    if places[0] is None or places[1] is None or calls[0] is None or calls[1] is None:
        return Found(None, tuple(_uncached(region_end, functional, core, state)))
    obstacles += layouts(core, places, first=True)  # type: ignore[arg-type]
    update, layer = updated(calls[0], calls[1]), layer_read(calls[0], calls[1])
    if update is None and layer is None:
        text = "keys and values do not come from one call of `update` or one layer of a cache"
        return Found(None, (*obstacles, Reason("cache_form", text, location(region_end))))
    sides: list[Side | None] = [None, None]
    if update is not None:
        for position, name in enumerate(_NAMES):
            try:
                sides[position] = side(update.args[1 + position], update, state, name)
            except Blocked as blocked:
                obstacles += blocked.reasons
    key, value = sides
    if key is not None and value is not None and key.map.x is not value.map.x:
        text = "keys and values are made of different tensors"
        obstacles.append(Reason("kv_sources_differ", text, location(value.map.x)))
    cross = key is not None and _query_source(functional, core) not in (None, key.map.x)
    # what stands beside x belongs to one row of the batch and one layer
    cross = cross and key is not None and key.beside is None and key.norm is None
    if key is not None and value is not None and not cross:
        obstacles += _larger(key, value)
    if obstacles:
        return Found(None, tuple(obstacles))
    # a prompt at the beginning of a static cache is all that is there
    length, whole = core.sizes["S"], ax.size_of(ops.value(places[0]).shape[2])
    read = None if ax.equal(length, whole) else length
    return Found(Kept((places[0], places[1]), update, layer, key, value, cross, read), ())


def _larger(key: Side, value: Side) -> Iterator[Reason]:
    """Of one layer alone: is x with what stands beside it no smaller than keys and values?"""
    width = key.map.width
    kept, beside = key.rows[2] * key.rows[3] + value.rows[2] * value.rows[3], 0
    if key.beside is not None:
        beside = key.beside.heads * key.beside.features
        kept += key.rows[2] * key.beside.features
    if width + beside >= kept:
        text = f"{width + beside} numbers of a token would be kept, and its keys and values are"
        yield Reason("cache_larger", f"{text} {kept}", location(key.map.x))


# ---------------------------------------------------------------- the cache


def _place(functional: FunctionalRegion, operand: Operand) -> fx.Node | None:
    return functional.read.get(operand.node)


def layouts(core: Core, places: list[fx.Node], *, first: bool = False) -> Iterator[Reason]:
    """The attention must read them as they are: [batch, kv heads, keys, features], all of it; or
    the first keys, where that can be served.
    """
    roles = core.roles
    for operand, last, place in zip(
        (core.k, core.v), (roles.feature, roles.value), places, strict=True
    ):
        groups = (roles.batch, roles.heads, roles.key, last)
        sizes, loose = shape(operand.node), first or operand is core.v
        whole = len(sizes) == 4 and all(
            # that both have the same number of keys is seen when it runs
            is_whole(index, group, None if loose and group is roles.key else size)
            for index, group, size in zip(operand.where, groups, sizes, strict=True)
        )
        if not whole:
            text = "the attention reads a part of what the cache holds, or in another order"
            yield Reason("cache_layout", text, location(place))


def updated(key: fx.Node, value: fx.Node) -> fx.Node | None:
    """The call `update(key, value, ...)` whose two results these are, read by nobody else."""
    pieces = []
    for piece, position in ((key, 0), (value, 1)):
        if piece.target is not operator.getitem or piece.args[1] != position:
            return None
        pieces.append(piece.args[0])
    call = pieces[0]
    if call is not pieces[1] or not isinstance(call, fx.Node) or call.op != "call_method":
        return None
    plain = call.target == "update" and not call.kwargs and len(call.args) >= 4
    only = all(u in (key, value) or not u.users for u in call.users)
    return call if plain and only else None


def layer_read(key: fx.Node, value: fx.Node) -> fx.Node | None:
    """The layer whose `keys` and `values` these are."""
    for node, name in ((key, "keys"), (value, "values")):
        if node.target is not getattr or node.args[1] != name:
            return None
    first, second = key.args[0], value.args[0]
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    node = first
    while node is not value:
        if "example_value" not in node.meta and node.target not in (getattr, operator.getitem):
            return None  # something may have changed the cache between the two
        node = node.next
    return first if _alike(first, second) else None


def _alike(left: Any, right: Any) -> bool:
    """Do two nodes read the same attribute or item of the same thing?"""
    if left is right:
        return True
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return bool(left == right)
    if left.target is not right.target or left.target not in (getattr, operator.getitem):
        return False
    return all(_alike(a, b) for a, b in zip(left.args, right.args, strict=True))


# ---------------------------------------------------------------- queries


def _query_source(functional: FunctionalRegion, core: Core) -> fx.Node | None:
    """What the queries are made of, if a linear map makes them."""
    start = _start(functional, core.q)
    return None if start is None else _made_of(start)


def _start(functional: FunctionalRegion, operand: Operand) -> fx.Node | None:
    """The host node that an operand is a view of."""
    host = {node: h for h, node in reversed(list(functional.of_host.items()))}
    return next((host[node] for node, _ in operand.chain if node in host), None)


def _made_of(start: fx.Node) -> fx.Node | None:
    """What the linear map behind a host node reads."""
    source, projection = sources(start)
    if projection is not None:
        return source
    maker = start
    while maker.op != "call_module" and maker.all_input_nodes:
        maker = maker.all_input_nodes[0]
    return maker.all_input_nodes[0] if maker.op == "call_module" else None


def find_update(
    functional: FunctionalRegion, core: Core, end: fx.Node
) -> tuple[Kept | None, tuple[Reason, ...]]:
    """The call of a cache that hands over keys and values, whatever they are made of.

    Returns:
        The call, None where no cache is involved; why a cache cannot be replaced.
    """
    places = [_place(functional, operand) for operand in (core.k, core.v)]
    calls = [node.meta.get("opaque") if node is not None else None for node in places]
    if calls == [None, None]:
        square = ax.equal(core.sizes["T"], core.sizes["S"])
        if square or not any(_comes_out(functional, x) for x in (core.k, core.v)):
            return None, ()
        text = "keys and values are made of what a cache hands over, and not what it holds"
        return None, (Reason("cache_form", text, location(end)),)
    update = None if None in calls else updated(*calls)  # type: ignore[arg-type]
    if update is None or places[0] is None or places[1] is None:
        text = "keys and values do not come from one call of `update` of a cache"
        return None, (Reason("cache_form", text, location(end)),)
    kept = Kept((places[0], places[1]), update, None, None, None, False)
    return kept, tuple(layouts(core, [places[0], places[1]]))


def _comes_out(functional: FunctionalRegion, operand: Operand) -> bool:
    """Is it made of what the `update` of a cache gave, as keys are of latents?"""
    start = _start(functional, operand)
    stack, seen = [] if start is None else [start], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        call = node.meta.get("opaque")
        if isinstance(call, fx.Node) and call.target is operator.getitem:
            call = call.args[0]
        if isinstance(call, fx.Node) and call.target == "update":
            return True
        stack.extend(node.all_input_nodes)
    return False


def single_source(functional: FunctionalRegion, core: Core) -> fx.Node | None:
    """The one tensor [B, T, D] that linear maps make queries, keys and values of."""
    found: list[fx.Node | None] = []
    for position, operand in enumerate((core.q, core.k, core.v)):
        start = _start(functional, operand) or _place(functional, operand)
        call = start.meta.get("opaque") if start is not None else None
        if call is not None and isinstance(call.args[0], fx.Node):
            call = call.args[0]  # one of the two that `update` gives
            given = call.args[position] if call.target == "update" else None
            start = given if isinstance(given, fx.Node) else None
        found.append(None if start is None else _made_of(start))
    x = found[0]
    if x is None or any(other is not x for other in found):
        return None
    sizes = [ax.size_of(size) for size in getattr(ops.value(x), "shape", ())]
    wanted = (core.sizes["B"], core.sizes["T"])
    fits = len(sizes) == 3 and all(map(ax.equal, sizes[:2], wanted))
    return x if fits and isinstance(sizes[2], int) else None


# ---------------------------------------------------------------- no cache


def _uncached(
    end: fx.Node, functional: FunctionalRegion, core: Core, state: State
) -> Iterator[Reason]:
    """Without a cache there is nothing to save; say what would stand in the way besides."""
    text = "no cache holds the keys and values of this call, so that nothing is saved"
    yield Reason("no_cache", text, location(end))
    host = {node: h for h, node in reversed(list(functional.of_host.items()))}
    made: list[fx.Node | None] = []
    for operand, name in ((core.k, "keys"), (core.v, "values")):
        start = host.get(operand.node) or functional.read.get(operand.node)
        try:
            if start is None:
                raise Blocked(end, ("no_projection", f"the {name} are not made here"))
            followed = follow(start, state, name)
            if followed.made is None:
                raise between(followed.functional, name, start)
            made.append(linear_map(followed.made, name).x)
        except Blocked as blocked:
            yield from blocked.reasons
    if len(made) == 2 and made[0] is not made[1]:
        text = "keys and values are made of different tensors"
        yield Reason("kv_sources_differ", text, location(end))
