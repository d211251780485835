"""Attention by generated Triton kernels: any program, on a GPU (or in Triton's interpreter).

    out, lse = forward(frame, tile)

A short query shares its keys among the heads of a group and, where that leaves the device idle,
among several programs: each takes a part of the keys, `combine` joins what they found.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_compiler.ir.expr import Call, walk
from attn_compiler.ir.score import Program
from attn_compiler.kernels.frame import Frame, Inputs, empty_heads, empty_lse
from attn_compiler.kernels.launch import (
    Launch,
    Tile,
    constants_of,
    folded,
    made_arguments,
    power,
    program_arguments,
    rows_visited,
    structure_of,
    with_descriptors,
)
from attn_compiler.kernels.template import load
from attn_compiler.kernels.triton_source import combine_source, forward_source, of_empty_rows
from attn_compiler.kernels.triton_text import UNPRINTABLE

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256


def refusal(given: Inputs) -> str:
    """Why no kernel can be generated for this call; empty if one can."""
    dtypes = {x.dtype for x in given.qkv}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        return f"q, k and v are {', '.join(sorted(str(d) for d in dtypes))}"
    if max(given.q.shape[3], given.v.shape[3]) > WIDEST:
        return f"head dim {max(given.q.shape[3], given.v.shape[3])} is above {WIDEST}"
    if any(read.dtype is torch.float64 or read.is_complex() for read in given.reads):
        return "the program reads a tensor in double"
    program = Program.parse(given.program)
    if not all(folded(given.q.shape[0] * x.shape[1])[0] for x in given.qkv):
        return "so many pairs of batch item and head that no launch has a place for each"
    missing = untold(program)
    if missing:
        return f"no Triton for {', '.join(missing)}"
    return ""


def untold(program: Program) -> list[str]:
    """Operations of a program that Triton has no text for."""
    return sorted(_operations(program) & UNPRINTABLE)


def _operations(program: Program) -> set[str]:
    parts = [program.score, program.mask, *([program.sink] if program.sink is not None else [])]
    return {n.op for part in parts for n in walk(part) if isinstance(n, Call)}


# ---------------------------------------------------------------- launch


def forward(frame: Frame, tile: Tile) -> tuple[Tensor, Tensor]:
    """out [B, H, T, dv] and lse [B, H, T] in the layout of `empty_heads`."""
    given, q, v = frame.given, frame.given.q, frame.given.v
    out = empty_heads(v, (*q.shape[:3], v.shape[3]))
    lse = empty_lse(q, torch.float32)
    part, part_lse = out[None], lse[None]
    if tile.splits > 1:
        part = torch.empty((tile.splits, *out.shape), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((tile.splits, *lse.shape), dtype=torch.float32, device=q.device)
    prepare(frame, tile, part, part_lse).run()
    if tile.splits > 1:
        _combine(part, part_lse, out, lse, given)
    return out, lse


def prepare(frame: Frame, tile: Tile, part: Tensor, part_lse: Tensor) -> Launch:
    """The forward kernel of a call; its results are [splits, B, H, T, dv] and [splits, B, H, T]."""
    given, grid = frame.given, frame.grid
    q, k, v = given.qkv
    visited = rows_visited(frame, tile)
    pairs, folds = folded(grid.B * grid.H // tile.heads)
    tile, described = with_descriptors(tile, k, v, tile.keys)
    strides = [n for x in given.qkv for n in x.stride()]
    strides += [*part.stride()[:4], *part_lse.stride()]
    sizes = (grid.B, grid.H, grid.T, grid.S)
    return Launch(
        load("forward", forward_source(structure_of(frame, tile, visited.kind))).forward,
        (-(-grid.T * tile.heads // tile.rows), pairs, max(folds, tile.splits)),
        (
            *(q, k, v, part, part_lse, *described, *visited.args, *made_arguments(frame)),
            *(*program_arguments(given), *strides, *sizes, given.scale),
        ),
        constants_of(given, tile, made=frame.made)
        | {"num_warps": tile.warps, "num_stages": tile.stages},
    )


def _combine(part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, given: Inputs) -> None:
    batch, heads, rows, width = out.shape
    strides = (*part.stride()[:4], *part_lse.stride(), *out.stride()[:3], *lse.stride())
    constants = {
        "SPLITS": part.shape[0],
        "DV": width,
        "BLOCK_DV": power(width),
        "BLOCK_SPLITS": power(part.shape[0]),
        "EMPTY": of_empty_rows(Program.parse(given.program)),
        "num_warps": 4,
    }
    kernel = load("combine", combine_source()).combine
    args = (part, part_lse, out, lse, *strides, heads)
    Launch(kernel, (rows, batch * heads, 1), args, constants).run()
