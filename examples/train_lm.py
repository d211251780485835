"""Trains a small language model from scratch with each kind of attention, and says what is shown.

    python examples/train_lm.py --variants dense,selective                      a few minutes
    python examples/train_lm.py --variants dense,selective --minutes 20         steps that fit
    python examples/train_lm.py --device cuda --width 512 --layers 16 --heads 8 --length 1024 \\
        --batch 32 --steps 20000                                                about 50M parameters

The text is the source code of Python's standard library. All variants start from the same weights
for a seed, see the same text in the same order and take the same number of steps. A difference
counts as shown if the 95 % interval of the differences to "dense", seed by seed, leaves 0 out.
Where "dense" and "selective" are trained, tokens are dropped from the caches of the second until
it is as good as the first, on other held-out windows than the comparison has.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

# its own folder, also where PYTHONSAFEPATH keeps it off the path
sys.path.insert(0, str(Path(__file__).parent))

import line_plot
import torch
from budget_search import Parity, at_parity
from byte_lm import ByteModel, Corpus, Sizes, bits, corpus
from lm_work import work
from student import half_interval
from torch import Tensor, nn

import attn_compiler as ac
from attn_compiler.train.progress import bar

VARIANTS: dict[str, Any] = {
    "dense": "fastest",
    "selective": ac.Selective(),
    "switchhead": ac.SwitchHead(),
    "switchall": ac.SwitchHead(feed_forward="sigma_moe"),
    "gau": ac.GAU(chunk=None),
    "flash-gau": ac.GAU(),
}
_WARM_UP, _LAST_RATE, _CURVE = 0.1, 0.1, 10


@dataclass(slots=True)
class Run:
    """One training: after some steps, the seconds they took and the loss on held-out text, in bits
    per byte. The seconds are of steps alone.
    """

    variant: str
    seed: int
    parameters: int
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    loss: float = math.nan
    seconds: float = 0.0


# ---------------------------------------------------------------- training


def build(given: argparse.Namespace, variant: str, seed: int) -> nn.Module:
    """The model of a seed, rewritten.

    Raises:
        AttnCompilerError: the package cannot put this variant in its place.
    """
    torch.manual_seed(seed)
    model = ByteModel(Sizes(given.width, given.heads, given.layers, given.length))
    example = torch.zeros(given.batch, given.length, dtype=torch.long, device=given.device)
    with precision(given):
        return ac.rewrite(
            model.to(given.device).train(), (example,), to=VARIANTS[variant], on_reject="raise"
        )


def precision(given: argparse.Namespace) -> AbstractContextManager[Any]:
    """Products in bfloat16 on a GPU."""
    return torch.autocast("cuda", torch.bfloat16, enabled=given.device.startswith("cuda"))


def train(
    given: argparse.Namespace, text: Corpus, variant: str, seed: int
) -> tuple[nn.Module, Run]:
    """One training from scratch."""
    model = build(given, variant, seed)
    run = Run(variant, seed, sum(p.numel() for p in model.parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), given.lr, (0.9, 0.95), weight_decay=0.1)
    held_out = text.windows(given.windows, given.batch, given.length)
    every = max(1, given.steps // _CURVE)
    clock = time.process_time if given.busy else time.perf_counter
    with bar(f"{variant}, seed {seed}", given.steps, 0, shown=not given.quiet) as advance:
        for step, windows in enumerate(
            text.batches(given.steps, given.batch, given.length, seed), start=1
        ):
            start = clock()
            loss = one_step(given, model, optimizer, windows, step)
            run.seconds += clock() - start
            advance(loss)
            if step % every == 0 or step == given.steps:
                run.loss = evaluate(given, model, held_out)
                run.curve.append((step, run.seconds, run.loss))
    return model, run


def one_step(
    given: argparse.Namespace,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    windows: Tensor,
    step: int,
) -> float:
    """A step; the rate rises, then falls as a cosine."""
    rise = max(1.0, _WARM_UP * given.steps)
    fall = 0.5 * (1 + math.cos(math.pi * max(0.0, step - rise) / max(1.0, given.steps - rise)))
    for group in optimizer.param_groups:
        group["lr"] = given.lr * min(step / rise, _LAST_RATE + (1 - _LAST_RATE) * fall)
    loss = loss_of(given, model, windows)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def loss_of(given: argparse.Namespace, model: nn.Module, windows: Tensor) -> Tensor:
    windows = windows.to(given.device)
    with precision(given):
        return bits(model(windows[:, :-1]), windows[:, 1:])


@torch.no_grad()
def evaluate(given: argparse.Namespace, model: nn.Module, held_out: Sequence[Tensor]) -> float:
    """Mean loss over windows of held-out text; all of them have as many bytes."""
    model.eval()
    losses = [float(loss_of(given, model, windows)) * len(windows) for windows in held_out]
    model.train()
    return sum(losses) / sum(map(len, held_out))


def steps_within(given: argparse.Namespace, text: Corpus, variants: Sequence[str]) -> int:
    """How many steps of all variants and seeds take about `--minutes`, of which a tenth is left
    for everything else.
    """
    seconds = 0.0
    for variant in variants:
        model = build(given, variant, 0)
        optimizer = torch.optim.AdamW(model.parameters(), given.lr)
        times = []
        for step, windows in enumerate(text.batches(4, given.batch, given.length, 0), start=1):
            start = time.perf_counter()
            one_step(given, model, optimizer, windows, step)
            times.append(time.perf_counter() - start)
        seconds += min(times[1:])
    return max(_CURVE, int(0.9 * 60 * given.minutes / (seconds * given.seeds)))


# ---------------------------------------------------------------- what it shows


def summary(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Mean, interval, and difference to dense of each variant."""
    found: dict[str, dict[str, Any]] = {}
    losses = {v: [r.loss for r in runs if r.variant == v] for v in dict.fromkeys(_names(runs))}
    for variant, own in losses.items():
        row: dict[str, Any] = {"mean": mean(own), "interval": half_interval(own)}
        row["parameters"] = next(r.parameters for r in runs if r.variant == variant)
        row["seconds"] = mean(r.seconds for r in runs if r.variant == variant)
        if variant != "dense" and len(losses.get("dense", ())) == len(own):
            apart = [a - b for a, b in zip(own, losses["dense"], strict=True)]
            row["difference"], row["difference_interval"] = mean(apart), half_interval(apart)
            row["verdict"] = verdict(mean(apart), half_interval(apart))
        found[variant] = row
    return found


