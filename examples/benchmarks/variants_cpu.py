"""Whole models on a CPU, one for each variant, against the model as it is: one command.

    eager, compiled   the model as it is, its attention written out
    sdpa              the same on PyTorch's fused call, compiled
    fastest, ...      that, rewritten, then compiled by stock torch.compile

A GPT-2 with random weights on random tokens, B=1, fp32. `forward` is a pass without gradients,
`train` a step (forward, backward, AdamW), `generate` tokens by beam search behind a prompt, not
compiled. In every round each way runs once, so that a busy moment of the machine hits all of them;
a ratio is taken inside a round: medians with the smallest and the largest. What a variant with
parameters of its own computes is not trained here: this is its time, and says nothing else of it.

    python examples/benchmarks/variants_cpu.py [--length 2048] [--only forward train] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# its own folder, also where PYTHONSAFEPATH keeps it off the path
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from spion_cpu import pattern
from torch import Tensor

import attn_compiler as ac
from attn_compiler.bench import Spread, peak_bytes, ratios
from attn_compiler.kernels import timing

HEAD, VOCABULARY, BLOCK = 64, 1000, 64
VARIANTS = ("fastest", "selective", "spion", "switchhead", "switchall", "gau")
GENERATING = ("el", "selective", "switchhead", "gau")
DENSE = ("eager", "compiled", "sdpa")
Calls = Mapping[str, Callable[[], Any]]


def spec(name: str, given: argparse.Namespace) -> Any:
    """What a way is rewritten to; every layer, or an error."""
    if name == "spion":
        side = -(-given.length // BLOCK)
        return ac.SPION(pattern=pattern(side, given.density, causal=True), block=BLOCK)
    return {
        "fastest": "fastest",
        "el": ac.ELAttention(),
        "selective": ac.Selective(),
        "switchhead": ac.SwitchHead(),
        "switchall": ac.SwitchHead(feed_forward="sigma_moe"),
        "gau": ac.GAU(),
    }[name]


def build(given: argparse.Namespace, attention: str) -> Any:
    """A random model; the same seed gives all the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=given.width, n_layer=given.layers, n_head=given.width // HEAD,
        n_positions=given.length + given.tokens, vocab_size=VOCABULARY,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None, attn_implementation=attention,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def tokens(given: argparse.Namespace) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (1, given.length), generator=draw)


def rewritten(name: str, given: argparse.Namespace, use_cache: bool) -> Any:
    example = {"input_ids": tokens(given), "use_cache": use_cache}
    return ac.rewrite(
        build(given, "sdpa"), (), example,
        to=spec(name, given), on_reject="raise", verify=False, inplace=True,
    )  # fmt: skip


def models(given: argparse.Namespace) -> dict[str, Any]:
    """Every way of `forward` and `train`."""
    torch._dynamo.reset()
    found = {name: build(given, "sdpa" if name == "sdpa" else "eager") for name in DENSE}
    found |= {name: rewritten(name, given, False) for name in given.variants if name in VARIANTS}
    return {
        name: model if name == "eager" else torch.compile(model, dynamic=False)
        for name, model in found.items()
    }


# ---------------------------------------------------------------- what is measured


def forward(given: argparse.Namespace) -> Calls:
    ids = tokens(given)

    @torch.inference_mode()
    def call(model: Any) -> Any:
        return model(input_ids=ids, use_cache=False).logits

    return {name: lambda m=m: call(m) for name, m in models(given).items()}


def train(given: argparse.Namespace) -> Calls:
    ids = tokens(given)

    def call(model: Any, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    found = {name: model.train() for name, model in models(given).items()}
    optimizers = {name: torch.optim.AdamW(m.parameters(), lr=1e-5) for name, m in found.items()}
    return {name: lambda n=name: call(found[n], optimizers[n]) for name in found}


def generate(given: argparse.Namespace) -> Calls:
    ids = tokens(given)
    found = {name: build(given, name) for name in ("eager", "sdpa")}
    found |= {name: rewritten(name, given, True) for name in given.variants if name in GENERATING}
    if "selective" in found:
        sites = [site.path for site in ac.explain(build(given, "sdpa"), (ids,)).sites]
        ac.set_budgets(found["selective"], dict.fromkeys(sites, given.budget or given.length // 8))

    @torch.inference_mode()
    def call(model: Any) -> Any:
        return model.generate(
            input_ids=ids, num_beams=given.beams, do_sample=False, pad_token_id=0,
            max_new_tokens=given.tokens, min_new_tokens=given.tokens,
        )  # fmt: skip

    return {name: lambda m=m: call(m) for name, m in found.items()}


PARTS = {"forward": forward, "train": train, "generate": generate}


def measured(calls: Calls, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each way, ratios to the models as they are, and the most memory of a call."""
    for call in calls.values():  # compiles
        call()
    times = timing.alternated(calls, given.rounds, timing.seconds)
    return {
        name: {
            "seconds": asdict(Spread.of(times[name])),
            "peak": peak_bytes(calls[name], torch.device("cpu")),
        }
        | {
            f"{base}_over": asdict(ratios(times[base], times[name]))
            for base in DENSE
            if base in calls
        }
        for name in calls
    }


def table(part: str, found: Mapping[str, Any]) -> str:
    """A part as Markdown."""
    against = [base for base in DENSE if base in found]
    head = [part, "ms", *(f"{base} / it" for base in against), "MiB at most"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in found.items():
        said = [_spread(row["seconds"], 1e3, 0)]
        said += [_spread(row[f"{base}_over"], 1, 2) for base in against]
        lines.append(f"| {name} | {' | '.join(said)} | {row['peak'] / 2**20:,.0f} |")
    return "\n".join(lines)


def _spread(found: Mapping[str, float], unit: float, digits: int) -> str:
    median, least, most = (
        f"{unit * found[name]:,.{digits}f}" for name in ("median", "least", "most")
    )
    return f"{median} ({least} to {most})"


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    sizes = {"length": 2048, "width": 512, "layers": 4, "rounds": 9, "beams": 4, "tokens": 16}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--density", type=float, default=0.05, help="of SPION's blocks")
    parser.add_argument("--budget", type=int, help="of a selective cache, an eighth of the length")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    every = list(dict.fromkeys((*VARIANTS, *GENERATING)))
    parser.add_argument("--variants", nargs="+", choices=every, default=every)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    given = arguments(words)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    machine |= {"python": platform.python_version(), "processor": platform.machine()}
    found: dict[str, Any] = {}
    for part in given.only:
        found[part] = measured(PARTS[part](given), given)
        print(f"{table(part, found[part])}\n", file=sys.stderr, flush=True)
    if given.json:
        print(json.dumps({"machine": machine, "options": vars(given), "parts": found}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
