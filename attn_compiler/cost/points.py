"""A roofline plot in numbers: what a device can do at most, and what each prediction reaches.

    rate <= min(matrix rate, intensity x memory rate),     intensity = flop / bytes

A point under both roofs is bounded by something that the plot does not show (exponentials, waves,
launches): its `limit` says what.

Source: Williams et al., Roofline (CACM 2009).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.work import matrix_rate


@dataclass(frozen=True, slots=True)
class Point:
    """One prediction.

    Attributes:
        name: what it is of.
        intensity: operations of matrix products per byte that crosses memory's bus.
        rate: operations per second.
        limit: what bounds it, as `roofline.Time` names it.
    """

    name: str
    intensity: float
    rate: float
    limit: str


@dataclass(frozen=True, slots=True)
class Roofline:
    """Roofs of a device and the points under them.

    Attributes:
        hardware: its name.
        peak: operations per second of matrix products, as published.
        sustained: the same at the clock that is left under load.
        memory, cache: bytes per second of memory and of the last cache.
        points: predictions.
    """

    hardware: str
    peak: float
    sustained: float
    memory: float
    cache: float
    points: tuple[Point, ...] = ()

    @property
    def ridge(self) -> float:
        """The intensity from which on memory's rate no longer bounds the sustained rate."""
        return self.sustained / self.memory

    def roof(self, intensity: float) -> float:
        """Operations per second that are possible at an intensity."""
        return min(self.sustained, intensity * self.memory)

    def with_point(
        self, name: str, work: tuple[float, float], seconds: float, limit: str
    ) -> Roofline:
        """The same with a further prediction; without products or bytes there is no point.

        Args:
            work: operations and bytes of a call.
            seconds: predicted.
        """
        flops, moved = work
        if min(flops, moved, seconds) <= 0.0:
            return self
        point = Point(name, flops / moved, flops / seconds, limit)
        return replace(self, points=(*self.points, point))


def roofline(hardware: Hardware, itemsize: int = 2, tf32: bool = False) -> Roofline:
    """The roofs of a device.

    Args:
        itemsize, tf32: what the matrix products multiply.
    """
    peak = hardware.processors * hardware.clock * matrix_rate(hardware, itemsize, tf32)
    return Roofline(
        hardware=hardware.name,
        peak=peak,
        sustained=peak * hardware.sustained,
        memory=hardware.dram_rate,
        cache=hardware.l2_rate * hardware.clock,
    )