def verdict(difference: float, half: float) -> str:
    """What may be said."""
    if abs(difference) <= half:
        return "not shown at this size"
    return f"shown: {'better' if difference < 0 else 'worse'} than dense"


def _names(runs: Sequence[Run]) -> list[str]:
    return [run.variant for run in runs]


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = []
    for variant, row in found.items():
        line = f"{variant:<12}{row['parameters']:>12,} parameters   {row['mean']:.4f} "
        line += f"± {row['interval']:.4f} bits per byte"
        if "verdict" in row:
            line += f"   {row['difference']:+.4f} ± {row['difference_interval']:.4f}: "
            line += row["verdict"]
        lines.append(line)
    return "\n".join(lines)


def machine(given: argparse.Namespace) -> dict[str, Any]:
    cuda = given.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "attn_compiler": version("attn-compiler"),
        },
    }


# ---------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    variants = given.variants.split(",")
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        print(f"no variant {unknown[0]!r}: choose among {', '.join(VARIANTS)}", file=sys.stderr)
        return 2
    if given.busy:
        torch.set_num_threads(1)
    text = corpus(given.text)
    print(f"text: {text.words}", file=sys.stderr)
    variants, refused = possible(given, variants)
    if given.minutes is not None and variants:
        given.steps = steps_within(given, text, variants)
        print(f"{given.steps} steps", file=sys.stderr)
    runs, parities = everything(given, text, variants)
    found = summary(runs)
    print(table(found))
    for seed, parity in enumerate(parities):
        print(words_of(parity, seed))
    words = shlex.join(["train_lm.py", *(sys.argv[1:] if arguments is None else arguments)])
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items()}
    result = {"command": words, "options": options, "text": text.words} | machine(given)
    result |= {"summary": found, "runs": [asdict(run) for run in runs], "refused": refused}
    counted = [v for v in variants if v in ("dense", "switchhead", "switchall")]
    result["work"] = {variant: works(given, variant) for variant in counted}
    result |= {"parity": [asdict(parity) for parity in parities], "memory": factors(parities)}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "train_lm.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    drawn_curves(given, runs)
    drawn_parities(given, parities)
    return 1 if refused else 0


def works(given: argparse.Namespace, variant: str) -> dict[str, Any]:
    """Operations and bytes of a batch."""
    model = build(given, variant, 0)
    spec = None if variant == "dense" else ac.last_report().sites[0].decision.spec
    tokens = torch.zeros(given.batch, given.length, dtype=torch.long, device=given.device)
    sizes = Sizes(given.width, given.heads, given.layers, given.length)
    with precision(given):
        return work(model, tokens, sizes, spec)


