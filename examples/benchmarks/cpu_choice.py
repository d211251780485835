"""Does the cost model choose what is fastest on this CPU? Twenty shapes, every way measured.

    causal, T = 2048:   keep 580 ms, sdpa 74 ms   ->   the model says sdpa: right

float32, random data. The ways: `keep` is attention as models write it, `sdpa` PyTorch's fused call
with a causal flag or a mask tensor, `blocked` and `gathered` this package's operator under a window
or a map of blocks; for a step of generation with its projections `layer` over cached keys and
values against `states`, EL-attention over what they are made of. In every round each way runs once
and the order turns around, so that a busy moment of the machine hits all of them. A choice is right
if its median is within five percent of the best one.

    python examples/benchmarks/cpu_choice.py --calibrate [--busy] [--rounds 11] [--out RESULT.json]
    python examples/benchmarks/cpu_choice.py --score RESULT.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attn_compiler as ac
from attn_compiler.calibrating import on_a_cpu
from attn_compiler.cost import cpu
from attn_compiler.cost.at_hand import plain
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.problem import Problem
from attn_compiler.kernels import timing
from attn_compiler.kernels.cpu_ways import cores, steps

BAND = 1.05
BLOCK = 64
RESULTS = Path(__file__).parent / "results" / "cpu_choice.json"


@dataclass(frozen=True, slots=True)
class Case:
    """A shape.

    Attributes:
        batch, heads, kv_heads, rows, keys, head_dim: B, H, G, T, S, d.
        causal, window: the mask; a window is causal and sees so many keys.
        density: share of the blocks that a random map keeps; None for no map.
        beams: above 0 it is a step over what keys and values are made of, so many beams a sample.
    """

    batch: int
    heads: int
    kv_heads: int
    rows: int
    keys: int
    head_dim: int
    causal: bool = False
    window: int = 0
    density: float | None = None
    beams: int = 0

    @property
    def problem(self) -> Problem:
        right = 0 if self.causal or self.window else None
        left = self.window - 1 if self.window else None
        return Problem(
            self.batch, self.heads, self.kv_heads, self.rows, self.keys, self.head_dim,
            self.head_dim, 4, left=left, right=right,
        )  # fmt: skip

    def __str__(self) -> str:
        names = [
            f"B{self.batch} H{self.heads}/{self.kv_heads} T{self.rows} S{self.keys}",
            f"d{self.head_dim}",
            "causal" if self.causal else "",
            f"window {self.window}" if self.window else "",
            "" if self.density is None else f"density {self.density}",
            f"{self.beams} beams over states" if self.beams else "",
        ]
        return " ".join(filter(None, names))


GRID = (
    Case(2, 12, 12, 96, 96, 64),
    Case(1, 8, 8, 512, 512, 64),
    Case(1, 4, 4, 1024, 1024, 128),
    Case(1, 8, 8, 1536, 1536, 64),
    Case(1, 12, 12, 128, 128, 64, causal=True),
    Case(1, 12, 12, 512, 512, 64, causal=True),
    Case(1, 12, 4, 1024, 1024, 64, causal=True),
    Case(1, 8, 8, 2048, 2048, 64, causal=True),
    Case(1, 4, 4, 512, 512, 64, window=256),
    Case(1, 8, 8, 1024, 1024, 64, window=64),
    Case(1, 4, 4, 2048, 2048, 64, window=1024),
    Case(1, 4, 4, 4096, 4096, 64, window=128),
    Case(1, 12, 12, 1, 512, 64),
    Case(4, 12, 4, 1, 2048, 64),
    Case(1, 32, 8, 1, 4096, 128),
    Case(1, 4, 4, 2048, 2048, 64, density=0.05),
    Case(1, 4, 4, 2048, 2048, 64, density=0.25),
    Case(1, 8, 8, 1024, 1024, 64, density=0.1),
    Case(1, 8, 8, 1, 1024, 64, beams=1),
    Case(1, 4, 4, 1, 4096, 64, beams=4),
)


def ways(case: Case) -> dict[str, Callable[[], Tensor]]:
    """Callables by name, on data that they share."""
    if case.beams:
        return steps(case.batch, case.beams, case.keys, case.heads, case.head_dim)
    return cores(case.problem, case.density, BLOCK)


# ---------------------------------------------------------------- measuring and scoring


@torch.inference_mode()
def measure(case: Case, rounds: int, clock: timing.Clock) -> dict[str, list[float]]:
    """Seconds of each way in every round."""
    found = ways(case)
    results = [way() for way in found.values()]
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=1e-3, atol=1e-4)
    return timing.alternated(found, rounds, clock)


def predicted(hardware: Hardware, case: Case) -> dict[str, float]:
    """Seconds of each way by the cost model, the choice first."""
    if not case.beams:
        ranked = cpu.ranked(hardware, case.problem, case.density, BLOCK)
        return {name: time.seconds for name, time in ranked}
    shape = ac.Shape(
        case.batch, 1, case.keys, case.heads, case.head_dim, width=case.heads * case.head_dim,
        beams=case.beams, causal=case.beams == 1,
    )  # fmt: skip
    plan = ac.plan(ac.ELAttention(), shape, hardware=hardware, dtype=torch.float32)
    found = {"states": plan.seconds, "layer": plan.alternatives[0].seconds}
    return dict(sorted(found.items(), key=lambda way: way[1]))


def scored(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each case the best way, the chosen one, what both took, and whether that is right."""
    hardware = Hardware.from_json(json.dumps(result["hardware"]))
    rows = []
    for row in result["rows"]:
        case = Case(**row["case"])
        medians = {name: statistics.median(s) for name, s in row["seconds"].items()}
        best, guesses = min(medians, key=lambda n: medians[n]), predicted(hardware, case)
        chosen = next(iter(guesses))
        rows.append({
            "case": str(case), "best": best, "chosen": chosen, "medians": medians,
            "predicted": guesses, "right": medians[chosen] <= BAND * medians[best],
        })  # fmt: skip
    return rows


