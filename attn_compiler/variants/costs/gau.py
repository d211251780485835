"""What gated attention units cost: a pair of them, which replaces a block.

    [U | V | Z] = silu(x W)    A = relu(q k^T)^2, q and k from Z    out = (U * A V) W_o

One head: d is the width of Z (s = 128 in the paper), e the expanded width (2 D). In chunks of C
tokens A stays inside a chunk, and what came before is a state of d x e. Operations of a pair for a
token, f the share of the pairs that is visited:

    12 D e + 4 D d   +   4 f C (d + e) + 8 d e   in chunks,   4 f T (d + e)   over all pairs

On a GPU the kernels (kernels/gau_triton) do more than that: a program has some of the e columns of
a result, so scores are computed once for each such slice, and states go through memory.

Source: Transformer Quality in Linear Time (arXiv 2202.10447); costs derived from its equations.
"""

from __future__ import annotations

import sympy

from attn_compiler.cost.letters import B, C, Cost, D, K, M, Number, S, T, d, e, n
from attn_compiler.variants.base import Work
from attn_compiler.variants.costs.parts import filled, linear

# columns of a program
_SLICE = 256


def pair(work: Work, *, chunked: bool, share: Number = 1, gpu: bool = False) -> Cost:
    """Two units.

    Args:
        work: see `Work`.
        chunked: chunks of C tokens and a state, else all pairs.
        share: of the pairs that are visited (of a chunk's pairs if chunked).
        gpu: by the generated kernels.
    """
    training = work == "training"
    rows = B * K * T if work == "decode" else B * T
    into = linear(rows, D, 2 * e + d, training=training) + Cost(exps=rows * (2 * e + d))
    out = linear(rows, e, D, training=training, keeps=False)
    inner = core(work, chunked=chunked, share=share)
    if gpu and work != "decode":
        inner += _sliced(work == "training", chunked, share)
    return (into + inner + out).times(2)


def core(work: Work, *, chunked: bool, share: Number = 1) -> Cost:
    """What one unit does between its two projections; arguments as above."""
    if work == "decode":
        return _chunk_step() if chunked else _step()
    forward = _forward(chunked, share)
    if work == "training":
        return forward + _backward(chunked, share)
    return forward + _cache(B, S, chunked)


def _forward(chunked: bool, share: Number) -> Cost:
    """One kernel that reads q, k, V, U and writes the gated output; in chunks there are two pairs
    of q and k, and the state stays where it is computed.
    """
    rows, keys = B * T, C if chunked else S
    state = 4 * rows * d * e if chunked else 0
    read, written = n * rows * (_keys(chunked) + 2 * e), n * rows * e
    return Cost(
        flops=2 * share * rows * keys * (d + e) + state,
        read=read,
        written=written,
        launches=1,
        near=n * share * rows * keys * (d + e) / M + read + written,
    )


def _backward(chunked: bool, share: Number) -> Cost:
    """Two kernels, as the scores need no sums of rows: dq; dk and dV. Both compute scores and dA
    again. Kept: the fused projection before its activation, and A V.
    """
    rows, keys = B * T, C if chunked else S
    state = 8 * rows * d * e if chunked else 0
    inputs = n * rows * (_keys(chunked) + 2 * e)
    return Cost(
        flops=2 * share * rows * keys * (4 * d + 3 * e) + state,
        read=2 * (inputs + n * rows * e),
        written=inputs,
        launches=2,
        saved=n * rows * (2 * e + d + e),
        near=2 * n * share * rows * keys * (d + 2 * e) / M + 2 * (inputs + n * rows * e) + inputs,
    )


def _sliced(training: bool, chunked: bool, share: Number) -> Cost:
    """What the kernels of a GPU do beyond that. Their backward has a kernel for dq, one for dk and
    one for dV, which has slices, and two products with the gate before them.
    """
    rows, keys = B * T, C if chunked else S
    slices = sympy.ceiling(e / _SLICE)
    scores = (2 * slices if training else slices) - 1
    found = Cost(
        flops=2 * share * rows * keys * d * scores,
        near=n * share * rows * keys * d * scores / M,
    )
    if training:
        found += Cost(read=3 * n * rows * e, written=n * rows * e, launches=3)
    if chunked:  # of one direction; the backward makes the forward's again, and its own
        state, inputs = 4 * rows * d * e / C, n * rows * (d + e)
        flops = 2 * rows * d * e if training else 0
        once = Cost(read=2 * state + inputs, written=2 * state, launches=2)
        found += once.times(3 if training else 1) + Cost(flops=flops)
    return found


def _keys(chunked: bool) -> Number:
    """Width of q and k together."""
    return 4 * d if chunked else 2 * d


def _step() -> Cost:
    """A new token against all keys and values before it."""
    kept = n * B * K * S * (d + e)
    return Cost(flops=2 * B * K * T * S * (d + e), read=kept, launches=1) + _cache(B * K, S, False)


def _chunk_step() -> Cost:
    """A new token against the open chunk, half full on average, and the state, to which every
    finished chunk is added.
    """
    flops = B * K * T * (C * (d + e) + 4 * d * e)
    read = B * K * (4 * d * e + n * C * (d + e) / 2)
    written = B * K * T * (n * (d + e) + 4 * d * e / C)
    return Cost(flops=flops, read=read, written=written, launches=1) + _cache(B * K, C, True)


def _cache(sequences: Number, keys: Number, chunked: bool) -> Cost:
    """Z and V of the tokens that are kept (q and k are scales and offsets of Z); the state is
    float32.
    """
    if not chunked:
        return Cost(cache=n * sequences * keys * (d + e))
    return Cost(cache=sequences * (4 * d * e + n * C * (d + e)))


def expanded(cost: Cost, expansion: float | None) -> Cost:
    """The same with e as a multiple of the width of the model; None leaves the letter."""
    if expansion is None:
        return cost
    return filled(cost, e=D * (int(expansion) if expansion == int(expansion) else expansion))
