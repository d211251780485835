"""Projections by experts on a GPU: rows are gathered on the way in, gated and added on the way out.

    routes, sorted on the device   ->   multiply, weights      see templates/experts.py.jinja

Nothing is as large as the routes times a width, and the host waits for nothing. Sums over routes
are atomic additions in float32: where PyTorch's deterministic algorithms are asked for, and where
most experts are chosen anyway, `expert_forms` multiplies by all of them. Not measured on a GPU.

Source: the grouping of SwitchHead's and ScatterMoE's kernels (arXiv 2312.07987, 2403.08245).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_compiler.kernels.expert_forms import Gradients, Routed
from attn_compiler.kernels.launch import Launch, dense, power, precision
from attn_compiler.kernels.template import load, render

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# E / k above which routes are sorted: a sorted product was assumed to run at 70 % of a plain one
WORTH_SORTING = 1.5
_NO_DOTS = (None, None)


@dataclass(frozen=True, slots=True)
class ExpertTile:
    """What is chosen for a launch.

    Attributes:
        rows: of the result of a product.
        columns: of it.
        step: channels that are multiplied at once.
        warps, stages: of a program.
    """

    rows: int = 128
    columns: int = 128
    step: int = 64
    warps: int = 8
    stages: int = 3


def refusal(call: Routed) -> str:
    """Why these kernels do not serve a call; empty if they do."""
    if call.a.dtype not in _DTYPES or call.gate.dtype is torch.float64:
        return f"rows are {call.a.dtype}, gates {call.gate.dtype}"
    tokens, _, k = call.index.shape
    if not all(x.numel() for x in (call.a, call.w, call.index)):
        return "there is nothing to multiply"
    # some are certainly left out: their weights need not even be read
    if call.experts <= WORTH_SORTING * k and tokens * k >= call.experts:
        return f"{k} of {call.experts} experts are chosen"
    if torch.are_deterministic_algorithms_enabled():
        return "sums have to have an order"
    return ""


def tile(call: Routed) -> ExpertTile:
    """The tile of a call, by the routes of an expert; without spills on sm_80 and sm_90."""
    rows = min(128, power(call.index.numel() // call.w.shape[0]))
    if call.a.dtype.itemsize == 4:
        return ExpertTile(min(64, rows), 64, 16, 8, 2)
    # AMD has 64 KiB of memory for a program
    stages = 2 if torch.version.hip else 3
    return ExpertTile(rows, 128, 64, 8 if rows == 128 else 4, stages)


def forward(call: Routed) -> Tensor:
    """[rows, out], in float32."""
    out = _zeros(call, call.rows, call.w.shape[2])
    prepare_forward(call, tile(call), out).run()
    return out


def prepare_forward(call: Routed, tile: ExpertTile, into: Tensor) -> Launch:
    """The launch of a forward pass, which adds to the zeros of `into`."""
    return _Products(call, tile).product(into=into)


def backward(call: Routed, grad: Tensor, needs: Sequence[bool]) -> Gradients:
    """Gradients of `a`, `w` and `gate`, those that are needed; see `expert_forms.backward`."""
    da = _zeros(call, *call.a.shape) if needs[0] else None
    dw = torch.empty_like(call.w, memory_format=torch.contiguous_format) if needs[1] else None
    dots = _zeros(call, *call.gate.shape) if needs[2] else None
    for launch in prepare_backward(call, grad, tile(call), (da, dw, dots)):
        launch.run()
    return da, dw, dots


def prepare_backward(call: Routed, grad: Tensor, tile: ExpertTile, into: Gradients) -> list[Launch]:
    """The launches of a backward pass; sums start with the zeros of `into`."""
    (da, dw, dots), products = into, _Products(call, tile)
    found = [] if dw is None else [products.weights(grad, dw)]
    if call.merge and (da is not None or dots is not None):
        # what comes back is c wide, and serves both
        return [*found, products.back(grad, into=da, dots=(call.a, dots))]
    if dots is not None:
        found.append(products.product(dots=(grad, dots)))
    if da is not None:
        found.append(products.back(grad, into=da))
    return found


def _zeros(call: Routed, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=call.a.device)


class _Products:
    """A call with its routes sorted, on the device."""

    def __init__(self, call: Routed, tile: ExpertTile) -> None:
        self.call, self.tile = call, tile
        self.module = load("experts", render("experts"))
        tokens, heads, k = call.index.shape
        number, device = call.w.shape[0], call.a.device
        ids = call.index
        if call.own:
            ids = ids + torch.arange(0, number, call.experts, device=device)[:, None]
        # fewer bits sort faster
        kind = torch.uint8 if number <= 256 else torch.int32
        found = ids.flatten().to(kind).sort(stable=True)
        numbers = torch.arange(number, device=device, dtype=kind)
        self.order = found.indices
        self.ends = torch.searchsorted(found.values, numbers, right=True, out_int32=True)
        self.gate = call.gate.flatten().to(torch.float32)
        # as many as an expert has where it was chosen by all, each once
        self.tiles = -(-tokens * (1 if call.own else heads) // tile.rows)
        self.token, self.slot = heads * k, k

    def product(
        self, *, into: Tensor | None = None, dots: tuple[Tensor | None, Tensor | None] = _NO_DOTS
    ) -> Launch:
        """Rows `a` times their experts. `dots`: rows to multiply the result with, and where that
        goes.
        """
        call = self.call
        sides = (self.slot, self.token) if call.merge else (self.token, self.slot)
        return self._multiply(call.a, call.w, sides, into, dots)

    def back(
        self,
        grad: Tensor,
        *,
        into: Tensor | None = None,
        dots: tuple[Tensor | None, Tensor | None] = _NO_DOTS,
    ) -> Launch:
        """Gradients times the same experts, transposed."""
        sides = (self.token, self.slot) if self.call.merge else (self.slot, self.token)
        return self._multiply(grad, self.call.w.mT, sides, into, dots)

    def _multiply(
        self,
        x: Tensor,
        w: Tensor,
        sides: tuple[int, int],
        into: Tensor | None,
        dots: tuple[Tensor | None, Tensor | None],
    ) -> Launch:
        x, tile, out = dense(x), self.tile, w.shape[2]
        beside, sums = dots
        beside = None if beside is None else dense(beside)
        stride = 0 if beside is None else beside.stride(0)
        columns = min(tile.columns, power(out))
        number = w.shape[0]
        # what is not asked for is not read
        args = (
            x, w, self.order, self.ends, self.gate,
            *(self.gate if t is None else t for t in (into, beside, sums)),
            x.stride(0), *w.stride(), stride, self.tiles,
        )  # fmt: skip
        constants = self._constants(sides, w.shape[1], out, columns) | {
            "EXPERTS": number, "ADDS": into is not None, "DOTS": sums is not None,
            "BLOCK_M": tile.rows, "BLOCK_K": min(tile.step, power(w.shape[1])),
        }  # fmt: skip
        grid = (-(-out // columns) * number * self.tiles, 1, 1)
        return Launch(self.module.multiply, grid, args, constants)

    def weights(self, grad: Tensor, dw: Tensor) -> Launch:
        """Gradients of the weights."""
        sides = (self.slot, self.token) if self.call.merge else (self.token, self.slot)
        x, above, tile = dense(self.call.a), dense(grad), self.tile
        number, ins, outs = dw.shape
        rows, columns = (min(most, power(n)) for most, n in ((tile.columns, ins), (64, outs)))
        args = (x, above, self.order, self.ends, self.gate, dw, x.stride(0), above.stride(0))
        constants = self._constants(sides, ins, outs, columns)
        constants |= {"BLOCK_M": rows, "BLOCK_K": tile.step}
        return Launch(
            self.module.weights, (-(-ins // rows) * -(-outs // columns), number, 1), args, constants
        )

    def _constants(
        self, sides: tuple[int, int], ins: int, outs: int, columns: int
    ) -> dict[str, Any]:
        wide = self.call.a.dtype is torch.float32
        return {
            "OF": sides[0], "TO": sides[1], "IN": ins, "OUT": outs, "BLOCK_N": columns,
            "PRECISION": precision() if wide else "tf32",
            "num_warps": self.tile.warps, "num_stages": self.tile.stages,
        }  # fmt: skip
