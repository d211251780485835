"""flex_attention with score functions, block masks and captured tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from zoo.entry import D, Entry, G, H, T, site


def _attend(
    q: Tensor, k: Tensor, v: Tensor, rule: Any = None, mask: Any = None, scale: float = D**-0.5
) -> Any:
    """flex_attention when compiled; eager computes the definition (it would compile by itself)."""
    if torch.compiler.is_compiling():
        blocks = (
            None
            if mask is None
            else create_block_mask(mask, None, None, q.shape[2], k.shape[2], device="cpu")
        )
        return flex_attention(
            q, k, v, score_mod=rule, block_mask=blocks, scale=scale, enable_gqa=k.shape[1] != H
        )
    b, h, i, j = torch.meshgrid(
        *map(torch.arange, (q.shape[0], H, q.shape[2], k.shape[2])), indexing="ij"
    )
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    s = q @ k.mT * scale
    s = s if rule is None else rule(s, b, h, i, j)
    s = s if mask is None else s.masked_fill(~mask(b, h, i, j), -float("inf"))
    return s.softmax(-1) @ v


def _flex(**options: Any) -> Callable[..., Any]:
    return lambda q, k, v: _attend(q, k, v, **options)


def _square(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score + score * score * 0.1


def _relative(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score + (k - q) * torch.exp2(-(h + 1.0))


def _causal_score(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.where(q >= k, score, -float("inf"))


def _causal_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def _window_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & (q - k < 4)


class Captured(nn.Module):
    """A learned table read by the score function."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(H, 2 * T - 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + self.table[h, i - j + T - 1]

        return _attend(q, k, v, rule=score)


def flex(name: str, attend: Any, **facts: Any) -> Entry:
    # torch has no backward pass of flex_attention on a CPU
    return site(f"flex_{name}", attend, training=False, **facts)


ENTRIES: tuple[Entry, ...] = (
    flex("plain", _flex()),
    flex("scale_groups", _flex(scale=0.3), kv=G),
    flex("square", _flex(rule=_square)),
    flex("relative", _flex(rule=_relative)),
    flex("causal_score", _flex(rule=_causal_score), mask="causal"),
    flex("causal_blocks", _flex(mask=_causal_mod), mask="causal"),
    flex("window_blocks", _flex(mask=_window_mod, rule=_relative), mask="causal & window(4)"),
    flex("captured", Captured),
)
