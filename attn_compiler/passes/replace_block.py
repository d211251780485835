"""A block becomes two units: one in the place of attention, one in that of the feed-forward net.

    x + A(norm x); h + F(norm h)   ->   x + unit(norm x, ..., number=0); h + unit(norm h, ..., 1)

Norms, residuals and the dropouts upon the branches stay. With a cache the call that updated it
gives what the units keep instead of keys and values.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from attn_compiler.ir import ops
from attn_compiler.ir.block import Block, Branch
from attn_compiler.ir.no_attention import NotAttention
from attn_compiler.ir.piece import Piece
from attn_compiler.ir.region import FunctionalRegion, order
from attn_compiler.ir.trace import Region
from attn_compiler.passes.emit import Emitter
from attn_compiler.passes.replace_layer import erase_demand
from attn_compiler.passes.replace_piece import in_dtype
from attn_compiler.variants.base import NewTensor, Replacement


def replace_block(
    region: Region, functional: FunctionalRegion, piece: Piece, replacement: Replacement
) -> tuple[NewTensor, ...]:
    """Replace both branches; the caller removes what is dead afterwards.

    Args:
        replacement: its tensors are those of the first unit, then those of the second.

    Returns:
        The tensors that the module has to get, under the names that the graph reads.

    Raises:
        NotAttention: `block.order`, a branch comes before what its unit reads; the graph is as
            before.
    """
    block: Block = piece.facts["block"]
    reads: tuple[fx.Node, ...] = piece.facts["reads"] or ()
    _check_order(block, reads)
    branches, half = (block.attention, block.feed_forward), len(replacement.tensors) // 2
    emitters, tensors, results = [], list[NewTensor](), []
    try:
        for number, branch in enumerate(branches):
            emitter = Emitter(region, functional, branch.made)
            emitters.append(emitter)
            own = replacement.tensors[number * half : (number + 1) * half]
            made = emitter.attributes(own, piece.taken)
            tensors += [tensor for tensor, _ in made]
            kept = None
            if block.update is not None:
                kept = emitter.opaque(operator.getitem, (block.update, 2), {}, None)
            x = _batch_first(emitter, block, branch.given)
            rest = (*reads, *(node for _, node in made))
            options = dict(replacement.options) | {"number": number, "reads": len(reads)}
            call = emitter.call(replacement.function, x, kept, *rest, **options)
            call = in_dtype(emitter, call, ops.value(branch.made).dtype)
            results.append(_batch_first(emitter, block, call))
    except Exception:
        for emitter in emitters:
            emitter.undo()
        raise
    if block.update is not None:
        _become_hold(block.update, block.attention, piece.facts["calls"].hold)
    for branch, result in zip(branches, results, strict=True):
        branch.made.replace_all_uses_with(result)
    return tuple(tensors)


def _batch_first(emitter: Emitter, block: Block, x: fx.Node) -> fx.Node:
    return x if block.batch_first else emitter.call(torch.transpose, x, 0, 1)


def _check_order(block: Block, reads: tuple[fx.Node, ...]) -> None:
    """Each branch comes after what its unit reads."""
    position = order(block.x.graph)
    needed = [position[n] for n in (*reads, *([block.update] if block.update else []))]
    for branch in (block.attention, block.feed_forward):
        if any(place > position[branch.made] for place in needed):
            text = "the feed-forward net comes before what the attention's mask is made of"
            raise NotAttention("block.order", text, branch.made)


def _become_hold(update: fx.Node, attention: Branch, hold: Any) -> None:
    """In place: the layers of a model share this graph, and the number of the layer is patched by
    the name and position that it has here.
    """
    cache, _, _, *rest = update.args
    update.op, update.target = "call_function", hold
    update.args = (cache, None, None, *rest)
    for place in [n for n in attention.nodes if "opaque" in n.meta]:
        for size in [n for n in place.users if ops.name(n) == "size"]:
            erase_demand(size)
