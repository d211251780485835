"""How good the cost model is, from measured seconds: no GPU is needed.

    results/*.json of gpu_speed   ->   picks 96 % of the best, worst 84 %, rank 0.9, off by 18 %

The constants are fitted on every other call and judged on the rest, so that no number is judged by
itself. A pick is the tile of a call that the model likes best; an implementation (ours, cuDNN,
flash) is right if it is the fastest or within five percent of it.

    python examples/benchmarks/gpu_score.py RESULT.json ...
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# its own folder, also where PYTHONSAFEPATH keeps it off the path
sys.path.insert(0, str(Path(__file__).parent))

from gpu_fit import hardware_of, measurements

from attn_compiler.cost.fit import Measurement, fit
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.peers import order
from attn_compiler.cost.problem import TEMPLATES, Problem, Template
from attn_compiler.cost.roofline import predict

BAND = 1.05
_TOP = 5


@dataclass(frozen=True, slots=True)
class Score:
    """What became of the picks.

    Attributes:
        calls, tiles: that were judged.
        first, worst: best seconds over those of the pick: geometric mean, least.
        among: the same of the best one among the first five.
        rank: Spearman's correlation of predicted and measured seconds in a call, mean.
        off: mean absolute error of the seconds.
    """

    calls: int
    tiles: int
    first: float
    worst: float
    among: float
    rank: float
    off: float


def halves(result: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The result with every other case: one to fit, one to judge."""
    rows = [row for row in result["rows"] if row.get("problem")]
    return {**result, "rows": rows[::2]}, {**result, "rows": rows[1::2]}


def fitted(result: dict[str, Any]) -> Hardware:
    """The device with the constants of a result."""
    row = hardware_of(result)
    found = [(t, fit(row, t, seen)) for t, seen in measurements(result).items() if seen]
    return replace(row, constants=tuple(sorted(found)), mark="measured")


def score(hardware: Hardware, template: Template, found: Sequence[Measurement]) -> Score | None:
    """Of the calls that were measured with several tiles; None if there are none."""
    calls: dict[Problem, list[Measurement]] = {}
    for m in found:
        calls.setdefault(m.problem, []).append(m)
    several = [each for each in calls.values() if len(each) > 1]
    if not several:
        return None
    firsts, among, ranks, errors = [], [], [], []
    for each in several:
        guesses = [predict(hardware, m.problem, template, m.tile, m.resident).seconds for m in each]
        seconds = [m.seconds for m in each]
        ordered = [s for _, s in sorted(zip(guesses, seconds, strict=True))]
        firsts.append(min(seconds) / ordered[0])
        among.append(min(seconds) / min(ordered[:_TOP]))
        ranks.append(statistics.correlation(_ranks(guesses), _ranks(seconds)))
        errors += [abs(g / s - 1) for g, s in zip(guesses, seconds, strict=True)]
    return Score(
        len(several), len(errors), _mean(firsts), min(firsts), _mean(among),
        statistics.fmean(ranks), statistics.fmean(errors),
    )  # fmt: skip


def _ranks(values: Sequence[float]) -> list[int]:
    ordered = sorted(values)
    return [ordered.index(value) for value in values]


def _mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def implementations(hardware: Hardware, result: Mapping[str, Any]) -> tuple[int, int]:
    """Calls whose predicted implementation is right, and all that had a choice."""
    right = total = 0
    for row in result["rows"]:
        seconds = {
            name: statistics.median(way["seconds"])
            for name, way in row["ways"].items()
            if name in ("cudnn", "flash", "triton") and way.get("seconds")
        }
        if len(seconds) < 2 or not row.get("problem"):
            continue
        work = "backward" if row.get("section", "").endswith("backward") else "forward"
        problem = Problem(**row["problem"]).bucketed()
        chosen = order(hardware, problem, tuple(sorted(seconds)), work)[0]
        total += 1
        right += seconds[chosen] <= BAND * min(seconds.values())
    return right, total


def report(result: dict[str, Any]) -> str:
    """The scores of one result as text."""
    if "arch" not in result:
        return "not measured on a GPU: nothing to score"
    known, judged = halves(result)
    hardware, lines = fitted(known), []
    for template in TEMPLATES:
        found = score(hardware, template, measurements(judged)[template])
        if found is None:
            lines.append(f"{template}: no call with several tiles")
            continue
        lines.append(
            f"{template}: {found.calls} calls, {found.tiles} tiles: pick {found.first:.1%} of the "
            f"best, worst {found.worst:.1%}; best of {_TOP} {found.among:.1%}; rank "
            f"{found.rank:.2f}; off by {found.off:.0%}"
        )
    right, total = implementations(hardware, judged)
    lines.append(f"implementation: {right} of {total} right or within 5 %")
    return "\n".join(lines)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(f"{path}\n{report(json.loads(Path(path).read_text(encoding='utf-8')))}")
