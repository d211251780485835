"""How long it takes: what every unit needs for itself, how far they overlap, how evenly they share.

    tile = max(tensor, special) + (1 - hidden) min(tensor, special)
    time = launches + norm(processors, last cache, memory)

Processors: with m of them, programs of v_1 >= v_2 >= ... tiles take at least
max(sum(v) / m, ceil(i / m) v_i for every i): the longest-first makespan for unequal programs and
the ceiling of whole waves for equal ones. Splitting the keys among programs is in the same formula,
ceil(waves) (tiles / split + prologue) + merge split. The norm is nearly a maximum: units that take
equally long get in each other's way.

Source: Williams et al., Roofline (CACM 2009); two units instead of one, FlashAttention-3 (2024);
longest processing time first, Graham (1969).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attn_compiler.cost.calibration import Calibration
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.problem import Problem, Template, TileConfig
from attn_compiler.cost.work import Work, matrix_rate, work

if TYPE_CHECKING:  # a kernel's launch needs no sympy
    from attn_compiler.cost.letters import Cost

# clocks until a load from beyond the processor arrives (assumed, one number for all devices)
_LATENCY = 800.0
# bytes that one processor takes from the last cache per clock, before `l2` (assumed)
_PORT = 64.0
# clocks that a tile costs beside its work: the loop, its barriers, its reductions (assumed)
_LOOP = 100.0
# `hidden` is meant for so many warps of a processor
_WARPS = 8


@dataclass(frozen=True, slots=True)
class Time:
    """A prediction.

    Attributes:
        seconds: of one call.
        limit: what bounds it: "tensor", "special", "shared", "latency", "waves" (programs that do
            not spread evenly), "l2", "dram", "launch".
        parts: seconds that each would need by itself.
    """

    seconds: float
    limit: str
    parts: tuple[tuple[str, float], ...]


def predict(
    hardware: Hardware,
    problem: Problem,
    template: Template,
    tile: TileConfig,
    resident: int,
    calibration: Calibration | None = None,
) -> Time:
    """The time of one generated kernel.

    Args:
        resident: programs that fit on a processor at once (`limits.resident`), at least 1.
        calibration: None takes those of the hardware.
    """
    does = work(hardware, problem, template, tile)
    fit = calibration or hardware.constants_of(template)
    return time_of_work(hardware, does, tile, resident, fit)


def time_of_work(
    hardware: Hardware, does: Work, tile: TileConfig, resident: int, fit: Calibration
) -> Time:
    """The same for work that is known already."""
    machine = _Machine(does, tile, resident, fit)
    clock = hardware.clock * hardware.sustained * fit.clock
    even, uneven = machine.clocks(hardware.processors)
    l2 = does.l2 / (hardware.l2_rate * hardware.clock * fit.l2)
    dram = does.dram / (hardware.dram_rate * fit.dram)
    launch = does.launches * fit.launch
    processors = max(even, uneven) / clock
    tiles = sum(n * t for n, t in does.blocks) / hardware.processors / clock
    parts = (
        ("tensor", tiles * does.step.tensor),
        ("special", tiles * does.step.special),
        ("shared", tiles * does.step.shared),
        ("processors", processors),
        ("l2", l2),
        ("dram", dram),
        ("launch", launch),
    )
    return Time(
        launch + together(processors, l2, dram), _limit(parts, even, uneven, machine), parts
    )


def together(*seconds: float) -> float:
    """Of units that work at the same time: the 8-norm, 9 percent above two equal ones (assumed)."""
    longest = max(seconds)
    if longest == 0.0:
        return 0.0
    return longest * math.pow(sum((s / longest) ** 8 for s in seconds), 1 / 8)


def _limit(
    parts: tuple[tuple[str, float], ...], even: float, uneven: float, machine: _Machine
) -> str:
    found = dict(parts)
    outer = max(("processors", "l2", "dram", "launch"), key=lambda name: found[name])
    if outer != "processors":
        return outer
    if uneven > 1.25 * even:
        return "waves"
    if machine.waits:
        return "latency"
    return max(("tensor", "special", "shared"), key=lambda name: found[name])


@dataclass(frozen=True, slots=True)
class _Machine:
    """One processor with the programs that live on it."""

    work: Work
    tile: TileConfig
    resident: int
    fit: Calibration

    @property
    def waits(self) -> bool:
        """Loads come too late even with every program that fits."""
        return self._pace(self.resident) > self._busy(self.resident)

    def clocks(self, processors: int) -> tuple[float, float]:
        """Of the busiest processor: if all shared evenly, and as whole programs are shared."""
        paces = [self._pace(n) for n in range(1, self.resident + 1)]
        before, tiles, longest = 0.0, 0.0, 0.0
        for programs, each in self.work.blocks:
            before += programs
            tiles += programs * each
            # of the longest programs so far some processor runs so many
            queue = int(-(-before // processors))
            rounds, left = divmod(queue, self.resident)
            clocks = rounds * self.resident * paces[-1] + (left * paces[left - 1] if left else 0.0)
            starts = rounds + (left > 0)
            longest = max(longest, clocks * each + starts * self.fit.prologue)
        total = tiles * paces[-1] + before * self.fit.prologue / self.resident
        return total / processors, longest

    def _pace(self, programs: int) -> float:
        """Clocks from tile to tile of a processor that so many programs share."""
        ahead, busy = self.tile.stages - 1, self._busy(programs)
        port = self.work.step.bytes / (_PORT * self.fit.l2)
        if ahead < 1:
            return busy + port + _LATENCY / programs
        return max(busy, port, _LATENCY / (ahead * programs))

    def _busy(self, programs: int) -> float:
        """The same if every load were there in time."""
        step = self.work.step
        feed = max(step.tensor, step.shared)
        seen = math.pow(1.0 - self.fit.hidden, programs * self.tile.warps / _WARPS)
        both = max(feed, step.special) + seen * min(feed, step.special)
        return both + _LOOP / programs


# ---------------------------------------------------------------- without a tile


def time_of(
    cost: Cost,
    hardware: Hardware,
    itemsize: int = 2,
    tf32: bool = False,
    held: float | None = None,
    calibration: Calibration | None = None,
) -> Time:
    """The time of a cost in numbers: an operator of which no more is known.

    Args:
        cost: numbers, of `Cost.numbers`.
        itemsize, tf32: what the matrix products multiply.
        held: bytes that the call works on; if they fit, the last cache serves them. None is memory.
    """
    fit = calibration or Calibration()
    clock = hardware.clock * hardware.sustained * fit.clock * hardware.processors
    tensor = cost.flops / (clock * matrix_rate(hardware, itemsize, tf32))
    special = cost.exps / (clock * hardware.exps) + cost.other / (clock * hardware.flops32)
    moved = cost.read + cost.written
    cached = held is not None and held <= hardware.l2
    rate = hardware.l2_rate * hardware.clock * fit.l2 if cached else hardware.dram_rate * fit.dram
    memory = "l2" if cached else "dram"
    launch = cost.launches * fit.launch
    parts = (
        ("tensor", tensor), ("special", special), (memory, moved / rate), ("launch", launch)
    )  # fmt: skip
    busy = max(tensor, special) + (1.0 - fit.hidden) * min(tensor, special)
    limit = max(parts, key=lambda part: part[1])[0]
    return Time(launch + together(busy, moved / rate), limit, parts)
