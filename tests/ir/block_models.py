"""Transformer blocks as people write them, small, and the graph of their forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from attn_compiler.call import Call
from attn_compiler.ir.block import FoundBlock
from attn_compiler.ir.blocks import find_block
from attn_compiler.ir.recognise import recognise
from attn_compiler.ir.region import ambient, cut, functionalise, order
from attn_compiler.passes.expand_composite import expand_composites
from attn_compiler.passes.find_regions import find_candidates
from attn_compiler.record import Recorder
from attn_compiler.symbols import Symbols, oblivious
from attn_compiler.watch import bound

WIDTH, HEADS = 12, 3


class RmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Attend(nn.Module):
    """Causal attention of tokens over themselves, or over `other`."""

    def __init__(self, causal: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.causal, self.dropout = causal, dropout
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def mixed(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if other is not None:
            k = self.qkv(other).chunk(3, -1)[1].unflatten(-1, (HEADS, -1)).transpose(1, 2)
        scores = q @ k.transpose(-1, -2) * 0.5
        if self.causal:
            rows = torch.arange(x.shape[1])
            scores = scores.masked_fill(rows > rows[:, None], float("-inf"))
        weights = functional.dropout(scores.softmax(-1), self.dropout, self.training)
        return (weights @ v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mixed(x))  # type: ignore[no-any-return]


class Net(nn.Module):
    """down(act(up x)), gated if asked."""

    def __init__(
        self, act: Callable[[Tensor], Tensor] = functional.gelu, *, gated: bool = False
    ) -> None:
        super().__init__()
        self.act = act
        self.up = nn.Linear(WIDTH, 20)
        self.gate = nn.Linear(WIDTH, 20) if gated else None
        self.down = nn.Linear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        hidden = self.act(hidden) if self.gate is None else self.act(self.gate(x)) * hidden
        return self.down(hidden)  # type: ignore[no-any-return]


class Pre(nn.Module):
    """h = x + A(norm x), y = h + F(norm h)."""

    def __init__(
        self,
        *,
        causal: bool = True,
        net: nn.Module | None = None,
        norm: Any = None,
        rate: float = 0,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        make = norm or (lambda: nn.LayerNorm(WIDTH))
        self.first, self.attend, self.drop = make(), Attend(causal), nn.Dropout(rate)
        self.second, self.net = make(), net or Net()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attend(self.first(x)))
        return x + self.drop(self.net(self.second(x)))  # type: ignore[no-any-return]


class Post(Pre):
    """h = norm(x + A(x)), y = norm(h + F(h))."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x + self.drop(self.attend(x)))
        return self.second(x + self.drop(self.net(x)))  # type: ignore[no-any-return]


class Parallel(Pre):
    """y = x + A(norm x) + F(norm x)."""

    def forward(self, x: Tensor) -> Tensor:
        normed = self.first(x)
        return self.attend(normed) + self.net(normed) + x  # type: ignore[no-any-return]


def graph_of(model: nn.Module, *args: Any) -> fx.Graph:
    """Its forward as the door sees it, every module traced through."""
    recorder = Recorder(model, lambda path, module: True, Symbols(fx.Graph(), False))
    with oblivious():
        Call(recorder).record(type(model), bound(type(model), args, {}))
    return fx.GraphModule(model, recorder.graph).graph


def found_in(model: nn.Module, *args: Any) -> FoundBlock:
    """The block around its first attention."""
    graph = graph_of(model, *args)
    state = ambient(graph)
    expand_composites(graph, state)
    (candidate, *_) = find_candidates(graph)
    region = cut(candidate.ends[0], order(graph), [])
    return find_block(region.end, recognise(functionalise(region, state)))
