"""Gradients of attention by generated Triton kernels.

prepare           delta = sum(g * out), which heads have rows without keys
queries           dq and the gradients of the score's tensors, a block of rows each
keys_and_values   dk and dv, a block of keys each
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    plan = frame.plan
    if plan.sink is not None and plan.program.sink is not None:
        # d sink = -p_sink * sum(g * out),  p_sink = exp(sink - lse)
        out, lse = (x.to(frame.dtype) for x in saved)
        whole = frame.grid.whole()
        tensors = frame.tensors(whole)
        share = torch.exp(frame.value(plan.sink, whole, tensors) - lse.unsqueeze(-1))
        delta = (grad.to(frame.dtype) * out).sum(-1, keepdim=True)
        pull_back(frame, whole, plan.sink, -share * delta, into, tensors)
    return dq, dk, dv


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
    """

    frame: Frame
    given: tuple[Tensor, Tensor, Tensor, Tensor]
    lse: Tensor
    wanted: Mapping[int, Tensor]
    rows: tuple[Tensor, Tensor, Tensor]
    dead: Tensor

    def module(self, tile: Tile, visits: Visits) -> Any:
        structure = structure_of(self.frame, tile, visits, tuple(self.wanted))
        return load("backward", backward_source(structure))

    def launch(
        self,
        name: str,
        tile: Tile,
        visited: Visited,
        blocks: tuple[int, int, int],
        tensors: Sequence[Tensor],
        rest: Sequence[Any],
    ) -> Launch:
        """A kernel over the grid; `rest` follows the arguments of the program."""
        grid, (q, k, v, g) = self.frame.grid, self.given
        over = (k, v, tile.keys) if name == "queries" else (q, g, tile.rows)
        tile, described = with_descriptors(tile, *over)
        strides = [n for x in self.given for n in x.stride()] + list(self.lse.stride())
        own = [n for x in tensors if x.dim() == 4 for n in x.stride()[:3]]
        constants = constants_of(self.frame.given, tile, g)
        del constants["HEADS"], constants["SPLITS"]
        return Launch(
            getattr(self.module(tile, visited.kind), name),
            blocks,
            (
                *(*self.given, self.lse, self.rows[0], *tensors, *described, *visited.args),
                *(*program_arguments(self.frame.given), *rest),
                *(*strides, *own, grid.B, grid.H, grid.T, grid.S, self.frame.given.scale),
            ),
            constants | {"num_warps": tile.warps, "num_stages": tile.stages},
        )


def prepare_backward(
    frame: Frame,
    grad: Tensor,
    saved: tuple[Tensor, Tensor],
    into: Mapping[int, Tensor],
    tiles: tuple[Tile, Tile],
    results: tuple[Tensor, Tensor, Tensor],
) -> list[Launch]:
    """The three kernels in the order they run."""
    grid, (out, lse), (dq, dk, dv) = frame.grid, saved, results
    q, k, v = frame.given.qkv
    delta, top, rest = (
        torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(3)
    )
    dead = torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device)
    wanted = {n: into[n] for n in sorted(into.keys() & frame.plan.score_slots)}
    call = _Call(frame, (q, k, v, grad), lse, wanted, (delta, top, rest), dead)
    by_key, by_row = tiles
    visited = keys_visited(frame, by_key)
    last = call.launch(
        "keys_and_values",
        by_key,
        visited,
        (-(-grid.S // by_key.keys), *folded(grid.B * k.shape[1])),
        (dead, top, rest, dk, dv),
        (),
    )
    first = call.launch(
        "queries",
        by_row,
        rows_visited(frame, by_row),
        (-(-grid.T // by_row.rows), *folded(grid.B * grid.H)),
        (top, rest, dq),
        [n for d in wanted.values() for n in (d, *d.stride(), *d.shape)],
    )
    every = constants_of(frame.given, by_key, grad, out)
    strides = [n for x in (out, grad, lse) for n in x.stride()]
    before = Launch(
        call.module(by_key, visited.kind).prepare,
        (-(-grid.T // _ROWS_OF_PREPARE), *folded(grid.B * grid.H)),
        (out, grad, lse, delta, dead, *strides, grid.H, grid.T),
        {"BLOCK_M": _ROWS_OF_PREPARE, "num_warps": 4}
        | {n: every[n] for n in ("DV", "BLOCK_DV", "INDEX")},
    )
    return [before, first, last]
