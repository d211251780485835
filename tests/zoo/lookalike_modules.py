"""Modules with a softmax and a product or two that are no attention at all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import WIDTH, T


class Router(nn.Module):
    """A mixture of experts: softmax over experts, then a weighted sum of what they made."""

    def __init__(self, hard: bool = False) -> None:
        super().__init__()
        self.hard, self.gate = hard, nn.Linear(WIDTH, 3)
        self.experts = nn.Parameter(torch.randn(3, WIDTH, WIDTH) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(-1)
        if self.hard:
            best, at = p.topk(2, dim=-1)
            p = torch.zeros_like(p).scatter(-1, at, best)
        return torch.einsum("bte,bted->btd", p, torch.einsum("btc,ecd->bted", x, self.experts))


class LinearRouter(nn.Module):
    """softmax(x W) E: `keys` and `values` are parameters without a batch, as a router has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.table = nn.Linear(WIDTH, 5, bias=False), nn.Parameter(torch.randn(5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).softmax(-1) @ self.table


class SoftExperts(nn.Module):
    """Soft MoE: dispatch by a softmax over tokens, combine by one over slots."""

    def __init__(self) -> None:
        super().__init__()
        self.phi, self.inner = nn.Parameter(torch.randn(WIDTH, 6)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.einsum("bmd,dp->bmp", x, self.phi)
        dispatched = torch.einsum("bmd,bmp->bpd", x, logits.softmax(dim=1))
        return torch.einsum("bpd,bmp->bmd", self.inner(dispatched), logits.softmax(dim=2))


class Pooling(nn.Module):
    """softmax(W x) x: one learned vector weighs the rows."""

    def __init__(self, hidden_layer: bool = False) -> None:
        super().__init__()
        inner = [nn.Linear(WIDTH, WIDTH), nn.Tanh()] if hidden_layer else []
        self.score = nn.Sequential(*inner, nn.Linear(WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.score(x).softmax(dim=1) * x).sum(1)


class PoolingByProduct(Pooling):
    """The same with a batched product."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(self.score(x).transpose(1, 2).softmax(-1), x).squeeze(1)


class Squeeze(nn.Module):
    """Squeeze and excite, with a softmax over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(F.relu(self.down(x.mean(1)))).softmax(-1)[:, None]


class Additive(nn.Module):
    """Bahdanau: the score is a small network of query and key, not a product."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.score = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        energy = torch.tanh(self.q(x)[:, :, None] + self.k(memory)[:, None])
        return self.score(energy).squeeze(-1).softmax(-1) @ memory


class Synthesizer(nn.Module):
    """The weights come from the rows alone, or from a table: there are no keys."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.value = nn.Parameter(torch.randn(T, T)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.table.softmax(-1) @ self.value(x)  # type: ignore[no-any-return]


class Classifier(nn.Module):
    """A product, a softmax and a product: the label embedding of soft predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.back = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.head(x).softmax(-1))  # type: ignore[no-any-return]


class NearestNeighbours(nn.Module):
    """Weights by distance, which is no product (the squared distance would be one)."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return torch.cdist(x, memory).neg().softmax(-1) @ memory
