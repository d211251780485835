"""An ear beside a whole layer of attention, which goes on computing what it computed.

    y = o_proj(attention(q_proj(x), k_proj(x), v_proj(x)))
        ->   y = heard(ear, o_proj(choose(ear, attention(...), asked(ear, q, v))), x, q, k, v, ...)

What an ear is: `variants.conversion.ear`.
"""

from __future__ import annotations

import itertools

import torch
from torch import fx

from attn_compiler.ir import ops
from attn_compiler.ir.core import Core
from attn_compiler.ir.layer import Layer
from attn_compiler.ir.maps import Made
from attn_compiler.ir.piece import Piece
from attn_compiler.ir.region import FunctionalRegion
from attn_compiler.ir.trace import Region
from attn_compiler.passes.emit import Emitter
from attn_compiler.passes.replace_layer import check_unwritten
from attn_compiler.passes.rewrite_site import finish, keys_and_values, operands
from attn_compiler.variants.base import NewModule
from attn_compiler.variants.conversion import ear as ears

_NAME = "attn_ear"


def listen_layer(
    region: Region, functional: FunctionalRegion, piece: Piece
) -> tuple[NewModule, ...]:
    """Put an ear beside a layer.

    Returns:
        What the module has to get, under the name that the graph reads.

    Raises:
        NotAttention: `piece.overwritten`; the graph is as before.
        RegionError: an operand cannot be laid out.
    """
    layer: Layer = piece.facts["layer"]
    check_unwritten(layer, region.end)
    graph = region.end.graph
    order = {node: place for place, node in enumerate(graph.nodes)}
    sides = list(layer.made[:-1])
    first = min((_first(made, order) for made in sides), key=order.__getitem__)
    taken = {str(n.target) for n in graph.find_nodes(op="get_attr")}
    names = (f"{_NAME}_{number}" for number in itertools.count())
    new = NewModule(next(name for name in names if name not in taken), ears.Ear)
    ear = Emitter(region, functional, first).submodule(new.name, new.kind())
    for made in sides:
        _enter(region, functional, (ear, layer.swapped), made, order)
    _hear(region, functional, ear, piece)
    return (new,)


def _first(made: Made, order: dict[fx.Node, int]) -> fx.Node:
    """The first node on the way to a map that reads its input."""
    return min((n for n in made.nodes if made.x in n.all_input_nodes), key=order.__getitem__)


def _enter(
    region: Region,
    functional: FunctionalRegion,
    ear: tuple[fx.Node, bool],
    made: Made,
    order: dict[fx.Node, int],
) -> None:
    """The map reads what the ear gives it."""
    readers = [n for n in made.nodes if made.x in n.all_input_nodes]
    if not readers:  # a map of several, seen to already
        return
    emitter = Emitter(region, functional, min(readers, key=order.__getitem__))
    given = emitter.opaque(ears.enter, (ear[0], made.x, ear[1]), {}, ops.value(made.x))
    for reader in readers:
        reader.replace_input_with(made.x, given)


def _hear(region: Region, functional: FunctionalRegion, ear: fx.Node, piece: Piece) -> None:
    layer: Layer = piece.facts["layer"]
    core: Core = piece.facts["core"]
    emitter = Emitter(region, functional, region.end.next)
    q, reads, ints = operands(emitter, core)
    k, v = keys_and_values(emitter, core)
    heads, values = ops.value(q), ops.value(v)
    with emitter.mode, torch.no_grad():
        like = values.new_empty((*heads.shape[:3], values.shape[3]))
    question = finish(emitter, core, emitter.opaque(ears.asked, (ear, q, v), {}, like))
    end = region.end
    chosen = emitter.opaque(ears.choose, (ear, end, question), {}, ops.value(end))
    end.replace_all_uses_with(chosen, lambda user: user is not chosen)
    late = Emitter(region, functional, piece.end.next)
    inputs = tuple(made.x for made in layer.made[:-1])
    given = (ear, piece.end, inputs, (q, k, v), (reads, ints))
    rest = ((str(core.program), core.scale), layer.turned, layer.swapped)
    result = late.opaque(ears.heard, (*given, *rest), {}, ops.value(piece.end))
    piece.end.replace_all_uses_with(result, lambda user: user is not result)
