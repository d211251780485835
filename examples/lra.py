"""Long-range tasks, trained dense, with SPION's three modes, and with fixed patterns: one table.

    rewrite(encoder, to=SPION(...), calibration="later"), SpionSchedule   ->   dense, then sparse
    rewrite(encoder, to=SPION(pattern=window or BigBird-like))            ->   sparse

Every way starts from the same parameters, sees the same batches in the same order, and keeps at
most as many blocks as SPION-CF can. Fixed patterns are there from the first step; SPION is dense
until its maps have settled, a third of the steps at the latest. Pre-norm encoder with positions
that are learned, mean pooling, AdamW, one linear cycle of the rate, gradients clipped by value, as
SPION's authors have it; no dropout, and the cycle does not start again at the switch.

Accuracy is that of the whole test set: mean over seeds and 95 % interval by Student's t, which is
paired by seed in comparisons. Seconds are those of the last third of the steps, where each way is
what it became; memory is what one such step adds to the largest resident set (on a GPU: to what is
allocated).

    python examples/lra.py --task listops --length 512 --block 32 --minutes 20
    python examples/lra.py --task listops --length 2048 --device cuda --steps 5000 --batch 64

Sources: SPION (arXiv 2309.12578), Long Range Arena (arXiv 2011.04006), BigBird (arXiv 2007.14062).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import attn_compiler as ac

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import resident
from lra_tasks import TASKS, Task, items
from lra_ways import FIXED, MODES, WAYS, Encoder, seeded, spec_of
from student import half_interval

CLAIMED = "spion-cf"  # at least dense less one point, and at least every fixed pattern


# ---------------------------------------------------------------- training


def made(
    way: str, task: Task, options: argparse.Namespace, seed: int, example: Tensor
) -> tuple[nn.Module, ac.SpionSchedule | None]:
    """A fresh model of this way, and its schedule."""
    torch.manual_seed(seed)
    model = Encoder(task, options).to(options.device).train()
    if way == "dense":
        return model, None
    spec, later = spec_of(way, options, seed), "later" if way in MODES else None
    with ambient(options):
        model = ac.rewrite(model, (example,), to=spec, calibration=later, on_reject="raise")
    if way not in MODES:
        return model, None
    every, most = max(1, options.steps // 20), max(1, options.steps // 2)
    return model, ac.SpionSchedule(model, spec, every=every, most=most)


def ambient(options: argparse.Namespace) -> Any:
    """bfloat16 by autocast, if asked for."""
    if options.bf16:
        return torch.autocast(options.device, torch.bfloat16)
    return contextlib.nullcontext()


@dataclass
class Run:
    """One way with one seed: accuracy on the test set, median seconds of a late step, the step of
    the switch, the share of kept blocks.
    """

    way: str
    seed: int
    accuracy: float
    seconds: float
    switched: int | None
    density: float


def train(way: str, task: Task, options: argparse.Namespace, seed: int, data: Any) -> Run:
    (tokens, answers), test = data
    model, schedule = made(way, task, options, seed, tokens[: options.batch].to(options.device))
    optimizer = torch.optim.AdamW(model.parameters(), options.rate, eps=1e-6, weight_decay=0.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.rate, total_steps=options.steps + 1, anneal_strategy="linear"
    )
    order = torch.randint(len(tokens), (options.steps, options.batch), generator=seeded(seed))
    taken = []
    for index, rows in enumerate(order):
        start = clock(options)
        step(model, optimizer, (tokens[rows], answers[rows]), options)
        if schedule is not None:
            schedule.step(index)
        cycle.step()
        taken.append(clock(options) - start)
    return Run(
        way=way,
        seed=seed,
        accuracy=accuracy(model, test, options),
        seconds=statistics.median(taken[-max(1, options.steps // 3) :]),
        switched=schedule.switched if schedule is not None else None,
        density=density(model) if way != "dense" else 1.0,
    )


def step(model: nn.Module, optimizer: Any, batch: Any, options: argparse.Namespace) -> None:
    x, y = (t.to(options.device) for t in batch)
    optimizer.zero_grad()
    with ambient(options):
        loss = cross_entropy(model(x), y)
    loss.backward()
    nn.utils.clip_grad_value_(model.parameters(), 1.0)
    optimizer.step()


def clock(options: argparse.Namespace) -> float:
    if options.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def accuracy(model: nn.Module, test: Any, options: argparse.Namespace) -> float:
    model.eval()
    right = 0
    size = 2 * options.batch
    for x, y in zip(*(t.split(size) for t in test), strict=True):
        with ambient(options):
            found = model(x.to(options.device)).argmax(-1).cpu()
        right += int((found == y).sum())
    return right / len(test[0])


def density(model: nn.Module) -> float:
    return statistics.mean(float(p.float().mean()) for p in ac.spion_patterns(model).values())


# ---------------------------------------------------------------- memory


def memory(options: argparse.Namespace, way: str, argv: Sequence[str]) -> float:
    """MiB that a late training step adds, in a process of its own."""
    command = [sys.executable, __file__, *argv, "--measure", way]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def growth(task: Task, options: argparse.Namespace) -> float:
    """The same, here; a pattern as large as SPION's stands for those of its modes."""
    way = options.measure
    tokens, answers = items(task, options.length, options.batch, 0)
    stands = "window" if way in MODES else way
    model, _ = made(stands, task, options, 0, tokens.to(options.device))
    optimizer = torch.optim.AdamW(model.parameters(), options.rate)
    step(model, optimizer, (tokens[:1], answers[:1]), options)  # what is loaded once
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, optimizer, (tokens, answers), options)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return resident.growth(lambda: step(model, optimizer, (tokens, answers), options))


