"""EL-attention on a CPU: how many samples fit, and where a step of generation is faster.

    fits    the largest batch whose beam search stays within a memory budget beside the weights
    speed   one step of a decoder with a full cache: stock, stock compiled, rewritten, where
            cross-attention reads the encoder's states and self-attention, whose cache is short,
            keeps keys and values
    reads   the kernel over states far larger than the caches, beside one and two passes of
            reading them, two products that read them twice, and the kernel over states that stay in
            the caches, for as many keys; then the kernel in bfloat16, and what it takes to make
            float32 of it

Random weights. Each way of `fits` runs in a process of its own; peaks are the growth of the largest
resident set. In `speed` every round runs each way once, so that a busy moment hits all of them; a
prediction by the cost model, fitted to this machine just before, stands beside the measurement.

    python examples/benchmarks/el_cpu.py [--json] [--only fits speed reads] [--budget 1024]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).parent))  # also where PYTHONSAFEPATH keeps it off

import resident
import torch

WAYS, PARTS = ("stock", "ours"), ("fits", "speed", "reads")
TOKENS, VOCABULARY = 4, 50265
# name: width, heads, tokens of input; sizes of known models
SETTINGS = {
    "s2t-small": (256, 4, 1500),
    "whisper-tiny": (384, 6, 1500),
    "marian": (512, 8, 512),
    "whisper-small": (768, 12, 1500),
    "bart-large": (1024, 16, 512),
    "32 heads": (1024, 32, 512),
}
MEBI = 2.0**20


def build(width: int, heads: int, layers: int, length: int, vocabulary: int) -> Any:
    """A decoder with an encoder of one layer, which is not timed."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(
        d_model=width, encoder_layers=1, decoder_layers=layers, encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=width, decoder_ffn_dim=4 * width,
        vocab_size=vocabulary, max_position_embeddings=max(1024, length), forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def rewritten(model: Any, which: str, inplace: bool) -> Any:
    """With EL-attention where a pattern says."""
    import attn_compiler as ac

    ids = torch.randint(4, 90, (2, 7))
    example = {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    return ac.rewrite(model, (), example, to={which: ac.ELAttention()}, inplace=inplace)


# ---------------------------------------------------------------- fits


@torch.inference_mode()
def peak(model: Any, batch: int, given: argparse.Namespace) -> float:
    """MiB by which the process grows while a beam search runs."""
    ids = torch.randint(4, 90, (batch, given.length))
    call = partial(
        model.generate, input_ids=ids, num_beams=given.beams, do_sample=False,
        max_new_tokens=TOKENS, min_new_tokens=TOKENS,
    )  # fmt: skip
    return resident.growth(call)


def most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number that fits, to an eighth of itself; 0 if one does not."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest(way: str, given: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: the largest batch of one way, and the peaks that were seen."""
    width, heads, _ = SETTINGS["bart-large"]
    model = build(
        given.width or width, given.heads or heads, given.layers, given.length, VOCABULARY
    )
    if way == "ours":
        model = rewritten(model, "*", inplace=True)
    peak(model, 1, given)
    peaks: dict[int, float] = {}

    def fits(batch: int) -> bool:
        peaks[batch] = peak(model, batch, given)
        return peaks[batch] <= given.budget

    return {"way": way, "batch": most(fits, given.limit), "peaks": peaks}


def fits(given: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for way in WAYS:
        command = [sys.executable, str(Path(__file__).resolve()), *given.words, "--way", way]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{way} failed:\n{done.stderr[-2000:]}")
        found[way] = json.loads(done.stdout.splitlines()[-1])
    ours, stock = (found[way]["batch"] for way in ("ours", "stock"))
    return {"budget": given.budget, "ways": found, "ratio": ours / stock if stock else None}


# ---------------------------------------------------------------- speed


@torch.no_grad()
def fitted() -> Any:
    """This machine as the cost model takes it, as `attn_compiler.calibrate` measures it."""
    from attn_compiler.calibrating import on_a_cpu
    from attn_compiler.cost.at_hand import plain

    return on_a_cpu(plain(torch.device("cpu")), seconds)


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def predicted(name: str, given: argparse.Namespace, machine: Any) -> tuple[float, bool, float]:
    """Speed-up of a step, whether cross-attention pays, and the heads at which it breaks even."""
    import attn_compiler as ac
    from attn_compiler.cost.cpu import time_of_cost
    from attn_compiler.cost.letters import Cost
    from attn_compiler.variants.el import most_heads

    width, heads, length = SETTINGS[name]
    dtype = getattr(torch, given.dtype)
    shape = ac.Shape(
        given.batch, 1, length, heads, width // heads, width=width, beams=given.beams, causal=False
    )
    cross = ac.plan(ac.ELAttention(), shape, hardware=machine, dtype=dtype)
    own = ac.plan(
        ac.ELAttention(),
        replace(shape, key=given.written, causal=True),
        hardware=machine,
        dtype=dtype,
    )
    rows, weights = given.batch * given.beams, 8 * width**2
    feed = time_of_cost(
        # with norms, residuals, the activation and what a cache puts together
        Cost(flops=2 * rows * weights, read=dtype.itemsize * weights, launches=12),
        machine,
        dtype.itemsize,
    )
    ours = cross.seconds + own.alternatives[0].seconds + feed.seconds
    stock = cross.alternatives[0].seconds + own.alternatives[0].seconds + feed.seconds
    flops = machine.processors * machine.clock * machine.sustained * machine.flops32
    limit = most_heads(flops / machine.dram_rate, dtype.itemsize)
    return stock / ours, not cross.keep, limit


@torch.inference_mode()
def step(model: Any, decoder: Any, name: str, given: argparse.Namespace) -> Callable[[], Any]:
    """A step of the decoder behind a prompt, the same at every call."""
    from transformers import DynamicCache, EncoderDecoderCache

    width, _, length = SETTINGS[name]
    dtype = getattr(torch, given.dtype)
    states = torch.randn(given.batch, length, width, dtype=dtype).repeat_interleave(given.beams, 0)
    rows = given.batch * given.beams
    past = EncoderDecoderCache(DynamicCache(), DynamicCache())
    ids = torch.randint(4, 90, (rows, given.written))
    model.model.decoder(input_ids=ids, encoder_hidden_states=states, past_key_values=past)

    @torch.inference_mode()
    def run() -> Any:
        out = decoder(input_ids=ids[:, :1], encoder_hidden_states=states, past_key_values=past)
        past.self_attention_cache.crop(-1)
        return out.last_hidden_state

    return run


def compare(name: str, given: argparse.Namespace, machine: Any) -> dict[str, Any]:
    """Alternated steps of the three ways."""
    torch._dynamo.reset()
    width, heads, length = SETTINGS[name]
    model = build(width, heads, given.layers, length, 1000).to(getattr(torch, given.dtype))
    new = rewritten(model, "*encoder_attn", inplace=False)
    compiled = torch.compile(model.model.decoder)
    torch.manual_seed(1)
    steps = {
        "stock": step(model, model.model.decoder, name, given),
        "compiled": step(model, compiled, name, given),
        "ours": step(new, new.model.decoder, name, given),
    }
    for run in steps.values():
        run()
        run()
    times: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(given.rounds):
        for way, run in steps.items():
            times[way].append(seconds(run))
    speed_up = [
        min(a, b) / c
        for a, b, c in zip(times["stock"], times["compiled"], times["ours"], strict=True)
    ]
    expected, pays, limit = predicted(name, given, machine)
    return {
        "setting": name, "dtype": given.dtype, "width": width, "heads": heads, "length": length,
        "break_even": limit,
        "seconds": {way: statistics.median(found) for way, found in times.items()},
        "speed_up": statistics.median(speed_up), "spread": [min(speed_up), max(speed_up)],
        "predicted": expected, "pays": pays,
    }  # fmt: skip


# ---------------------------------------------------------------- reads


def kernels(x: torch.Tensor, rows: int) -> dict[str, Callable[[], Any]]:
    """The middle of a step, softmax(q x^T) x: for `rows` heads and beams of each item
    of x [B, S, D], by the kernel that a step runs and by two products.
    """
    from attn_compiler.kernels.gathered_cpu import FORWARD

    q = torch.randn(x.shape[0], rows, x.shape[2]) / x.shape[2] ** 0.5
    q, states = q.to(x.dtype), x[:, None]

    def products() -> torch.Tensor:
        return torch.bmm(torch.bmm(q, x.transpose(1, 2)).softmax(-1), x)

    def kernel() -> torch.Tensor:
        found: torch.Tensor = FORWARD(q[:, None], states, states, 0.0, False, scale=1.0)[0][:, 0]
        return found

    if x.dtype is torch.float32:
        torch.testing.assert_close(kernel(), products(), rtol=1e-3, atol=1e-4)
    return {"kernel": kernel, "products": products}


def repeated(call: Callable[[], Any], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


@torch.inference_mode()
def reads(rows: int, given: argparse.Namespace) -> dict[str, Any]:
    """Alternated passes over states [B, S, D], one after the other of each round."""
    batch, width = given.batch, given.width or SETTINGS["bart-large"][0]
    keys, near = (int(size * MEBI) // (4 * batch * width) for size in (given.size, given.near))
    x = torch.randn(batch, keys, width)
    calls = {"one pass": x.sum, "largest": x.amax, "two passes": repeated(x.sum, 2)}
    calls |= kernels(x, rows)
    for name, call in kernels(torch.randn(batch, near, width), rows).items():
        calls[f"{name}, near"] = repeated(call, keys // near)
    half = x.bfloat16()
    calls |= {"bfloat16": kernels(half, rows)["kernel"], "to float32": half.float}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(1 + given.rounds):
        for name, call in calls.items():
            took = seconds(call)
            times[name] += [took] if number else []
    # either way to read it once
    times["one pass"] = list(map(min, times["one pass"], times.pop("largest")))
    sizes = {"rows": rows, "bytes": x.nbytes, "near": given.near * MEBI, "width": width}
    return {**sizes, "threads": torch.get_num_threads(), "seconds": times}


def show_reads(rows: Sequence[dict[str, Any]], given: argparse.Namespace) -> None:
    print(
        f"\nstates of {given.size} MiB in float32, {given.batch} items, threads: "
        f"{torch.get_num_threads()}; ms, medians (least to most); near: as many "
        f"keys from {given.near} MiB that stay in the caches"
    )
    for row in rows:
        medians = {name: statistics.median(found) for name, found in row["seconds"].items()}
        one = medians["one pass"]
        print(f"  {row['rows']} rows an item; one pass is {row['bytes'] / one / 1e9:.1f} GB/s")
        for name, found in row["seconds"].items():
            least, middle, most_ = (1e3 * f(found) for f in (min, statistics.median, max))
            text = f"{middle:7.1f} ({least:.1f} to {most_:.1f})  {one / medians[name]:5.0%} of it"
            if f"{name}, near" in medians:
                more = (medians[name] - medians[f"{name}, near"]) / one
                text += f", {more:.2f} passes more than near"
            print(f"    {name:15} {text}")


# ---------------------------------------------------------------- what people see


def show(found: dict[str, Any], given: argparse.Namespace) -> None:
    if "fits" in found:
        rows = found["fits"]["ways"]
        print(
            f"\nlargest batch in {given.budget:.0f} MiB beside the weights, {given.beams} beams, "
        )
        print(f"{given.length} tokens of input, {given.layers} layers")
        for way in WAYS:
            peaks = ", ".join(f"{b}: {p:.0f}" for b, p in rows[way]["peaks"].items())
            print(f"  {way:6} {rows[way]['batch']:5}   MiB by batch: {peaks}")
        print(f"  ratio {found['fits']['ratio']}")
    if "speed" in found:
        print(
            f"\none step, batch {given.batch}, {given.beams} beams, {given.layers} layers, "
            f"{given.written} tokens written, {torch.get_num_threads()} threads, ms; faster: than "
            "the better of stock and stock compiled"
        )
        print(
            "setting        dtype    width tokens heads (even)   stock compiled  ours   "
            "faster (spread)      predicted  of it"
        )
    if "reads" in found:
        show_reads(found["reads"], given)
    for row in found.get("speed", ()):
        ms = [f"{row['seconds'][way] * 1e3:7.1f}" for way in ("stock", "compiled", "ours")]
        least, most_ = row["spread"]
        print(
            f"{row['setting']:14} {row['dtype']:8} {row['width']:5} {row['length']:6} "
            f"{row['heads']:5} ({row['break_even']:4.1f}) {' '.join(ms)}  "
            f"{row['speed_up']:5.2f} ({least:.2f} to {most_:.2f})  {row['predicted']:5.2f}  "
            f"{row['speed_up'] / row['predicted']:7.0%}{'' if row['pays'] else '  declined'}"
        )


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=tuple(SETTINGS))
    parser.add_argument("--budget", type=float, default=1024, help="MiB")
    parser.add_argument("--limit", type=int, default=256, help="no batch above is tried")
    parser.add_argument("--length", type=int, default=512, help="tokens of input, for fits")
    parser.add_argument("--written", type=int, default=32, help="tokens of output, for speed")
    parser.add_argument("--width", type=int, help="for fits and reads, 1024 if not given")
    parser.add_argument("--heads", type=int, help="for fits, 16 if not given")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="for speed and reads")
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 2, 4), help="for reads")
    parser.add_argument("--size", type=int, default=256, help="MiB of states, for reads")
    parser.add_argument("--near", type=int, default=8, help="MiB that the caches hold, for reads")
    parser.add_argument("--rounds", type=int, default=7)
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes, help="for speed")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    options.words = sys.argv[1:] if given is None else list(given)
    if options.way:
        print(json.dumps(largest(options.way, options)))
        return 0
    found: dict[str, Any] = {}
    if "fits" in options.only:
        found["fits"] = fits(options)
    if "speed" in options.only:
        machine = fitted()
        one = [argparse.Namespace(**(vars(options) | {"dtype": d})) for d in options.dtype]
        found["speed"] = [compare(name, g, machine) for g in one for name in options.settings]
    if "reads" in options.only:
        found["reads"] = [reads(rows, options) for rows in options.rows]
    print(json.dumps(found, indent=1)) if options.json else show(found, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
