"""Selective attention whose kernels make F themselves, tile by tile, where they subtract it.

    carries [B, T / R, S]: F in the first row of every R rows       one pass of the selecting head
    F tile = carry + exclusive sums over the rows of relu(z*)       inside of attention's kernels

So nothing of T x S numbers exists but the carries. Backward, the gradient of F is a tensor of a
band of rows, from below: what it brings to the selecting head is all that the band above needs.

Source: the two passes of Selective Attention (arXiv 2410.02703), cut into tiles.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attn_compiler.cost.problem import SHORT
from attn_compiler.kernels import flash_triton, flash_triton_backward, gpu, selective_tiles
from attn_compiler.kernels.frame import Frame, Inputs, Made
from attn_compiler.kernels.launch import Tile
from attn_compiler.kernels.masking_triton import Scan
from attn_compiler.kernels.selection import Gradients, Selection

# by family and padded head dim: of the forward kernel, of the backward's blocks of keys and of its
# blocks of rows. What F takes in registers leaves less for the rest: what is missing spills, and
# so does every tile of 32-bit numbers
_TILES = {
    "ampere": {
        64: (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 2)),
        128: (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 2)),
    },
    "hopper": {
        64: (Tile(64, 64, 8, 2), Tile(32, 64, 8, 2), Tile(64, 32, 8, 2)),
        128: (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 2)),
    },
}


def tiles(given: Inputs, width: int) -> tuple[Tile, Tile, Tile] | None:
    """Of the forward kernel and of the two of the backward: a block of keys, a block of rows.
    None where no tile fits.

    Args:
        width: of the selecting head.
    """
    widest = max(given.q.shape[3], given.v.shape[3], width)
    if given.q.dtype is torch.float32:
        return None
    table = _TILES.get(gpu.family(given.q.device), {})
    return next((found for size, found in table.items() if widest <= size), None)


def forward(selection: Selection, scan: Scan) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and the state, see `selective`."""
    scan = replace(scan, fine=True)
    carries, state = scan.carries()
    frame = _frame(selection, scan, carries)
    return *flash_triton.forward(frame, _tiles(selection, scan)[0]), state


def backward(
    selection: Selection,
    scan: Scan,
    grad: Tensor,
    saved: tuple[Tensor, Tensor],
    into: dict[int, Tensor],
    rows: int,
) -> Gradients:
    """All gradients; `saved` is out and lse, `rows` those of a band, whole tiles."""
    given, gate, scan = selection.given, selection.gate, replace(scan, fine=True)
    frame = _frame(selection, scan, scan.carries()[0])
    total, weight = torch.zeros_like(scan.start), scan.start.new_zeros(())
    own_q, own_k = (torch.zeros_like(x, dtype=given.dtype) for x in (scan.alone.q, scan.alone.k))

    def take(first: int, band: Tensor) -> None:
        found = scan.pull(band, total, first)
        own_q[:, :, first : first + band.shape[1]] = found.dq
        own_k.add_(found.dk)
        total.copy_(found.above)
        weight.add_(found.gate)

    dq, dk, dv = flash_triton_backward.backward_by_bands(
        frame, grad, saved, into, _tiles(selection, scan)[1:], rows, take
    )
    dq, dk, dv = (x.to(given.dtype) for x in (dq, dk, dv))
    weight += (scan.start * total).sum()
    if gate is not None:
        for x in (own_q, own_k, total):
            x.mul_(gate.to(given.dtype))
    if selection.selector:
        return Gradients(dq, dk, dv, into, [own_q, own_k], weight, total)
    head, group = selection.head, selection.key_head
    dq[:, head : head + 1] += own_q
    dk[:, group : group + 1] += own_k
    return Gradients(dq, dk, dv, into, [], weight, total)


def possible(selection: Selection, scan: Scan) -> bool:
    """Are there kernels for this call that make F inside?"""
    given = selection.given
    if given.q.shape[2] <= SHORT or not gpu.generates(selection.reading(_nothing(given))):
        return False
    if torch.are_deterministic_algorithms_enabled():  # what F gets is added up in no fixed order
        return False
    found, rows = tiles(given, scan.alone.q.shape[3]), replace(scan, fine=True).tile.rows
    return found is not None and all(tile.rows % rows == 0 for tile in found)


def _tiles(selection: Selection, scan: Scan) -> tuple[Tile, Tile, Tile]:
    found = tiles(selection.given, scan.alone.q.shape[3])
    assert found is not None  # see `possible`
    return found


def _frame(selection: Selection, scan: Scan, carries: Tensor) -> Frame:
    given, rows, gate = selection.given, scan.tile.rows, selection.gate
    read = selection.reading(_nothing(given))
    first = carries[:, :: selective_tiles.SIDE // rows]
    read = selective_tiles.left_out(read, given, first, scan.past, gate)
    slot = len(given.reads)
    made = Made(slot, scan.alone, scan.past, scan.protected, carries, rows, gate)
    return Frame(read, made)


def _nothing(given: Inputs) -> Tensor:
    """What stands for F; nobody reads it."""
    shape = (given.q.shape[0], given.q.shape[2], given.k.shape[2])
    return given.q.new_zeros((), dtype=torch.float32).expand(shape)
