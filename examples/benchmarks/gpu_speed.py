"""The generated kernels against PyTorch's own on one GPU, alternated in one process.

    python examples/benchmarks/gpu_speed.py [--out FOLDER]

Random data, bfloat16; medians with the smallest and the largest of alternated rounds; TFLOP/s count
4 B H T S d for the forward (half of it where causal), 2.5 times that for the backward.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attn_compiler.ir.expr import parse
from attn_compiler.ir.score import Program
from attn_compiler.kernels.library import attention

ROUNDS = 11
HEADS = {64: 32, 128: 16, 256: 8}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, help="folder for the numbers as JSON")
    arguments.add_argument("--length", type=int, nargs="+", default=[4096, 8192])
    given = arguments.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_speed needs a GPU, and there is none")
    name = torch.cuda.get_device_name().replace(" ", "-")
    found = [
        row
        for length in given.length
        for dim in HEADS
        for causal in (False, True)
        for row in compare(length, dim, causal)
    ]
    result = {"gpu": name, "torch": torch.__version__, "rounds": ROUNDS, "rows": found}
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / f"{name}.json").write_text(json.dumps(result, indent=1))


def compare(length: int, dim: int, causal: bool) -> list[dict[str, Any]]:
    """Forward and backward of one shape, 16k tokens in all."""
    batch, heads = max(1, 16384 // length), HEADS[dim]
    q, k, v = (
        torch.randn(batch, length, heads, dim, device="cuda", dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for _ in range(3)
    )
    ways = peers(q, k, v, causal)
    flops = 4 * batch * heads * length * length * dim / (2 if causal else 1)
    shape = {"T": length, "d": dim, "causal": causal}
    with torch.no_grad():
        forward = alternated(ways)
    grad = torch.randn_like(q)
    outs = {way: call() for way, call in ways.items()}
    backward = alternated(
        {
            way: lambda out=out: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)  # type: ignore[misc]
            for way, out in outs.items()
        }
    )
    return [
        report({**shape, "pass": "forward"}, forward, flops),
        report({**shape, "pass": "backward"}, backward, 2.5 * flops),
    ]


def peers(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> dict[str, Callable[[], torch.Tensor]]:
    """What runs here of ours, cuDNN, flash and FlexAttention."""
    length, scale = q.shape[2], q.shape[3] ** -0.5
    program = str(Program(mask=parse("k <= q")) if causal else Program())

    def ours() -> torch.Tensor:
        out, _ = attention(q, k, v, [], [], None, program=program, scale=scale, dropout=0.0)
        return out

    def sdpa(backend: SDPBackend) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return call

    flex = torch.compile(flex_attention, dynamic=False)
    mask = (
        create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length) if causal else None
    )
    ways: dict[str, Callable[[], Any]] = {
        "ours": ours,
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "flex": lambda: flex(q, k, v, block_mask=mask),
    }
    return {name: call for name, call in ways.items() if runs(name, call)}


def runs(name: str, call: Callable[[], Any]) -> bool:
    try:
        call()
        torch.cuda.synchronize()
    except RuntimeError as error:
        if name == "ours":
            raise
        print(f"{name} does not run here: {str(error).splitlines()[0][:100]}")
        return False
    return True


def alternated(ways: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of each way, one after the other in every round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 2):
        for name, call in ways.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3)
    return {name: found[2:] for name, found in times.items()}


def report(shape: dict[str, Any], times: dict[str, list[float]], flops: float) -> dict[str, Any]:
    row = dict(shape)
    for name, found in times.items():
        row[name] = {
            "tflops": flops / statistics.median(found) / 1e12,
            "seconds": [min(found), statistics.median(found), max(found)],
        }
        ratios = [theirs / ours for theirs, ours in zip(found, times["ours"], strict=True)]
        row[name]["ours_is_faster_by"] = [min(ratios), statistics.median(ratios), max(ratios)]
    text = "  ".join(
        f"{name} {row[name]['tflops']:.0f} ({row[name]['ours_is_faster_by'][1]:.2f}x)"
        for name in times
    )
    print(f"{shape}: TFLOP/s {text}", flush=True)
    return row


if __name__ == "__main__":
    main()
