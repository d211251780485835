"""Whole models on a CPU, one for each variant, against the model as it is: one command.

    eager, compiled   the model as it is, its attention written out
    sdpa              the same on PyTorch's fused call, compiled
    fastest, ...      the model as it is, rewritten, then compiled by stock torch.compile

A decoder like GPT-2 with random weights on random tokens, B=1, fp32. `forward` is a pass without
gradients, `train` a step (forward, backward, AdamW), `generate` tokens of transformers' GPT-2 by
beam search behind a prompt, not compiled. In every round each way runs once, so that a busy moment
of the machine hits all of them; a ratio is taken inside a round: medians with the smallest and the
largest. Nothing is trained: this is the time of a variant, and says nothing of what it is worth.

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
from torch import Tensor, nn
from torch.nn import functional as F

import attn_compiler as ac
from attn_compiler.bench import Spread, peak_bytes, ratios
from attn_compiler.kernels import timing

HEAD, VOCABULARY, BLOCK = 64, 1000, 64
VARIANTS = ("fastest", "selective", "spion", "linear", "switchhead", "switchall", "gau")
GENERATING = ("el", "selective", "linear", "switchhead", "gau")
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
        "linear": ac.LinearAttention(),
        "switchhead": ac.SwitchHead(),
        "switchall": ac.SwitchHead(feed_forward="sigma_moe"),
        "gau": ac.GAU(),
    }[name]


class Attention(nn.Module):
    """Causal; written out, or PyTorch's fused call."""

    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.fused = nn.Linear(width, 3 * width), nn.Linear(width, width), fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, HEAD)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            length = x.shape[1]
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = (q @ k.mT / HEAD**0.5).masked_fill(future, float("-inf"))
            mixed = scores.softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm attention and feed-forward net."""

    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = Attention(width, fused)
        self.net = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.net(self.norms[1](x))


class Decoder(nn.Module):
    """A language model like GPT-2."""

    def __init__(self, given: argparse.Namespace, fused: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, given.width)
        self.places = nn.Embedding(given.length, given.width)
        self.blocks = nn.ModuleList(Block(given.width, fused) for _ in range(given.layers))
        self.norm = nn.LayerNorm(given.width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.tokens.weight.mT


def decoder(given: argparse.Namespace, fused: bool) -> Decoder:
    """With random weights; the same seed gives all ways the same."""
    torch.manual_seed(0)
    return Decoder(given, fused).eval()


def models(given: argparse.Namespace) -> dict[str, Any]:
    """Every way of `forward` and `train`."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # the ways share the code of their forwards
    found = {name: decoder(given, fused=name == "sdpa") for name in DENSE}
    for name in given.variants:
        if name in VARIANTS:
            model = decoder(given, fused=False)
            found[name] = rewritten(model, (tokens(given),), {}, spec(name, given))
    return {
        name: model if name == "eager" else torch.compile(model, dynamic=False)
        for name, model in found.items()
    }


def rewritten(model: nn.Module, args: tuple[Any, ...], kwargs: Any, to: Any) -> Any:
    """Every layer, or an error; the model itself is changed."""
    return ac.rewrite(model, args, kwargs, to=to, on_reject="raise", verify=False, inplace=True)


def tokens(given: argparse.Namespace) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (1, given.length), generator=draw)


# ---------------------------------------------------------------- what is measured


def forward(given: argparse.Namespace) -> Calls:
    ids = tokens(given)

    @torch.inference_mode()
    def call(model: Any) -> Any:
        return model(ids)

    return {name: lambda m=m: call(m) for name, m in models(given).items()}


def train(given: argparse.Namespace) -> Calls:
    ids = tokens(given)

    def call(model: Any, optimizer: torch.optim.Optimizer) -> None:
        F.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()  # so that gradients count among what a step holds

    found = {name: model.train() for name, model in models(given).items()}
    optimizers = {name: torch.optim.AdamW(m.parameters(), lr=1e-5) for name, m in found.items()}
    return {name: lambda n=name: call(found[n], optimizers[n]) for name in found}


def gpt2(given: argparse.Namespace) -> Any:
    """One that can generate."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=given.width, n_layer=given.layers, n_head=given.width // HEAD,
        n_positions=given.length + given.tokens, vocab_size=VOCABULARY,
        bos_token_id=None, eos_token_id=None, attn_implementation="sdpa",
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def generate(given: argparse.Namespace) -> Calls:
    ids = tokens(given)
    found = {"sdpa": gpt2(given)}
    for name in given.variants:
        if name in GENERATING:
            example = {"input_ids": ids, "use_cache": True}
            found[name] = rewritten(gpt2(given), (), example, spec(name, given))
    if "selective" in found:
        budget = given.budget or given.length // 8
        sites = [site.path for site in ac.explain(gpt2(given), (ids,)).sites]
        ac.set_budgets(found["selective"], dict.fromkeys(sites, budget))

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
    parser.add_argument(
        "--density", type=float, default=0.05, help="of blocks for SPION, below the diagonal"
    )
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
