"""From a result to the constants of the cost model.

    {"ways": {"triton": {"tile", "template", "seconds"}}, "problem"}   ->   Measurement   ->   fit

Taken are our kernels where what a row sees is a band; their seconds are those of an event around
the call, medians.
"""

from __future__ import annotations

import statistics
from typing import Any

from gpu_table import wrong

from attn_compiler.cost.fit import Measurement, fit, off
from attn_compiler.cost.hardware import Hardware, of_properties
from attn_compiler.cost.limits import living, resident
from attn_compiler.cost.problem import TEMPLATES, Problem, Template, TileConfig


def hardware_of(result: dict[str, Any]) -> Hardware:
    """The row of the table for the device that was measured."""
    return of_properties(result["gpu"], result["arch"], result["processors"], result["memory"])


def measurements(result: dict[str, Any]) -> dict[Template, list[Measurement]]:
    """What the cost model can learn from, by template; kernels that spill are left out, and scores
    that do what it does not count.
    """
    hardware = hardware_of(result)
    found: dict[Template, list[Measurement]] = {template: [] for template in TEMPLATES}
    for row in result["rows"]:
        if not row.get("problem"):
            continue
        problem = Problem(**row["problem"])
        if problem.extra:
            continue
        for way in row["ways"].values():
            template = way.get("template")
            if template not in found or not way.get("seconds") or way.get("spills") or wrong(way):
                continue
            tile = _tile(way["tile"])
            lives = _resident(hardware, problem, template, tile, way)
            if lives:
                seconds = statistics.median(way["seconds"])
                found[template].append(Measurement(problem, tile, lives, seconds))
    return found


def _tile(tile: dict[str, Any]) -> TileConfig:
    return TileConfig(
        tile["rows"], tile["keys"], tile["warps"], tile["stages"], tile["heads"], tile["splits"]
    )


def _resident(
    hardware: Hardware, problem: Problem, template: Template, tile: TileConfig, way: dict[str, Any]
) -> int:
    """Programs of a processor: by what the driver said of the kernel, else by the table."""
    if "registers" in way:
        return resident(hardware, tile.warps, way["registers"], way["shared"])
    return living(hardware, problem, template, tile)


def report(result: dict[str, Any]) -> str:
    """The fitted constants of each template, as text."""
    if "arch" not in result:
        return "not measured on a GPU: nothing to fit"
    hardware, lines = hardware_of(result), []
    for template, found in measurements(result).items():
        if not found:
            lines.append(f"{template}: {len(found)} measurements, nothing to fit")
            continue
        constants = fit(hardware, template, found)
        before, after = (off(hardware, template, found, c) for c in (None, constants))
        lines.append(
            f"{template}: {len(found)} measurements, off by a factor of {before:.2f} with the "
            f"defaults, {after:.2f} with\n    {constants}"
        )
    return "\n".join(lines)
