"""SwitchHead on a CPU against ordinary attention with as many parameters: one command.

    dense    x W_QKV, scaled_dot_product_attention, W_O
    ours     a layer of SwitchHead: projections by experts, attn_compiler::attention

Causal self-attention, projections included, B=1, random data. Sizes of SwitchHead are those that
`SwitchHead()` takes for the dense layer. Layers are run in turns, so that a busy moment of the
machine hits both; a ratio is taken inside a round. `--forms` compares the two ways to multiply by
experts instead, for the rule that chooses between them.

    python examples/benchmarks/switchhead_cpu.py [--length 4096] [--train] [--forms] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attn_compiler.kernels import expert_forms as forms
from attn_compiler.kernels.routing import route
from attn_compiler.kernels.switchhead import Mixture, Scores, Weights, switchhead_attention
from attn_compiler.variants.switchhead import (
    SwitchHead,
    attention_parameters,
    filled,
    parameters,
)
from attn_compiler.variants.switchhead_fresh import Drawing, fresh

CAUSAL = Scores("score: dot; mask: k <= q; empty: any")


class Dense(NamedTuple):
    """An ordinary layer."""

    width: int
    heads: int
    head_dim: int


LAYERS = {"1024, 16 x 64": Dense(1024, 16, 64), "512, 8 x 64": Dense(512, 8, 64)}


class Ordinary(nn.Module):
    def __init__(self, sizes: Dense) -> None:
        super().__init__()
        self.heads, inner = sizes.heads, sizes.heads * sizes.head_dim
        self.qkv = nn.Linear(sizes.width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class Switched(nn.Module):
    def __init__(self, sizes: Dense, head_dim: int | None) -> None:
        super().__init__()
        spec = SwitchHead(head_dim=head_dim or "auto")
        self.spec = filled(spec, **sizes._asdict())
        self.mixture = Mixture(int(self.spec.heads), int(self.spec.experts), int(self.spec.k))
        weights = fresh(self.mixture, sizes.width, int(self.spec.head_dim), Drawing())
        for name in Weights.__slots__:
            self.register_parameter(name, nn.Parameter(getattr(weights, name)))

    def forward(self, x: Tensor) -> Tensor:
        weights = Weights(*(getattr(self, name) for name in Weights.__slots__))
        return switchhead_attention(x, x, weights, self.mixture, CAUSAL)


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every way in every round, after one that does not count."""
    for way in ways.values():
        way()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(seconds(way))
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Ordinary attention and SwitchHead at equal parameters."""
    sizes, dtype = LAYERS[name], getattr(torch, options.dtype)
    torch.manual_seed(0)
    layers = {
        "dense": Ordinary(sizes).to(dtype),
        "ours": Switched(sizes, options.head_dim).to(dtype),
    }
    x = torch.randn(1, options.length, sizes.width, dtype=dtype, requires_grad=options.train)

    def run(layer: nn.Module) -> None:
        with torch.set_grad_enabled(options.train):
            y = layer(x)
            if options.train:
                torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])

    found = in_turns({n: lambda m=m: run(m) for n, m in layers.items()}, options.rounds)
    ratio = [d / o for d, o in zip(found["dense"], found["ours"], strict=True)]
    spec = layers["ours"].spec
    row = {
        "layer": name,
        "switchhead": f"H={spec.heads} E={spec.experts} k={spec.k} c={spec.head_dim}",
        "parameters": {
            "dense": attention_parameters(*sizes),
            "ours": parameters(spec, sizes.width),
        },
        "seconds": {n: spread(v) for n, v in found.items()},
        "dense_over_ours": spread(ratio),
    }
    say(
        f"{name} -> {row['switchhead']}   parameters {row['parameters']}\n"
        f"    T={options.length} {'forward and backward' if options.train else 'forward'}: "
        f"dense {1e3 * statistics.median(found['dense']):.0f} ms, "
        f"ours {1e3 * statistics.median(found['ours']):.0f} ms, "
        f"dense / ours {_ratio(ratio)}"
    )
    return row


def compare_forms(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Sorted routes against all products, forward and backward, at several E / k."""
    rows = []
    for experts, k in ((4, 4), (4, 3), (5, 3), (4, 2), (5, 2), (8, 2), (8, 1), (16, 1)):
        for merge in (False, True):
            ratios = form_ratios(LAYERS[name].width, (experts, k), merge, options)
            kind = "merge" if merge else "project"
            found = {part: spread(values) for part, values in ratios.items()}
            rows.append(
                {"layer": name, "E": experts, "k": k, "kind": kind, "masked_over_grouped": found}
            )
            texts = ", ".join(f"{part} {_ratio(values)}" for part, values in ratios.items())
            say(f"{name} E={experts} k={k} {kind}: masked / grouped {texts}")
    return rows


def form_ratios(
    width: int, sizes: tuple[int, int], merge: bool, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Time of "masked" over that of "grouped", for two heads 64 wide."""
    (experts, k), length, heads, inner = sizes, options.length, 2, 64
    router = torch.randn(heads * experts, width)
    routes = route(torch.randn(1, length, width), router, heads=heads, k=k)
    ends = (inner, width) if merge else (width, inner)
    dtype = getattr(torch, options.dtype)
    a = torch.randn(length * heads if merge else length, ends[0], dtype=dtype)
    w = torch.randn(heads * experts, *ends, dtype=dtype)
    call = forms.Routed(a, w, routes.index.flatten(0, 1), routes.gate.flatten(0, 1), experts, merge)
    grad, needs = torch.randn(call.rows, ends[1], dtype=dtype), (True, True, True)
    ways = {
        "forward": (lambda: forms._masked(call), lambda: forms._grouped(call)),
        "backward": (
            lambda: forms._masked_backward(call, grad, needs),
            lambda: forms._grouped_backward(call, grad, needs),
        ),
    }
    found = {}
    for part, (masked, grouped) in ways.items():
        times = in_turns({"masked": masked, "grouped": grouped}, options.rounds)
        found[part] = [m / g for m, g in zip(times["masked"], times["grouped"], strict=True)]
    return found


def _ratio(values: Sequence[float]) -> str:
    s = spread(values)
    return f"{s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f})"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--head-dim", type=int, help="of SwitchHead; the widest that fits if absent"
    )
    parser.add_argument("--train", action="store_true", help="backward too")
    parser.add_argument("--forms", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    say(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.dtype}, B=1")
    found = [(compare_forms if options.forms else compare)(name, options) for name in LAYERS]
    if options.json:
        print(json.dumps({"threads": torch.get_num_threads(), "layers": found}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
