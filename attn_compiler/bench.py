"""One model under torch.compile twice, as it is and with its attention rewritten.

    compare(given, "fastest", 15)   ->   seconds in alternated rounds, memory, largest difference

Forward passes without gradients, on the example and the device that were given.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from attn_compiler import backend
from attn_compiler.given import Given, called
from attn_compiler.kernels.timing import alternated
from attn_compiler.report import Report, heading


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of some numbers."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
        device: where.
        rounds: how often each way was called, after those that compile and warm up.
        report: what was rewritten.
        seconds: of a call, by way.
        ratio: stock / ours, inside each round.
        peak: bytes that a call holds at most beyond what is there before it, by way.
        difference: the largest between the outputs.
    """

    device: str
    rounds: int
    report: Report
    seconds: dict[str, Spread]
    ratio: Spread
    peak: dict[str, int]
    difference: float

    def __str__(self) -> str:
        lines = [f"{heading(self.report)}; {self.rounds} rounds on {self.device}"]
        for way, spread in self.seconds.items():
            times = f"{_ms(spread.median)} ({_ms(spread.least)} to {_ms(spread.most)})"
            lines.append(f"{way:<13}  {times}, {self.peak[way] / 2**20:,.1f} MiB at most")
        r = self.ratio
        lines.append(f"stock / ours   {r.median:.2f} ({r.least:.2f} to {r.most:.2f})")
        lines.append(f"largest difference of the outputs {self.difference:.1e}")
        return "\n".join(lines)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        found = {name: getattr(self, name) for name in ("device", "rounds", "peak", "difference")}
        found["seconds"] = {way: asdict(spread) for way, spread in self.seconds.items()}
        found["stock_over_ours"] = asdict(self.ratio)
        found["sites"] = len(self.report.sites)
        found["rewritten"] = self.report.rewritten
        return found


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.2f} ms"


def compare(given: Given, to: Any, rounds: int) -> Comparison:
    """Compile both ways, then call them in turns.

    Raises:
        CouldNot: the model cannot be compiled.
        BadOption: a wrong target.
    """
    device = given.device()
    backend.register()
    options = {"to": to}
    ways = {
        "stock": torch.compile(given.model),
        "attn_compiler": torch.compile(given.model, backend="attn_compiler", options=options),
    }

    def call(way: str) -> Any:
        with torch.no_grad():
            return ways[way](*given.args, **given.kwargs)

    calls = {way: (lambda way=way: call(way)) for way in ways}
    with called(given):
        outputs = {way: one() for way, one in calls.items()}
    report = backend.last_report()
    seconds = alternated(calls, rounds, partial(_seconds, device))
    return Comparison(
        device=_named(device),
        rounds=rounds,
        report=report,
        seconds={way: Spread.of(values) for way, values in seconds.items()},
        ratio=ratios(seconds["stock"], seconds["attn_compiler"]),
        peak={way: peak_bytes(one, device) for way, one in calls.items()},
        difference=_difference(*outputs.values()),
    )


def _named(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type}, {torch.get_num_threads()} threads"


def _difference(one: Any, other: Any) -> float:
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    found = [
        (a.double() - b.double()).abs().max().item()
        for a, b in pairs
        if isinstance(a, torch.Tensor) and a.is_floating_point() and a.numel()
    ]
    return max(found, default=0.0)


# ---------------------------------------------------------------- time and memory


def _seconds(device: torch.device, call: Callable[[], Any]) -> float:
    """What a user waits for a call: on a GPU it ends when the GPU has."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(one: Sequence[float], other: Sequence[float]) -> Spread:
    """one / other, round by round."""
    return Spread.of([a / b for a, b in zip(one, other, strict=True)])


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most that PyTorch's allocator holds beyond what was there before the call."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return int(torch.cuda.max_memory_allocated(device)) - before
    from torch.profiler import ProfilerActivity, profile

    with _silenced(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    held = most = 0
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = seen.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@contextmanager
def _silenced() -> Iterator[None]:
    """The profiler writes lines of its own past sys.stderr."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
