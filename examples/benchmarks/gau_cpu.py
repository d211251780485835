"""Two gated attention units in chunks against the block they replace, on a CPU: one command.

    x + attention(norm x), x + net(norm x)   on SDPA        against       x + unit(norm x), twice

Both compiled by stock torch.compile, causal, one sequence, float32, random weights and inputs, an
equal number of parameters within 5 %. In every round each way runs once, so that a busy moment of
the machine hits both, and a ratio is taken inside a round: medians with their spread.

    python examples/benchmarks/gau_cpu.py [--json] [--width 1024] [--lengths 8192 32768]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # also where PYTHONSAFEPATH keeps it off

import resident
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from attn_compiler.kernels.gau_layer import GauForm, GauParameters, fresh, gau_layer

S, CHUNK, HEAD = 128, 256, 64
CAUSAL = partial(scaled_dot_product_attention, is_causal=True)


class Block(nn.Module):
    """Pre-norm attention and feed-forward net.

    Args:
        width: of the model.
        head: width of a head.
        attend: causal attention over q, k, v [B, heads, T, head].
    """

    def __init__(
        self,
        width: int,
        head: int = HEAD,
        attend: Callable[..., Tensor] = CAUSAL,
    ) -> None:
        super().__init__()
        self.head, self.attend = head, attend
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, -1, self.head)).unbind(2)
        heads = (t.transpose(1, 2) for t in (q, k, v))
        mixed = self.attend(*heads)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norms[1](x))))


class Pair(nn.Module):
    """Pre-norm, two units of the expanded width 2 D."""

    def __init__(self, width: int, s: int = S, chunk: int = CHUNK) -> None:
        super().__init__()
        self.form = GauForm(chunk=chunk, causal=True)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        units = [fresh((width, 2 * width, s), chunk=chunk) for _ in range(2)]
        names = GauParameters.__slots__
        self.units = nn.ModuleList(
            nn.ParameterDict({n: nn.Parameter(getattr(unit, n)) for n in names}) for unit in units
        )

    def forward(self, x: Tensor) -> Tensor:
        for norm, unit in zip(self.norms, self.units, strict=True):
            x = x + gau_layer(norm(x), GauParameters(**unit), self.form)
        return x


@torch.inference_mode()
def seconds_of(forward: Callable[[Tensor], Tensor], x: Tensor) -> float:
    start = time.perf_counter()
    forward(x)
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compare(width: int, length: int, rounds: int) -> dict[str, Any]:
    """Alternated forward passes of both, after one that compiles."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    modules = {"block": Block(width).eval(), "pair": Pair(width).eval()}
    forwards = {name: torch.compile(m, dynamic=False) for name, m in modules.items()}
    x = torch.randn(1, length, width)
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    for forward in forwards.values():
        seconds_of(forward, x)
    for _ in range(rounds):
        for name, forward in forwards.items():
            seconds[name].append(seconds_of(forward, x))
    pairs = zip(seconds["block"], seconds["pair"], strict=True)
    count = {name: sum(p.numel() for p in m.parameters()) for name, m in modules.items()}
    return {
        "length": length,
        "seconds": {name: spread(times) for name, times in seconds.items()},
        "block_over_pair": spread([block / pair for block, pair in pairs]),
        "parameters": count["pair"] / count["block"],
    }


def growth(width: int, lengths: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Microseconds for a token of the pair at each length, in turns, and MiB at the peak."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    pair = torch.compile(Pair(width).eval(), dynamic=True)
    inputs = {length: torch.randn(1, length, width) for length in lengths}
    taken: dict[int, list[float]] = {length: [] for length in lengths}
    for x in inputs.values():
        seconds_of(pair, x)
    for _ in range(rounds):
        for length, x in inputs.items():
            taken[length].append(1e6 * seconds_of(pair, x) / length)
    return [
        {
            "length": length,
            "microseconds_per_token": spread(times),
            "mebibytes": resident.growth(partial(seconds_of, pair, inputs[length])),
        }
        for length, times in taken.items()
    ]


def say(text: str) -> None:
    """For people; standard output stays free for --json."""
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="also print everything as JSON")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--lengths", nargs="*", type=int, default=[8192, 32768])
    parser.add_argument("--growth", nargs="*", type=int, default=[8192, 16384, 32768, 65536])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    say(f"torch {torch.__version__}, {torch.get_num_threads()} threads, width {options.width}")
    rows = []
    for length in options.lengths:
        row = compare(options.width, length, options.rounds)
        rows.append(row)
        ratio, seconds = row["block_over_pair"], row["seconds"]
        say(
            f"T={length}: block {seconds['block']['median']:.2f} s  "
            f"pair {seconds['pair']['median']:.2f} s   block / pair {ratio['median']:.2f} "
            f"({ratio['min']:.2f} to {ratio['max']:.2f})   parameters x {row['parameters']:.3f}"
        )
    grown = growth(options.width, options.growth, options.rounds) if options.growth else []
    for row in grown:
        found = row["microseconds_per_token"]
        say(
            f"T={row['length']}: pair {found['median']:.1f} us for a token "
            f"({found['min']:.1f} to {found['max']:.1f}), {row['mebibytes']:.0f} MiB at the peak"
        )
    if len(grown) > 1:
        each = [row["microseconds_per_token"]["median"] for row in grown]
        say(f"a token of the longest takes {each[-1] / each[0] - 1:+.1%} to one of the shortest")
    if options.json:
        print(json.dumps({"width": options.width, "speed": rows, "growth": grown}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
