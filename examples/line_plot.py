"""Lines over two axes as SVG, without a library.

write(path, {"dense": [(1, 2.1), (2, 1.9)]}, title="loss", across="steps", up="bits per byte")
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 640, 400, 70, 40, 150, 55
_COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4b94", "#8a6d1f", "#4a4a4a")


def write(path: Path, lines: Mapping[str, Points], *, title: str, across: str, up: str) -> None:
    """Draw every line with its name, and its points as dots."""
    points = [point for line in lines.values() for point in line]
    x, y = (_Axis.of([p[i] for p in points]) for i in (0, 1))
    right, low = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_WIDTH / 2, 22, title, "middle", size=15),
        _text((_LEFT + right) / 2, _HEIGHT - 12, across, "middle"),
        f'<g transform="rotate(-90 18 {(_TOP + low) / 2})">'
        + _text(18, (_TOP + low) / 2, up, "middle")
        + "</g>",
    ]
    for value in x.ticks:
        at = _LEFT + x.share(value) * (right - _LEFT)
        parts += [_line(at, _TOP, at, low), _text(at, low + 16, f"{value:g}", "middle")]
    for value in y.ticks:
        at = low - y.share(value) * (low - _TOP)
        parts += [_line(_LEFT, at, right, at), _text(_LEFT - 6, at + 4, f"{value:g}", "end")]
    for number, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [
            (_LEFT + x.share(a) * (right - _LEFT), low - y.share(b) * (low - _TOP)) for a, b in line
        ]
        joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2" fill="{colour}"/>' for a, b in places]
        parts.append(_text(right + 10, _TOP + 12 + 18 * number, name, "start", colour))
    path.write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


class _Axis:
    """From the smallest to the largest value, with about five round ticks."""

    def __init__(self, low: float, high: float, ticks: list[float]) -> None:
        self.low, self.high, self.ticks = low, high, ticks

    @classmethod
    def of(cls, values: Sequence[float]) -> _Axis:
        low, high = min(values), max(values)
        if low == high:
            low, high = low - 0.5, high + 0.5
        rough = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
        low, high = step * math.floor(low / step), step * math.ceil(high / step)
        return cls(low, high, [low + i * step for i in range(round((high - low) / step) + 1)])

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str = "black", size: int = 12) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"'
    return f"<text {where}>{escape(text)}</text>"