# ---------------------------------------------------------------- what it shows


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % interval; infinite for a single value."""
    return statistics.mean(values), half_interval(values)


def claims(accuracies: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Is the claimed way at least each of the others, outside the interval? Dense may be a point
    better.
    """
    found = []
    for other in ("dense", *FIXED):
        if not accuracies.get(other) or not accuracies.get(CLAIMED):
            continue
        pairs = zip(accuracies[CLAIMED], accuracies[other], strict=True)
        mean, half = interval([ours - theirs for ours, theirs in pairs])
        margin = 0.01 if other == "dense" else 0.0
        claim = f"{CLAIMED} >= {other}" + (" - 1 point" if margin else "")
        shown = "shown" if mean - half >= -margin else "not shown at this size"
        found.append({"claim": claim, "difference": mean, "half": half, "verdict": shown})
    return found


def table(found: dict[str, Any]) -> str:
    head = f"{'way':<10}{'accuracy':>22}{'step':>12}{'dense/step':>12}{'memory':>12}{'blocks':>9}"
    lines = [head]
    rows = found["ways"]
    for way, row in rows.items():
        mean, half = row["accuracy"]
        shown = f"{100 * mean:.2f} +- {100 * half:.2f} %"
        ratio = rows["dense"]["seconds"] / row["seconds"] if "dense" in rows else float("nan")
        mib = "not measured" if row["mib"] is None else f"{row['mib']:.0f} MiB"
        lines.append(
            f"{way:<10}{shown:>22}{1000 * row['seconds']:>9.1f} ms{ratio:>12.2f}{mib:>13}"
            f"{100 * row['density']:>7.1f} %"
        )
    for claim in found["claims"]:
        lines.append(
            f"{claim['claim']}: difference {100 * claim['difference']:+.2f} +- "
            f"{100 * claim['half']:.2f} points: {claim['verdict']}"
        )
    return "\n".join(lines)


def summary(runs: list[Run], mib: dict[str, float | None]) -> dict[str, Any]:
    by_way = {way: [r for r in runs if r.way == way] for way in WAYS}
    ways = {
        way: {
            "accuracy": interval([r.accuracy for r in those]),
            "seconds": statistics.median(r.seconds for r in those),
            "density": statistics.mean(r.density for r in those),
            "switched": [r.switched for r in those],
            "mib": mib.get(way),
        }
        for way, those in by_way.items()
        if those
    }
    accuracies = {way: [r.accuracy for r in those] for way, those in by_way.items()}
    return {"ways": ways, "claims": claims(accuracies), "runs": [asdict(r) for r in runs]}


