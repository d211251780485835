"""A layer with a cache as people write it, and the check that it stays the same when rewritten.

Attend().forward(x, past):  k, v = past.update(*sides(x), 0);  softmax(q k^T) v
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import attn_compiler as ac

tf = pytest.importorskip("transformers")

WIDTH, HEADS, FEATURES = 23, 3, 5
INNER = HEADS * FEATURES
Sides = tuple[Tensor, Tensor]


class Counted(TorchDispatchMode):
    """How often the operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.found = {"el_attention": 0, "attention": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(getattr(func, "overloadpacket", func)).rpartition(".")[2]
        if "attn_compiler" in str(func) and name in self.found:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, FEATURES)).transpose(1, 2)


class Attend(nn.Module):
    """Causal attention over what a cache holds."""

    def __init__(self, groups: int = HEADS, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(WIDTH, INNER)
        self.k = nn.Linear(WIDTH, groups * FEATURES, bias=bias)
        self.v = nn.Linear(WIDTH, groups * FEATURES, bias=bias)
        self.out = nn.Linear(INNER, WIDTH)

    def sides(self, x: Tensor) -> Sides:
        return heads(self.k(x)), heads(self.v(x))

    def cached(self, sides: Sides, past: Any) -> Sides:
        return past.update(*sides, 0)  # type: ignore[no-any-return]

    def scores(self, dot: Tensor) -> Tensor:
        rows, keys = dot.shape[-2:]
        seen = torch.arange(keys) <= torch.arange(rows)[:, None] + (keys - rows)
        return dot.masked_fill(~seen, float("-inf"))

    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def forward(self, x: Tensor, past: Any) -> Tensor:
        q = heads(self.q(x))
        k, v = self.cached(self.sides(x), past)
        k, v = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
        weights = self.weights(self.scores(q @ k.transpose(-1, -2) * FEATURES**-0.5))
        return self.out((weights @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def draw(rows: int, length: int) -> Tensor:
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(length))


def rewritten(model: nn.Module, *args: Any) -> tuple[nn.Module, Any]:
    new = ac.rewrite(model.eval(), args or (draw(2, 7), tf.DynamicCache()), to=ac.ELAttention())
    report = ac.last_report()
    assert len(report.sites) == 1, str(report)
    return new, report.sites[0].decision


def steps(model: nn.Module, past: Any) -> list[Tensor]:
    """A prompt, single tokens, several at once, a reordering of the batch in between."""
    found = []
    for number, length in enumerate((7, 1, 1, 3, 1)):
        with torch.no_grad():
            found.append(model(draw(2, length), past))
        if number == 2 and hasattr(past, "reorder_cache"):
            past.reorder_cache(torch.tensor([1, 0]))
    return found


def same(model: nn.Module, new: nn.Module, make: Callable[[], Any] = tf.DynamicCache) -> Any:
    """Every step is as near to float64 as the original's."""
    past = make()
    ours, theirs = steps(new, past), steps(model, make())
    # a deep copy in float64 sees the same inputs
    wide = copy.deepcopy(model).double()
    wide.register_forward_pre_hook(lambda m, args: (args[0].double(), *args[1:]))
    for mine, other, exact in zip(ours, theirs, steps(wide, make()), strict=True):
        budget = 4 * float((other - exact).abs().max()) + 8 * 2**-23 * float(exact.abs().max())
        assert float((mine - exact).abs().max()) <= budget
    return past


TURNED = 2


def turned(x: Tensor) -> Tensor:
    """Rotated by the position, which is read from nothing but the length."""
    angle = torch.arange(x.shape[2])[:, None] * torch.linspace(0.1, 1.0, x.shape[3])
    half = torch.cat([-x[..., 1:], x[..., :1]], -1)
    return x * angle.cos() + half * angle.sin()
