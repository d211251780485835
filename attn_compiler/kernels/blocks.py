"""Which tiles a kernel visits where a tensor decides it: lists of blocks, made on the device.

    some, every  [B, H, row tiles, key tiles]   ->   per row tile the key tiles in full, then those
                                                     that the mask cuts; longest rows first

The lists are the four int32 tensors of FlexAttention's BlockMask (`full_kv_num_blocks`,
`full_kv_indices`, `kv_num_blocks`, `kv_indices`; PyTorch 2.13, torch.nn.attention.flex_attention),
and for the opposite order their transposes. Nothing of them is read by the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attn_compiler.ir.bounds import Tiling, tile_classes
from attn_compiler.ir.expr import Call, Const, Expr, Var, children, slots
from attn_compiler.kernels.frame import Frame
from attn_compiler.kernels.plan import plan

# below so many elements of the grid the lists cost more than they save
_LEAST = 2**20
# elements of a tensor that may be looked at, per row and key
_MOST_READ = 8


@dataclass(frozen=True, slots=True)
class Blocks:
    """The tiles that each block visits; int32, batch and heads 1 where they do not matter.

    Attributes:
        order: [b, h, n] blocks, those with the most tiles first.
        full_count, full_index: [b, h, n] and [b, h, n, m]: how many tiles need no mask, and which
            (only the first `full_count` of a row count).
        part_count, part_index: the same for tiles that the mask cuts.
    """

    order: Tensor
    full_count: Tensor
    full_index: Tensor
    part_count: Tensor
    part_index: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.order, self.full_count, self.full_index, self.part_count, self.part_index

    @property
    def strides(self) -> tuple[int, ...]:
        """Of batch and head in the counts, of batch, head and block in the indices."""
        (batch, heads, number), width = self.order.shape, self.part_index.shape[3]
        sizes = (heads * number if batch > 1 else 0, number if heads > 1 else 0)
        return (*sizes, *(n * width for n in sizes), width)


def wanted(frame: Frame) -> bool:
    """Does a tensor decide enough about the tiles to be worth the lists?"""
    grid, program = frame.grid, plan(frame.given.program).program
    if grid.T * grid.S < _LEAST or (
        program.sink is None and program.empty not in ("any", "zero")
    ):  # a row without keys reaches all of them
        return False
    read = slots(program.mask)
    looked_at = sum(frame.given.reads[slot].numel() for slot in read)
    return bool(read) and looked_at <= _MOST_READ * grid.B * (grid.T + grid.S) * grid.H


@lru_cache(maxsize=512)
def whole(program: str, rows: int, keys: int) -> bool:
    """Does the mask of this program never tell two elements of a tile apart?"""
    stack = [plan(program).program.mask]
    while stack:
        node = stack.pop()
        if isinstance(node, Var) and node.name in ("q", "k"):
            return False
        if not _same_in_a_tile(node, rows, keys):
            stack.extend(children(node))
    return True


def _same_in_a_tile(expr: Expr, rows: int, keys: int) -> bool:
    """Is it  q // n  or  k // n  of a multiple of the tile?"""
    if not isinstance(expr, Call) or expr.op != "floordiv":
        return False
    index, by = expr.args
    size = {"q": rows, "k": keys}.get(index.name) if isinstance(index, Var) else None
    return size is not None and isinstance(by, Const) and by.value > 0 and by.value % size == 0


def by_rows(frame: Frame, rows: int, keys: int) -> Blocks:
    """For each block of rows the tiles of keys."""
    some, every = _classes(frame, rows, keys)
    return listed(some, every)


def by_keys(frame: Frame, rows: int, keys: int) -> Blocks:
    """For each block of keys the tiles of rows that see it, of all heads."""
    some, every = _classes(frame, rows, keys)
    return listed(some.transpose(2, 3), every.transpose(2, 3))


def _classes(frame: Frame, rows: int, keys: int) -> tuple[Tensor, Tensor]:
    grid, given = frame.grid, frame.given
    tiling = Tiling(grid.B, grid.H, grid.T, grid.S, rows, keys, grid.ints)
    some, every = tile_classes(plan(given.program).program.mask, tiling, given.reads)
    # the last tile reaches over the edge
    inside = torch.ones(some.shape[2:], dtype=torch.bool, device=some.device)
    inside[grid.T // rows :], inside[:, grid.S // keys :] = False, False
    return some, every & inside


def listed(some: Tensor, every: Tensor) -> Blocks:
    """Lists from maps [b, h, blocks, tiles]: tiles that count at all, and those that do in full.

    The indices ascend in each list.
    """
    part = some & ~every
    counts = [x.sum(-1, dtype=torch.int32) for x in (every, part)]
    # a stable sort of the complement puts what counts first, in order
    full_index, part_index = (
        (~x).byte().contiguous().argsort(dim=-1, stable=True).int() for x in (every, part)
    )
    order = (counts[0] + counts[1]).argsort(dim=-1, descending=True, stable=True)
    return Blocks(order.int(), counts[0], full_index, counts[1], part_index)
