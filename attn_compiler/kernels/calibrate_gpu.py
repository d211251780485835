"""The constants of the generated kernels on a GPU, from seconds of their own launches.

    forward           head dims 64, 128, 256, long and short, decoding, one tiny call   ->   fit
    queries           each kernel of the backward by itself
    keys_and_values

The calls differ in what bounds them, so that each constant is seen by some: head dims for `hidden`
and `clock`, decoding for `dram`, many small programs for `prologue`, a tiny call for `launch`. Not
measured on a GPU yet.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from attn_compiler.cost.fit import Measurement, fit
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.limits import living
from attn_compiler.cost.problem import TEMPLATES, Problem, Template, TileConfig
from attn_compiler.cost.search import choose
from attn_compiler.errors import BadOption
from attn_compiler.ir.expr import parse
from attn_compiler.ir.score import Program
from attn_compiler.kernels import flash_triton, flash_triton_backward
from attn_compiler.kernels.frame import Frame, Inputs
from attn_compiler.kernels.launch import Tile
from attn_compiler.kernels.timing import Clock

log = logging.getLogger("attn_compiler")
_ROUNDS = 5
# batch, heads, kv heads, rows, keys, head dim, causal
_FORWARD = (
    (2, 16, 16, 4096, 4096, 64, False),
    (2, 16, 16, 4096, 4096, 128, False),
    (1, 8, 8, 4096, 4096, 256, False),
    (4, 16, 16, 2048, 2048, 64, True),
    (4, 16, 16, 2048, 2048, 128, True),
    (8, 16, 4, 512, 512, 128, True),
    (32, 32, 8, 1, 8192, 128, False),
    (1, 32, 8, 1, 32768, 128, False),
    (1, 2, 2, 64, 64, 64, False),
)
_BACKWARD = tuple(case for case in _FORWARD if case[3] > 1)
# tiles of each call: the model's first ones, so that it learns what tells them apart
_TILES = 2
Run = Callable[[Problem, Template, TileConfig], Callable[[], None]]


def on_a_gpu(row: Hardware, device: torch.device, time: Clock) -> Hardware:
    """The row with what was fitted for each template.

    Raises:
        BadOption: no kernel can be generated for the device, or none ran.
    """
    found = {t: list(measured(row, t, time, Calls(device).run)) for t in TEMPLATES}
    constants = [(t, fit(row, t, each)) for t, each in sorted(found.items()) if each]
    if not constants:
        raise BadOption(
            f"nothing could be measured on {row.name}",
            do="see the log; without calibration the defaults hold",
        )
    return replace(row, constants=tuple(constants), mark="measured")


def measured(
    hardware: Hardware, template: Template, time: Clock, run: Run
) -> Iterator[Measurement]:
    """At most twenty measurements of a template; what fails is left out with a line in the log.

    Args:
        run: makes a call of a kernel with a tile.
    """
    for batch, heads, kv_heads, rows, keys, width, causal in (
        _FORWARD if template == "forward" else _BACKWARD
    ):
        problem = Problem(
            batch, heads, kv_heads, rows, keys, width, width, right=0 if causal else None
        )
        for tile, _ in choose(hardware, problem, template)[:_TILES]:
            lives = living(hardware, problem, template, tile)
            try:
                call = run(problem, template, tile)
                call()  # compiles it
                seconds = statistics.median(time(call) for _ in range(_ROUNDS))
            except RuntimeError as error:
                log.warning("%s with %s is not measured: %s", template, tile, error)
                continue
            yield Measurement(problem, tile, lives, seconds)


class Calls:
    """Kernels on random numbers of a device, bfloat16."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def run(self, problem: Problem, template: Template, tile: TileConfig) -> Callable[[], None]:
        """A launch with everything made before it."""
        given, used = self._given(problem), launched(tile)
        if template == "forward":
            return lambda: _discard(flash_triton.forward(Frame(given), used))
        out, lse = flash_triton.forward(Frame(given), launched(_first_tile(problem, tile)))
        grad = torch.randn_like(out)
        results = (
            torch.empty_like(given.q), torch.empty_like(given.k), torch.empty_like(given.v)
        )  # fmt: skip
        launches = flash_triton_backward.prepare_backward(
            Frame(given), grad, (out, lse), {}, (used, used), results
        )
        launches[0].run()
        return launches[1 if template == "queries" else 2].run

    def _given(self, problem: Problem) -> Inputs:
        def drawn(length: int, heads: int) -> Tensor:
            shape = (problem.batch, length, heads, problem.head_dim)
            x = torch.randn(shape, device=self._device, dtype=torch.bfloat16)
            return x.transpose(1, 2)

        mask = parse("k <= q") if problem.right == 0 else None
        program = Program() if mask is None else Program(mask=mask, empty="any")
        return Inputs.of(
            drawn(problem.rows, problem.heads), drawn(problem.keys, problem.kv_heads),
            drawn(problem.keys, problem.kv_heads), [], [], None,
            program=str(program), scale=problem.head_dim**-0.5, dropout=0.0,
        )  # fmt: skip


def _first_tile(problem: Problem, tile: TileConfig) -> TileConfig:
    """For the forward whose results a backward needs: small, so that it runs anywhere."""
    return TileConfig(64, 32, 4, 2) if problem.head_dim <= 128 else TileConfig(64, 32, 8, 2)


def _discard(_: object) -> None:
    """The time counts, not the result."""


def launched(tile: TileConfig) -> Tile:
    """A tile of the cost model as a launch takes it."""
    return Tile(tile.block_m, tile.block_n, tile.warps, tile.stages, tile.heads, tile.splits)
