"""The layer of an attention and the feed-forward net of its block become one call each.

    x + layer(norm x); h + down(act(up(norm h)))   ->   x + f(norm x, w); h + net(norm h, w)

Both are replaced or none. Norms, residuals and the dropouts upon the branches stay.
"""

from __future__ import annotations

from attn_compiler.ir import ops
from attn_compiler.ir.net_piece import Net
from attn_compiler.ir.piece import Piece
from attn_compiler.ir.region import FunctionalRegion
from attn_compiler.ir.trace import Region
from attn_compiler.passes.emit import Emitter
from attn_compiler.passes.replace_layer import replace_layer
from attn_compiler.passes.replace_piece import in_dtype, mark
from attn_compiler.variants.base import NewTensor, Replacement


def replace_layer_and_net(
    region: Region, functional: FunctionalRegion, piece: Piece, replacement: Replacement
) -> tuple[NewTensor, ...]:
    """Replace both; the caller removes what is dead afterwards.

    Returns:
        The tensors that the modules have to get, those of the layer first, under the names that the
        graph reads.

    Raises:
        NotAttention, RegionError: see `replace_layer`; the graph is as before.
    """
    net: Net = piece.facts["net"]
    assert replacement.net is not None
    old, emitter = net.branch.made, Emitter(region, functional, net.branch.made)
    try:
        made = emitter.attributes(replacement.net.tensors, piece.taken)
        weights = (node for _, node in made)
        options = dict(replacement.net.options)
        call = emitter.call(replacement.net.function, net.branch.given, *weights, **options)
        mark(call, replacement.net)
        result = in_dtype(emitter, call, ops.value(old).dtype)
        # the layer's checks see a net that nobody reads any more
        old.replace_all_uses_with(result)
        try:
            tensors = replace_layer(region, functional, piece, replacement)
        except Exception:
            result.replace_all_uses_with(old)
            raise
    except Exception:
        emitter.undo()
        raise
    return (*tensors, *(tensor for tensor, _ in made))