def everything(
    given: argparse.Namespace, text: Corpus, variants: Sequence[str]
) -> tuple[list[Run], list[Parity]]:
    """All trainings, seed by seed, and the searches."""
    runs, parities = [], []
    searched = not given.no_search and {"dense", "selective"} <= set(variants)
    for seed in range(given.seeds):
        models = {}
        for variant in variants:
            model, run = train(given, text, variant, seed)
            runs.append(run)
            if variant in ("dense", "selective"):
                models[variant] = model
        if searched:
            windows = torch.cat(text.windows(given.search, given.search, given.length, part=1))
            with precision(given):
                parities.append(
                    at_parity(
                        models["selective"],
                        models["dense"],
                        windows[:, :-1].to(given.device),
                        step=max(1, given.length // 16),
                        progress=not given.quiet,
                    )
                )
    return runs, parities


def factors(parities: Sequence[Parity]) -> dict[str, float]:
    """How many times fewer tokens caches hold at equal loss: mean and interval over seeds."""
    values = [parity.factor for parity in parities]
    return {"factor": mean(values), "interval": half_interval(values)} if values else {}


def words_of(parity: Parity, seed: int) -> str:
    line = (
        f"seed {seed}: dense {parity.target:.4f}, selective {parity.unpruned:.4f} bits per byte, "
    )
    if parity.budgets is None:
        return line + "so that nothing may be dropped at equal loss"
    kept = " ".join(map(str, parity.budgets.values()))
    return line + f"{parity.factor:.2f} times fewer tokens at equal loss (kept: {kept})"


def drawn_curves(given: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Loss against steps and against seconds, the mean of the seeds."""
    means = {
        variant: [
            tuple(map(mean, zip(*points, strict=True)))
            for points in zip(*(r.curve for r in runs if r.variant == variant), strict=True)
        ]
        for variant in dict.fromkeys(_names(runs))
    }
    for at, name, across in ((0, "training", "steps"), (1, "time", "seconds of training")):
        lines = {variant: [(p[at], p[2]) for p in points] for variant, points in means.items()}
        if lines:
            drawn = {"title": "held-out loss", "across": across, "up": "bits per byte"}
            line_plot.write(given.out / f"{name}.svg", lines, **drawn)


def drawn_parities(given: argparse.Namespace, parities: Sequence[Parity]) -> None:
    lines: dict[str, Sequence[tuple[float, float]]] = {}
    for seed, parity in enumerate(parities):
        if parity.path:
            lines[f"selective {seed}"] = parity.path
            lines[f"dense {seed}"] = [(kept, parity.target) for kept, _ in parity.path]
    if lines:
        drawn = {"across": "tokens kept in a layer, on average", "up": "bits per byte"}
        line_plot.write(given.out / "memory.svg", lines, title="loss against memory", **drawn)


def possible(
    given: argparse.Namespace, variants: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Those that can be built, and what the package says about the others."""
    good, refused = [], {}
    for variant in variants:
        try:
            build(given, variant, 0)
            good.append(variant)
        except ac.AttnCompilerError as error:
            refused[variant] = str(error)
            print(f"{variant}: {error}", file=sys.stderr)
    return good, refused


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", default="dense,selective", help=", ".join(VARIANTS))
    for name, usual, says in (
        ("seeds", 3, "trainings of each variant"),
        ("steps", 300, "steps of each training"),
        ("width", 128, "of the model"),
        ("heads", 4, "of each attention"),
        ("layers", 4, "blocks"),
        ("length", 256, "bytes of a window"),
        ("batch", 8, "windows of a step"),
        ("windows", 128, "windows of held-out text"),
        ("search", 16, "other windows of held-out text, to search budgets with"),
    ):
        parser.add_argument(f"--{name}", type=int, default=usual, help=f"{says} ({usual})")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate (0.001)")
    parser.add_argument("--minutes", type=float, help="choose the steps so that it takes so long")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--busy", action="store_true", help="one thread, and its own seconds: others work here too"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("reports/train_lm"), help="folder (reports/train_lm)"
    )
    parser.add_argument("--text", type=Path, help="folder of Python files to train on instead")
    parser.add_argument("--no-search", action="store_true", help="no search for budgets")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


if __name__ == "__main__":
    sys.exit(main())
