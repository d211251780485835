"""What is to be computed, and by which tiles: sizes, a band of visible keys, blocks of rows.

    T = S = 256, causal, tiles of 64 x 64   ->   blocks of 1, 2, 3, 4 tiles

Row q sees key k where  q + shift - left <= k <= q + shift + right;  None lets that side open.
Causal is right = 0; a window adds left; shift = S - T where the rows are the last ones of the keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Template = Literal["forward", "queries", "keys_and_values"]
TEMPLATES: tuple[Template, ...] = ("forward", "queries", "keys_and_values")
# a query of at most so many rows shares its keys among the heads of a group, and among programs
SHORT = 16
# blocks that are looked at one by one; of more, so many at equal distances stand for all
_SAMPLES = 32


@dataclass(frozen=True, slots=True)
class TileConfig:
    """The numbers of a generated kernel, as its launch takes them.

    Attributes:
        block_m: query rows (times `heads`) of a program or of a step.
        block_n: keys of a step or of a program.
        warps, stages: warps of a program, depth of its pipeline of loads.
        heads: query heads of one kv head that a program takes together.
        splits: programs that share the keys of a block of rows.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    heads: int = 1
    splits: int = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """One call of attention.

    Attributes:
        batch, heads, kv_heads: B, H, G.
        rows, keys: T, S.
        head_dim, value_dim: d and the width of the values.
        itemsize: bytes of an element, 2 or 4.
        tf32: products of 32-bit numbers may be rounded to tf32.
        left, right, shift: the band of visible keys (above).
        score_bytes: bytes read per score, as for a bias or a mask of T x S.
        extra: the score does more than a mask by position: it reads, caps or drops.
    """

    batch: int
    heads: int
    kv_heads: int
    rows: int
    keys: int
    head_dim: int
    value_dim: int
    itemsize: int = 2
    tf32: bool = False
    left: int | None = None
    right: int | None = None
    shift: int = 0
    score_bytes: float = 0.0
    extra: bool = False

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def width(self) -> int:
        """The head dim that a kernel computes with, a power of two from 16."""
        return padded(self.head_dim)

    @property
    def value_width(self) -> int:
        return padded(self.value_dim)

    def bucketed(self) -> Problem:
        """The class of shapes it belongs to: what one choice is made for.

        Long lengths are rounded up to a power of two or one and a half of one, so that a length
        that grows by one each step meets a new class rarely. The band moves with its corner: a
        query at the end of the keys stays there.
        """
        rows, keys = bucket(self.rows), bucket(self.keys)
        shift = self.shift
        if self.left is not None or self.right is not None:
            corner = self.keys - self.rows
            shift = keys - rows if shift == corner else bucket(shift) if shift > 0 else shift
        left = None if self.left is None else bucket(self.left)
        right = None if self.right is None else bucket(self.right)
        return replace(self, rows=rows, keys=keys, shift=shift, left=left, right=right)


def padded(n: int) -> int:
    """The next power of two, at least 16."""
    return max(16, 1 << (n - 1).bit_length())


def bucket(n: int) -> int:
    """n up to 16, above it the next of 24, 32, 48, 64, 96, ..."""
    if n <= 16:
        return n
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if n <= power * 3 // 4 else power


Blocks = tuple[tuple[float, float], ...]


def blocks(problem: Problem, template: Template, tile: TileConfig) -> Blocks:
    """How many programs run over how many tiles: pairs (programs, tiles), the longest first.

    A program of `keys_and_values` visits the rows of every head of its group; a split one its share
    of the tiles, rounded up.
    """
    if template == "keys_and_values":
        size, step, packed = tile.block_n, tile.block_m, 1
        own, other = problem.keys, problem.rows
        # the same band, seen from the keys
        sides = problem.right, problem.left, -problem.shift
        repeat, each = problem.batch * problem.kv_heads, problem.group
    else:
        size, step, packed = tile.block_m, tile.block_n, tile.heads
        own, other = problem.rows, problem.keys
        sides = problem.left, problem.right, problem.shift
        repeat, each = problem.batch * problem.heads // packed * tile.splits, 1
    count = -(-own * packed // size)
    picked = min(count, _SAMPLES)
    found: dict[int, float] = {}
    for j in range(picked):
        block = (2 * j + 1) * count // (2 * picked)
        first, last = block * size // packed, ((block + 1) * size - 1) // packed
        tiles = _visited(first, min(last, own - 1), step, other, sides)
        tiles = -(-tiles // tile.splits) * each
        found[tiles] = found.get(tiles, 0.0) + count / picked * repeat
    return tuple((n, t) for t, n in sorted(found.items(), reverse=True))


def _visited(
    first: int, last: int, step: int, length: int, sides: tuple[int | None, int | None, int]
) -> int:
    left, right, shift = sides
    low = 0 if left is None else max(0, first + shift - left)
    high = length if right is None else min(length, last + shift + right + 1)
    return max(0, -(-high // step) - low // step) if high > low else 0


def visible(problem: Problem) -> float:
    """Scores of one head that the band lets through, nearly: by the middle rows of 32 parts."""
    picked = min(problem.rows, _SAMPLES)
    seen = 0
    for j in range(picked):
        row = (2 * j + 1) * problem.rows // (2 * picked)
        seen += _visited(row, row, 1, problem.keys, (problem.left, problem.right, problem.shift))
    return seen * problem.rows / picked
