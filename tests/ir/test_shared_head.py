"""Heads that share one kv head are heads, also where there is one row beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from doors.cached import FEATURES, HEADS, WIDTH, Attend, draw, heads, turned
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attn_compiler as ac

tf = pytest.importorskip("transformers")


class Shared(Attend):
    """One kv head; queries are rotated, or are views of their projection."""

    def __init__(self, rotated: bool, fused: bool) -> None:
        super().__init__(groups=1)
        self.rotated, self.fused = rotated, fused

    def forward(self, x: Tensor, past: Any) -> Tensor:
        q, (k, v) = heads(self.q(x)), self.sides(x)
        if self.rotated:
            q, k = turned(q), turned(k)
        k, v = past.update(k, v, 0)
        if self.fused:
            k, v = (t.expand(-1, HEADS, -1, -1) for t in (k, v))
            y = scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.mT * FEATURES**-0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rotated", [True, False])
def test_one_row_of_heads(rotated: bool, fused: bool) -> None:
    model, cache = Shared(rotated, fused), tf.DynamicCache()
    sides = torch.zeros(2, 1, 11, FEATURES), torch.zeros(2, 1, 11, FEATURES)
    cache.update(*sides, 0)
    (site,) = ac.explain(model, (draw(2, 1), cache)).sites
    assert (site.query_heads, site.kv_heads, site.head_dim) == (HEADS, 1, FEATURES)
    assert site.length is None and site.phases[0].value == "decode"


@pytest.mark.parametrize("fused", [True, False])
def test_rows_of_one_head(fused: bool) -> None:
    """The other way round: what has no heads keeps its rows."""

    class Bare(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if fused:
                return scaled_dot_product_attention(q, k, v, scale=0.2)
            return (q @ k.mT).softmax(-1) @ v

    for shape in ((2, 1), (2,), (1, 1)):
        q, k, v = (torch.randn(*shape, n, WIDTH) for n in (3, 7, 7))
        (site,) = ac.explain(Bare(), (q, k, v)).sites
        assert site.phases[0].value == "prefill"
        assert site.query_heads in (1, None)
