"""The encoder of the long-range tasks, and what is put in place of its dense attention.

    "spion-cf"   ->   SPION(mode="CF"), density of a budget
    "window"     ->   SPION(pattern=the blocks nearest to the diagonal), as many

The budget is what SPION-CF can keep at most.

Sources: SPION (arXiv 2309.12578) for the encoder, BigBird (arXiv 2007.14062) for one fixed pattern.
"""

from __future__ import annotations

import argparse

import torch
from lra_tasks import PAD, Task
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

import attn_compiler as ac
from attn_compiler.variants.spion import filled, most_blocks

MODES = {"spion-c": "C", "spion-f": "F", "spion-cf": "CF"}
FIXED = ("window", "bigbird")
WAYS = ("dense", *MODES, *FIXED)


# ---------------------------------------------------------------- the model


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        heads = (t.transpose(1, 2) for t in (q, k, v))
        return self.out(scaled_dot_product_attention(*heads, mask).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.norms[0](x), mask)
        return x + self.down(gelu(self.up(self.norms[1](x))))


class Encoder(nn.Module):
    """Tokens [B, T] to logits [B, classes]."""

    def __init__(self, task: Task, options: argparse.Namespace) -> None:
        super().__init__()
        width = options.width
        self.padded = task.padded
        self.embed = nn.Embedding(task.tokens, width)
        self.positions = nn.Parameter(torch.randn(options.length, width) * 0.02)
        self.layers = nn.ModuleList(Layer(width, options.heads) for _ in range(options.layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, task.classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions
        keep = tokens != PAD
        for layer in self.layers:
            x = layer(x, keep[:, None, None, :] if self.padded else None)
        x = self.norm(x)
        if self.padded:
            return self.head((x * keep.unsqueeze(-1)).sum(1) / keep.sum(1, keepdim=True))
        return self.head(x.mean(1))


# ---------------------------------------------------------------- the ways to attend


def window(side: int, blocks: int) -> Tensor:
    """The blocks nearest to the diagonal, so many of them."""
    places = torch.arange(side)
    far = (places.unsqueeze(1) - places).abs()
    return _first(far.float(), blocks)


def bigbird(side: int, blocks: int, seed: int) -> Tensor:
    """The diagonal, then the first column and row, then neighbours and random blocks in turn."""
    draw = torch.rand(side, side, generator=torch.Generator().manual_seed(seed))
    places = torch.arange(side)
    far = (places.unsqueeze(1) - places).abs()
    left = max(0, blocks - (3 * side - 2))
    order = 10 + draw
    order[far == 1] = 5 + draw[far == 1]
    near = (far == 1).nonzero()[torch.randperm(2 * side - 2, generator=seeded(seed))]
    for kept in near[: left // 2]:
        order[kept[0], kept[1]] = 2
    # half of what is left goes to random blocks, before the other neighbours
    order = torch.where((order > 5) & (far > 1), 3 + draw, order)
    order[0], order[:, 0] = 1.5, 1.0
    return _first(order.masked_fill(far == 0, -1.0), blocks)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _first(order: Tensor, blocks: int) -> Tensor:
    kept = torch.zeros(order.numel(), dtype=torch.bool)
    kept[order.flatten().argsort(stable=True)[:blocks]] = True
    return kept.view(order.shape)


def spec_of(way: str, options: argparse.Namespace, seed: int) -> ac.SPION:
    """What a way that is not dense is rewritten to."""
    block = options.block or "auto"
    auto = filled(ac.SPION(block=block, alpha=options.alpha or "auto"), options.length)
    side = -(-options.length // auto.block)
    budget = most_blocks(side, auto.alpha)
    common = {"block": auto.block, "softmax": options.softmax}
    if way in MODES:
        density = min(1.0, budget / side**2)
        return ac.SPION(mode=MODES[way], alpha=auto.alpha, density=density, **common)
    kept = window(side, budget) if way == "window" else bigbird(side, budget, seed)
    return ac.SPION(pattern=kept, **common)
