"""From results to the plots in docs/performance.md: how many times faster each way is.

    results/cpu_choice.json   ->   docs/plots/cpu_choice.svg, and the page names it

Only what was measured is drawn: without a result there is no plot. A ratio is taken inside of each
round; a dot is the median, its line runs from the smallest to the largest.

    python examples/benchmarks/plots.py [--results FOLDER] [--page docs/performance.md]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gpu_table

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- plots -->", "<!-- end of plots -->"
# background, text and lines by what the reader prefers
LIGHT = {"back": "#ffffff", "text": "#1f2328", "line": "#d0d7de"}
DARK = {"back": "#0d1117", "text": "#e6edf3", "line": "#30363d"}
# seen on both backgrounds
COLOURS = ("#2f81c7", "#c8553d", "#3a8f4e", "#9a6fc0", "#a3791f")
_LEFT, _RIGHT, _TOP, _ROW, _BOTTOM = 300, 30, 64, 24, 44
_PLOT = 420
_SHOWN = ("forward", "backward", "variants", "variants backward", "decode", "blocks")


@dataclass(frozen=True, slots=True)
class Line:
    """One case.

    Attributes:
        name: what was measured.
        ratios: how many times faster, in each round, by way.
    """

    name: str
    ratios: dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Plot:
    """Cases under one another."""

    title: str
    across: str
    lines: tuple[Line, ...]


def of_result(result: dict[str, Any]) -> Plot | None:
    """The plot of one result; None if nothing was measured that can be compared."""
    rows = result.get("rows", [])
    if any("case" in row for row in rows):
        lines, title = tuple(_choices(rows)), f"CPU, {result['threads']} threads, float32"
        across = "times as fast as the model's own way (keep; layer with cached keys and values)"
    else:
        lines, title = tuple(_against(rows)), str(result.get("gpu", ""))
        across = "generated kernel: times as fast as"
    return Plot(title, across, lines) if lines else None


def _choices(rows: Sequence[dict[str, Any]]) -> Iterator[Line]:
    for row in rows:
        (_, base), *others = row["seconds"].items()
        found = {
            way: [slow / fast for slow, fast in zip(base, seconds, strict=True)]
            for way, seconds in others
        }
        yield Line(_case(row["case"]), found)


def _case(case: dict[str, Any]) -> str:
    what = "one row" if case["rows"] == 1 else "full"
    if case["causal"] or case["window"]:
        what = f"window {case['window']}" if case["window"] else "causal"
    if case["density"] is not None:
        what = f"{case['density']:.0%} of the blocks"
    if case["beams"]:
        what = f"step, {case['beams']} beam{'s' * (case['beams'] > 1)}"
    length = f"T {case['rows']}" if case["rows"] == case["keys"] else f"{case['keys']} keys"
    return f"{what}, B {case['batch']}, {case['heads']} heads of {case['head_dim']}, {length}"


def _against(rows: Sequence[dict[str, Any]]) -> Iterator[Line]:
    for row in rows:
        if row.get("section") in _SHOWN and "triton" in row.get("ways", {}):
            others = [way for way in row["ways"] if way in ("cudnn", "flash", "flex", "dense")]
            found = {way: gpu_table.ratios(row, way, "triton") for way in others}
            found = {way: values for way, values in found.items() if values}
            if found:
                yield Line(gpu_table.title(row), found)


# ---------------------------------------------------------------- drawing


def svg(plot: Plot) -> str:
    """The plot over a logarithmic axis, in the colours that the reader prefers."""
    ways = list(dict.fromkeys(way for line in plot.lines for way in line.ratios))
    every = [r for line in plot.lines for ratios in line.ratios.values() for r in ratios]
    low, high = (math.floor(math.log2(min(every))), math.ceil(math.log2(max(every))))
    low, high = min(low, -1), max(high, 1)
    width, bottom = _LEFT + _PLOT + _RIGHT, _TOP + _ROW * len(plot.lines)

    def x(ratio: float) -> float:
        return _LEFT + (math.log2(ratio) - low) / (high - low) * _PLOT

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + _BOTTOM}" '
        'font-family="sans-serif" font-size="12" role="img">',
        f"<title>{escape(plot.title)}: {escape(plot.across)}</title>",
        f"<style>{_style()}</style>",
        f'<rect class="back" width="{width}" height="{bottom + _BOTTOM}"/>',
        _text(12, 22, plot.title, size=14),
        _text(_LEFT + _PLOT / 2, bottom + 36, plot.across, "middle"),
    ]
    for number, way in enumerate(ways):
        at = _LEFT + 105 * number
        parts += [_dot(at + 5, 40, number), _text(at + 16, 44, way)]
    for power in range(low, high + 1):
        at, kind = x(2.0**power), "one" if power == 0 else "grid"
        parts.append(
            f'<line class="{kind}" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{bottom}"/>'
        )
        parts.append(_text(at, bottom + 16, f"{2.0**power:g}", "middle"))
    for row, line in enumerate(plot.lines):
        y = _TOP + _ROW * (row + 0.5)
        parts.append(_text(_LEFT - 10, y + 4, line.name, "end"))
        for place, (way, ratios) in enumerate(line.ratios.items()):
            at = y + 6 * (place - (len(line.ratios) - 1) / 2)
            parts += _mark(at, [x(r) for r in ratios], ways.index(way))
    return "\n".join([*parts, "</svg>\n"])


def _mark(y: float, places: Sequence[float], number: int) -> list[str]:
    """A median as a dot, with a line from the smallest to the largest."""
    colour = COLOURS[number % len(COLOURS)]
    spread = (
        f'<line x1="{min(places):.1f}" y1="{y:.1f}" x2="{max(places):.1f}" y2="{y:.1f}" '
        f'stroke="{colour}" stroke-width="2"/>'
    )
    return [spread, _dot(statistics.median(places), y, number)]


def _dot(x: float, y: float, number: int) -> str:
    colour = COLOURS[number % len(COLOURS)]
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'


def _style() -> str:
    def rules(theme: dict[str, str]) -> str:
        return (
            f".back{{fill:{theme['back']}}} text{{fill:{theme['text']}}} "
            f".grid{{stroke:{theme['line']}}} .one{{stroke:{theme['text']}}}"
        )

    return f"{rules(LIGHT)} @media (prefers-color-scheme: dark) {{ {rules(DARK)} }}"


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f"<text {where}>{escape(text)}</text>"


# ---------------------------------------------------------------- files


def write(results: Path, page: Path) -> list[Path]:
    """Draw every result of a folder beside the page, and name the plots in it; those that were
    drawn, and no others, are there afterwards.
    """
    folder = page.parent / "plots"
    folder.mkdir(exist_ok=True)
    drawn = []
    for file in sorted(results.glob("*.json")):
        plot = of_result(json.loads(file.read_text(encoding="utf-8")))
        if plot is not None:
            drawn.append(folder / f"{file.stem}.svg")
            drawn[-1].write_text(svg(plot), encoding="utf-8")
    for old in set(folder.glob("*.svg")) - set(drawn):
        old.unlink()
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    named = "\n\n".join(f"![speed, {file.stem}](plots/{file.name})" for file in drawn)
    text = named or "Nothing was measured yet."
    page.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    for file in write(options.results, options.page):
        print(file)


if __name__ == "__main__":
    main()
