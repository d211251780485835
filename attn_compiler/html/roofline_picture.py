"""A roofline as numbers for an SVG: both axes logarithmic, two roofs, a point for each way.

    x = log10(flop / byte)      y = log10(flop / second)

Source: Williams et al., Roofline (CACM 2009).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from attn_compiler.cost.points import Point, Roofline

WIDTH, HEIGHT = 420, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 12, 40


@dataclass(frozen=True, slots=True)
class Mark:
    """A point on the page.

    Attributes:
        x, y: its place.
        number: of the way in the table beside it, from 1.
        label: where the number stands; points that would cover each other are moved apart.
    """

    x: float
    y: float
    number: int
    label: tuple[float, float]
    point: Point


@dataclass(frozen=True, slots=True)
class RooflinePicture:
    """All that is drawn.

    Attributes:
        roof, peak, cache: corners of polylines.
        ticks_x, ticks_y: place and text.
        marks: the ways.
    """

    roof: str
    peak: str
    cache: str
    ticks_x: tuple[tuple[float, str], ...]
    ticks_y: tuple[tuple[float, str], ...]
    marks: tuple[Mark, ...]
    ridge: tuple[float, float]
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


@dataclass(frozen=True, slots=True)
class _Axes:
    """Decades that are shown."""

    x0: int
    x1: int
    y0: int
    y1: int

    def x(self, value: float) -> float:
        share = (math.log10(value) - self.x0) / (self.x1 - self.x0)
        return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        share = (math.log10(value) - self.y0) / (self.y1 - self.y0)
        return round(HEIGHT - _BOTTOM - share * (HEIGHT - _BOTTOM - _TOP), 1)


def picture(found: Roofline) -> RooflinePicture:
    """Place the roofs and the points.

    Args:
        found: with at least one point.
    """
    rates = [p.rate for p in found.points]
    where = [p.intensity for p in found.points]
    axes = _Axes(
        math.floor(math.log10(min(*where, found.ridge) / 2)),
        math.ceil(math.log10(max(*where, found.ridge) * 2)),
        math.floor(math.log10(min(rates) / 1.5)),
        math.ceil(math.log10(max(found.peak, *rates) * 1.2)),
    )
    low, high = 10.0**axes.x0, 10.0**axes.x1

    def line(rate: float, most: float) -> str:
        floor = 10.0**axes.y0
        start = max(low, floor / rate)
        corner = min(max(most / rate, start), high)
        ends = [(start, start * rate), (corner, corner * rate), (high, min(most, high * rate))]
        return " ".join(f"{axes.x(x)},{axes.y(y)}" for x, y in ends)

    return RooflinePicture(
        roof=line(found.memory, found.sustained),
        peak=" ".join(f"{axes.x(x)},{axes.y(found.peak)}" for x in (low, high)),
        cache=line(found.cache, found.sustained),
        ticks_x=tuple((axes.x(10.0**e), _decade(e)) for e in range(axes.x0, axes.x1 + 1)),
        ticks_y=tuple((axes.y(10.0**e), _decade(e)) for e in range(axes.y0, axes.y1 + 1)),
        marks=_marks(axes, found.points),
        ridge=(axes.x(found.ridge), axes.y(found.sustained)),
    )


def _marks(axes: _Axes, points: tuple[Point, ...]) -> tuple[Mark, ...]:
    taken: list[tuple[float, float]] = []
    marks = []
    for number, point in enumerate(points, 1):
        x, y = axes.x(point.intensity), axes.y(point.rate)
        label = (x + 8, y + 4)
        while any(abs(label[0] - a) < 12 and abs(label[1] - b) < 11 for a, b in taken):
            label = (label[0] + 12, label[1])
        taken.append(label)
        marks.append(Mark(x, y, number, label, point))
    return tuple(marks)


def _decade(exponent: int) -> str:
    """10 ** exponent as people say it."""
    names = {-6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P"}
    step = exponent // 3 * 3
    return f"{10 ** (exponent - step)}{names.get(step, f'e{step}')}"
