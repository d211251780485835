"""Parameters of SwitchHead and SwitchAll before any training.

    W_Q, W_K, W_V, routers ~ N(0, s^2 / D)    W_O ~ N(0, s^2 / (H c))    rows of a router: length s

Neither k nor E is in the deviations, as in the paper's code: with gates near 1/2, values and
outputs each start with about k / 4 of the variance. Rows of routers get one length, so that no
expert starts with an advantage; their deviation stays. What replaces a layer of a model starts at
the scale of that layer instead: see `starts`.

Source: SwitchHead (arXiv 2312.07987v3) and its code; sigma-MoE (arXiv 2310.10837).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_compiler.kernels.switchhead import Mixture, Weights


@dataclass(frozen=True, slots=True)
class Drawing:
    """How numbers are drawn.

    Attributes:
        scale: s; 1 / sqrt(layers) is recommended.
        generator: on the device of the parameters; None draws from the global one.
    """

    scale: float = 1.0
    generator: torch.Generator | None = None
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None

    def normal(self, *shape: int, deviation: float) -> Tensor:
        """Independent normal numbers with mean 0, drawn in float32."""
        drawn = torch.randn(
            shape, generator=self.generator, device=self.device, dtype=torch.float32
        )
        return (drawn * deviation).to(self.dtype or torch.get_default_dtype())

    def router(self, rows: int, width: int) -> Tensor:
        """[rows, D], every row of length s."""
        drawn = self.normal(rows, width, deviation=1.0)
        lengths = torch.linalg.vector_norm(drawn, dim=1, keepdim=True)
        return torch.mul(drawn, self.scale / lengths)


def fresh(mixture: Mixture, width: int, head_dim: int, drawing: Drawing) -> Weights:
    """The parameters of a layer; shapes as in `Weights`.

    Args:
        width: D.
        head_dim: c.
    """
    heads, experts, on = mixture.heads, mixture.heads * mixture.experts, mixture.experts_on
    inner = drawing.scale / math.sqrt(width)
    outer = drawing.scale / math.sqrt(heads * head_dim)
    w_q, w_k, w_v = (
        drawing.normal(experts if name in on else heads, width, head_dim, deviation=inner)
        for name in "qkv"
    )
    w_o = drawing.normal(experts if "o" in on else heads, head_dim, width, deviation=outer)
    has_source = not mixture.shared and ("k" in on or "v" in on)
    has_destination = mixture.shared or "q" in on or "o" in on
    w_s = drawing.router(experts, width) if has_source else None
    w_d = drawing.router(experts, width) if has_destination else None
    return Weights(w_q, w_k, w_v, w_o, w_s, w_d)


def fresh_positions(mixture: Mixture, width: int, head_dim: int, drawing: Drawing) -> Tensor:
    """W_P of Transformer-XL's positions, [H, D, c]."""
    deviation = drawing.scale / math.sqrt(width)
    return drawing.normal(mixture.heads, width, head_dim, deviation=deviation)


def fresh_sigma_moe(
    experts: int, width: int, hidden: int, drawing: Drawing
) -> tuple[Tensor, Tensor, Tensor]:
    """W_sel [N, D], W_1 [N, D, G] and W_2 [N, G, D] of a feed-forward net.

    Args:
        experts: N.
        width: D.
        hidden: G, channels of one expert.
    """
    w_sel = drawing.router(experts, width)
    w_1 = drawing.normal(experts, width, hidden, deviation=drawing.scale / math.sqrt(width))
    w_2 = drawing.normal(
        experts, hidden, width, deviation=drawing.scale / math.sqrt(experts * hidden)
    )
    return w_sel, w_1, w_2
