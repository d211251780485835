"""Linear attention in a model: the maps that are taught, and what the change costs.

    new = rewrite(model, args, to=LinearAttention())
    new.requires_grad_(False)
    for maps in feature_maps(new).values():
        maps.requires_grad_(True)
    distill(new, model, batches, steps=(500, 0), lr=1e-2)

Source: LoLCATs (arXiv 2410.10254), whose first step moves the maps alone, by the square error of
each layer's output.
"""

from __future__ import annotations

from torch import nn

from attn_compiler.installed import rewritten
from attn_compiler.kernels.feature_maps import FeatureMaps
from attn_compiler.variants.base import NewModule


def feature_maps(model: nn.Module) -> dict[str, FeatureMaps]:
    """The feature maps of a model that was rewritten to LinearAttention.

    Returns:
        Modules by the path of their attention, in the order of the model: parameters `w_q` [H, d,
        d], `w_k` [G, d, d] and `weight` [H]. Nothing where there are none.
    """
    found: dict[str, FeatureMaps] = {}
    for _, owner, site in rewritten(model):
        for new in site.decision.tensors:
            maps = getattr(owner, new.name) if isinstance(new, NewModule) else None
            if isinstance(maps, FeatureMaps):
                found[site.path] = maps
    return found
