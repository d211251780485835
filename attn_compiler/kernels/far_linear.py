"""Softmax over the last tokens and linear attention over all before them, under one denominator.

    out_i = (sum_near exp(s_ij) v_j + f_i sum_far g_j v_j) / (sum_near exp(s_ij) + f_i sum_far g_j)

    near: the last w keys up to the row's own;   far: those before, of which f_i reads sums alone

Rows go by tiles of C, tiles by bands whose scores stay near the processor. A tile of rows sees a
span of C + w - 1 keys; the first C of these leave the window within the tile, so that linear
attention is the strictly causal one over late keys. Time and memory are linear in the length.

    rows       0 1 2 | 3 4 5 | ...            C = 3, w = 4
    span       . . . 0 1 2 | 0 1 2 3 4 5 | ...
    leaving    . . . | 0 1 2 | 3 4 5

The denominator is one more channel of the values: [v, 1]; its gradient one more of the output's:
[dO, -dO.out]. B batch, G kv heads, R query heads of each, m tiles of a band, F features.

Source: LoLCATs (arXiv 2410.10254), its sliding window beside linear attention; the tiles and the
derivatives are worked out here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from attn_compiler.kernels.frame import accumulator, empty_heads, empty_lse, in_heads_layout

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
class _Band:
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


def _bands(call: NearAndFar) -> list[_Band]:
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
            _Band(slice(r0, r0 + count * tile), tile, count, width, call.past + r0 - width + 1)
        )
    return found


def _cut(x: Tensor, low: int, high: int) -> Tensor:
    """Rows low to high of [B, heads, n, ...], zeros where there are none."""
    n = x.shape[2]
    inner = x[:, :, max(0, low) : max(0, min(n, high))]
    before = min(max(0, -low), high - low)
    after = high - low - before - inner.shape[2]
    return pad(inner, (0, 0, before, after)) if before or after else inner


def _in_tiles(x: Tensor, band: _Band, groups: int) -> Tensor:
    """Rows [B, H, T, n] of a band as [B, G, m, R C, n]."""
    cut = _cut(x, band.rows.start, band.rows.stop)
    apart: Tensor = cut.unflatten(1, (groups, -1)).unflatten(3, (band.count, band.tile))
    return apart.transpose(2, 3).flatten(3, 4)


def _of_tiles(x: Tensor, band: _Band, rows: int) -> Tensor:
    """The inverse, without the rows beyond the end."""
    apart: Tensor = x.unflatten(3, (-1, band.tile)).transpose(2, 3)
    return apart.flatten(3, 4).flatten(1, 2)[:, :, : rows - band.rows.start]


def _spans(x: Tensor, band: _Band) -> Tensor:
    """What the tiles of a band see of keys or values [B, G, S, n]: [B, G, m, span, n], a view."""
    return _cut(x, *band.keys).unfold(2, band.span, band.tile).transpose(3, 4)


def _leaving(x: Tensor, band: _Band) -> Tensor:
    """What leaves the window within the tiles: [B, G, m, C, n]."""
    cut: Tensor = _cut(x, *band.leaving).unflatten(2, (band.count, band.tile))
    return cut


def _add_spans(total: Tensor, parts: Tensor, band: _Band) -> None:
    """Add what tiles [B, G, m, span, n] have for keys that they share to [B, G, S, n]."""
    blocks = -(-band.span // band.tile)
    wide = pad(parts, (0, 0, 0, blocks * band.tile - band.span)).unflatten(3, (blocks, band.tile))
    shape = (*parts.shape[:2], band.count + blocks - 1, *wide.shape[4:])
    summed = parts.new_zeros(shape)
    for block in range(blocks):
        summed[:, :, block : block + band.count] += wide[:, :, :, block]
    _add(total, summed.flatten(2, 3)[:, :, : band.keys[1] - band.keys[0]], band.first)


def _add(total: Tensor, part: Tensor, first: int) -> None:
    """Add rows that stand from `first` on, those that there are."""
    start, stop = max(0, -first), min(part.shape[2], total.shape[2] - first)
    if start < stop:
        total[:, :, first + start : first + stop] += part[:, :, start:stop]


class _Tiles:
    """A call in the dtype of its arithmetic, band by band."""

    def __init__(self, call: NearAndFar) -> None:
        self.call, self.bands = call, _bands(call)
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

    def rows(self, x: Tensor, band: _Band) -> Tensor:
        return _in_tiles(x.to(self.call.dtype), band, self.groups)

    def scores(self, band: _Band) -> tuple[Tensor, Tensor]:
        """Queries and their scores [B, G, m, R C, span], -inf where a key is not near."""
        q = self.rows(self.call.q, band)
        scores = (q @ _spans(self.k, band).mT).mul_(self.call.scale)
        index = torch.arange(band.span, device=q.device)
        row = torch.arange(band.tile, device=q.device)[:, None]
        near = (index >= row) & (index < row + band.width)
        seen = near & _spans(self.counted, band).mT  # [B, 1, m, C, span]
        apart = scores.unflatten(3, (-1, band.tile))
        return q, apart.masked_fill_(~seen.unsqueeze(3), -INF).flatten(3, 4)

    def late(self, band: _Band, device: torch.device) -> Tensor:
        """Which keys have left the window before which rows of a tile: [C, C]."""
        return torch.ones(band.tile, band.tile, dtype=torch.bool, device=device).tril(-1)

    def masked(self, x: Tensor, band: _Band) -> Tensor:
        """Rows against leaving keys [B, G, m, R C, C], 0 where a key is still near."""
        apart: Tensor = x.unflatten(3, (-1, band.tile))
        return (apart * self.late(band, x.device)).flatten(3, 4)

    def sums(self, band: _Band) -> Tensor:
        """What each tile adds to the state: [B, G, m, F, dv + 1]."""
        return _leaving(self.g, band).mT @ _leaving(self.values, band)


# ---------------------------------------------------------------- forward


def forward(call: NearAndFar) -> tuple[Tensor, Tensor]:
    """out [B, H, T, dv] and the logarithm of its denominator [B, H, T], -inf where it is 0."""
    dtype, shape = call.dtype, (*call.q.shape[:3], call.v.shape[3])
    out, lse = empty_heads(call.v, shape), empty_lse(call.q, dtype)
    if 0 in shape[:3]:
        return out.zero_(), lse.fill_(-INF)
    tiles = _Tiles(call)
    state = tiles.state
    for band in tiles.bands:
        sums = tiles.sums(band)
        before, state = _exclusive(sums, state)
        f = tiles.rows(call.f, band)
        inner = tiles.masked(f @ _leaving(tiles.g, band).mT, band)
        far = inner @ _leaving(tiles.values, band) + f @ before
        mixed, total = _joined(tiles, band, far)
        rows = slice(band.rows.start, min(band.rows.stop, shape[2]))
        out[:, :, rows] = _of_tiles(mixed, band, shape[2])
        lse[:, :, rows] = _of_tiles(total, band, shape[2]).squeeze(-1)
    return out, lse


def _exclusive(sums: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each tile [B, G, m, F, n], and after the last."""
    summed = torch.empty_like(sums)
    for number in range(sums.shape[2]):  # a scan over this dimension is slow on a CPU
        summed[:, :, number] = state
        state = state + sums[:, :, number]
    return summed, state