def agreement(rows: Sequence[Mapping[str, Any]]) -> float:
    """Share of the cases whose choice is right."""
    return sum(bool(row["right"]) for row in rows) / len(rows)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The scores for a terminal, milliseconds measured (predicted)."""
    lines = []
    for row in rows:
        times = "  ".join(
            f"{name} {1e3 * s:.2f} ({1e3 * row['predicted'][name]:.2f})"
            for name, s in row["medians"].items()
        )
        verdict = "right" if row["right"] else f"WRONG, best is {row['best']}"
        lines.append(f"{row['case']:<46} {row['chosen']:<9}{verdict}\n    ms: {times}")
    share = agreement(rows)
    lines.append(f"{share:.0%} of {len(rows)} choices are the fastest or within 5 % of it")
    return "\n".join(lines)


def _hardware(options: argparse.Namespace) -> Hardware:
    """This CPU; fitted anew with the clock of the measurements if that is wanted."""
    if options.calibrate and options.busy:
        return on_a_cpu(plain(torch.device("cpu")), timing.own_seconds)
    return ac.calibrate("cpu") if options.calibrate else Hardware.from_device("cpu")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, help="of PyTorch")
    parser.add_argument(
        "--busy", action="store_true", help="one thread, and its own seconds: others work here too"
    )
    parser.add_argument("--calibrate", action="store_true", help="fit the constants here first")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--score", type=Path, help="score a result instead of measuring")
    options = parser.parse_args(argv)
    if options.score:
        print(table(scored(json.loads(options.score.read_text(encoding="utf-8")))))
        return 0
    if options.threads or options.busy:
        torch.set_num_threads(1 if options.busy else options.threads)
    clock = timing.own_seconds if options.busy else timing.seconds
    hardware = _hardware(options)
    rows = []
    for number in options.only or range(len(GRID)):
        print(f"{number:>2} {GRID[number]}", file=sys.stderr, flush=True)
        rows.append(
            {"case": asdict(GRID[number]), "seconds": measure(GRID[number], options.rounds, clock)}
        )
    result = {
        "about": "seconds of every way in every round; float32, random data, alternated",
        "clock": "CPU seconds of the one thread" if options.busy else "seconds",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "hardware": json.loads(hardware.to_json()),
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(scored(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
