"""The tiles in which attention near and far is computed: which keys their rows see, and how.

    rows       0 1 2 | 3 4 5 | ...            C = 3, w = 4
    span       . . . 0 1 2 | 0 1 2 3 4 5 | ...
    leaving    . . . | 0 1 2 | 3 4 5

Rows go by tiles of C, tiles by bands whose scores stay near the processor. A tile of rows sees a
span of C + w - 1 keys by softmax; the first C of these leave the window within the tile.
B batch, G kv heads, R query heads of each, m tiles of a band.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from attn_compiler.kernels.frame import accumulator

INF = float("inf")
# rows of a tile, and scores that a band may hold at once, by device type
_LEAST_TILE, _MOST_TILE = 32, 128
_SCORES = {"cpu": 2**18}
_MANY_SCORES = 2**27


@dataclass(frozen=True, slots=True)
class NearAndFar:
    """One call.

    Attributes:
        q: [B, H, T, d]; the rows stand at the last T of the keys.
        k, v: [B, G, S, d] and [B, G, S, dv]; G divides H.
        f, g: features of queries [B, H, T, F] and of keys [B, G, S, F], none below 0.
        valid: [B, S] bool, False for keys that nobody sees; None for none.
        state: [B, G, F, dv + 1], the sum over earlier keys of g [v, 1]; None is 0.
        window: keys that a row sees by softmax, its own among them.
        scale: of q k^T.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    f: Tensor
    g: Tensor
    valid: Tensor | None
    state: Tensor | None
    window: int
    scale: float

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic."""
        return accumulator(self.q, self.k, self.v, self.f, self.g)

    @property
    def past(self) -> int:
        """Keys before the first row."""
        return self.k.shape[2] - self.q.shape[2]

    def problem(self) -> str:
        """Why the arguments do not belong together, "" if they do."""
        q, k, v, f, g = self.q, self.k, self.v, self.f, self.g
        if not q.dim() == k.dim() == v.dim() == f.dim() == g.dim() == 4:
            return "q, k, v, f and g have four dimensions: batch, heads, rows, features"
        if f.shape[:3] != q.shape[:3] or not g.shape[:3] == k.shape[:3] == v.shape[:3]:
            return "f has the rows of q; g and v those of k"
        if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or f.shape[3] != g.shape[3]:
            return "both sides share batch and features"
        if k.shape[1] == 0 or q.shape[1] % k.shape[1] or self.past < 0:
            return "kv heads divide query heads, and there are as many keys as rows or more"
        if self.window < 1:
            return "the window is at least 1"
        if self.valid is not None and self.valid.shape != (k.shape[0], k.shape[2]):
            return "valid is [batch, keys]"
        wanted = (*k.shape[:2], f.shape[3], v.shape[3] + 1)
        if self.state is not None and self.state.shape != wanted:
            return "the state is [batch, kv heads, features, value features + 1]"
        return ""


# ---------------------------------------------------------------- tiles


@dataclass(frozen=True, slots=True)
class Band:
    """Neighbouring tiles.

    Attributes:
        rows: of the call, some of the last perhaps beyond its end.
        tile: rows of a tile.
        count: tiles.
        width: of the window.
        first: the key that stands first in the span of the first tile; may lie before all keys.
    """

    rows: slice
    tile: int
    count: int
    width: int
    first: int

    @property
    def span(self) -> int:
        """Keys that the rows of a tile see by softmax."""
        return self.tile + self.width - 1

    @property
    def keys(self) -> tuple[int, int]:
        """Those that any of its rows sees so."""
        return self.first, self.first + self.tile * (self.count - 1) + self.span

    @property
    def leaving(self) -> tuple[int, int]:
        """Those that leave the window within it."""
        return self.first, self.first + self.tile * self.count


def rows_of_tile(window: int) -> int:
    """Of a call with more rows than that: a span is at least half of what a row sees."""
    return min(max(window, _LEAST_TILE), _MOST_TILE)


def bands(call: NearAndFar) -> list[Band]:
    batch, heads, rows, _ = call.q.shape
    # a window wider than all keys sees no more than all of them
    width = min(call.window, call.k.shape[2])
    tile = min(rows_of_tile(width), rows)
    most = _SCORES.get(call.q.device.type, _MANY_SCORES)
    step = max(1, most // (batch * heads * tile * (tile + width - 1)))
    tiles, found = -(-rows // tile), []
    for start in range(0, tiles, step):
        count, r0 = min(step, tiles - start), start * tile
        found.append(
            Band(slice(r0, r0 + count * tile), tile, count, width, call.past + r0 - width + 1)
        )
    return found


def cut(x: Tensor, low: int, high: int) -> Tensor:
    """Rows low to high of [B, heads, n, ...], zeros where there are none."""
    n = x.shape[2]
    inner = x[:, :, max(0, low) : max(0, min(n, high))]
    before = min(max(0, -low), high - low)
    after = high - low - before - inner.shape[2]
    return pad(inner, (0, 0, before, after)) if before or after else inner


def in_tiles(x: Tensor, band: Band, groups: int) -> Tensor:
    """Rows [B, H, T, n] of a band as [B, G, m, R C, n]."""
    whole = cut(x, band.rows.start, band.rows.stop)
    apart: Tensor = whole.unflatten(1, (groups, -1)).unflatten(3, (band.count, band.tile))
    return apart.transpose(2, 3).flatten(3, 4)


def of_tiles(x: Tensor, band: Band, rows: int) -> Tensor:
    """The inverse, without the rows beyond the end."""
    apart: Tensor = x.unflatten(3, (-1, band.tile)).transpose(2, 3)
    return apart.flatten(3, 4).flatten(1, 2)[:, :, : rows - band.rows.start]


def spans(x: Tensor, band: Band) -> Tensor:
    """What the tiles of a band see of keys or values [B, G, S, n]: [B, G, m, span, n], a view."""
    return cut(x, *band.keys).unfold(2, band.span, band.tile).transpose(3, 4)


def leaving(x: Tensor, band: Band) -> Tensor:
    """What leaves the window within the tiles: [B, G, m, C, n]."""
    found: Tensor = cut(x, *band.leaving).unflatten(2, (band.count, band.tile))
    return found


def add_spans(total: Tensor, parts: Tensor, band: Band) -> None:
    """Add what tiles [B, G, m, span, n] have for keys that they share to [B, G, S, n]."""
    blocks = -(-band.span // band.tile)
    wide = pad(parts, (0, 0, 0, blocks * band.tile - band.span)).unflatten(3, (blocks, band.tile))
    shape = (*parts.shape[:2], band.count + blocks - 1, *wide.shape[4:])
    summed = parts.new_zeros(shape)
    for block in range(blocks):
        summed[:, :, block : block + band.count] += wide[:, :, :, block]
    add_rows(total, summed.flatten(2, 3)[:, :, : band.keys[1] - band.keys[0]], band.first)


def add_rows(total: Tensor, part: Tensor, first: int) -> None:
    """Add rows that stand from `first` on, those that there are."""
    start, stop = max(0, -first), min(part.shape[2], total.shape[2] - first)
    if start < stop:
        total[:, :, first + start : first + stop] += part[:, :, start:stop]


class Tiles:
    """A call in the dtype of its arithmetic, band by band."""

    def __init__(self, call: NearAndFar) -> None:
        self.call, self.bands = call, bands(call)
        self.groups, dtype = call.k.shape[1], call.dtype
        self.k, self.values = call.k.to(dtype), pad(call.v.to(dtype), (0, 1), value=1.0)
        self.g = call.g.to(dtype)
        ones = torch.ones(call.k.shape[0], 1, call.k.shape[2], 1, dtype=torch.bool)
        counted = ones.to(call.k.device) if call.valid is None else call.valid[:, None, :, None]
        self.counted = counted
        if call.valid is not None:
            self.g = self.g * counted
        self.early = max(0, self.bands[0].first)
        found = self.g[:, :, : self.early].mT @ self.values[:, :, : self.early]
        self.state = found if call.state is None else found + call.state.to(dtype)

    def rows(self, x: Tensor, band: Band) -> Tensor:
        # a band at a time: who casts all rows in every band is no longer linear
        return in_tiles(x, band, self.groups).to(self.call.dtype)

    def scores(self, band: Band) -> tuple[Tensor, Tensor]:
        """Queries and their scores [B, G, m, R C, span], -inf where a key is not near."""
        q = self.rows(self.call.q, band)
        scores = (q @ spans(self.k, band).mT).mul_(self.call.scale)
        index = torch.arange(band.span, device=q.device)
        row = torch.arange(band.tile, device=q.device)[:, None]
        near = (index >= row) & (index < row + band.width)
        seen = near & spans(self.counted, band).mT  # [B, 1, m, C, span]
        apart = scores.unflatten(3, (-1, band.tile))
        return q, apart.masked_fill_(~seen.unsqueeze(3), -INF).flatten(3, 4)

    def late(self, band: Band, device: torch.device) -> Tensor:
        """Which keys have left the window before which rows of a tile: [C, C]."""
        return torch.ones(band.tile, band.tile, dtype=torch.bool, device=device).tril(-1)

    def masked(self, x: Tensor, band: Band) -> Tensor:
        """Rows against leaving keys [B, G, m, R C, C], 0 where a key is still near."""
        apart: Tensor = x.unflatten(3, (-1, band.tile))
        return (apart * self.late(band, x.device)).flatten(3, 4)

    def sums(self, band: Band) -> Tensor:
        """What each tile adds to the state: [B, G, m, F, dv + 1]."""
        return leaving(self.g, band).mT @ leaving(self.values, band)
