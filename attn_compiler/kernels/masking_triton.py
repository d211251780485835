"""What Selective attention subtracts, as a tensor, by generated kernels.

protect   which tokens see nothing but themselves
amounts   F [B, T, S], a block of keys each, running down over the rows
unmask    from dF the gradient of the selecting products, running up; two products bring it to q, k

The attention itself reads F as it reads any bias. Tiles were chosen by reasoning: a program runs
over all rows one after the other, so blocks of keys are narrow. None of it was measured.

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
from attn_compiler.kernels.masking import PROTECTED
from attn_compiler.kernels.template import load
from attn_compiler.kernels.triton_source import masking_source

TILE = Tile(rows=64, keys=32, warps=4, stages=2)
# by padded head dim; no matrix units multiply 32 bits, what they would hold takes registers
TILES_32_BITS = {
    64: Tile(rows=32, keys=32, warps=4, stages=2),
    128: Tile(rows=32, keys=16, warps=8, stages=2),
    256: Tile(rows=16, keys=16, warps=8, stages=1),
}


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
    """

    alone: Inputs
    past: int
    protected: Tensor
    start: Tensor

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

    def amounts(self) -> tuple[Tensor, Tensor]:
        """F [B, T, S], 0 where no row sees a key, and the state [B, S]."""
        amount, after = self._whole(torch.float32), torch.empty_like(self.start)
        self.launch("amounts", (self.start, amount, after)).run()
        return amount, after.masked_fill(self.protected.bool(), PROTECTED)

    def pull(self, grad: Tensor, below: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the selecting query and key and of F in row 0, from that of F and of F after
        the last row [B, S].
        """
        alone, total = self.alone, below.to(torch.float32, copy=True)
        ddot = self._whole(alone.q.dtype)
        self.launch("unmask", (grad.contiguous(), ddot, total)).run()
        q, k = alone.q.squeeze(1), alone.k.squeeze(1)
        dq, dk = ddot @ k, ddot.transpose(1, 2) @ q
        return (dq * alone.scale).unsqueeze(1), (dk * alone.scale).unsqueeze(1), total

    def protect(self) -> Launch:
        """The kernel that fills `protected` beyond the carry."""
        alone, tile = self.alone, self._tile
        constants = {n: self._constants()[n] for n in ("BLOCK_M", "BLOCK_N", "INDEX")}
        grid = (-(-alone.q.shape[2] // tile.rows), alone.q.shape[0], 1)
        return Launch(self._module().protect, grid, (self.protected, *self._program()), constants)

    def launch(self, name: str, tensors: tuple[Tensor, ...]) -> Launch:
        """`amounts` or `unmask`, a block of keys for each program."""
        alone, tile = self.alone, self._tile
        q, k = dense(alone.q), dense(alone.k)
        strides = (q.stride(0), q.stride(2), k.stride(0), k.stride(2))
        grid = (-(-k.shape[2] // tile.keys), q.shape[0], 1)
        args = (q, k, self.protected, *tensors, *self._program(), *strides, alone.scale)
        constants = self._constants() | {"num_warps": tile.warps, "num_stages": tile.stages}
        return Launch(getattr(self._module(), name), grid, args, constants)

    @property
    def _tile(self) -> Tile:
        q = self.alone.q
        if q.dtype is not torch.float32:
            return TILE
        return next(tile for width, tile in TILES_32_BITS.items() if q.shape[3] <= width)

    def _whole(self, dtype: torch.dtype) -> Tensor:
        batch, keys = self.start.shape
        return self.start.new_zeros((batch, self.alone.q.shape[2], keys), dtype=dtype)

    def _module(self) -> Any:
        return load("masking", masking_source(structure_of(Frame(self.alone), self._tile, "all")))

    def _program(self) -> list[Any]:
        sizes = (self.alone.q.shape[0], 1, self.alone.q.shape[2], self.alone.k.shape[2])
        return [*program_arguments(self.alone), *sizes, self.past]

    def _constants(self) -> dict[str, Any]:
        found = constants_of(self.alone, self._tile)
        return {n: found[n] for n in ("D", "BLOCK_D", "BLOCK_M", "BLOCK_N", "PRECISION", "INDEX")}
