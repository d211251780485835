"""What Selective attention subtracts, by generated kernels: a program for each tile.

protect   which tokens see nothing but themselves
sums      of S over the rows of each tile; `scan` makes what comes before them: the carries
amounts   F [B, T, S] out of the carries
unmask    from dF the gradient of the selecting products; two products bring it to q, k

The attention itself reads F as it reads any bias, or makes it inside from the carries (`made`).
Tiles were chosen by reasoning; none of it was measured.

Source: the passes are those of Selective Attention (arXiv 2410.02703) cut into tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_compiler.ir.expr import slots
from attn_compiler.kernels import gpu
from attn_compiler.kernels.frame import Frame, Inputs
from attn_compiler.kernels.launch import (
    Launch,
    Tile,
    constants_of,
    dense,
    program_arguments,
    structure_of,
)
from attn_compiler.kernels.masking import PROTECTED, Pulled
from attn_compiler.kernels.template import load
from attn_compiler.kernels.triton_source import masking_source

TILE = Tile(rows=64, keys=32, warps=4, stages=2)
# where attention's kernels start from the carries, of which some have 32 rows
FINE = Tile(rows=32, keys=64, warps=4, stages=2)
# by padded head dim; no matrix units multiply 32 bits, what they would hold takes registers
TILES_32_BITS = {
    64: Tile(rows=32, keys=32, warps=4, stages=2),
    128: Tile(rows=32, keys=16, warps=8, stages=2),
    256: Tile(rows=16, keys=16, warps=8, stages=1),
}
_KEYS_OF_A_SCAN = 128


def runs(alone: Inputs) -> bool:
    """Are there kernels for this selecting head on its device?"""
    return gpu.generates(alone) and alone.dtype is torch.float32


def differentiates(alone: Inputs, wanted: Sequence[int]) -> bool:
    """Is the selecting head's gradient one of its query and key alone?"""
    return not set(wanted) & set(slots(Frame(alone).plan.program.score))


