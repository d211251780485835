"""Gradients of attention by generated Triton kernels.

prepare           delta = sum(g * out), which heads have rows without keys
queries           dq and the gradients of the score's tensors, a block of rows each
keys_and_values   dk and dv, a block of keys each
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_compiler.kernels.frame import Frame, empty_heads
from attn_compiler.kernels.launch import (
    Launch,
    Tile,
    Visited,
    constants_of,
    folded,
    keys_visited,
    made_arguments,
    program_arguments,
    rows_visited,
    structure_of,
    with_descriptors,
)
from attn_compiler.kernels.rows import pull_back
from attn_compiler.kernels.template import load
from attn_compiler.kernels.triton_source import Visits, backward_source

_ROWS_OF_PREPARE = 64


def backward(
    frame: Frame,
    grad: Tensor,
    saved: tuple[Tensor, Tensor],
    into: Mapping[int, Tensor],
    tiles: tuple[Tile, Tile],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; those of the reads are added to `into` (float32), by slot.

    Args:
        frame: the call.
        grad: the gradient of out.
        saved: out and lse.
        into: where gradients of reads go.
        tiles: of the kernel that runs over rows for a block of keys, and of its opposite.
    """
    dq, dk, dv = (empty_heads(x, x.shape) for x in frame.given.qkv)
    for launch in prepare_backward(frame, grad, saved, into, tiles, (dq, dk, dv)):
        launch.run()
    _of_the_sink(frame, grad, saved, into)
    return dq, dk, dv


