"""Selective attention on a CPU: forward time and peak memory against what one writes down by hand.

    ours       attn_compiler::selective_attention
    given F    scaled_dot_product_attention with -F and the causal mask as a float mask, F for free
    causal     scaled_dot_product_attention without F, which skips half of the pairs
    naive      softmax(q k^T - F) v with every tensor in full

B=1, fp32, random data. In every round each way runs once, so that a busy moment of the machine hits
all of them, and a ratio is taken inside a round. Peak memory is the growth of the largest resident
set over one forward pass, each way in a process of its own.

    python examples/benchmarks/selective_cpu.py [--length 4096] [--heads 8] [--dim 64] [--json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # also where PYTHONSAFEPATH keeps it off

import resident
import torch
import torch.nn.functional as functional
from torch import Tensor

from attn_compiler.kernels.selective import masking, selection_of, selective_attention

PROGRAM = "score: dot; mask: (k <= q); empty: any"
Way = Callable[[], Tensor]


def ways(length: int, heads: int, dim: int, only: str = "") -> dict[str, Way]:
    """The four ways on the same tensors; `only` makes what one of them needs."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, length, heads, dim, generator=draw).transpose(1, 2) for _ in range(3))
    options: dict[str, Any] = {"program": PROGRAM, "scale": dim**-0.5, "dropout": 0.0}
    options |= {"head": 0, "select_from": "qk"}
    args = (q, k, v, [], [], None, [], None, None)
    bias = torch.zeros(())
    if only in ("", "given F"):
        amount, _ = masking(selection_of(*args, **options))
        later = torch.full((length, length), -torch.inf).triu(1)
        bias = (later - amount).unsqueeze(1)
    attention = functional.scaled_dot_product_attention
    return {
        "ours": lambda: selective_attention(*args, **options)[0],
        "given F": lambda: attention(q, k, v, attn_mask=bias),
        "causal": lambda: attention(q, k, v, is_causal=True),
        "naive": lambda: naive(q, k, v),
    }


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, one line after the other."""
    length = q.shape[2]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    logits = (q @ k.transpose(-1, -2) * q.shape[3] ** -0.5).masked_fill(later, -torch.inf)
    chosen = torch.relu(logits[:, 0])
    chosen[:, :, 0] = 0
    chosen = chosen.tril(-1)
    amount = functional.pad(chosen, (0, 0, 1, 0))[:, :-1].cumsum(1)
    return torch.softmax(logits - amount.unsqueeze(1), -1) @ v


@torch.inference_mode()
def speed(given: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each way, and how many times longer ours takes, round by round."""
    calls = ways(given.length, given.heads, given.dim)
    exact = calls["given F"]()
    apart = {name: float((call() - exact).abs().max()) for name, call in calls.items()}
    rounds: list[dict[str, float]] = []
    for _ in range(given.rounds):
        row = {}
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            row[name] = time.perf_counter() - start
        rounds.append(row)
    return {
        "milliseconds": {n: spread([1e3 * r[n] for r in rounds]) for n in calls},
        "ours over": {n: spread([r["ours"] / r[n] for r in rounds]) for n in calls if n != "ours"},
        "largest difference": {n: apart[n] for n in ("ours", "naive")},
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


@torch.inference_mode()
def peak(given: argparse.Namespace) -> float:
    """MiB that one forward pass of `--measure` adds to the largest resident set."""
    call = ways(given.length, given.heads, given.dim, given.measure)[given.measure]
    small = ways(64, given.heads, given.dim, given.measure)[given.measure]
    small()  # what is loaded once
    return resident.growth(call)


def memory(given: argparse.Namespace) -> dict[str, float]:
    """MiB of ours and of the definition, each in a process of its own."""
    sizes = ["--length", given.length, "--heads", given.heads, "--dim", given.dim]
    found = {}
    for name in ("ours", "naive"):
        command = [sys.executable, __file__, *map(str, sizes), "--measure", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = float(done.stdout)
    return found | {"naive over ours": found["naive"] / found["ours"]}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    for name, usual in (("length", 4096), ("heads", 8), ("dim", 64), ("rounds", 5)):
        arguments.add_argument(f"--{name}", type=int, default=usual)
    arguments.add_argument("--json", action="store_true", help="numbers only")
    arguments.add_argument("--measure", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.measure:
        print(peak(given))
        return
    found = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "shape": {"B": 1, "H": given.heads, "T": given.length, "d": given.dim},
        "speed": speed(given),
        "MiB": memory(given),
    }
    print(json.dumps(found, indent=None if given.json else 2))


if __name__ == "__main__":
    main()
