"""From measured times to the constants of a hardware and a template.

    sum over measurements of (log predicted - log measured)^2   ->   least

Twenty measurements are enough for six constants if they differ in what bounds them: head dims for
`hidden` and `clock`, a decoding step for `dram`, one tiny call for `launch`. A constant that no
measurement depends on keeps its default. Source: Hooke and Jeeves, direct search (JACM 1961).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.problem import Problem, Template, TileConfig
from attn_compiler.cost.roofline import Calibration, time_of_work
from attn_compiler.cost.work import work
from attn_compiler.errors import BadOption

# least and greatest value of each constant, in their order
_BOUNDS = ((0.0, 0.98), (0.2, 1.5), (0.2, 1.0), (0.1, 1.0), (1e-7, 1e-4), (0.0, 1e5))
# the first steps; halved until they are a thousandth of that
_STEPS = (0.1, 0.1, 0.1, 0.1, 1e-6, 1000.0)
_HALVINGS = 10
_MOVES = 40


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one kernel took: seconds of its launches on the device.

    `resident` is what `limits.resident` says, or better the number the device reports.
    """

    problem: Problem
    tile: TileConfig
    resident: int
    seconds: float


def fit(
    hardware: Hardware,
    template: Template,
    measurements: Sequence[Measurement],
    start: Calibration | None = None,
) -> Calibration:
    """The constants that explain the measurements best.

    Raises:
        BadOption: no measurement, or one that is not a positive time.
    """
    if not measurements:
        raise BadOption("no measurements to fit", do="give at least one, better twenty")
    if any(not 0.0 < m.seconds < math.inf for m in measurements):
        raise BadOption("a measured time is not positive")
    known = [(m, work(hardware, m.problem, template, m.tile)) for m in measurements]

    def error(point: Sequence[float]) -> float:
        constants, total = Calibration(*point), 0.0
        for m, does in known:
            found = time_of_work(hardware, does, m.tile, m.resident, constants).seconds
            total += math.log(found / m.seconds) ** 2
        return total

    return Calibration(*_least(error, list(astuple(start or Calibration()))))


def _least(error: Callable[[Sequence[float]], float], point: list[float]) -> list[float]:
    best = error(point)
    steps = list(_STEPS)
    for _ in range(_HALVINGS):
        for _ in range(_MOVES):
            old = list(point)
            value = _explored(error, point, best, steps)
            if value >= best:
                break
            best = value
            # a step that helped is worth another one in the same direction
            further = [_within(i, 2 * point[i] - was) for i, was in enumerate(old)]
            value = _explored(error, further, error(further), steps)
            if value < best:
                point, best = further, value
        steps = [step / 2 for step in steps]
    return point


def _explored(
    error: Callable[[Sequence[float]], float],
    point: list[float],
    best: float,
    steps: Sequence[float],
) -> float:
    """Each constant one step up or down, where that helps; changes `point`."""
    for i, step in enumerate(steps):
        was = point[i]
        for change in (step, -step):
            point[i] = _within(i, was + change)
            value = error(point)
            if value < best:
                best = value
                break
            point[i] = was
    return best


def _within(i: int, value: float) -> float:
    low, high = _BOUNDS[i]
    return min(max(value, low), high)
