"""Softmax over the last tokens and linear attention over all before them, under one denominator.

    out_i = (sum_near exp(s_ij) v_j + f_i sum_far g_j v_j) / (sum_near exp(s_ij) + f_i sum_far g_j)

    near: the last w keys up to the row's own;   far: those before, of which f_i reads sums alone

Linear attention is the strictly causal one over the keys that leave the window in each tile of rows
(`far_tiles`). Time and memory are linear in the length.

The denominator is one more channel of the values: [v, 1]; its gradient one more of the output's:
[dO, -dO.out]. B batch, G kv heads, R query heads of each, m tiles of C rows, F features.

Source: LoLCATs (arXiv 2410.10254), its sliding window beside linear attention; the tiles and the
derivatives are worked out here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_compiler.kernels.far_tiles import (
    INF,
    Band,
    NearAndFar,
    Tiles,
    add_rows,
    add_spans,
    leaving,
    of_tiles,
    spans,
)
from attn_compiler.kernels.frame import empty_heads, empty_lse, in_heads_layout

# ---------------------------------------------------------------- forward


def forward(call: NearAndFar) -> tuple[Tensor, Tensor]:
    """out [B, H, T, dv] and the logarithm of its denominator [B, H, T], -inf where it is 0."""
    dtype, shape = call.dtype, (*call.q.shape[:3], call.v.shape[3])
    out, lse = empty_heads(call.v, shape), empty_lse(call.q, dtype)
    if 0 in shape[:3]:
        return out.zero_(), lse.fill_(-INF)
    tiles = Tiles(call)
    state = tiles.state
    for band in tiles.bands:
        sums = tiles.sums(band)
        before, state = _exclusive(sums, state)
        f = tiles.rows(call.f, band)
        inner = tiles.masked(f @ leaving(tiles.g, band).mT, band)
        far = inner @ leaving(tiles.values, band) + f @ before
        mixed, total = _joined(tiles, band, far)
        rows = slice(band.rows.start, min(band.rows.stop, shape[2]))
        out[:, :, rows] = of_tiles(mixed, band, shape[2])
        lse[:, :, rows] = of_tiles(total, band, shape[2]).squeeze(-1)
    return out, lse


def _exclusive(sums: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each tile [B, G, m, F, n], and after the last."""
    summed = torch.empty_like(sums)
    for number in range(sums.shape[2]):  # a scan over this dimension is slow on a CPU
        summed[:, :, number] = state
        state = state + sums[:, :, number]
    return summed, state


def _joined(tiles: Tiles, band: Band, far: Tensor) -> tuple[Tensor, Tensor]:
    """What is near and what is far [B, G, m, R C, dv + 1] under one denominator, and its logarithm.

    Both are divided by the larger one, so that nothing overflows.
    """
    _, scores = tiles.scores(band)
    most = torch.maximum(scores.amax(-1, keepdim=True), far[..., -1:].log())
    nothing = most == -INF
    most = most.masked_fill_(nothing, 0.0)
    both = scores.sub_(most).exp_() @ spans(tiles.values, band)
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
        tiles = Tiles(call)
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


def _states(tiles: Tiles) -> Iterator[tuple[Band, Tensor]]:
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

    tiles: Tiles
    sums: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    wide: Tensor
    lse: Tensor

    def add(self, band: Band, before: Tensor, later: Tensor) -> Tensor:
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

    def _near(self, band: Band, wide: Tensor, lse: Tensor) -> None:
        tiles, (dq, dk, dv, _, _) = self.tiles, self.sums
        q, scores = tiles.scores(band)
        weights = scores.sub_(lse.masked_fill(lse == -INF, 0.0)).exp_()
        add_spans(dv, weights.mT @ wide[..., :-1], band)
        grads = (wide @ spans(tiles.values, band).mT).mul_(weights).mul_(tiles.call.scale)
        self._put(dq, grads @ spans(tiles.k, band), band)
        add_spans(dk, grads.mT @ q, band)

    def _far(
        self, band: Band, given: tuple[Tensor, Tensor], before: Tensor, later: Tensor
    ) -> Tensor:
        tiles, (_, _, dv, df, dg) = self.tiles, self.sums
        wide, inverse = given
        g, values = leaving(tiles.g, band), leaving(tiles.values, band)
        states, _ = _exclusive(tiles.sums(band), before)
        f = tiles.rows(tiles.call.f, band) * inverse
        grads = tiles.masked(wide @ values.mT, band)
        self._put(df, (grads @ g + wide @ states.mT) * inverse, band)
        # each tile's keys are read by its own rows, and through the state by those of later tiles
        after, later = _exclusive((f.mT @ wide).flip(2), later)
        after = after.flip(2)
        weights = tiles.masked(f @ g.mT, band)
        add_rows(dg, (grads.mT @ f + values @ after.mT).flatten(2, 3), band.first)
        more = weights.mT @ wide[..., :-1] + g @ after[..., :-1]
        add_rows(dv, more.flatten(2, 3), band.first)
        return later

    def _put(self, total: Tensor, part: Tensor, band: Band) -> None:
        rows = total.shape[2]
        stop = min(band.rows.stop, rows)
        total[:, :, band.rows.start : stop] = of_tiles(part, band, rows)