def _joined(tiles: _Tiles, band: _Band, far: Tensor) -> tuple[Tensor, Tensor]:
    """What is near and what is far [B, G, m, R C, dv + 1] under one denominator, and its logarithm.

    Both are divided by the larger one, so that nothing overflows.
    """
    _, scores = tiles.scores(band)
    most = torch.maximum(scores.amax(-1, keepdim=True), far[..., -1:].log())
    nothing = most == -INF
    most = most.masked_fill_(nothing, 0.0)
    both = scores.sub_(most).exp_() @ _spans(tiles.values, band)
    both += far * _inverse(most)
    total = both[..., -1:].masked_fill(nothing, 1.0)
    return both[..., :-1] / total, (total.log() + most).masked_fill_(nothing, -INF)


def _inverse(lse: Tensor) -> Tensor:
    """1 over the denominator, 0 where there is none. It is bounded: beside a far part of 0 the
    denominator may be as small as it likes.
    """
    most = torch.finfo(lse.dtype).max ** 0.5
    return (-lse).exp().clamp(max=most).masked_fill(lse == -INF, 0.0)


# ---------------------------------------------------------------- backward


@dataclass(frozen=True, slots=True)
class Gradients:
    """Of the tensors of a call that have one."""

    q: Tensor
    k: Tensor
    v: Tensor
    f: Tensor
    g: Tensor
    state: Tensor


