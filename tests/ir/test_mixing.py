"""Talking heads, as people write the map over heads, and what only looks like it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as ac
from attn_compiler.ir import ops
from attn_compiler.ir.mixing import mixed_heads
from tests.ir.block_models import graph_of

HEADS, FEATURES, ROWS = 3, 5, 7
WIDTH = HEADS * FEATURES


class Plain(nn.Module):
    """Attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.map = nn.Linear(HEADS, HEADS, bias=False)

    def before(self, scores: Tensor) -> Tensor:
        return scores

    def behind(self, weights: Tensor) -> Tensor:
        return weights

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = self.behind(self.before(q @ k.transpose(-1, -2) * 0.4).softmax(-1))
        return self.out((weights @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Linear(Plain):
    def before(self, scores: Tensor) -> Tensor:
        return self.map(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class Einsum(Plain):
    def behind(self, weights: Tensor) -> Tensor:
        return torch.einsum("bhts,gh->bgts", weights, self.map.weight)


class Product(Plain):
    def before(self, scores: Tensor) -> Tensor:
        return (self.map.weight @ scores.flatten(2)).view_as(scores)


class Convolution(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Conv2d(HEADS, HEADS, 1)  # type: ignore[assignment]

    def behind(self, weights: Tensor) -> Tensor:
        return self.map(weights)  # type: ignore[no-any-return]


class Wide(Convolution):
    """Mixes neighbours as well."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Conv2d(HEADS, HEADS, 3, padding=1)  # type: ignore[assignment]


class OverKeys(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(ROWS, ROWS)

    def behind(self, weights: Tensor) -> Tensor:
        return self.map(weights)  # type: ignore[no-any-return]


class Router(Plain):
    """A choice among as many experts as heads, of what an attention gives."""

    def forward(self, x: Tensor) -> Tensor:
        return self.map(super().forward(x)[..., :HEADS]).softmax(-1)  # type: ignore[no-any-return]


def words(model: nn.Module) -> set[str]:
    graph = graph_of(model, torch.randn(2, ROWS, WIDTH))
    return {mixed_heads(node) for node in graph.nodes if ops.name(node) in ops.SOFTMAX}


@pytest.mark.parametrize(
    ("kind", "where"),
    [(Linear, "before"), (Product, "before"), (Einsum, "behind"), (Convolution, "behind")],
)
def test_who_mixes_heads(kind: type[Plain], where: str) -> None:
    assert words(kind()) == {f"a linear map mixes the heads {where} the softmax"}


@pytest.mark.parametrize("kind", [Plain, Wide, OverKeys, Router])
def test_who_does_not(kind: type[Plain]) -> None:
    assert words(kind()) == {""}


def test_the_reason_of_a_look_alike() -> None:
    (missed,) = ac.explain(Einsum(), (torch.randn(2, ROWS, WIDTH),)).missed
    assert missed.code == "not_attention.heads_mixed"
    assert missed.text.endswith("no head attends by itself")
