"""Products that hold more than a product: three operands, something added, a gate on the weights.

Every function is softmax(q k^T / sqrt(d)) v, and what its name says.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import WIDTH, D, Entry, H, Site, T, hidden, normal, site

SCALE = 1 / math.sqrt(D)


def values_projected_in_the_product(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
    weights = (torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE).softmax(-1)
    return torch.einsum("bhqk,bhkd,hde->bhqe", weights, v, out)


def scores_with_a_metric(q: Tensor, k: Tensor, v: Tensor, metric: Tensor) -> Tensor:
    return torch.einsum("bhqd,hde,...hke->bhqk", q, metric, k).mul(SCALE).softmax(-1) @ v


def scores_weighted_by_feature(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("bhqd,bhkd,hd->bhqk", [q, k, weight]).softmax(-1) @ v


def rows_gated_in_the_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * SCALE).softmax(-1)
    out = torch.einsum("bhqk,bhq,bhkd->bqhd", weights, q.mean(-1).sigmoid(), v)
    # laid out as the contraction leaves it
    return out.transpose(1, 2).view(-1, D).view(out.shape[0], H, -1, D)


def by_vecdot(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.linalg.vecdot(q.unsqueeze(3), k.unsqueeze(2)).mul(SCALE).softmax(-1)
    return torch.linalg.vecdot(weights.unsqueeze(3), v.mT.unsqueeze(2))


def by_cosine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (F.cosine_similarity(q.unsqueeze(3), k.unsqueeze(2), dim=-1) * 5).softmax(-1) @ v


def scores_added_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # what baddbmm gives is written through a view
    b, h, t, d = q.shape
    q3, k3 = (x.reshape(b * h, t, d) for x in (q, k))
    nothing = torch.zeros(1, 1, 1, dtype=q.dtype)
    scores = nothing.baddbmm(batch2=k3.mT, batch1=q3, beta=2, alpha=SCALE)
    scores.view(b, h, t, t).masked_fill_(torch.ones(t, t, dtype=torch.bool).triu(1), -torch.inf)
    return scores.view(b, h, t, t).softmax(-1) @ v


class ByAddmm(nn.Module):
    """One head and no batch: a bias, the scores, and a residual, each added by a product."""

    def __init__(self, summed: bool = False) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Linear(WIDTH, n) for n in (16, 16, WIDTH))
        self.summed = summed

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.wq(x), self.wk(x), self.wv(x)
        if self.summed:
            q, k = (y.view(len(x), 4, 4).transpose(0, 1) for y in (q, k))
            scores = torch.addbmm(bias, q, k.mT, alpha=0.25)
        else:
            scores = torch.addmm(bias, q, k.t(), beta=0.5, alpha=0.25)
        return torch.addmm(x, scores.softmax(-1), v, alpha=2)


class HeadGate(nn.Module):
    """A learned factor for each head, or for each row, on the weights."""

    def __init__(self, rows: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 1) if rows else nn.Parameter(torch.rand(H, 1, 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gate = self.gate(q).sigmoid() if isinstance(self.gate, nn.Linear) else self.gate
        return (F.dropout((q @ k.mT * SCALE).softmax(-1), 0.0) * gate) @ v


class RowGate(HeadGate):
    def __init__(self) -> None:
        super().__init__(rows=True)


def keys_gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gate = k.mean(-1).sigmoid().unsqueeze(2)
    return torch.matmul(gate * (q @ k.mT * SCALE).softmax(-1), v)


ENTRIES: tuple[Entry, ...] = (
    site("values_projected_in_the_product", values_projected_in_the_product, normal(H, D, D)),
    site("scores_with_a_metric", scores_with_a_metric, normal(H, D, D)),
    site("scores_weighted_by_feature", scores_weighted_by_feature, normal(H, D)),
    site("scores_added_in_place", scores_added_in_place, mask="causal"),
    *(
        site(f.__name__, f)
        for f in (rows_gated_in_the_product, by_vecdot, HeadGate, RowGate, keys_gated)
    ),
    Entry("by_cosine", lambda: Site(by_cosine), hidden(), heads=None),
    *(
        Entry(
            name,
            build,
            lambda g: (torch.randn(T, WIDTH, generator=g), torch.randn(T, T, generator=g)),
            heads=1,
            kv_heads=1,
            head_dim=16,
        )
        for name, build in (
            ("by_addmm", ByAddmm),
            ("by_addbmm", lambda: ByAddmm(summed=True)),
        )
    ),
)
