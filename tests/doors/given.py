"""Models for the tests of the command line: FILE:FUNCTION names a function of this file."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]
WIDTH, HEADS = 28, 7


class Attention(nn.Module):
    """Causal attention as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (y.view(b, t, HEADS, -1).transpose(1, 2) for y in self.qkv(x).split(d, 2))
        scores = q @ k.mT * 0.5
        future = torch.ones(t, t, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, d))  # type: ignore[no-any-return]


class Gated(nn.Module):
    """The weights gate themselves: no attention that can be rewritten."""

    def forward(self, x: Tensor) -> Tensor:
        weights = (x @ x.mT).softmax(-1)
        weights = weights * (2 * weights).sigmoid()
        return weights @ x


class Broken(nn.Module):
    """Its layers do not fit each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Attention(), nn.Linear(WIDTH + 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x))
        return y


class Untraceable(nn.Module):
    """Runs by itself; a whole graph is asked for, and a line breaks it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.shifted(x)

    @torch._dynamo.error_on_graph_break(True)
    def shifted(self, x: Tensor) -> Tensor:
        offset = int(x.sum().item() > 0)
        return x + offset


class Disabled(nn.Module):
    """The tracer may not look into it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


def example() -> Tensor:
    return torch.randn(2, 11, WIDTH, generator=torch.Generator().manual_seed(3))


def make() -> Made:
    torch.manual_seed(0)
    return nn.Sequential(Attention(), Attention(), Gated()).eval(), (example(),), {}


def broken() -> Made:
    return Broken(), (example(),), {}


def untraceable() -> Made:
    return Untraceable(), (example(),), {}


def fails() -> Made:
    raise FileNotFoundError("no weights here")


def number() -> int:
    return 3


def prints() -> Made:
    print("loading weights")
    model = Attention()
    model.register_forward_pre_hook(lambda *_: print("called"))
    return model, (example(),), {}


def exits() -> Made:
    class Exits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sys.exit(3)

    return Exits(), (example(),), {}


class Cut(nn.Module):
    """The tracer lets go between the scores and the softmax, then for good."""

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.mT
        torch._dynamo.graph_break()
        x = scores.softmax(-1) @ x
        if x.sum() > 0:
            x = x + 1
        return self.again(x)

    def again(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + 1
            torch._dynamo.graph_break()
        return x


def cut() -> Made:
    return Cut(), (example(),), {}


def kept_out() -> Made:
    return Disabled(), (example(),), {}


def needs(width: int) -> Made:
    return nn.Linear(width, width), (example(),), {}


def a_class() -> Any:
    return Attention, (example(),), {}


def bare_args() -> Any:
    return Attention(), example()


def listed_kwargs() -> Any:
    return Attention(), (), [("x", example())]


def too_few() -> Made:
    return Attention(), (), {}


def scripted() -> Made:
    return torch.jit.script(nn.Linear(WIDTH, 3)), (example(),), {}


def leaves() -> Made:
    raise SystemExit("usage: given.py NAME")
