"""Plots of what was measured: true to the results, readable, and none where nothing was."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import plots
import pytest

RESULTS = plots.HERE / "results"


def _page(folder: Path) -> Path:
    page = folder / "performance.md"
    page.write_text(f"before\n{plots.BEGIN}\nold\n{plots.END}\nafter\n", encoding="utf-8")
    return page


def test_the_plots_of_the_page_are_those_of_the_results(tmp_path: Path) -> None:
    """If results have changed: python examples/benchmarks/plots.py."""
    page = tmp_path / plots.PAGE.name
    shutil.copy(plots.PAGE, page)
    drawn = plots.write(RESULTS, page)
    assert drawn and page.read_text() == plots.PAGE.read_text()
    committed = {file.name: file.read_text() for file in (plots.PAGE.parent / "plots").iterdir()}
    assert {file.name: file.read_text() for file in drawn} == committed


def test_a_dot_is_the_median_of_the_ratios(tmp_path: Path) -> None:
    case = {"batch": 1, "heads": 3, "rows": 5, "keys": 5, "head_dim": 7, "causal": True}
    case |= {"window": 0, "density": None, "beams": 0}
    rows = [{"case": case, "seconds": {"keep": [2.0, 4.0, 8.0], "sdpa": [1.0, 1.0, 1.0]}}]
    (tmp_path / "here.json").write_text(json.dumps({"threads": 2, "rows": rows}))
    (drawn,) = plots.write(tmp_path, _page(tmp_path))
    root = ET.fromstring(drawn.read_text())
    space = {"s": "http://www.w3.org/2000/svg"}
    ticks = {t.text: float(t.attrib["x"]) for t in root.findall(".//s:text", space)}
    _, dot = root.findall(".//s:circle", space)
    (line,) = [n for n in root.findall(".//s:line", space) if "stroke" in n.attrib]
    ends = [float(line.attrib[name]) for name in ("x1", "x2")]
    assert ends == pytest.approx([ticks["2"], ticks["8"]], abs=0.11)
    assert float(dot.attrib["cx"]) == pytest.approx(ticks["4"], abs=0.11)
    assert "causal, B 1, 3 heads of 7, T 5" in ticks


def test_without_results_there_is_no_plot(tmp_path: Path) -> None:
    page = _page(tmp_path)
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "gone.svg").write_text("")
    (tmp_path / "empty.json").write_text(json.dumps({"rows": [], "gpu": "H200"}))
    assert plots.write(tmp_path, page) == [] and not list((tmp_path / "plots").iterdir())
    assert page.read_text() == (
        f"before\n{plots.BEGIN}\nNothing was measured yet.\n{plots.END}\nafter\n"
    )


def test_a_result_of_a_gpu_is_drawn_against_the_others() -> None:
    sizes = {"B": 1, "H": 3, "G": 3, "T": 64, "S": 64, "d": 32}
    row = {"section": "forward", "rule": "causal", "sizes": sizes, "ways": {}}
    row["ways"] = {"triton": {"seconds": [1.0, 2.0]}, "cudnn": {"seconds": [3.0, 3.0]}}
    row["ways"]["flash"] = {"seconds": [1.0, 1.0], "differences": [0.5]}  # wrong numbers
    plot = plots.of_result({"gpu": "<H200>", "rows": [row, {"error": "x", "name": "y"}]})
    assert plot is not None and [line.ratios for line in plot.lines] == [{"cudnn": [3.0, 1.5]}]
    ET.fromstring(plots.svg(plot))


def _light(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_light(one), _light(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [plots.LIGHT, plots.DARK], ids=["light", "dark"])
def test_both_themes_can_be_read(theme: dict[str, str]) -> None:
    """WCAG asks for 4.5 of text, and for 3 of marks."""
    assert _contrast(theme["text"], theme["back"]) > 4.5
    assert min(_contrast(colour, theme["back"]) for colour in plots.COLOURS) > 3


def test_a_plot_is_alone_and_small() -> None:
    for file in (plots.PAGE.parent / "plots").glob("*.svg"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg)|url\(|<script", text)
        assert len(text) < 100_000
