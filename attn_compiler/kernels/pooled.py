"""Sums of attention maps by blocks, of the map itself and of its convolution along the diagonals.

    conv[i, j] = sum_k A[i + k, j + k],  |k| <= (F - 1) / 2
    pool[I, J] = mean of conv over the block I x J

Both are linear in A, so an element (u, v) goes straight to the blocks around it, times

    w(u, v; I, J) = #{k : (u - k, v - k) in I x J} / B^2

which depends on its place in its own block alone: one product of L^2 by about seven weights, in any
order, whatever the filter; no map of the whole sequence need exist.

Source: SPION (arXiv 2309.12578), the convolution and the pooling; the weights are derived.
L tokens, B rows of a block, nb blocks along a side, F elements of the filter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from attn_compiler.errors import BadOption


@dataclass(frozen=True, slots=True)
class BlockMap:
    """A sum of attention maps, by blocks; what is added changes its tensors in place.

    Attributes:
        length: tokens of the sequence.
        block: rows and columns of a block.
        filter: elements of the diagonal filter.
        convolved: [nb, nb] or [H, nb, nb], float64: means over blocks of the convolved map.
        plain: the same of the map itself.
    """

    length: int
    block: int
    filter: int
    convolved: Tensor
    plain: Tensor

    @staticmethod
    def zeros(
        length: int,
        *,
        block: int,
        filter: int = 31,
        heads: tuple[int, ...] = (),
        device: torch.device | str = "cpu",
    ) -> BlockMap:
        """The sum of no maps; `heads` is (H,) for one map of each head.

        Raises:
            BadOption: a size is not positive, or the filter is not odd.
        """
        if min(length, block, filter) < 1 or filter % 2 == 0:
            raise BadOption(
                f"no map of length {length} with block {block} and filter {filter}",
                where="option block or filter",
                do="give positive sizes, and an odd filter",
            )
        side = -(-length // block)
        both = (
            torch.zeros(*heads, side, side, dtype=torch.float64, device=device) for _ in range(2)
        )
        return BlockMap(length, block, filter, *both)

    @staticmethod
    def of(attention_map: Tensor, *, block: int, filter: int = 31) -> BlockMap:
        """Of a whole map [L, L] or [H, L, L]; where L is no multiple of the block, zeros follow.

        Raises:
            BadOption: the map is not square, or as in `zeros`.
        """
        shape = attention_map.shape
        if len(shape) < 2 or shape[-1] != shape[-2] or not shape[-1]:
            raise BadOption(
                f"an attention map of shape {tuple(shape)} is not square",
                where="option attention_map",
                do="give [length, length]: rows are queries, columns are keys",
            )
        heads, device = tuple(shape[:-2]), attention_map.device
        found = BlockMap.zeros(shape[-1], block=block, filter=filter, heads=heads, device=device)
        for row in range(0, shape[-1], block):
            found.add(attention_map[..., row : row + block, :], row, 0)
        return found

    def add(self, part: Tensor, row: int, column: int) -> None:
        """Add a piece [..., rows, columns] of a map that begins at a row and a column."""
        size = self.block
        starts = [row // size, column // size]
        before = row % size, column % size
        after = [-(b + n) % size for b, n in zip(before, part.shape[-2:], strict=True)]
        part = pad(part.detach().double(), (before[1], after[1], before[0], after[0]))
        tiles = part.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).transpose(-3, -2)
        tiles = tiles.flatten(-2)  # [..., I, J, B * B]
        offsets, weights = _weights(size, self.filter)
        sums = tiles @ weights.to(tiles.device)
        # the last column of the weights is that of the map itself
        _shifted_add(self.plain, sums[..., -1], starts[0], starts[1])
        for place, (down, right) in enumerate(offsets):
            _shifted_add(self.convolved, sums[..., place], starts[0] + down, starts[1] + right)

    def lost(self, pattern: Tensor) -> Tensor:
        """Share of the attention outside the blocks that are kept:  1 - kept mass / mass.

        Args:
            pattern: boolean [nb, nb], or one for each head.

        Returns:
            One number, or one for each head.
        """
        mass = self.plain.sum((-1, -2))
        kept = torch.where(pattern.to(self.plain.device), self.plain, 0.0).sum((-1, -2))
        return torch.where(mass > 0, 1 - kept / mass, 0.0).clamp_(min=0.0)

    def resized(self, length: int) -> BlockMap:
        """For sequences of another length: the maps are stretched, never the pattern."""
        side = -(-length // self.block)
        both = (_stretched(x, side) for x in (self.convolved, self.plain))
        return BlockMap(length, self.block, self.filter, *both)


def _stretched(pool: Tensor, side: int) -> Tensor:
    flat = pool.view(1, -1, *pool.shape[-2:])
    found = interpolate(flat, (side, side), mode="bilinear", antialias=True)
    return found.view(*pool.shape[:-2], side, side)


def _shifted_add(into: Tensor, part: Tensor, row: int, column: int) -> None:
    """Add a part that begins at a place that may lie outside; what is outside is lost."""
    cuts = []
    for axis, start in ((-2, row), (-1, column)):
        first, last = max(start, 0), min(start + part.shape[axis], into.shape[axis])
        if first >= last:
            return
        cuts.append((slice(first, last), slice(first - start, last - start)))
    (rows, from_rows), (columns, from_columns) = cuts
    into[..., rows, columns] += part[..., from_rows, from_columns]


@lru_cache(maxsize=64)
def _weights(block: int, filter: int) -> tuple[tuple[tuple[int, int], ...], Tensor]:
    """Block offsets that an element reaches, and its weights there, [B * B, offsets + 1]."""
    half, places = filter // 2, torch.arange(block)
    # which block an element of a row or a column lands in, for each k
    lands = torch.div(
        places.unsqueeze(1) - torch.arange(-half, half + 1), block, rounding_mode="floor"
    )
    found = list(_pairs(lands))
    plain = torch.ones(block, block, dtype=torch.float64)
    weights = torch.stack([*(w for _, w in found), plain], -1) / block**2
    return tuple(offset for offset, _ in found), weights.flatten(0, 1)


def _pairs(lands: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Offsets (down, right) and for how many k an element (u, v) lands there, [B, B]."""
    blocks = range(int(lands.min()), int(lands.max()) + 1)
    hits = {n: (lands == n).double() for n in blocks}
    for down in blocks:
        for right in blocks:
            count = hits[down] @ hits[right].T
            if bool(count.any()):
                yield (down, right), count
