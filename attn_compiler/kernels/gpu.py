"""What a GPU runs: the generated kernels, and the composite ones where none can be generated.

`tests/kernels/test_triton_ahead.py` says which of these tiles were compiled for which target; which
of them is fastest has not been measured yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from attn_compiler.ir.score import Program
from attn_compiler.kernels import attention as composite
from attn_compiler.kernels import flash_triton, flash_triton_backward
from attn_compiler.kernels.frame import Frame, Inputs, in_heads_layout
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
_SHORT = 16
_ROWS_OF_A_SHORT_QUERY = 64
_KEYS_OF_A_SHORT_QUERY = 64
# a part of the keys that is worth a program
_LEAST_TILES = 4


def forward(given: Inputs) -> tuple[Tensor, Tensor]:
    """out and lse."""
    if not runs(given):
        return composite.forward(given)
    frame = Frame(given)
    device = given.q.device
    return flash_triton.forward(frame, forward_tile(given, family(device), processors(device)))


def backward(
    given: Inputs, grad: Tensor, saved: tuple[Tensor, Tensor], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of q, k, v and of the reads that `needs` marks."""
    # gradients of tensors are added up in no fixed order
    if not runs(given) or (any(needs) and torch.are_deterministic_algorithms_enabled()):
        return composite.backward(given, grad, saved, needs)
    wanted = [i for i, need in enumerate(needs) if need]
    into = {
        i: torch.zeros(given.reads[i].shape, dtype=given.dtype, device=given.q.device)
        for i in wanted
    }
    tiles = backward_tiles(given, family(given.q.device))
    found = flash_triton_backward.backward(Frame(given), grad, saved, into, tiles)
    dq, dk, dv = (in_heads_layout(g, x.dtype) for g, x in zip(found, given.qkv, strict=True))
    return dq, dk, dv, [into[i].to(given.reads[i].dtype) for i in wanted]


def runs(given: Inputs) -> bool:
    """Is there a generated kernel for this call on this device?"""
    if any(x.numel() == 0 for x in given.qkv) or flash_triton.refusal(given):
        return False
    return bool(family(given.q.device))


@lru_cache(maxsize=64)
def family(device: torch.device) -> str:
    """Which tiles suit the device; empty where Triton uses no matrix units (below capability 8)."""
    if find_spec("triton") is None:
        return ""
    if torch.version.hip:
        return "amd"
    major, _ = torch.cuda.get_device_capability(device)
    # consumer Blackwell (12) has the shared memory and the matrix instructions of Ampere
    return "hopper" if major in (9, 10, 11) else "ampere" if major >= 8 else ""


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """How many programs run at once, at least."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward_tile(given: Inputs, family: str, programs: int) -> Tile:
    """The tile of a call on a device of this family that runs so many programs at once."""
    wide, width = given.q.dtype is torch.float32, _width(given)
    tile = (_FORWARD_32_BITS if wide else _FORWARD[family])[width]
    if family == "hopper" and not wide and not given.reads and described(given.k, given.v):
        tile = _DESCRIBED[width]
    group, length = given.q.shape[1] // given.k.shape[1], given.q.shape[2]
    if length > _SHORT:
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
