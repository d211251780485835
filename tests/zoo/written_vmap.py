"""Masks and attentions written for one element and mapped over the rest by torch.vmap."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from zoo.entry import WIDTH, B, D, Entry, S, T, constant, normal, site

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
SCALE = 1 / math.sqrt(D)
CHUNK = 4
KEEP = constant(torch.arange(T) < torch.tensor([[T], [6]]))


def mapped(rule: Rule, batch: int, rows: int, keys: int) -> Tensor:
    """rule(b, h, q, k) for all b, q and k: bool [batch, 1, rows, keys]."""
    over = rule
    for dims in (
        (None, None, None, 0),
        (None, None, 0, None),
        (None, 0, None, None),
        (0, *[None] * 3),
    ):
        over = torch.vmap(over, in_dims=dims, out_dims=0)
    return over(*(torch.arange(n) for n in (batch, 1, rows, keys)))


def attend(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    allowed = mapped(rule, q.shape[0], q.shape[2], k.shape[2])
    scores = (q @ k.mT * SCALE).masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ v


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k <= q


def both(*rules: Rule) -> Rule:
    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        result = q.new_ones((), dtype=torch.bool)
        for one in rules:
            result = result & one(b, h, q, k)
        return result

    return rule


def by_rule(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, causal)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, both(causal, lambda b, h, q, k: q - k < 4))


def chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        apart = torch.div(q, CHUNK, rounding_mode="trunc") - torch.div(
            k, CHUNK, rounding_mode="trunc"
        )
        return (apart >= 0) & (apart <= 1)

    return attend(q, k, v, rule)


def padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return attend(q, k, v, both(causal, lambda b, h, q, k: keep[b, k]))


def for_fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    allowed = mapped(causal, q.shape[0], q.shape[2], k.shape[2])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


def one_sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def single(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * SCALE).softmax(-1) @ v

    return torch.vmap(single)(q, k, v)


ENTRIES: tuple[Entry, ...] = (
    site("vmap_causal", by_rule, mask="causal"),
    site("vmap_window", window, mask="causal & window(4)"),
    site("vmap_chunks", chunks, mask=None),
    site("vmap_padded", padded, KEEP, mask="causal & padding("),
    site("vmap_for_fused", for_fused, mask="causal"),
    site("vmap_cross", by_rule, normal(B, S, WIDTH), cross=True, mask="causal"),
    site(
        "vmap_of_everything",
        one_sequence,
        refused=("region.vmap",),
        why="the attention itself is mapped: its tensors have hidden dimensions",
    ),
)
