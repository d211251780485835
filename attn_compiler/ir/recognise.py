"""From a functional region to the attention it computes, or to the reason why it computes none."""

from __future__ import annotations

from attn_compiler.ir import contractions, gathers, values, views  # noqa: F401  (enter their rules)
from attn_compiler.ir.axes import along
from attn_compiler.ir.core import Core
from attn_compiler.ir.fused import from_sdpa
from attn_compiler.ir.no_attention import NotAttention
from attn_compiler.ir.pull import Coordinates, Puller, op, product_at, shape
from attn_compiler.ir.region import FunctionalRegion
from attn_compiler.ir.soft import Place, quotient, through_casts
from attn_compiler.ir.spelled import from_product


def recognise(region: FunctionalRegion) -> Core:
    """The attention whose output is the region's end.

    Raises:
        NotAttention: it is none, or one that cannot be rewritten; with code, sentence and node.
    """
    puller = Puller(region.module)
    end = region.end
    where: Coordinates = tuple(along(puller.new_axis(size)) for size in shape(end))
    node, at = through_casts(puller, end, where)
    if op(node) == "scaled_dot_product_attention":
        return from_sdpa(puller, end, where, node, at)
    divisor: Place | None = None
    if op(node) in ("div", "mul") and (parts := quotient(puller, node, at)) is not None:
        (node, at), divisor = parts
    found = product_at(puller, node, at)
    if found is None:
        raise NotAttention(
            "not_attention.no_value_product", "the weights are not summed over with values", node
        )
    return from_product(puller, end, where, found, divisor)
