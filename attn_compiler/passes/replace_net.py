"""The layers of a block's attentions, and its feed-forward net, become one call each.

    x + layer(norm x); h + down(act(up(norm h)))   ->   x + f(norm x, w); h + net(norm h, w)

All are replaced or none. Norms, residuals and the dropouts upon the branches stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attn_compiler.ir import ops
from attn_compiler.ir.net_piece import Net
from attn_compiler.ir.piece import Piece
from attn_compiler.ir.region import FunctionalRegion
from attn_compiler.ir.trace import Region
from attn_compiler.passes.emit import Emitter
from attn_compiler.passes.replace_layer import prepare_layer
from attn_compiler.passes.replace_piece import in_dtype, mark
from attn_compiler.variants.base import NewTensor, Replacement

Job = tuple[Region, FunctionalRegion, Piece, Replacement]


def replace_together(jobs: Sequence[Job]) -> list[tuple[NewTensor, ...]]:
    """Replace the layers of a block and the net that one of them has with it; the caller removes
    what is dead afterwards.

    Returns:
        For each layer the tensors that the modules have to get, under the names that the graph
        reads; those of the net behind those of its layer.

    Raises:
        NotAttention, RegionError: see `prepare_layer`; the graph is as before.
    """
    undos: list[Callable[[], None]] = []
    prepared = []
    try:
        for region, functional, piece, replacement in jobs:
            tensors: tuple[NewTensor, ...] = ()
            if replacement.net is not None:
                # first: the layers' checks see a net that nobody reads any more
                tensors, undo = _net(region, functional, piece, replacement.net)
                undos.append(undo)
            layer = prepare_layer(region, functional, piece, replacement)
            undos.append(layer.undo)
            prepared.append((layer, tensors))
    except Exception:
        for undo in reversed(undos):
            undo()
        raise
    for layer, _ in prepared:
        layer.finish()
    return [(*layer.tensors, *tensors) for layer, tensors in prepared]


def _net(
    region: Region, functional: FunctionalRegion, piece: Piece, replacement: Replacement
) -> tuple[tuple[NewTensor, ...], Callable[[], None]]:
    """The net replaced: its tensors, and the way back."""
    net: Net = piece.facts["net"]
    old, emitter = net.branch.made, Emitter(region, functional, net.branch.made)
    try:
        made = emitter.attributes(replacement.tensors, piece.taken)
        weights = (node for _, node in made)
        options = dict(replacement.options)
        call = emitter.call(replacement.function, net.branch.given, *weights, **options)
        mark(call, replacement)
        result = in_dtype(emitter, call, ops.value(old).dtype)
    except Exception:
        emitter.undo()
        raise
    old.replace_all_uses_with(result)

    def undo() -> None:
        result.replace_all_uses_with(old)
        emitter.undo()

    return tuple(tensor for tensor, _ in made), undo
