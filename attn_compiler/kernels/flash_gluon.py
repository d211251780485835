"""A forward kernel for Hopper in Gluon: one warp fetches tiles, two groups of warps take turns.

    out, lse = forward(frame, tile)

It computes what `flash_triton` does, for the programs that read no tensors. It is for devices of
compute capability 9.0, and runs only where it was measured to be the fastest (`kernels.measure`).

The scheme is that of FlashAttention-3 (Shah et al. 2024, sections 3.1 and 3.2): the products of one
group run beside the exponentials of the other, and inside of a group the scores of a tile beside
the values of the one before. How the three wait for each other is written in the template.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attn_compiler.ir.expr import DOT, TRUE
from attn_compiler.ir.mask import Mask
from attn_compiler.ir.mask import Tile as Tiling
from attn_compiler.ir.score import Program
from attn_compiler.kernels import flash_triton
from attn_compiler.kernels.frame import Frame, Inputs, empty_heads, empty_lse
from attn_compiler.kernels.grid import Grid
from attn_compiler.kernels.launch import Launch, Tile, folded, power, rows_visited, structure_of
from attn_compiler.kernels.plan import plan
from attn_compiler.kernels.template import load, render
from attn_compiler.kernels.triton_source import Structure, keep
from attn_compiler.kernels.triton_text import Lines

_DTYPES = (torch.float16, torch.bfloat16)
# the least width of a tile: rows of 128 bytes, as the copies interleave them
_NARROWEST = 64
# what a copy engine wants of an address and of a stride
_ALIGNMENT = 16
# by width: rows, keys, warps, stages; its numbers are tested with them
_TILES = {64: Tile(128, 128, 4, 2), 128: Tile(128, 128, 4, 2), 256: Tile(128, 64, 4, 2)}
# where so few rows share no key that is looked at, some row is taken to have none
_FEW_ROWS = 16


def refusal(given: Inputs) -> str:
    """Why this kernel cannot be generated for this call; empty if it can."""
    reason = flash_triton.refusal(given)
    if reason:
        return reason
    if given.q.dtype not in _DTYPES:
        return f"{given.q.dtype} numbers"
    if given.reads:
        return "the program reads a tensor"
    if given.drop.rate:
        return "dropout"
    program = Program.parse(given.program)
    if program.sink is not None:
        return "a sink"
    if program.empty in ("uniform", "absorbed") and not _rows_see_keys(_grid(given)):
        return "a row without keys takes the mean of all values"
    if program.score == DOT and not given.scale > 0:
        return f"the scale {given.scale} is not positive"
    if folded(given.q.shape[0] * given.q.shape[1])[1] != 1:
        return "so many pairs of batch item and head that one axis of a launch does not hold them"
    width, value_width = _width(given.q), _width(given.v)
    if width != value_width:
        return f"head dims {given.q.shape[3]} and {given.v.shape[3]} need tiles of different width"
    names = zip("qkv", given.qkv, strict=True)
    return next((f"{name}: {why}" for name, x in names if (why := _uncopyable(x))), "")


def usual_tile(given: Inputs) -> Tile:
    """The tile of a call."""
    return _TILES[_width(given.q)]


def _grid(given: Inputs) -> Grid:
    batch, heads, rows, _ = given.q.shape
    return Grid(given.program, batch, heads, rows, given.k.shape[2], tuple(given.ints))


@lru_cache(maxsize=256)
def _rows_see_keys(grid: Grid) -> bool:
    """Is it certain that every row may see some key? A key is sought that many rows see at once."""
    known = plan(grid.program)
    if known.loose != TRUE:
        return False
    stack = [(0, grid.T)]
    while stack:
        first, last = stack.pop()
        if _share_a_key(known.structural, grid, (first, last)):
            continue
        if last - first <= _FEW_ROWS:
            return False
        middle = (first + last) // 2
        stack += [(middle, last), (first, middle)]
    return True


def _share_a_key(mask: Mask, grid: Grid, rows: tuple[int, int]) -> bool:
    lo, hi = mask.key_range(rows, grid.sizes, grid.ints)
    return any(
        mask.tile(rows, (k, k + 1), grid.sizes, grid.ints) is Tiling.FULL
        for k in sorted({lo, (lo + hi) // 2, hi - 1})
    )


def _uncopyable(x: Tensor) -> str:
    """What the copy engine does not take about a tensor."""
    if x.numel() == 0:
        return "no elements"
    unit = x.element_size()
    if x.data_ptr() % _ALIGNMENT:
        return f"its address is no multiple of {_ALIGNMENT} bytes"
    if x.shape[3] * unit % _ALIGNMENT:
        return f"a head dim of {x.shape[3]} is no multiple of {_ALIGNMENT} bytes"
    for n, stride in zip(x.shape[:3], x.stride()[:3], strict=True):
        if n > 1 and (stride <= 0 or stride * unit % _ALIGNMENT):
            return f"a stride of {stride} elements is no positive multiple of {_ALIGNMENT} bytes"
    return "" if x.stride(3) == 1 else "its features do not lie side by side"


def _width(x: Tensor) -> int:
    return max(_NARROWEST, power(x.shape[3]))


# ---------------------------------------------------------------- text


@lru_cache(maxsize=512)
def source(structure: Structure) -> str:
    """The text of the kernel."""
    program, masks = Program.parse(structure.program), structure.masks()
    lines = Lines(structure.kinds)
    full, cut = lines.fork(), lines.fork()
    full_keep = keep(full, program.score, masks["full"])
    cut_keep = keep(cut, program.score, masks["cut"])
    return render(
        "forward_hopper",
        row_lines=lines.outer,
        outer=[line.partition(" = ")[0] for line in lines.outer],
        full_lines=full.body,
        full_keep=full_keep,
        cut_lines=cut.body,
        cut_keep=cut_keep,
        empty="nan" if program.empty in ("nan", "nan_added") else "zero",
        **structure.common(),
    )


# ---------------------------------------------------------------- launch


def forward(frame: Frame, tile: Tile) -> tuple[Tensor, Tensor]:
    """out [B, H, T, dv] and lse [B, H, T] in the layout of `empty_heads`.

    Args:
        frame: a call for which `refusal` is empty.
        tile: 128 rows or a multiple of them, keys of a step, places for keys and for values
            (stages); the numbers of warps, heads and splits are not asked.
    """
    q, v = frame.given.q, frame.given.v
    out = empty_heads(v, (*q.shape[:3], v.shape[3]))
    lse = empty_lse(q, torch.float32)
    prepare(frame, tile, out, lse).run()
    return out, lse


def prepare(frame: Frame, tile: Tile, out: Tensor, lse: Tensor) -> Launch:
    """The kernel of a call; its results are [B, H, T, dv] and [B, H, T]."""
    given, grid = frame.given, frame.grid
    visited = rows_visited(frame, tile)
    half = tile.rows // 2
    copies = [
        _copies(x, rows)
        for x, rows in ((given.q, half), (given.k, tile.keys), (given.v, tile.keys), (out, half))
    ]
    sizes = (grid.B, grid.H, grid.T, grid.S)
    constants = {
        "SHARE": grid.H // given.k.shape[1],
        "BLOCK_D": _width(given.q),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "STAGES": tile.stages,
        "num_warps": 4,  # of one group; Triton adds the others
    }
    structure = structure_of(frame, tile, visited.kind)
    return Launch(
        load("forward_hopper", source(structure)).forward,
        (-(-grid.T // tile.rows), grid.B * grid.H, 1),
        (lse, *visited.args, *copies, *given.ints, *lse.stride(), *sizes, given.scale),
        constants,
    )


def _copies(x: Tensor, rows: int) -> Any:
    """What tells the copy engine about a [B, heads, length, width], in tiles of so many rows."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [1, 1, rows, _width(x)]
    kind = gl.bfloat16 if x.dtype is torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, kind)
    # the stride of a dimension of one element may be any number, and the engine wants a good one
    unit = _ALIGNMENT // x.element_size()
    strides = [s if n > 1 else unit for n, s in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)
