"""One recognised attention keeps hidden states in its cache instead of keys and values.

    k, v = cache.update(W_k(x), W_v(x), 3)           kept = keep(cache, (x, ...), (...), 3)
    softmax(q @ k.T * scale + mask) @ v        ->    attend(kept, q, reads, ints, None, program=...)

What still asks for the size of a key is given something of its shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir import ops
from attn_compiler.ir.core import Core
from attn_compiler.ir.no_attention import NotAttention
from attn_compiler.ir.region import FunctionalRegion
from attn_compiler.ir.sides import Side
from attn_compiler.ir.states import Kept
from attn_compiler.ir.trace import Region
from attn_compiler.kernels.frame import empty_heads
from attn_compiler.kernels.plan import plan
from attn_compiler.passes.emit import Emitter
from attn_compiler.passes.rewrite_site import (
    check_readers,
    finish,
    live_nodes,
    operands,
    unread,
)
from attn_compiler.variants import ELAttention

_SIZES = frozenset({"size", "sym_size", "dim", "shape"})


@dataclass(frozen=True)
class CacheCalls:
    """What stands in the graph for the calls of a cache.

    Attributes:
        keep: keep(cache, (x, weights, cross, heads, beside, norm), rows, index) -> kept, for
            `update`; heads of the queries where the cache holds keys and values if that is faster,
            else 0; beside is None, or the keys and which features of them (start, features, heads)
            are no linear image of x; norm is None, or how keys are normalised: two parameters, and
            (centred, eps, rows, offset, step).
        attend: attend(kept or layer, q, reads, ints, length, ...) -> out; length is how many keys
            are read, the first ones, None for all.
        shown: shown(kept or layer, 0 or 1) -> something of the shape of all keys or values.
        hold: hold(cache, None, None, index) -> None, None, what gated units keep, for `update`;
            None where they are not.
    """

    keep: Callable[..., Any]
    attend: Callable[..., Any]
    shown: Callable[..., Any]
    hold: Callable[..., Any] | None = None


def rewrite_states(
    region: Region,
    functional: FunctionalRegion,
    core: Core,
    kept: Kept,
    calls: CacheCalls,
    spec: ELAttention,
) -> set[fx.Node]:
    """Replace the attention and the call of its cache.

    Returns:
        Nodes that may be dead now, besides those of the region.

    Raises:
        NotAttention: `attention.second_reader`, `el.kv_read_elsewhere`; the graph is as before.
        RegionError: an operand cannot be laid out; the graph is as before.
    """
    check_readers(region, functional, core)
    check_kept(region, kept, "el")
    emitter = Emitter(region, functional)
    try:
        handle: fx.Node = kept.update or kept.layer  # type: ignore[assignment]
        width = ops.value(kept.places[1]).shape[3]
        result = _emit(emitter, core, (handle, kept.length), calls, spec.keep_key_bias, width)
    except Exception:
        emitter.undo()
        raise
    region.end.replace_all_uses_with(result)
    dead: set[fx.Node] = set()
    if kept.update is not None and kept.key is not None and kept.value is not None:
        heads = core.sizes["H"] if spec.only_where_faster else 0
        _become_keep(emitter, kept.update, kept, calls, heads if isinstance(heads, int) else 0)
        dead = set(kept.value.nodes | (kept.key.nodes if kept.key.beside is None else set()))
    replace_cache(emitter, kept, calls)
    return dead


def _emit(
    emitter: Emitter,
    core: Core,
    source: tuple[fx.Node, ax.Size | None],
    calls: CacheCalls,
    keep_key_bias: bool,
    width: Any,
) -> fx.Node:
    q, reads, ints = operands(emitter, core)
    handle, length = source
    length = None if length is None else emitter.size(length)
    kwargs = {
        "program": str(core.program),
        "scale": core.scale,
        "key_bias": keep_key_bias or not falls_out(str(core.program)),
    }
    value = ops.value(q)
    with emitter.mode, torch.no_grad():
        like = empty_heads(value, (*value.shape[:3], width))
    out = emitter.opaque(calls.attend, (handle, q, reads, ints, length), kwargs, like)
    return finish(emitter, core, out)


def falls_out(program: str) -> bool:
    """Does a number added to all scores of a row leave its softmax as it was?"""
    found = plan(program)
    return found.additive and found.program.sink is None


def check_kept(region: Region, kept: Kept, variant: str) -> None:
    """Keys and values may be read by the attention alone, and be asked for their sizes.

    Raises:
        NotAttention: `<variant>.kv_read_elsewhere`.
    """
    graph = region.end.graph
    live = live_nodes(graph, set(region.nodes) | unread(graph), {region.end})
    for place in kept.places:
        for user in place.users:
            dead = user is region.end or (user in region.nodes and user not in live)
            if not dead and ops.name(user) not in _SIZES and not _is_shape(user):
                code, text = (
                    f"{variant}.kv_read_elsewhere",
                    "keys or values are read elsewhere, too",
                )
                raise NotAttention(code, text, user)


def _is_shape(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] == "shape"


def replace_cache(emitter: Emitter, kept: Kept, calls: CacheCalls) -> None:
    """Put shapes in the place of keys and values, once `update` has become something else."""
    graph = emitter.graph
    pieces = [place.meta["opaque"] for place in kept.places]
    handle = kept.update or kept.layer
    after = kept.update or pieces[1]
    assert handle is not None
    for position, place in enumerate(kept.places):
        with graph.inserting_after(after):
            place.meta["opaque"] = after = graph.call_function(calls.shown, (handle, position))
    for piece in pieces:
        graph.erase_node(piece)
    for reader in [n for n in handle.users if "example_value" not in n.meta and not n.users]:
        if reader.target is not calls.shown and reader.target is not calls.attend:
            graph.erase_node(reader)


def _become_keep(
    emitter: Emitter, update: fx.Node, kept: Kept, calls: CacheCalls, heads: int
) -> None:
    """In place: the layers of a model share this graph, and the number of the layer is patched by
    the name and position that it has here.
    """
    assert kept.key is not None and kept.value is not None
    with emitter.graph.inserting_before(update):
        weights = tuple(
            None if path is None else _parameter(emitter, path)
            for side in (kept.key, kept.value)
            for path in (side.map.weight, side.map.bias)
        )
    cache, _, _, *rest = update.args
    update.op, update.target = "call_function", calls.keep
    rows = (kept.key.rows, kept.value.rows)
    key = kept.key
    beside: tuple[Any, ...] | None = None
    if key.beside is not None:
        beside = (key.given, (key.beside.start, key.beside.features, key.beside.heads))
    made = (key.map.x, weights, kept.cross, heads, beside, _norm(emitter, update, key))
    update.args = (cache, made, rows, *rest)
    update.meta["bypassed"] = tuple(_modules(kept.key, kept.value))


def _norm(emitter: Emitter, update: fx.Node, key: Side) -> tuple[Any, ...] | None:
    if key.norm is None:
        return None
    norm = key.norm.norm
    with emitter.graph.inserting_before(update):
        parameters = tuple(
            None if path is None else _parameter(emitter, path) for path in (norm.weight, norm.bias)
        )
    return (parameters, (norm.centred, norm.eps, key.norm.rows, key.norm.offset, key.norm.step))


def _modules(*sides: Side) -> list[str]:
    found = {side.map.module for side in sides}
    found |= {side.norm.norm.module for side in sides if side.norm is not None}
    return sorted(found - {""})


def _parameter(emitter: Emitter, path: str) -> fx.Node:
    owner = emitter.graph.owning_module
    assert owner is not None
    node = emitter.graph.get_attr(path)
    home, _, name = path.rpartition(".")
    weight = getattr(owner.get_submodule(home), name)
    node.meta[emitter.key] = emitter.mode.from_tensor(weight, static_shapes=True)
    return node
