"""SwitchAll in a living model: SwitchHead, and a sigma-MoE net for the feed-forward net.

    up, down  or  gate, up, down   ->   w_sel [N, D], w_1 [N, D, G], w_2 [N, G, D], as many numbers

The net and all attentions of a block are replaced, or none. Activations become the paper's: ReLU.

Source: SwitchHead (arXiv 2312.07987v3), section 3.4; sigma-MoE (arXiv 2310.10837).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from attn_compiler.errors import BadOption
from attn_compiler.ir.no_attention import NotAttention
from attn_compiler.ir.piece import Piece
from attn_compiler.ir.site import AttentionSite, Reason
from attn_compiler.kernels import sigma_moe
from attn_compiler.kernels.routing import mixture_deviation
from attn_compiler.variants.base import (
    Fidelity,
    NewTensor,
    Replacement,
    Scope,
    Variant,
)
from attn_compiler.variants.sites import switchhead
from attn_compiler.variants.starts import Like, Start, normal, rows_of_length
from attn_compiler.variants.switchhead import NetSizes, SwitchHead, net_sizes

if TYPE_CHECKING:
    from attn_compiler.ir.net_piece import Net


def legality(site: AttentionSite, spec: SwitchHead) -> Iterator[Reason]:
    """Codes: those of `sites.switchhead`; of `ir.blocks` (block.*) and `ir.feed_forward`
    (feed_forward.*), where the block has no net that can be replaced.
    """
    around = tuple(o for o in site.obstacles or () if "." in o.code)
    yield from around
    own = tuple(o for o in site.obstacles or () if "." not in o.code)
    yield from switchhead.legality(replace(site, obstacles=own), spec)


def replacement(site: AttentionSite, piece: Piece, spec: SwitchHead) -> Replacement:
    """The layer, and the net if it is replaced with this one; what the modules have already stays.

    Raises:
        NotAttention: `switchall.sizes`, no net of experts has about as many parameters.
        BadOption: the parameters of the layer are too few for a head of one channel.
    """
    net: Net | None = piece.facts["net"]
    before = piece.facts["before"]
    layer = switchhead.replacement(site, _of_layer(piece), spec)
    if net is None:
        words = f"{layer.words}; feed-forward net: with the last attention of the block"
        return layer if before is not None else replace(layer, words=words)
    fresh, words = {"dtype": net.dtype, "device": net.device}, ""
    held = () if before is None else before.tensors
    tensors = tuple(replace(t, **fresh) for t in held if _is_net(t))
    if tensors:
        sizes = NetSizes(*tensors[1].shape[::2])
    else:
        try:
            sizes = net_sizes(net.width, net.parameters)
        except BadOption as error:
            raise NotAttention("switchall.sizes", error.what) from error
        tensors = _tensors(sizes, net)
        words = (
            f"{layer.words}; feed-forward net: {sizes.k} of {sizes.experts} experts "
            f"{sizes.hidden} wide, {sizes.parameters(net.width):,} parameters for "
            f"{net.parameters:,}"
        )
    made = _net(layer, sizes, tensors, net)
    return replace(layer, words=words, net=made)


def _net(
    layer: Replacement, sizes: NetSizes, tensors: tuple[NewTensor, ...], net: Net
) -> Replacement:
    dropped = float(dict(layer.options)["expert_dropout"])
    options: tuple[tuple[str, Any], ...] = (
        ("k", sizes.k),
        ("expert_dropout", dropped),
        ("hidden_dropout", net.dropout),
    )
    training = layer.training or bool(net.dropout)
    return Replacement(sigma_moe.net, tensors, options, layer.spec, training=training)


def _of_layer(piece: Piece) -> Piece:
    """What `sites.switchhead` has to know."""
    before = piece.facts["before"]
    if before is None:
        return piece
    tensors = tuple(t for t in before.tensors if not _is_net(t))
    return replace(piece, facts={**piece.facts, "before": replace(before, tensors=tensors)})


def _is_net(tensor: NewTensor) -> bool:
    return switchhead.bare(tensor) in sigma_moe.NAMES


def _tensors(sizes: NetSizes, net: Net) -> tuple[NewTensor, ...]:
    """The maps start with the variance that those of the net have; without numbers to go by, and
    for the router: as `switchhead_fresh.fresh_sigma_moe` starts them.
    """
    experts, hidden, width = sizes.experts, sizes.hidden, net.width
    gain = math.sqrt(net.hidden / hidden) / mixture_deviation(sizes.k, experts)
    starts: tuple[tuple[tuple[int, ...], Start], ...] = (
        ((experts, width), Start(rows_of_length, (1.0,))),
        ((experts, width, hidden), Start(normal, (width**-0.5,), Like((net.up,)))),
        (
            (experts, hidden, width),
            Start(normal, ((experts * hidden) ** -0.5,), Like((net.down,), gain)),
        ),
    )
    return tuple(
        NewTensor(name, shape, net.dtype, start, True, net.home, net.device)
        for name, (shape, start) in zip(sigma_moe.NAMES, starts, strict=True)
    )


SWITCHALL = Variant(
    name="switchall",
    spec=SwitchHead,
    scope=Scope.SITE_AND_NET,
    fidelity=Fidelity.RETRAINED,
    legality=legality,
    replace=replacement,
    serves=lambda spec: spec.feed_forward == "sigma_moe",
)
