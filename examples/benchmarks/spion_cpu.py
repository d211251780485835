"""Block-sparse attention on a CPU against dense attention: forward and backward, one layer.

    softmax(q k^T) v over all keys (PyTorch's SDPA)     against     over the kept blocks

fp32, B=1, random data; a pattern is the diagonal and random blocks, twice as many in the first
columns and the last rows, where walks over attention maps meet. In every round each way runs once,
so that a busy moment of the machine hits all of them, and a ratio is taken inside a round.

    python examples/benchmarks/spion_cpu.py [--densities 0.03 0.06] [--causal] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attn_compiler.ir.expr import parse
from attn_compiler.ir.score import Program
from attn_compiler.kernels.library import attention
from attn_compiler.kernels.sparse import sparse


def pattern(side: int, density: float, causal: bool) -> Tensor:
    """Booleans [side, side] with this share of ones (of the lower triangle, if causal)."""
    draw = torch.rand(side, side, generator=torch.Generator().manual_seed(side))
    edge = max(1, side // 16)
    draw[:, :edge] += draw[:, :edge]
    draw[-edge:] += draw[-edge:]
    draw.diagonal().fill_(torch.inf)
    counts = torch.ones(side, side, dtype=torch.bool)
    counts = counts.tril() if causal else counts
    number = max(side, round(density * int(counts.sum())))
    kept = torch.zeros(side * side, dtype=torch.bool)
    kept[draw.masked_fill(~counts, -1.0).flatten().topk(number).indices] = True
    return kept.view(side, side)


def seconds_of(way: Callable[[], Tensor], qkv: Sequence[Tensor], grad: Tensor) -> float:
    start = time.perf_counter()
    torch.autograd.grad(way(), qkv, grad)
    return time.perf_counter() - start


def compare(options: argparse.Namespace, density: float) -> dict[str, Any]:
    length, heads, width, block = options.length, options.heads, options.width, options.block
    draw = torch.Generator().manual_seed(0)
    shape = (1, length, heads, width)
    q, k, v, grad = (torch.randn(shape, generator=draw).transpose(1, 2) for _ in range(4))
    qkv = [x.requires_grad_() for x in (q, k, v)]
    kept = pattern(-(-length // block), density, options.causal)
    base = Program(mask=parse("k <= q")) if options.causal else Program()
    program, reads = sparse(base, kept, block=block, length=length, slot=0, softmax=options.softmax)
    text, scale = str(program), width**-0.5
    ways: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: scaled_dot_product_attention(*qkv, is_causal=options.causal),
        "sparse": lambda: attention(*qkv, reads, [], None, program=text, scale=scale, dropout=0.0)[
            0
        ],
    }
    rounds = [
        {name: seconds_of(way, qkv, grad) for name, way in ways.items()}
        for _ in range(options.rounds + 1)
    ][1:]  # the first one warms up
    faster = [r["dense"] / r["sparse"] for r in rounds]
    return {
        "density": float(kept.float().mean()),
        "seconds": {name: spread([r[name] for r in rounds]) for name in ways},
        "dense_over_sparse": spread(faster),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--densities", nargs="+", type=float, default=[0.03, 0.05, 0.07])
    parser.add_argument("--softmax", choices=("neg_inf", "zero_logit"), default="neg_inf")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args(argv)
    found = [compare(options, density) for density in options.densities]
    if options.json:
        print(
            json.dumps(
                {"torch": torch.__version__, "threads": torch.get_num_threads(), "runs": found}
            )
        )
        return 0
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, T={options.length}")
    for row in found:
        milliseconds = "  ".join(
            f"{name} {1000 * s['median']:.0f} ms" for name, s in row["seconds"].items()
        )
        ratio = row["dense_over_sparse"]
        print(
            f"density {100 * row['density']:.1f} %: {milliseconds}   dense / sparse "
            f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
