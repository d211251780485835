"""Block-sparse attention on a CPU against dense attention, and how long a pattern takes.

    attention   softmax(q k^T) v over all keys (PyTorch's SDPA)   against   over the kept blocks,
                forward and backward, one layer
    step        a training step of a pre-norm encoder, as it is   against   rewritten with
                SPION(pattern=...)
    pattern     spion_pattern of one [L, L] map, in modes CF, C and F: seconds

fp32, B=1, random data; a pattern is the diagonal and random blocks, twice as many in the first
columns and the last rows, where walks over attention maps meet. In every round each way runs once,
so that a busy moment of the machine hits all of them, and a ratio is taken inside a round.

    python examples/benchmarks/spion_cpu.py [--densities 0.03 0.06] [--causal] [--json]
    python examples/benchmarks/spion_cpu.py --what step --length 8192 --densities 0.05 --rounds 3
    python examples/benchmarks/spion_cpu.py --what pattern --length 8192

`--what step` also runs on a GPU (`--device cuda`, bfloat16 by autocast).
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
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

import attn_compiler as ac
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
    return compared(
        {name: lambda way=way: seconds_of(way, qkv, grad) for name, way in ways.items()},
        options.rounds,
    ) | {"density": float(kept.float().mean())}


def compared(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """Seconds of `dense` and `sparse` in turns; the first round warms up."""
    found = [{name: way() for name, way in ways.items()} for _ in range(rounds + 1)][1:]
    return {
        "seconds": {name: spread([r[name] for r in found]) for name in ways},
        "dense_over_sparse": spread([r["dense"] / r["sparse"] for r in found]),
    }


# ---------------------------------------------------------------- a training step


class Block(nn.Module):
    """Pre-norm attention and feed-forward net."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        width = options.heads * options.width
        self.heads, self.causal = options.heads, options.causal
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        heads = (t.transpose(1, 2) for t in (q, k, v))
        mixed = scaled_dot_product_attention(*heads, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norms[1](x))))


def step(options: argparse.Namespace, density: float) -> dict[str, Any]:
    """A whole training step of an encoder, dense and rewritten."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(options) for _ in range(options.layers))).to(options.device)
    x = torch.randn(1, options.length, options.heads * options.width, device=options.device)
    kept = pattern(-(-options.length // options.block), density, options.causal)
    spec = ac.SPION(pattern=kept, block=options.block, softmax=options.softmax)
    cuda = options.device == "cuda"

    def seconds(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        start = clock(cuda)
        optimizer.zero_grad()
        with torch.autocast(options.device, torch.bfloat16, enabled=cuda):
            loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return clock(cuda) - start

    with torch.autocast(options.device, torch.bfloat16, enabled=cuda):
        sparse_ = ac.rewrite(model, (x,), to=spec, on_reject="raise", verify=False)
    trained = {"dense": model, "sparse": sparse_}
    pairs = {name: (m, torch.optim.AdamW(m.parameters())) for name, m in trained.items()}
    ways = {name: lambda pair=pair: seconds(*pair) for name, pair in pairs.items()}
    return compared(ways, options.rounds) | {"density": float(kept.float().mean())}


def clock(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


# ---------------------------------------------------------------- a pattern


def patterns(options: argparse.Namespace) -> dict[str, float]:
    """Seconds from a map of random probabilities to its pattern, by mode."""
    draw = torch.Generator().manual_seed(0)
    attention_map = torch.rand(options.length, options.length, generator=draw)
    attention_map /= attention_map.sum(-1, keepdim=True)
    found = {}
    for mode, level in (("CF", {"alpha": 0.96}), ("C", {"density": 0.05}), ("F", {"alpha": 0.96})):
        start = time.perf_counter()
        ac.spion_pattern(attention_map, mode=mode, block=options.block, **level)
        found[mode] = time.perf_counter() - start
    return found


# ---------------------------------------------------------------- one command


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--what", choices=("attention", "step", "pattern"), default="attention")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--layers", type=int, default=1, help="of a step's encoder")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--densities", nargs="+", type=float, default=[0.03, 0.05, 0.07])
    parser.add_argument("--softmax", choices=("neg_inf", "zero_logit"), default="neg_inf")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of a step")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args(argv)
    way = {"attention": compare, "step": step}.get(options.what)
    found: Any = [way(options, d) for d in options.densities] if way else patterns(options)
    about = f"torch {torch.__version__}, {torch.get_num_threads()} threads, T={options.length}"
    if options.json:
        print(json.dumps({"about": about, "options": vars(options), "runs": found}))
        return 0
    print(about)
    for line in map(row, found) if way else (f"{m}: {s:.2f} s" for m, s in found.items()):
        print(line)
    return 0


def row(found: dict[str, Any]) -> str:
    milliseconds = "  ".join(
        f"{name} {1000 * s['median']:.0f} ms" for name, s in found["seconds"].items()
    )
    ratio = found["dense_over_sparse"]
    return (
        f"density {100 * found['density']:.1f} %: {milliseconds}   dense / sparse "
        f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
    )


if __name__ == "__main__":
    sys.exit(main())
