"""What a report says in short, as sentences for people who read such a report for the first time.

Causal(0)   ->   "causal: a query sees the keys up to its own position"
"""

from __future__ import annotations

from collections.abc import Sequence

from attn_compiler.ir.mask import (
    Causal,
    Chunked,
    Documents,
    Either,
    Local,
    Mask,
    Other,
    Padding,
    Prefix,
    Tensor,
    Term,
    Window,
)
from attn_compiler.ir.site import AttentionSite
from attn_compiler.ir.terms import terms_text

_TERMS: dict[type[Term], str] = {
    Causal: "a query sees the keys up to its own position",
    Window: "and of those only the last ones",
    Local: "a query sees the keys near its own position",
    Chunked: "a query sees the keys of its own chunk",
    Prefix: "only the first keys may be seen",
    Padding: "a tensor says for each key whether it counts",
    Documents: "a query sees the keys of its own document, as a tensor numbers them",
    Tensor: "a tensor says for each pair of query and key whether it counts",
    Either: "one of several conditions is enough",
    Other: "a condition without a name",
}

LIMITS = {
    "tensor": "matrix units: products of queries, keys and values",
    "special": "exponentials and other work on single scores",
    "shared": "shared memory that feeds the matrix units",
    "latency": "waiting for loads",
    "waves": "programs that do not spread evenly over the processors",
    "processors": "processors, all work together",
    "l2": "the last cache's rate",
    "dram": "the memory's rate",
    "launch": "starting kernels",
}

COUNTED = {
    "flops": "operations of products",
    "exps": "exponentials",
    "other": "further operations on scores",
    "read": "bytes read",
    "written": "bytes written",
    "near": "bytes from the last cache, tiles of M rows",
    "launches": "kernels",
    "saved": "bytes kept for the backward",
    "cache": "bytes kept for the next step",
}

LETTERS = (
    "B batch, T queries, S keys, H heads, G kv heads, d and e head dims of keys and values, D "
    "width of the model, n bytes of a number, K beams, L layers, E experts and k of them active, "
    "C tokens of a chunk or block, rho share of the pairs that is left, M rows of a tile."
)

WAYS = {
    "keep": "the code as it is written, scores through memory",
    "triton": "the kernel that is generated for this site",
    "cudnn": "PyTorch's cuDNN kernel",
    "flash": "PyTorch's FlashAttention kernel",
    "sdpa": "PyTorch's fused kernel, one call",
    "blocked": "the same kernel by blocks of rows",
    "composite": "PyTorch's operators one after the other",
}

EMPTY = {
    "nan": "NaN, as the model computes it",
    "nan_added": "NaN, as the model computes it",
    "zero": "zero",
    "uniform": "the mean of all values, as the model computes it",
    "absorbed": "the mean of all values, as the model computes it",
}


def mask_words(mask: Mask) -> list[tuple[str, str]]:
    """Each condition of a mask, and what it means."""
    if not mask.terms:
        return [("none", "every query sees every key")]
    return [(terms_text((term,), mask.names), _TERMS[type(term)]) for term in mask.terms]


def formula(site: AttentionSite) -> list[str]:
    """The attention as it was understood, line by line."""
    scale = "scale" if site.scale is None else f"{site.scale:.6g}"
    lines = [f"dot    = {scale} · q·kᵀ"]
    if site.score != "dot":
        lines.append(f"score  = {site.score}")
    name = "dot" if site.score == "dot" else "score"
    if site.mask.terms:
        lines.append(f"score  = {name} where {site.mask}, else −∞")
        name = "score"
    sink = f" with a sink of {site.program.sink}" if site.program.sink is not None else ""
    lines.append(f"weight = softmax over keys of {name}{sink}, in {site.softmax_dtype}")
    dropped = f"dropout({site.dropout:g}) of " if site.dropout else ""
    lines.append(f"out    = {dropped}weight · v")
    return lines


def projections(site: AttentionSite) -> list[tuple[str, str]]:
    """What makes q, k and v: "q, k, v" and "c_attn.weight + bias" where one map makes all three."""
    found: dict[str, list[str]] = {}
    for name, p in site.projections.items():
        weight = p.weight.removeprefix(f"{site.path}." if site.path else "")
        bias = f" + {p.bias.rpartition('.')[2]}" if p.bias else ""
        found.setdefault(weight + bias, []).append(name)
    return [(", ".join(names), text) for text, names in found.items()]


def seconds(value: float) -> str:
    """A time as people compare it."""
    if value == 0:
        return "0"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:,.3g} {unit}"
    return f"{value / 1e-9:,.3g} ns"


def amount(value: float, unit: str) -> str:
    """1.2 Gflop, 340 MB."""
    for sign, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:,.3g} {sign}{unit}"
    return f"{value:,.3g} {unit}"


def span(paths: Sequence[str]) -> str:
    """One path, or the first and the last of many."""
    named = [path or "the root" for path in paths]
    return named[0] if len(named) == 1 else f"{named[0]} … {named[-1]}"