@dataclass(frozen=True, slots=True)
class Scan:
    """The kernels of one call.

    Attributes:
        alone: the selecting head as an attention of its own.
        past: keys before row 0.
        protected: [B, S], int8.
        start: F in row 0, [B, S], float32.
        fine: are carries for attention's kernels?
    """

    alone: Inputs
    past: int
    protected: Tensor
    start: Tensor
    fine: bool = False

    @staticmethod
    def of(alone: Inputs, past: int, carry: Tensor | None) -> Scan:
        shape = (alone.q.shape[0], alone.k.shape[2])
        start = torch.zeros(shape, dtype=torch.float32, device=alone.q.device)
        protected = torch.zeros(shape, dtype=torch.int8, device=alone.q.device)
        if carry is not None:
            start[:, :past] = carry.clamp(min=0)
            protected[:, :past] = carry < 0
        found = Scan(alone, past, protected, start)
        found.protect().run()
        return found

    @property
    def tile(self) -> Tile:
        q = self.alone.q
        if q.dtype is not torch.float32:
            return FINE if self.fine else TILE
        return next(tile for width, tile in TILES_32_BITS.items() if q.shape[3] <= width)

    def carries(self) -> tuple[Tensor, Tensor]:
        """F in the first row of every tile, [B, tiles, S], and the state [B, S]."""
        batch, keys = self.start.shape
        found = self.start.new_empty((batch, -(-self.alone.q.shape[2] // self.tile.rows), keys))
        self.launch("sums", (found,)).run()
        after = torch.empty_like(self.start)
        self.scan(found, self.start, after, up=False).run()
        return found, after.masked_fill(self.protected.bool(), PROTECTED)

    def amounts(self) -> tuple[Tensor, Tensor]:
        """F [B, T, S], 0 where no row sees a key, and the state."""
        carries, state = self.carries()
        amount = self._whole(torch.float32, self.alone.q.shape[2])
        self.launch("amounts", (carries, amount)).run()
        return amount, state

    def pull(self, grad: Tensor, below: Tensor, first: int = 0) -> Pulled:
        """Gradients, from that of F in the rows from `first` on, [B, rows, S], and of F after them
        [B, S]. `first` is the first row of a tile.
        """
        alone, own = self.alone, slice(first, first + grad.shape[1])
        sums = _by_tiles(grad, self.tile.rows)
        ddot = self._whole(alone.q.dtype, grad.shape[1])
        gate, above = torch.zeros_like(sums), torch.empty_like(self.start)
        self.scan(sums, below, above, up=True).run()
        rows = (first // self.tile.rows, grad.shape[1])
        self.launch("unmask", (sums, grad.contiguous(), ddot, gate), rows).run()
        q, k = alone.q.squeeze(1)[:, own], alone.k.squeeze(1)
        dq, dk = (x.mul_(alone.scale).unsqueeze(1) for x in (ddot @ k, ddot.transpose(1, 2) @ q))
        return Pulled(dq, dk, above, gate.sum())

    def protect(self) -> Launch:
        """The kernel that fills `protected` beyond the carry."""
        alone, tile = self.alone, self.tile
        constants = {n: self._constants()[n] for n in ("BLOCK_M", "BLOCK_N", "INDEX")}
        grid = (-(-alone.q.shape[2] // tile.rows), alone.q.shape[0], 1)
        return Launch(self._module().protect, grid, (self.protected, *self._program()), constants)

    def scan(self, sums: Tensor, start: Tensor, end: Tensor, *, up: bool) -> Launch:
        """The kernel that makes sums of tiles, in place, those of all tiles before, or after."""
        batch, tiles, keys = sums.shape
        grid = (-(-keys // _KEYS_OF_A_SCAN), batch, 1)
        constants = {"UP": up, "BLOCK": _KEYS_OF_A_SCAN, "num_warps": 4}
        args = (sums, start.contiguous(), end, tiles, keys)
        return Launch(self._module().scan, grid, args, constants)

    def launch(
        self, name: str, tensors: tuple[Tensor, ...], rows: tuple[int, int] | None = None
    ) -> Launch:
        """`sums`, `amounts` or `unmask`; `rows` are the first tile and the number of rows that the
        tensors hold, None for all.
        """
        alone, tile = self.alone, self.tile
        first, held = rows or (0, alone.q.shape[2])
        q, k = dense(alone.q), dense(alone.k)
        strides = (q.stride(0), q.stride(2), k.stride(0), k.stride(2))
        tiles = -(-held // tile.rows)
        grid = (-(-k.shape[2] // tile.keys), tiles, q.shape[0])
        args = (q, k, self.protected, *tensors, *self._program(), *strides, alone.scale)
        constants = self._constants() | {"num_warps": tile.warps, "num_stages": tile.stages}
        return Launch(getattr(self._module(), name), grid, (*args, first, held, tiles), constants)

    def _whole(self, dtype: torch.dtype, rows: int) -> Tensor:
        batch, keys = self.start.shape
        return self.start.new_zeros((batch, rows, keys), dtype=dtype)

    def _module(self) -> Any:
        return load("masking", masking_source(structure_of(Frame(self.alone), self.tile, "all")))

    def _program(self) -> list[Any]:
        sizes = (self.alone.q.shape[0], 1, self.alone.q.shape[2], self.alone.k.shape[2])
        return [*program_arguments(self.alone), *sizes, self.past]

    def _constants(self) -> dict[str, Any]:
        found = constants_of(self.alone, self.tile)
        return {n: found[n] for n in ("D", "BLOCK_D", "BLOCK_M", "BLOCK_N", "PRECISION", "INDEX")}


def _by_tiles(grad: Tensor, rows: int) -> Tensor:
    """Sums over the rows of each tile, [B, R, S] -> [B, tiles, S]."""
    full = grad.shape[1] // rows * rows
    sums = grad[:, :full].unflatten(1, (-1, rows)).sum(2) if full else grad[:, :0]
    rest = grad[:, full:]
    return torch.cat([sums, rest.sum(1, keepdim=True)], 1) if rest.shape[1] else sums
