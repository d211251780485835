"""rewrite: sizes that are rounded before an attention, and checked when the next call comes.

t / 4 is an integer, or tokens are added        ->        math.floor(shape_0[1] / 4) == ...
"""

from __future__ import annotations

import claims
import torch
import torch.nn.functional as F
from doors.living import WIDTH, calls
from torch import Tensor, nn

import attn_compiler as ac


class Chunks(nn.Module):
    """Attention in chunks of four tokens; the last one is filled up."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        chunks = tokens / 4
        if not chunks.is_integer():
            x = F.pad(x, (0, 0, 0, int(4 * (chunks // 1 + 1)) - tokens))
        q, k, v = (t.unflatten(1, (-1, 4)) for t in (self.query(x), self.key(x), x))
        return torch.softmax(q @ k.mT / 8, -1).matmul(v).flatten(1, 2)[:, :tokens]


def test_rounded_sizes_are_checked() -> None:
    model = Chunks().eval()
    new = ac.rewrite(model, (torch.randn(2, 7, WIDTH),))
    for tokens in (7, 11, 8):
        x = torch.randn(2, tokens, WIDTH)
        claims.same_numbers(model, new, (x,))
        assert calls(new, x) == 1 or tokens != 7


class Padded(Chunks):
    """The length of a chunk, as a quotient of sizes, is nobody's size."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens = x.shape[:2]

        def split(t: Tensor) -> Tensor:
            t = t.view(batch, -1, 2, WIDTH // 2)
            t = F.pad(t, (0, 0, 0, 0, 0, -tokens % 4)) if tokens % 4 else t
            return t.reshape(batch, t.shape[1] // 4, 4, 2, WIDTH // 2)

        q, k, v = (split(t) for t in (self.query(x), self.key(x), x))
        p = torch.einsum("...qhd,...khd->...hqk", q, k).softmax(-1)
        mixed = torch.einsum("...hqk,...khd->...qhd", p, v)
        return mixed.contiguous().view(batch, -1, WIDTH)[:, :tokens]


def test_quotients_and_remainders_of_sizes_are_computed() -> None:
    model = Padded().eval()
    new = ac.rewrite(model, (torch.randn(2, 7, WIDTH),))
    for tokens in (7, 11, 8):
        x = torch.randn(2, tokens, WIDTH)
        claims.same_numbers(model, new, (x,))
        assert calls(new, x) == 1 or tokens == 8
