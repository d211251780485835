"""The tiles of a call, the fastest first: every legal one, its predicted time, sorted.

    choose(Hardware.named("h200"), problem)[0]   ->   (TileConfig(128, 64, 8, 3), Time(...))

One choice is made for a class of shapes (`Problem.bucketed`) and kept, so that a length that grows
by one each step does not search each step.
"""

from __future__ import annotations

from functools import lru_cache

from attn_compiler.cost.calibration import Calibration
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.problem import Problem, Template, TileConfig
from attn_compiler.cost.roofline import Time, predict
from attn_compiler.cost.tile import legal

Choice = tuple[TileConfig, Time]


def choose(
    hardware: Hardware,
    problem: Problem,
    template: Template = "forward",
    calibration: Calibration | None = None,
) -> tuple[Choice, ...]:
    """All tiles that fit, the fastest first; empty where none is known to.

    The times are those of the class of shapes, not of the single length. Of equal times the deeper
    pipeline comes first: it waits less for loads that are later than the model thinks.
    """
    return _choose(hardware, problem.bucketed(), template, calibration)


@lru_cache(maxsize=1024)
def _choose(
    hardware: Hardware, problem: Problem, template: Template, calibration: Calibration | None
) -> tuple[Choice, ...]:
    found = [
        (tile, predict(hardware, problem, template, tile, resident, calibration))
        for tile, resident in legal(hardware, problem, template)
    ]
    return tuple(sorted(found, key=lambda choice: (choice[1].seconds, _rank(choice[0]))))


def _rank(tile: TileConfig) -> tuple[int, ...]:
    return tile.splits, -tile.stages, tile.block_m * tile.block_n, tile.warps, tile.block_m
