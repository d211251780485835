"""How good the cost model is, from measured seconds: no GPU is needed.

    results/*.json of gpu_speed   ->   picks 96 % of the best, worst 84 %, rank 0.9, off by 18 %

The constants are fitted to at most twenty measurements of each kernel and judged on the calls that
were measured with every tile the model knows, which are other shapes. A pick is the tile that the
model likes best for the class of shapes of a call, as a launch would ask it; an implementation
(ours, cuDNN, flash) is right if it is the fastest or within five percent of it.

    python examples/benchmarks/gpu_score.py RESULT.json ...
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# its own folder, also where PYTHONSAFEPATH keeps it off the path
sys.path.insert(0, str(Path(__file__).parent))

from gpu_cases import KERNELS
from gpu_fit import hardware_of, measurements
from gpu_ways import TILED

from attn_compiler.cost.fit import Measurement, fit
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.peers import order
from attn_compiler.cost.problem import TEMPLATES, Problem, Template
from attn_compiler.cost.roofline import predict
from attn_compiler.cost.search import choose

BAND = 1.05
_TOP = 5
# measurements that constants may come from, as of `calibrate`
_FITTED = 20
# what the model is meant to reach, over at least so many calls
CALLS = 24


@dataclass(frozen=True, slots=True)
class Score:
    """What became of the picks.

    Attributes:
        calls, tiles: that were judged.
        first, worst: best seconds over those of the pick: geometric mean, least.
        among: the same of the best one among the first five.
        rank: Spearman's correlation of predicted and measured seconds in a call, mean over calls.
        off: mean absolute error of the seconds.
    """

    calls: int
    tiles: int
    first: float
    worst: float
    among: float
    rank: float
    off: float


def parts(result: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The result with the calls to fit, and with those to judge: of all tiles."""
    rows = [row for row in result["rows"] if row.get("problem")]
    known = [row for row in rows if row["section"] not in TILED]
    return {**result, "rows": known}, {**result, "rows": [r for r in rows if r not in known]}


def fitted(result: dict[str, Any]) -> Hardware:
    """The device with the constants of a result."""
    found = []
    for template, seen in measurements(result).items():
        some = random.Random(0).sample(seen, min(_FITTED, len(seen)))
        if some:
            found.append((template, fit(hardware_of(result), template, some)))
    return replace(hardware_of(result), constants=tuple(sorted(found)), mark="measured")


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
        # the answer is that of the class of shapes, and the fitted constants may tell another first
        # tile than was picked before there were any
        liked = {tile: n for n, (tile, _) in enumerate(choose(hardware, each[0].problem, template))}
        ordered = [m.seconds for m in sorted(each, key=lambda m: liked.get(m.tile, len(liked)))]
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


def infeasible(result: Mapping[str, Any]) -> list[str]:
    """Tiles that the model took to be possible and that failed, or that spill registers."""
    return [
        f"{row['name']}, {name}: {way.get('error') or 'spills registers'}"
        for row in result["rows"]
        if row["section"] in TILED
        for name, way in row.get("ways", {}).items()
        if name.partition(" ")[0] in ("triton", *KERNELS) and ("error" in way or way.get("spills"))
    ]


def report(result: dict[str, Any]) -> str:
    """The scores of one result as text."""
    if "arch" not in result:
        return "not measured on a GPU: nothing to score"
    known, judged = parts(result)
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
    return "\n".join(lines + infeasible(result))


def missed(result: dict[str, Any]) -> list[str]:
    """What a result does not reach of what the cost model is meant to; empty for a good one."""
    known, judged = parts(result)
    hardware, found = fitted(known), infeasible(result)
    for template in TEMPLATES:
        reached = score(hardware, template, measurements(judged)[template])
        if reached is None or reached.calls < CALLS:
            found.append(f"fewer than {CALLS} calls with all tiles of {template}")
            continue
        found += _below(template, {
            "picks": (reached.first, 0.95), "worst pick": (reached.worst, 0.8),
            "best of the first picks": (reached.among, 0.99), "rank": (reached.rank, 0.85),
            "accuracy": (1.0 - reached.off, 0.8),
        })  # fmt: skip
    right, total = implementations(hardware, judged)
    return found + (_below("all", {"implementations": (right / total, 0.95)}) if total else [])


def _below(of: str, numbers: Mapping[str, tuple[float, float]]) -> list[str]:
    return [
        f"{name}, {of}: {value:.3f} is below {least}"
        for name, (value, least) in numbers.items()
        if not value >= least
    ]


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(f"{path}\n{report(json.loads(Path(path).read_text(encoding='utf-8')))}")
