"""Blocks with two attentions and one feed-forward net, as people write them, small."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.ir.block_models import HEADS, WIDTH, Net, Pre

ROWS, KEYS = 7, 11
X, E = (torch.randn(2, n, WIDTH, generator=torch.Generator().manual_seed(n)) for n in (ROWS, KEYS))


class Attend(nn.Module):
    """Over itself, causal if asked, or over another sequence."""

    def __init__(self, causal: bool = False, sloped: bool = False) -> None:
        super().__init__()
        self.causal, self.sloped = causal, sloped
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.slope = nn.Parameter(torch.randn(HEADS, 1, 1)) if sloped else None

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        pairs = ((self.q, x), (self.k, other), (self.v, other))
        q, k, v = (m(t).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m, t in pairs)
        scores = q @ k.transpose(-1, -2) * 0.5
        far = torch.arange(x.shape[1])[:, None] - torch.arange(other.shape[1])
        if self.slope is not None:
            scores = scores - self.slope * far.abs()
        if self.causal:
            scores = scores.masked_fill(far < 0, float("-inf"))
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Pre-norm: x + A(norm x), h + C(norm h, e), g + F(norm g)."""

    def __init__(
        self,
        *,
        net: nn.Module | None = None,
        norm: Any = None,
        rate: float = 0.0,
        sloped: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        make = norm or (lambda: nn.LayerNorm(WIDTH))
        self.first, self.second, self.third = make(), make(), make()
        self.own, self.cross, self.net = Attend(True), Attend(sloped=sloped), net or Net()
        self.drop = nn.Dropout(rate)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        x = x + self.drop(self.own(self.first(x)))
        x = x + self.drop(self.cross(self.second(x), e))
        return x + self.drop(self.net(self.third(x)))  # type: ignore[no-any-return]


class PostDecoder(Decoder):
    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        x = self.first(x + self.drop(self.own(x)))
        x = self.second(x + self.drop(self.cross(x, e)))
        return self.third(x + self.drop(self.net(x)))  # type: ignore[no-any-return]


class CrossFirst(Decoder):
    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        x = x + self.cross(self.second(x), e)
        x = x + self.own(self.first(x))
        return x + self.net(self.third(x))  # type: ignore[no-any-return]


class CrossThenParallel(Decoder):
    """The net is beside the second attention."""

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        x = x + self.cross(self.second(x), e)
        normed = self.first(x)
        return x + self.own(normed) + self.net(normed)  # type: ignore[no-any-return]


class TwoNets(Decoder):
    """A net behind each attention, and all four maps in the block itself."""

    def __init__(self) -> None:
        super().__init__()
        del self.net
        self.up, self.more = nn.Linear(WIDTH, 20), nn.Linear(WIDTH, 20)
        self.down, self.less = nn.Linear(20, WIDTH), nn.Linear(20, WIDTH)
        self.fourth = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        x = x + self.own(self.first(x))
        x = x + self.down(self.up(self.second(x)).relu())
        x = x + self.cross(self.third(x), e)
        return x + self.less(self.more(self.fourth(x)).relu())  # type: ignore[no-any-return]


class OneModule(nn.Module):
    """Both attentions are computed in the forward of the block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.maps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def attended(self, x: Tensor, other: Tensor, at: int) -> Tensor:
        q, k, v, o = self.maps[at : at + 4]
        pairs = ((q, x), (k, other), (v, other))
        sides = (m(t).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m, t in pairs)
        out = functional.scaled_dot_product_attention(*sides, is_causal=not at)
        return o(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        normed = self.norms[0](x)
        x = x + self.attended(normed, normed, 0)
        x = x + self.attended(self.norms[1](x), e, 4)
        return x + self.down(self.up(self.norms[2](x)).relu())  # type: ignore[no-any-return]


class Now(Decoder):
    """The other sequence may be missing."""

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        x = x + self.own(self.first(x))
        if e is not None:
            x = x + self.cross(self.second(x), e)
        return x + self.net(self.third(x))  # type: ignore[no-any-return]


class NoNet(Decoder):
    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        x = x + self.own(self.first(x))
        return self.third(x + self.cross(self.second(x), e))  # type: ignore[no-any-return]


class Peeking(Decoder):
    """Somebody reads a bias of the second attention."""

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return super().forward(x, e) + self.cross.o.bias.sin()


class Hooked(Decoder):
    """A module of the block has a hook."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.get_submodule(name).register_forward_hook(_nothing)


def _nothing(*_: Any) -> None:
    """Changes nothing."""


class Pair(nn.Module):
    """Two blocks that share a module."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.one, self.two = Decoder(), Decoder()
        setattr(self.two, name, getattr(self.one, name))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.two(self.one(x, e), e)  # type: ignore[no-any-return]


class EverySecond(nn.Module):
    """A block with one attention, a block with two, and again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Decoder() if i % 2 else Pre() for i in range(4))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x, e) if number % 2 else layer(x)
        return x
