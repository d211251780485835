"""CPU speed against stock torch.compile: one command, alternated runs, medians with their spread.

    eager attention, stock      eager attention, ours      the library's own SDPA path, stock

on a 4-layer GPT-2 and a 4-layer Llama (width 768, 12 heads; Llama with 4 kv heads) with random
weights, B=1, fp32. In every round each way runs once, so that a busy moment of the machine hits
all of them, and a ratio is taken inside a round. Compile time is taken cold, in processes of
their own with empty cache folders; so is peak memory, as the growth of the process's largest
resident set over one forward pass of a single attention layer.

    python examples/benchmarks/cpu_speed.py [--json] [--only speed compile memory]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).parent))  # also where PYTHONSAFEPATH keeps it off

import resident
import torch
from torch import Tensor, nn

Way = tuple[str, str]  # attention implementation of the model, backend

STOCK: Way = ("eager", "inductor")
OURS: Way = ("eager", "attn_compiler")
SDPA: Way = ("sdpa", "inductor")
WAYS = {"stock": STOCK, "ours": OURS, "sdpa": SDPA}
FAMILIES = ("gpt2", "llama")
WIDTH, HEADS, KV_HEADS, VOCABULARY, POSITIONS = 768, 12, 4, 1000, 16384


def build(family: str, attention: str, layers: int = 4) -> nn.Module:
    """A random model; the same seed gives both attention paths the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if family == "gpt2":
        config = GPT2Config(
            n_embd=WIDTH, n_layer=layers, n_head=HEADS, n_positions=POSITIONS,
            vocab_size=VOCABULARY, attn_implementation=attention,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()
    llama = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(llama).eval()


def tokens(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, VOCABULARY, (1, length), generator=generator)


@torch.inference_mode()
def seconds_of(forward: Callable[..., Any], ids: Tensor) -> float:
    start = time.perf_counter()
    forward(input_ids=ids, use_cache=False)
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compare(family: str, length: int, repetitions: int) -> dict[str, Any]:
    """Alternated forward passes of the three ways."""
    torch._dynamo.reset()
    ids = tokens(length)
    forwards = {
        name: torch.compile(build(family, attention), backend=backend, dynamic=False)
        for name, (attention, backend) in WAYS.items()
    }
    with torch.inference_mode():
        logits = {n: f(input_ids=ids, use_cache=False).logits for n, f in forwards.items()}
    for forward in forwards.values():
        seconds_of(forward, ids)
    seconds: dict[str, list[float]] = {name: [] for name in forwards}
    for _ in range(repetitions):
        for name, forward in forwards.items():
            seconds[name].append(seconds_of(forward, ids))
    ratio = {
        name: spread([t / o for t, o in zip(seconds[name], seconds["ours"], strict=True)])
        for name in ("stock", "sdpa")
    }
    return {
        "family": family,
        "length": length,
        "seconds": {name: spread(times) for name, times in seconds.items()},
        "stock_over_ours": ratio["stock"],
        "sdpa_over_ours": ratio["sdpa"],
        "max_error": (logits["ours"] - logits["stock"]).abs().max().item(),
    }


def in_fresh_process(cache: str, *arguments: str) -> float:
    """One number from this file run anew, with this folder as the compile cache."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def compile_seconds(family: str, way: str, length: int) -> float:
    """In a fresh process: the first call less a later one. Both imports are paid beforehand."""
    import torch._inductor.compile_fx

    import attn_compiler.backend  # noqa: F401

    attention, backend = WAYS[way]
    forward = torch.compile(build(family, attention), backend=backend, dynamic=False)
    ids = tokens(length)
    return seconds_of(forward, ids) - seconds_of(forward, ids)


def peak_mebibytes(family: str, way: str, length: int) -> float:
    """In a fresh process: growth of the resident set over one compiled forward pass.

    Compilation has a peak of its own, so it is paid beforehand at short lengths, in a dynamic
    graph, and the kernel's high-water mark is reset before the call that counts.
    """
    attention, backend = WAYS[way]
    model = build(family, attention, layers=1).base_model
    forward = torch.compile(model, backend=backend, dynamic=True)
    for warm in (96, 128):
        seconds_of(forward, tokens(warm))
    return resident.growth(lambda: seconds_of(forward, tokens(length)))


MEASURES = {"compile": compile_seconds, "memory": peak_mebibytes}


def versions() -> dict[str, str]:
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "cpu": _cpu_name(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def speed(options: argparse.Namespace) -> Any:
    found = []
    for family in FAMILIES:
        for length in options.lengths:
            row = compare(family, length, options.repetitions)
            found.append(row)
            milliseconds = "  ".join(
                f"{name} {1000 * s['median']:.0f} ms" for name, s in row["seconds"].items()
            )
            say(
                f"{family} T={length}: {milliseconds}\n"
                f"    stock / ours {_ratio(row['stock_over_ours'])}   "
                f"sdpa / ours {_ratio(row['sdpa_over_ours'])}   "
                f"largest difference of the logits {row['max_error']:.1e}"
            )
    return found


def _ratio(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def cold_compile(options: argparse.Namespace) -> Any:
    """Stock and ours in turns, each time with an empty cache."""
    found = []
    for family in FAMILIES:
        seconds: dict[str, list[float]] = {"stock": [], "ours": []}
        for way in ("stock", "ours") * options.processes:
            with tempfile.TemporaryDirectory() as cache:
                taken = in_fresh_process(cache, "--measure", "compile", family, way, "1024")
            seconds[way].append(taken)
        row = {way: spread(values) for way, values in seconds.items()}
        ratio = row["ours"]["median"] / row["stock"]["median"]
        found.append({"family": family, "seconds": row, "ours_over_stock": ratio})
        say(
            f"{family} cold compile: stock {row['stock']['median']:.1f} s  "
            f"ours {row['ours']['median']:.1f} s   ours / stock {ratio:.2f}"
        )
    return found


def memory(options: argparse.Namespace) -> Any:
    """One graph serves all lengths, so the cache is kept between the processes."""
    found = []
    lengths = (*options.lengths, 2 * options.lengths[-1])
    with tempfile.TemporaryDirectory() as cache:
        for family, length in product(FAMILIES, lengths):
            mebibytes = {
                way: in_fresh_process(cache, "--measure", "memory", family, way, str(length))
                for way in WAYS
            }
            found.append({"family": family, "length": length, "mebibytes": mebibytes})
            text = "  ".join(f"{way} {mib:.0f} MiB" for way, mib in mebibytes.items())
            say(f"{family} T={length} peak of one layer: {text}")
    return found


PARTS = {"speed": speed, "compile": cold_compile, "memory": memory}


def say(text: str) -> None:
    """For people; standard output stays free for --json."""
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="also print everything as JSON")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--processes", type=int, default=3, help="cold compilations of each")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        name, family, way, length = options.measure
        print(MEASURES[name](family, way, int(length)))
        return 0
    facts = versions()
    say(", ".join(f"{name} {value}" for name, value in facts.items()) + ", float32, B=1")
    found = {part: PARTS[part](options) for part in options.only}
    if options.json:
        print(json.dumps({"versions": facts, **found}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
