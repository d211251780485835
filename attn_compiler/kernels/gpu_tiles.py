"""The tiles of the generated kernels by kind of GPU.

`tests/kernels/test_triton_ahead.py` compiles each of them for the targets it is meant for; which of
them is fastest has not been measured yet.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from attn_compiler.ir.score import Program
from attn_compiler.kernels.frame import Inputs
from attn_compiler.kernels.launch import Tile, described

# by family and padded head dim: rows, keys, warps, stages
_FORWARD = {
    "ampere": {64: Tile(128, 64, 4, 3), 128: Tile(128, 32, 8, 3), 256: Tile(64, 32, 8, 2)},
    "hopper": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
    "amd": {64: Tile(128, 64, 4, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2)},
}
# loads by descriptors leave registers for larger tiles
_DESCRIBED = {
    64: Tile(128, 128, 8, 3, descriptors=True),
    128: Tile(128, 128, 8, 2, descriptors=True),
    256: Tile(128, 64, 8, 2, descriptors=True),
}
_FORWARD_32_BITS = {64: Tile(32, 32, 4, 2), 128: Tile(32, 16, 8, 2), 256: Tile(32, 16, 8, 2)}
# of the kernel that runs over rows for a block of keys; its opposite swaps the two
_BACKWARD = {
    "ampere": {64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(16, 64, 8, 2)},
    "hopper": {64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(16, 64, 8, 2)},
    "amd": {64: Tile(32, 64, 4, 2), 128: Tile(16, 64, 8, 2), 256: Tile(16, 32, 8, 2)},
}
_BACKWARD_32_BITS = {64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 8, 2), 256: Tile(16, 16, 8, 1)}
# a query of at most so many rows shares its keys among the heads of a group
SHORT = 16
_ROWS_OF_A_SHORT_QUERY = 64
_KEYS_OF_A_SHORT_QUERY = 64
# a part of the keys that is worth a program
_LEAST_TILES = 4


def forward_tile(given: Inputs, family: str, programs: int) -> Tile:
    """The tile of a call on a device of this family that runs so many programs at once."""
    wide, width = given.q.dtype is torch.float32, _width(given)
    tile = (_FORWARD_32_BITS if wide else _FORWARD[family])[width]
    if family == "hopper" and not wide and not given.reads and described(given.k, given.v):
        tile = _DESCRIBED[width]
    group, length = given.q.shape[1] // given.k.shape[1], given.q.shape[2]
    if length > SHORT:
        return replace(tile, warps=8) if given.reads else tile  # places of reads take registers
    heads = group if group * length <= _ROWS_OF_A_SHORT_QUERY else 1
    rows = max(16, 1 << (heads * length - 1).bit_length())
    keys = min(_KEYS_OF_A_SHORT_QUERY, tile.keys)
    busy = given.q.shape[0] * given.q.shape[1] // heads
    return Tile(rows, keys, 4, 3, heads, _splits(given, busy, keys, programs))


def _splits(given: Inputs, busy: int, keys: int, programs: int) -> int:
    """How many programs share the keys; one where the device is busy anyway."""
    program = Program.parse(given.program)
    if program.sink is None and program.empty in ("uniform", "absorbed"):
        return 1  # the mean over all keys is made in one place
    tiles = -(-given.k.shape[2] // keys)
    if busy >= 0.8 * programs or tiles <= _LEAST_TILES:
        return 1
    return max(1, min(2 * programs // busy, tiles // _LEAST_TILES, 64))


def backward_tiles(given: Inputs, family: str) -> tuple[Tile, Tile]:
    """Tiles for a block of keys and for a block of rows."""
    wide = given.q.dtype is torch.float32
    tile = (_BACKWARD_32_BITS if wide else _BACKWARD[family])[_width(given)]
    tile = replace(tile, warps=8 if given.reads else tile.warps, descriptors=family == "hopper")
    return tile, replace(tile, rows=tile.keys, keys=tile.rows)


def _width(given: Inputs) -> int:
    width = max(given.q.shape[3], given.v.shape[3])
    return next(w for w in _FORWARD_32_BITS if width <= w)
