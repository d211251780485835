"""The tiles of the generated kernels: those the cost model ranks first, and by kind of GPU where it
has none.

    H200, k <= q, head dim 128, T = S = 4096   ->   Tile(128, 64, 8, 3, descriptors=True)

The cost model offers only tiles that the compiler was asked about; `tests/kernels/
test_triton_ahead.py` compiles the others for the targets they are meant for. Which is fastest has
not been measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from attn_compiler.cost.problem import SHORT, Problem, Template
from attn_compiler.ir.expr import DOT, TRUE, Read, depends, walk
from attn_compiler.ir.score import Program
from attn_compiler.kernels.frame import Inputs
from attn_compiler.kernels.grid import Grid, is_free
from attn_compiler.kernels.launch import Tile, described, precision
from attn_compiler.kernels.plan import plan

if TYPE_CHECKING:
    from attn_compiler.cost.hardware import Hardware

# by family and padded head dim: rows, keys, warps, stages
_FORWARD = {
    "ampere": {64: Tile(128, 64, 4, 3), 128: Tile(128, 32, 8, 3), 256: Tile(64, 32, 8, 2)},
    "hopper": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
    "amd": {64: Tile(128, 64, 4, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2)},
}
_FORWARD_32_BITS = {64: Tile(32, 32, 4, 2), 128: Tile(32, 16, 8, 2), 256: Tile(32, 16, 8, 2)}
# of the kernel that runs over rows for a block of keys; its opposite swaps the two
_BACKWARD = {
    "ampere": {64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(16, 64, 8, 2)},
    "hopper": {64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(16, 64, 8, 2)},
    "amd": {64: Tile(32, 64, 4, 2), 128: Tile(16, 64, 8, 2), 256: Tile(16, 32, 8, 2)},
}
_BACKWARD_32_BITS = {64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 8, 2), 256: Tile(16, 16, 8, 1)}
_ROWS_OF_A_SHORT_QUERY = 64
_KEYS_OF_A_SHORT_QUERY = 64
# a part of the keys that is worth a program
_LEAST_TILES = 4
_PROCESSORS = 64  # of a device that nothing is known about


def forward_tile(given: Inputs, family: str, hardware: Hardware | None) -> Tile:
    """The tile of a call.

    Args:
        family: "ampere", "hopper" or "amd".
        hardware: None where its numbers are not known.
    """
    tile = _chosen(given, hardware, "forward") or _default(given, family, hardware)
    long = given.q.shape[2] > SHORT
    return replace(tile, descriptors=long and family == "hopper" and described(given.k, given.v))


def backward_tiles(given: Inputs, family: str, hardware: Hardware | None) -> tuple[Tile, Tile]:
    """Tiles for a block of keys and for a block of rows."""
    wide = given.q.dtype is torch.float32
    tile = (_BACKWARD_32_BITS if wide else _BACKWARD[family])[_width(given)]
    tile = replace(tile, warps=8) if given.reads else tile
    by_key = _chosen(given, hardware, "keys_and_values") or tile
    by_row = _chosen(given, hardware, "queries") or replace(tile, rows=tile.keys, keys=tile.rows)
    on = family == "hopper"
    return replace(by_key, descriptors=on), replace(by_row, descriptors=on)


def ranked_tiles(
    given: Inputs, family: str, hardware: Hardware | None, work: str
) -> Iterator[tuple[float, tuple[Tile, ...]]]:
    """Predicted seconds and tiles of a "forward" or a "backward", the first ones of the model; of a
    backward the n-th tile of one kernel goes with the n-th of the other.
    """
    if work == "forward":
        usual = forward_tile(given, family, hardware)
        for seconds, tile in _choices(given, hardware, "forward"):
            yield seconds, (replace(tile, descriptors=usual.descriptors),)
        return
    on = family == "hopper"
    pairs = zip(
        *(_choices(given, hardware, name) for name in ("keys_and_values", "queries")), strict=False
    )
    for (first, by_key), (second, by_row) in pairs:
        tiles = (replace(by_key, descriptors=on), replace(by_row, descriptors=on))
        yield first + second, tiles


# ---------------------------------------------------------------- by the cost model


def _chosen(given: Inputs, hardware: Hardware | None, template: Template) -> Tile | None:
    return next((tile for _, tile in _choices(given, hardware, template)), None)


def _choices(
    given: Inputs, hardware: Hardware | None, template: Template
) -> Iterator[tuple[float, Tile]]:
    if hardware is None:
        return
    from attn_compiler.cost.search import choose

    for t, time in choose(hardware, problem_of(given), template):
        yield time.seconds, Tile(t.block_m, t.block_n, t.warps, t.stages, t.heads, t.splits)


def problem_of(given: Inputs) -> Problem:
    """A call in the words of the cost model."""
    (batch, heads, rows, head_dim), keys = given.q.shape, given.k.shape[2]
    grid = Grid(given.program, batch, heads, rows, keys, tuple(given.ints))
    left, right, shift = _band(grid)
    program = Program.parse(given.program)
    return Problem(
        batch=batch,
        heads=heads,
        kv_heads=given.k.shape[1],
        rows=rows,
        keys=keys,
        head_dim=head_dim,
        value_dim=given.v.shape[3],
        itemsize=given.q.element_size(),
        tf32=given.q.dtype is torch.float32 and precision() == "tf32",
        left=left,
        right=right,
        shift=shift,
        score_bytes=_bytes_of_a_score(given),
        extra=bool(given.reads) or program.score != DOT or given.drop.rate > 0,
    )


@lru_cache(maxsize=1024)
def _band(grid: Grid) -> tuple[int | None, int | None, int]:
    """left, right, shift of a band that nearly is the mask by structure: what a row in the middle
    sees, and whether others see the same beside them.
    """
    if is_free(grid):
        return None, None, 0
    known = plan(grid.program).structural
    row = grid.T // 2
    lo, hi = known.key_range((row, row + 1), grid.sizes, grid.ints)
    right = 0 if hi < grid.S or grid.T == 1 else None
    shift = hi - 1 - row if right == 0 else 0
    return (row + shift - lo if lo > 0 else None), right, shift


def _bytes_of_a_score(given: Inputs) -> float:
    program = Program.parse(given.program)
    reads = {
        node
        for part in (program.score, program.mask)
        if part != TRUE
        for node in walk(part)
        if isinstance(node, Read)
    }
    each = [r for r in reads if depends(r, "q") and depends(r, "k")]
    return float(sum(given.reads[read.slot].element_size() for read in each))


# ---------------------------------------------------------------- by kind


def _default(given: Inputs, family: str, hardware: Hardware | None) -> Tile:
    wide = given.q.dtype is torch.float32
    tile = (_FORWARD_32_BITS if wide else _FORWARD[family])[_width(given)]
    group, length = given.q.shape[1] // given.k.shape[1], given.q.shape[2]
    if length > SHORT:
        return replace(tile, warps=8) if given.reads else tile  # places of reads take registers
    heads = group if group * length <= _ROWS_OF_A_SHORT_QUERY else 1
    rows = max(16, 1 << (heads * length - 1).bit_length())
    keys = min(_KEYS_OF_A_SHORT_QUERY, tile.keys)
    busy = given.q.shape[0] * given.q.shape[1] // heads
    programs = hardware.processors if hardware is not None else _PROCESSORS
    return Tile(rows, keys, 4, 3, heads, _splits(given, busy, keys, programs))


def _splits(given: Inputs, busy: int, keys: int, programs: int) -> int:
    """How many programs share the keys; one where the device is busy anyway."""
    tiles = -(-given.k.shape[2] // keys)
    if busy >= 0.8 * programs or tiles <= _LEAST_TILES:
        return 1
    return max(1, min(2 * programs // busy, tiles // _LEAST_TILES, 64))


def _width(given: Inputs) -> int:
    width = max(given.q.shape[3], given.v.shape[3])
    return next(w for w in _FORWARD_32_BITS if width <= w)
