"""A whole layer of attention, with its linear maps, becomes one call with parameters of its own.

    o_proj(attention(q_proj(x), *cache.update(k_proj(x), v_proj(x), 3)))
        ->   k, v, start = write(cache, (x, w_k, w_v, ...), options, 3);  read(x, k, v, start, ...)

Without a cache it is one function. The program of the scores stays, with what it reads.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attn_compiler.errors import require
from attn_compiler.ir import ops
from attn_compiler.ir.core import Core
from attn_compiler.ir.layer import VOID, Layer
from attn_compiler.ir.no_attention import NotAttention
from attn_compiler.ir.piece import Piece
from attn_compiler.ir.region import FunctionalRegion
from attn_compiler.ir.trace import Region
from attn_compiler.passes.emit import Emitter
from attn_compiler.passes.replace_piece import check_unread, in_dtype, mark
from attn_compiler.passes.rewrite_site import live_nodes, reads_of, unread
from attn_compiler.variants.base import NewTensor, Replacement


@dataclass(frozen=True)
class Prepared:
    """A replacement of which all nodes stand in the graph, and none is read yet.

    Attributes:
        tensors: that the module has to get, under the names that the graph reads.
        finish: put it in its place, which cannot fail.
        undo: erase it.
    """

    tensors: tuple[NewTensor, ...]
    finish: Callable[[], None]
    undo: Callable[[], None]


def replace_layer(
    region: Region, functional: FunctionalRegion, piece: Piece, replacement: Replacement
) -> tuple[NewTensor, ...]:
    """Replace the layer; the caller removes what is dead afterwards.

    Returns:
        The tensors that the module has to get, under the names that the graph reads.

    Raises:
        NotAttention, RegionError: see `prepare_layer`.
    """
    prepared = prepare_layer(region, functional, piece, replacement)
    prepared.finish()
    return prepared.tensors


def prepare_layer(
    region: Region, functional: FunctionalRegion, piece: Piece, replacement: Replacement
) -> Prepared:
    """All of it that may fail.

    Raises:
        NotAttention: `piece.read_elsewhere`, something outside reads what would no longer be made;
            `piece.overwritten`; the graph is as before.
        RegionError: a tensor that the program reads cannot be had; the graph is as before.
    """
    layer: Layer = piece.facts["layer"]
    removed = {piece.end} if layer.update is None else {piece.end, layer.update}
    check_unread(region, piece, removed)
    check_unwritten(layer, region.end)
    if layer.places is not None:
        _check_places(region, layer.places, removed)
    old = {place: ops.value(place) for place in layer.places or ()}
    emitter = Emitter(region, functional)
    early = Emitter(region, functional, layer.update)

    def undo() -> None:
        emitter.undo()
        early.undo()
        for place, value in old.items():
            place.meta[emitter.key] = value

    try:
        made = early.attributes(replacement.tensors, piece.taken)
        weights = [node for _, node in made]
        call = _called(emitter, piece, weights, replacement)
        result = in_dtype(emitter, _batch_first(emitter, layer, call), ops.value(piece.end).dtype)
    except Exception:
        undo()
        raise

    def finish() -> None:
        if layer.update is not None:
            _become_write(early, layer, weights, replacement)
        void = {s for value in old.values() for s in _symbols(value)}
        region.end.graph.owning_module.meta.setdefault(VOID, set()).update(void)  # type: ignore[union-attr]
        piece.end.replace_all_uses_with(result)

    return Prepared(tuple(t for t, _ in made), finish, undo)


def _called(
    emitter: Emitter, piece: Piece, weights: Sequence[fx.Node], replacement: Replacement
) -> fx.Node:
    """The call that computes the layer."""
    layer: Layer = piece.facts["layer"]
    core: Core = piece.facts["core"]
    x_q = _batch_first(emitter, layer, layer.query.x)
    reads = reads_of(emitter, core, x_q)
    ints = [emitter.size(size) for size in core.ints]
    if layer.places is None:
        rest = [_batch_first(emitter, layer, m.x) for m in layer.made[1:-1]]
        given: tuple[Any, ...] = (x_q, *rest)
        call = emitter.call(
            replacement.function, *given, reads, ints, *weights, **dict(replacement.options)
        )
    else:
        call = _cached(emitter, layer, (x_q, reads, ints, weights), replacement)
    mark(call, replacement)
    return call


def _symbols(value: torch.Tensor) -> set[Any]:
    """Those of the heads and the width that a cache held for the original, as they were before
    anything was learnt about them.
    """
    sizes: list[Any] = [value.shape[dim] for dim in (1, 3)]
    return {s for n in sizes if isinstance(n, torch.SymInt) for s in n.node._expr.free_symbols}


def _batch_first(emitter: Emitter, layer: Layer, x: fx.Node) -> fx.Node:
    return emitter.call(torch.transpose, x, 0, 1) if layer.swapped else x


def _cached(
    emitter: Emitter,
    layer: Layer,
    given: tuple[fx.Node, list[fx.Node], list[Any], Sequence[fx.Node]],
    replacement: Replacement,
) -> fx.Node:
    """The call that reads keys and values of the new sizes."""
    assert layer.places is not None and replacement.cached is not None
    x_q, reads, ints, weights = given
    sizes = replacement.cached
    for place in layer.places:
        value = ops.value(place)
        with emitter.mode, torch.no_grad():
            shape = (value.shape[0], sizes.heads, value.shape[2], sizes.width)
            place.meta[emitter.key] = value.new_empty(shape)
    start: Any = 0
    if layer.update is not None:
        with emitter.mode:
            count = torch.empty((), dtype=torch.int64)
        start = emitter.opaque(operator.getitem, (layer.update, 2), {}, count)
    options = dict(replacement.options)
    return emitter.call(sizes.read, x_q, *layer.places, start, reads, ints, *weights, **options)


def _become_write(
    early: Emitter, layer: Layer, weights: Sequence[fx.Node], replacement: Replacement
) -> None:
    """In place: the layers of a model share this graph, and the number of the layer is patched by
    the name and position that it has here.
    """
    update = layer.update
    assert update is not None and layer.key is not None and layer.value is not None
    assert replacement.cached is not None and layer.places is not None
    x_k, x_v = (_batch_first(early, layer, m.x) for m in (layer.key, layer.value))
    cache, _, _, *rest = update.args
    update.op, update.target = "call_function", replacement.cached.write
    update.args = (cache, ((x_k, x_v), list(weights)), dict(replacement.options), *rest)
    for place in layer.places:
        for size in [n for n in place.users if ops.name(n) == "size"]:
            erase_demand(size)


def erase_demand(size: fx.Node) -> None:
    """What the trace demanded of the sizes of all keys holds for the old ones."""
    for same in list(size.users):
        for check in [n for n in same.users if n.target is require]:
            size.graph.erase_node(check)
        if not same.users:
            size.graph.erase_node(same)
    if not size.users:
        size.graph.erase_node(size)


# ---------------------------------------------------------------- checks


def _check_places(region: Region, places: Sequence[fx.Node], removed: set[fx.Node]) -> None:
    """What a cache hands over has other sizes now: nobody else may read it."""
    graph = region.end.graph
    live = live_nodes(graph, set(region.nodes) | unread(graph), removed | {region.end})
    for place in places:
        for user in place.users:
            dead = user is region.end or (user in region.nodes and user not in live)
            if not dead and ops.name(user) not in ("size", "dim", "getattr", "sym_size"):
                text = "keys or values of the cache are read elsewhere, too"
                raise NotAttention("piece.read_elsewhere", text, user)


def check_unwritten(layer: Layer, end: fx.Node) -> None:
    """Nobody may write to an input between its map and the end of the attention."""
    held = {m.x: ops.storages(m.x) for m in layer.made[:-1]}
    for made in layer.made[:-1]:
        node = made.node
        while node is not end:
            if any(ops.storages(t) & held[made.x] for t in ops.written(node)):
                text = "an input of the layer is overwritten before its end"
                raise NotAttention("piece.overwritten", text, node)
            node = node.next
