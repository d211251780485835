"""A trained model with a sixth of its attention maps: converted, distilled, measured each time.

    MiniLM, 12 heads a layer  --rewrite(to=SwitchHead(init="convert"), calibration=...)-->
        2 maps with 6 experts each  --distill(student, teacher, ...)-->  measured again

Both see the same sentences (Python's language reference, see demo.py); every number is of others,
which no step has seen. The model that is only rewritten, with drawn parameters, is measured too.

    python examples/convert_minilm.py [--heads N] [--k N] [--steps LAYERS MODEL] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# a script beside this one, whatever the interpreter's options
sys.path.insert(0, str(Path(__file__).parent))

import demo
import torch
from torch import Tensor, nn

import attn_compiler as ac
from attn_compiler.train.distill import Recipe

Batch = Mapping[str, Tensor]
Auto = int | str
# what a user of embeddings would hardly notice; below, the words say so
_GOOD_COSINE, _GOOD_RANKS = 0.99, 0.98


@dataclass(frozen=True)
class Quality:
    """Of sentences that nobody was taught with, against the trained model.

    Attributes:
        cosine, least_cosine: of mean-pooled embeddings, on average and at worst.
        ranks: Spearman's correlation of the similarities of all pairs.
        error: relative square error of the last hidden states, padding left out.
    """

    cosine: float
    least_cosine: float
    ranks: float
    error: float

    def __str__(self) -> str:
        return (
            f"cosine {self.cosine:.4f} (least {self.least_cosine:.4f}), "
            f"ranks of pairs {self.ranks:.4f}, error of states {self.error:.4f}"
        )


@torch.inference_mode()
def quality(student: nn.Module, teacher: nn.Module, batches: Sequence[Batch]) -> Quality:
    """Compare two models on padded batches."""
    ours, theirs = demo.embed(student, batches).double(), demo.embed(teacher, batches).double()
    cosines = (ours * theirs).sum(-1)
    pairs = torch.triu_indices(len(ours), len(ours), 1)
    similar = [(x @ x.mT)[pairs[0], pairs[1]] for x in (ours, theirs)]
    gap = size = 0.0
    for batch in batches:
        kept = batch["attention_mask"].bool()
        a, b = (model(**batch).last_hidden_state[kept].double() for model in (student, teacher))
        gap, size = gap + float((a - b).square().sum()), size + float(b.square().sum())
    return Quality(
        float(cosines.mean()), float(cosines.min()), correlation(*map(ranks, similar)), gap / size
    )


def ranks(x: Tensor) -> Tensor:
    """The place of each number in the order of all."""
    return x.argsort().argsort().double()


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's."""
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def verdict(found: Quality) -> str:
    """In words, what the numbers allow to say."""
    if found.cosine >= _GOOD_COSINE and found.ranks >= _GOOD_RANKS:
        return "close to the trained model on these sentences"
    return (
        "NOT a replacement of the trained model yet: this is where training starts, and "
        "conversions of this kind are expected to need far more tokens"
    )


def split(options: argparse.Namespace, tokenizer: Any) -> dict[str, tuple[Batch, ...]]:
    """Sentences for the conversion and training, and others that are only measured."""
    texts = demo.sentences(100_000)
    random.Random(options.seed).shuffle(texts)
    held, left = texts[: options.held_out], texts[options.held_out :]
    parts = {"held_out": held, "calibration": left[: options.calibration]}
    parts["training"] = left[: options.training]
    return {
        name: demo.batched(name, part, tokenizer, options.batch).batches
        for name, part in parts.items()
    }


def calls(batches: Sequence[Batch], seed: int) -> list[tuple[tuple[()], dict[str, Tensor]]]:
    """Batches as calls, in a random order: those of the demo are sorted by length."""
    mixed = [((), dict(batch)) for batch in batches]
    random.Random(seed).shuffle(mixed)
    return mixed


def run(
    teacher: nn.Module, texts: Mapping[str, tuple[Batch, ...]], options: argparse.Namespace
) -> dict[str, Any]:
    """Convert, distil and measure: what goes into the file."""
    data, held = calls(texts["calibration"], options.seed), texts["held_out"]
    seconds: dict[str, float] = {}
    found: dict[str, Quality] = {}
    sizes = {"heads": options.heads, "experts": options.experts, "k": options.k}
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    drawn = ac.rewrite(teacher, (), data[0][1], to=ac.SwitchHead(**sizes))
    found["drawn"] = quality(drawn, teacher, held)
    print(f"drawn       {found['drawn']}", flush=True)
    start = time.perf_counter()
    spec = ac.SwitchHead(init="convert", **sizes)
    student = ac.rewrite(teacher, (), data[0][1], to=spec, calibration=data)
    seconds["conversion"] = time.perf_counter() - start
    layers = {s.path: s.facts["calibration"] for s in ac.last_report().sites if s.decision.accepted}
    found["converted"] = quality(student, teacher, held)
    print(f"converted   {found['converted']}", flush=True)
    start = time.perf_counter()
    recipe = Recipe(checkpoint=options.checkpoint)
    batches = calls(texts["training"], options.seed)
    taught = ac.distill(
        student, teacher, batches, steps=tuple(options.steps), lr=options.lr, recipe=recipe
    )
    seconds["distillation"] = time.perf_counter() - start
    found["distilled"] = quality(student, teacher, held)
    print(f"distilled   {found['distilled']}\n{verdict(found['distilled'])}", flush=True)
    counts = [sum(p.numel() for p in model.parameters()) for model in (teacher, student)]
    return {
        "quality": {name: asdict(measured) for name, measured in found.items()},
        "verdict": verdict(found["distilled"]),
        "layers": layers,
        "distilled": taught.losses,
        "parameters": counts,
        "seconds": seconds,
    }


def _size(text: str) -> Auto:
    return "auto" if text == "auto" else int(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    for name in ("heads", "experts", "k"):
        parser.add_argument(f"--{name}", type=_size, default="auto", help="of a layer")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=(100, 200), metavar=("LAYERS", "MODEL")
    )
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration", type=int, default=128, help="sentences")
    parser.add_argument("--training", type=int, default=2048, help="sentences")
    parser.add_argument("--held-out", type=int, default=128, help="sentences")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--checkpoint", type=Path, help="resume from this file, if it is there")
    parser.add_argument("--json", type=Path, default=Path("reports/convert_minilm.json"))
    options = parser.parse_args(argv)
    teacher, tokenizer = demo.load()
    found = run(teacher, split(options, tokenizer), options)
    given = sys.argv[1:] if argv is None else list(argv)
    found["command"] = f"python examples/convert_minilm.py {shlex.join(given)}".strip()
    found["machine"] = (
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads"
    )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"written: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