# ---------------------------------------------------------------- one command


def affordable(task: Task, options: argparse.Namespace, data: Any, end: float) -> int:
    """Steps for every run so that all of them are done at `end`, by the time dense steps take."""
    (tokens, answers), test = data
    model, _ = made("dense", task, options, 0, tokens[: options.batch])
    optimizer = torch.optim.AdamW(model.parameters(), options.rate)
    few = tokens[: options.batch], answers[: options.batch]
    taken = []
    for _ in range(6):
        start = clock(options)
        step(model, optimizer, few, options)
        taken.append(clock(options) - start)
    some = min(len(test[0]), 8 * options.batch)
    start = clock(options)
    accuracy(model, tuple(t[:some] for t in test), options)
    testing = (clock(options) - start) * len(test[0]) / some
    runs = len(options.ways) * options.seeds
    share = (end - time.monotonic()) / runs - testing
    return max(30, int(share / statistics.median(taken[1:])))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    found.add_argument("--task", choices=TASKS, default="listops")
    found.add_argument("--length", type=int, default=512, help="tokens; a square for pictures")
    found.add_argument("--minutes", type=float, default=20.0, help="for everything, see --steps")
    found.add_argument("--steps", type=int, default=0, help="of each run; 0: as --minutes allows")
    found.add_argument("--seeds", type=int, default=3, choices=range(1, 11))
    found.add_argument("--train-items", type=int, default=10_000)
    found.add_argument("--test-items", type=int, default=10_000)
    found.add_argument("--batch", type=int, default=32)
    found.add_argument("--rate", type=float, default=2e-3, help="the highest of its cycle")
    found.add_argument("--width", type=int, default=64)
    found.add_argument("--heads", type=int, default=2)
    found.add_argument("--layers", type=int, default=2)
    found.add_argument("--block", type=int, default=0, help="rows of a block; 0: by the length")
    found.add_argument("--alpha", type=float, default=0.0, help="quantile; 0: by the length")
    found.add_argument("--softmax", choices=("neg_inf", "zero_logit"), default="neg_inf")
    found.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    found.add_argument("--bf16", action="store_true", help="autocast")
    found.add_argument("--no-memory", action="store_true")
    found.add_argument("--out", type=Path, help="a JSON file with everything")
    found.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(given)
    task = TASKS[options.task]
    if options.measure:
        options.steps = options.steps or 1
        print(growth(task, options))
        return 0
    begin = time.monotonic()
    numbers = {"train": options.train_items, "test": options.test_items}
    say(f"{options.task}, length {options.length}: making {sum(numbers.values())} items")
    data = [items(task, options.length, n, seed) for seed, n in enumerate(numbers.values(), 1001)]
    mib: dict[str, float | None] = {}
    if not options.no_memory:
        mib = {way: memory(options, way, given) for way in options.ways}
    end = begin + 60 * options.minutes
    options.steps = options.steps or affordable(task, options, data, end)
    say(f"{options.steps} steps of each run, {time.monotonic() - begin:.0f} s so far")
    runs = []
    for seed in range(options.seeds):
        for way in options.ways:
            runs.append(train(way, task, options, seed, data))
            last = runs[-1]
            say(
                f"seed {seed} {way}: accuracy {100 * last.accuracy:.2f} %, step "
                f"{1000 * last.seconds:.1f} ms, switched after {last.switched}, "
                f"{time.monotonic() - begin:.0f} s"
            )
    found = summary(runs, mib) | about(given, options)
    print(table(found))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


def about(given: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """What was run, and on what."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor()
    return {
        "command": ["python", "examples/lra.py", *given],
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "hardware": device or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "attn_compiler": ac.__version__,
    }


def say(text: str) -> None:
    """For people, while it runs."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
