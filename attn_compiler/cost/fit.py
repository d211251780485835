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

from attn_compiler.cost.calibration import BOUNDS, Calibration, default
from attn_compiler.cost.cpu import Phases
from attn_compiler.cost.cpu import time_of as time_of_phases
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.problem import Problem, Template, TileConfig
from attn_compiler.cost.roofline import predict, time_of_work
from attn_compiler.cost.work import work
from attn_compiler.errors import BadOption

# the first steps; halved until they are a thousandth of that
_STEPS = (0.1, 0.1, 0.1, 0.1, 1e-6, 1000.0)
_HALVINGS = 10
# no kernel on a GPU reads faster than memory and the last cache are
_OF_A_GPU = (*BOUNDS[:1], (0.2, 1.5), (0.2, 1.0), (0.1, 1.0), *BOUNDS[4:])
# how much a constant of a CPU wants to be what it usually is, beside one measurement: caches, calls
# and overlap explain much the same there, and few calls cannot tell them apart
_PRIOR = 0.05
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
    """The constants that explain the measurements of a generated kernel best.

    Raises:
        BadOption: no measurement, or one that is not a positive time.
    """
    known = [(m, work(hardware, m.problem, template, m.tile)) for m in measurements]
    guesses = [
        lambda c, m=m, does=does: time_of_work(hardware, does, m.tile, m.resident, c).seconds
        for m, does in known
    ]
    seconds = [m.seconds for m in measurements]
    return _fitted(guesses, seconds, start or default(template), _OF_A_GPU)


def fit_cpu(
    hardware: Hardware, way: str, measurements: Sequence[tuple[Phases, float]], itemsize: int = 4
) -> Calibration:
    """The same for a way to compute attention on a CPU.

    Args:
        way: whose defaults are started from.
        measurements: what was done, and its seconds.
        itemsize: of what the products multiply.
    """
    guesses = [
        lambda c, phases=phases: time_of_phases(phases, hardware, itemsize, c).seconds
        for phases, _ in measurements
    ]
    return _fitted(guesses, [seconds for _, seconds in measurements], default(way), BOUNDS, _PRIOR)


def off(
    hardware: Hardware,
    template: Template,
    found: Sequence[Measurement],
    constants: Calibration | None,
) -> float:
    """The mean factor, above 1, between predicted and measured."""
    logs = [
        abs(math.log(
            predict(hardware, m.problem, template, m.tile, m.resident, constants).seconds
            / m.seconds
        ))
        for m in found
    ]  # fmt: skip
    return math.exp(sum(logs) / len(logs))


Guess = Callable[[Calibration], float]
Bounds = Sequence[tuple[float, float]]


def _fitted(
    guesses: Sequence[Guess],
    seconds: Sequence[float],
    start: Calibration,
    bounds: Bounds,
    prior: float = 0.0,
) -> Calibration:
    if not seconds:
        raise BadOption("no measurements to fit", do="give at least one, better twenty")
    if any(not 0.0 < s < math.inf for s in seconds):
        raise BadOption("a measured time is not positive")

    def error(point: Sequence[float]) -> float:
        constants = Calibration(*point)
        pairs = zip(guesses, seconds, strict=True)
        found = sum(math.log(guess(constants) / taken) ** 2 for guess, taken in pairs)
        return found + prior * sum(map(_distance, point, usual)) if prior else found

    usual = list(astuple(start))
    return Calibration(*_least(error, list(usual), bounds))


def _distance(value: float, usual: float) -> float:
    return math.log((value + 1e-9) / (usual + 1e-9)) ** 2


def _least(
    error: Callable[[Sequence[float]], float], point: list[float], bounds: Bounds
) -> list[float]:
    best = error(point)
    steps = list(_STEPS)
    for _ in range(_HALVINGS):
        for _ in range(_MOVES):
            old = list(point)
            value = _explored(error, point, best, steps, bounds)
            if value >= best:
                break
            best = value
            # a step that helped is worth another one in the same direction
            further = [_within(bounds[i], 2 * point[i] - was) for i, was in enumerate(old)]
            value = _explored(error, further, error(further), steps, bounds)
            if value < best:
                point, best = further, value
        steps = [step / 2 for step in steps]
    return point


def _explored(
    error: Callable[[Sequence[float]], float],
    point: list[float],
    best: float,
    steps: Sequence[float],
    bounds: Bounds,
) -> float:
    """Each constant one step up or down, where that helps; changes `point`."""
    for i, step in enumerate(steps):
        was = point[i]
        for change in (step, -step):
            point[i] = _within(bounds[i], was + change)
            value = error(point)
            if value < best:
                best = value
                break
            point[i] = was
    return best


def _within(bounds: tuple[float, float], value: float) -> float:
    low, high = bounds
    return min(max(value, low), high)