def backward_by_bands(
    frame: Frame,
    grad: Tensor,
    saved: tuple[Tensor, Tensor],
    into: Mapping[int, Tensor],
    tiles: tuple[Tile, Tile],
    rows: int,
    take: Callable[[int, Tensor], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same where F of Selective attention is made inside.

    Args:
        rows: of a band, a multiple of those of both tiles.
        take: is given the first row of a band and the gradient of what was subtracted in it,
            [B, rows, S] float32, which it may change; the last band comes first.
    """
    made, grid = frame.made, frame.grid
    assert made is not None
    dq, dk, dv = (empty_heads(x, x.shape) for x in frame.given.qkv)
    call = _Call.of(frame, grad, saved[1], {**into, made.slot: dq}, tiles)
    call.before(saved[0]).run()
    for first in reversed(range(0, grid.T, rows)):
        held = min(rows, grid.T - first)
        band = frame.given.q.new_zeros((grid.B, held, grid.S), dtype=torch.float32)
        call.wanted[made.slot] = band
        call.queries(dq, (first, first + held)).run()
        take(first, band)
    call.keys_and_values(dk, dv).run()
    _of_the_sink(frame, grad, saved, into)
    return dq, dk, dv


def _of_the_sink(
    frame: Frame, grad: Tensor, saved: tuple[Tensor, Tensor], into: Mapping[int, Tensor]
) -> None:
    """d sink = -p_sink * sum(g * out),  p_sink = exp(sink - lse)"""
    plan = frame.plan
    if plan.sink is None or plan.program.sink is None:
        return
    out, lse = (x.to(frame.dtype) for x in saved)
    whole = frame.grid.whole()
    tensors = frame.tensors(whole)
    share = torch.exp(frame.value(plan.sink, whole, tensors) - lse.unsqueeze(-1))
    delta = (grad.to(frame.dtype) * out).sum(-1, keepdim=True)
    pull_back(frame, whole, plan.sink, -share * delta, into, tensors)


def prepare_backward(
    frame: Frame,
    grad: Tensor,
    saved: tuple[Tensor, Tensor],
    into: Mapping[int, Tensor],
    tiles: tuple[Tile, Tile],
    results: tuple[Tensor, Tensor, Tensor],
) -> list[Launch]:
    """The three kernels in the order they run."""
    call, (dq, dk, dv) = _Call.of(frame, grad, saved[1], into, tiles), results
    return [call.before(saved[0]), call.queries(dq), call.keys_and_values(dk, dv)]


@dataclass(frozen=True, slots=True)
class _Call:
    """What the kernels of one backward share.

    Attributes:
        frame: the call.
        given: q, k, v and the gradient of out.
        lse: of the forward.
        wanted: where gradients of the score's reads go, by slot.
        rows: delta, and for scores that may be huge the two parts of a precise lse; [B, H, T] each.
        dead: per head how many rows have no key.
        tiles: see `backward`.
    """

    frame: Frame
    given: tuple[Tensor, Tensor, Tensor, Tensor]
    lse: Tensor
    wanted: dict[int, Tensor]
    rows: tuple[Tensor, Tensor, Tensor]
    dead: Tensor
    tiles: tuple[Tile, Tile]

    @staticmethod
    def of(
        frame: Frame,
        grad: Tensor,
        lse: Tensor,
        into: Mapping[int, Tensor],
        tiles: tuple[Tile, Tile],
    ) -> _Call:
        q, k, v = frame.given.qkv
        delta, top, rest = (
            torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(3)
        )
        dead = torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device)
        wanted = {n: into[n] for n in sorted(into.keys() & frame.plan.score_slots)}
        return _Call(frame, (q, k, v, grad), lse, wanted, (delta, top, rest), dead, tiles)

    def before(self, out: Tensor) -> Launch:
        frame, tile, (_, _, _, grad) = self.frame, self.tiles[0], self.given
        every = constants_of(frame.given, tile, grad, out, made=frame.made)
        strides = [n for x in (out, grad, self.lse) for n in x.stride()]
        sizes = frame.grid.H, frame.grid.T
        return Launch(
            self._module(tile, keys_visited(frame, tile).kind).prepare,
            (-(-frame.grid.T // _ROWS_OF_PREPARE), *folded(frame.grid.B * frame.grid.H)),
            (out, grad, self.lse, self.rows[0], self.dead, *strides, *sizes),
            {"BLOCK_M": _ROWS_OF_PREPARE, "num_warps": 4}
            | {n: every[n] for n in ("DV", "BLOCK_DV", "INDEX")},
        )

    def queries(self, dq: Tensor, band: tuple[int, int] | None = None) -> Launch:
        """Of all rows, or of whole blocks of them."""
        frame, tile, grid = self.frame, self.tiles[1], self.frame.grid
        first, end = band or (0, grid.T)
        blocks = first // tile.rows, -(-end // tile.rows)
        rest = [n for d in self.wanted.values() for n in (d, *d.stride(), *d.shape)]
        return self._launch(
            "queries",
            tile,
            rows_visited(frame, tile, None if band is None else blocks),
            (blocks[1] - blocks[0], *folded(grid.B * grid.H)),
            (*self.rows[1:], dq),
            rest + ([] if frame.made is None else [blocks[0]]),
        )

    def keys_and_values(self, dk: Tensor, dv: Tensor) -> Launch:
        frame, tile, grid = self.frame, self.tiles[0], self.frame.grid
        return self._launch(
            "keys_and_values",
            tile,
            keys_visited(frame, tile),
            (-(-grid.S // tile.keys), *folded(grid.B * self.given[1].shape[1])),
            (self.dead, *self.rows[1:], dk, dv),
            (),
        )

    def _module(self, tile: Tile, visits: Visits) -> Any:
        structure = structure_of(self.frame, tile, visits, tuple(self.wanted))
        return load("backward", backward_source(structure))

    def _launch(
        self,
        name: str,
        tile: Tile,
        visited: Visited,
        blocks: tuple[int, int, int],
        tensors: Sequence[Tensor],
        rest: Sequence[Any],
    ) -> Launch:
        """A kernel over the grid; `rest` follows the arguments of the program."""
        frame, grid, (q, k, v, g) = self.frame, self.frame.grid, self.given
        over = (k, v, tile.keys) if name == "queries" else (q, g, tile.rows)
        tile, described = with_descriptors(tile, *over)
        strides = [n for x in self.given for n in x.stride()] + list(self.lse.stride())
        own = [n for x in tensors if x.dim() == 4 for n in x.stride()[:3]]
        constants = constants_of(frame.given, tile, g, made=frame.made)
        del constants["HEADS"], constants["SPLITS"]
        return Launch(
            getattr(self._module(tile, visited.kind), name),
            blocks,
            (
                *(*self.given, self.lse, self.rows[0], *tensors, *described, *visited.args),
                *(*made_arguments(frame), *program_arguments(frame.given), *rest),
                *(*strides, *own, grid.B, grid.H, grid.T, grid.S, frame.given.scale),
            ),
            constants | {"num_warps": tile.warps, "num_stages": tile.stages},
        )