def backward(call: NearAndFar, grad_out: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    """Gradients of `forward` in the dtypes of its arguments; scores are computed again."""
    dtype = call.dtype
    tensors = (call.q, call.k, call.v, call.f, call.g)
    dq, dk, dv, df, dg = (empty_heads(x, x.shape, dtype).zero_() for x in tensors)
    shape = (*call.k.shape[:2], call.f.shape[3], call.v.shape[3] + 1)
    later = call.k.new_zeros(shape, dtype=dtype)
    if 0 not in call.q.shape[:3]:
        tiles = _Tiles(call)
        grad = grad_out.to(dtype)
        wide = torch.cat((grad, -(grad * out.to(dtype)).sum(-1, keepdim=True)), -1)
        found = _Gradient(tiles, (dq, dk, dv, df, dg), wide, lse.to(dtype))
        for band, before in reversed(list(_states(tiles))):
            later = found.add(band, before, later)
        first = slice(0, tiles.early)
        dg[:, :, first] += tiles.values[:, :, first] @ later.mT
        dv[:, :, first] += tiles.g[:, :, first] @ later[..., :-1]
        dg *= tiles.counted
    pairs = zip((dq, dk, dv, df, dg), tensors, strict=True)
    dq, dk, dv, df, dg = (in_heads_layout(grad, x.dtype) for grad, x in pairs)
    return Gradients(dq, dk, dv, df, dg, later)


def _states(tiles: _Tiles) -> Iterator[tuple[_Band, Tensor]]:
    """Bands with the state before them."""
    state = tiles.state
    for band in tiles.bands:
        yield band, state
        state = state + tiles.sums(band).sum(2)


@dataclass(frozen=True, slots=True)
class _Gradient:
    """Gradients while they are summed up.

    Attributes:
        tiles: the call.
        sums: of q, k, v, f and g.
        wide: [B, H, T, dv + 1], see the file.
        lse: [B, H, T].
    """

    tiles: _Tiles
    sums: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    wide: Tensor
    lse: Tensor

    def add(self, band: _Band, before: Tensor, later: Tensor) -> Tensor:
        """Add those of a band.

        Args:
            before: the state before it, [B, G, F, dv + 1].
            later: the gradient of the state after it.

        Returns:
            The gradient of the state before it.
        """
        lse = self.tiles.rows(self.lse.unsqueeze(-1), band)
        # rows beyond the end have no gradient: theirs are zeros
        wide = self.tiles.rows(self.wide, band)
        self._near(band, wide, lse)
        return self._far(band, (wide, _inverse(lse)), before, later)

    def _near(self, band: _Band, wide: Tensor, lse: Tensor) -> None:
        tiles, (dq, dk, dv, _, _) = self.tiles, self.sums
        q, scores = tiles.scores(band)
        weights = scores.sub_(lse.masked_fill(lse == -INF, 0.0)).exp_()
        _add_spans(dv, weights.mT @ wide[..., :-1], band)
        grads = (wide @ _spans(tiles.values, band).mT).mul_(weights).mul_(tiles.call.scale)
        self._put(dq, grads @ _spans(tiles.k, band), band)
        _add_spans(dk, grads.mT @ q, band)

    def _far(
        self, band: _Band, given: tuple[Tensor, Tensor], before: Tensor, later: Tensor
    ) -> Tensor:
        tiles, (_, _, dv, df, dg) = self.tiles, self.sums
        wide, inverse = given
        g, values = _leaving(tiles.g, band), _leaving(tiles.values, band)
        states, _ = _exclusive(tiles.sums(band), before)
        f = tiles.rows(tiles.call.f, band) * inverse
        grads = tiles.masked(wide @ values.mT, band)
        self._put(df, (grads @ g + wide @ states.mT) * inverse, band)
        # each tile's keys are read by its own rows, and through the state by those of later tiles
        after, later = _exclusive((f.mT @ wide).flip(2), later)
        after = after.flip(2)
        weights = tiles.masked(f @ g.mT, band)
        _add(dg, (grads.mT @ f + values @ after.mT).flatten(2, 3), band.first)
        more = weights.mT @ wide[..., :-1] + g @ after[..., :-1]
        _add(dv, more.flatten(2, 3), band.first)
        return later

    def _put(self, total: Tensor, part: Tensor, band: _Band) -> None:
        rows = total.shape[2]
        stop = min(band.rows.stop, rows)
        total[:, :, band.rows.start : stop] = _of_tiles(part, band, rows)
