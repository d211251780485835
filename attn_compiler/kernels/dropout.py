"""Attention dropout that is a function of the seed and the place.

    dropped[b, h, q, k] = mix(row(seed, b, h, q) ^ column(seed, k)) < rate * 2^32

So every block of every pass draws the same, however the matrix is cut, on any device. Rows and
columns are hashed in 64 bits (splitmix64; Steele, Lea and Flood 2014), one element costs two 32-bit
multiplications (murmur3's finaliser with the constants that Wellons found in 2018). Philox, which
PyTorch draws from, takes about twenty for an element, four of which lie together: more than a tile
of scores, and a backward pass that runs over other tiles, can bear.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Drop:
    """The dropout of one call.

    Attributes:
        seed: int64, one element.
        rate: probability to drop; 0 draws nothing.
        part: where the call is some rows of another: the first of them, and how many that has.
    """

    seed: Tensor | None
    rate: float
    part: tuple[int, int] | None = None

    @property
    def gain(self) -> float:
        """What the surviving probabilities are multiplied with."""
        return 1 / (1 - self.rate) if self.rate < 1 else 0.0

    def dropped(
        self,
        shape: tuple[int, int],
        items: tuple[int, int],
        rows: tuple[int, int],
        cols: tuple[int, int],
    ) -> Tensor | None:
        """Which probabilities are set to zero, None for none.

        Args:
            shape: heads H and query rows T of the call.
            items: first and last + 1 batch item; `rows` and `cols` likewise.

        Returns:
            Boolean [items, H, rows, columns].
        """
        if self.rate == 0 or self.seed is None:
            return None
        heads, length = shape
        first, length = self.part or (0, length)
        device = self.seed.device
        start = _splitmix(self.seed.reshape(()).to(torch.int64))
        pairs = torch.arange(items[0] * heads, items[1] * heads, device=device).view(-1, heads, 1)
        row = _splitmix(
            start
            + 2 * (pairs * length + torch.arange(first + rows[0], first + rows[1], device=device))
        )
        column = _splitmix(start + 2 * torch.arange(cols[0], cols[1], device=device) + 1)
        x = row.to(torch.int32).unsqueeze(-1) ^ column.to(torch.int32)
        x = x * 0x7FEB352D
        x = ((x >> 15) & 0x1FFFF) ^ x
        x = x * -0x7B935975
        x = ((x >> 16) & 0xFFFF) ^ x
        if self.rate == 1:
            return torch.ones_like(x, dtype=torch.bool)
        return x < round(self.rate * 2.0**32) - 2**31


def _splitmix(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers; the low 32 bits of the result are used."""
    x = x * -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
