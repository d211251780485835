"""What Selective attention costs: the core, with the masking between tokens.

    F[i,j] = sum over r < i of relu(z*[r,j]), 0 < j < r        z[i,j] - F[i,j]   in every head

F needs sums over earlier rows: one pass over the selecting head writes what has been summed up
before each tile of rows, a second pass attends. A step of generation sees S kept tokens.

Source: Selective Attention (arXiv 2410.02703) for F; the costs are those of the two passes.
"""

from __future__ import annotations

from sympy import Rational

from attn_compiler.cost.letters import B, Cost, G, H, K, Number, S, T, d
from attn_compiler.variants.base import Work
from attn_compiler.variants.costs.parts import Core, filled

# bytes that a kept token needs beside its key and value: F, float32, and its position, int32
STATE = 8


def core(
    work: Work, *, group: Number = 1, rows_of_tile: int = 64, materialise: bool = False
) -> Cost:
    """The core, causal: half of the T x S pairs.

    Args:
        work: see `Work`.
        group: heads that one program computes together, which share F.
        rows_of_tile: query rows of a tile.
        materialise: the first pass writes F, float32, and nobody computes it again.
    """
    if work == "decode":
        return _step()
    training = work == "training"
    half = Core(share=Rational(1, 2))
    cost = half.cost(training) + (Cost() if training else Core().cache())
    cost += _masking(group, rows_of_tile, materialise)
    return cost + _masking_backward(group, rows_of_tile, materialise) if training else cost


def dedicated(cost: Cost) -> Cost:
    """The same with one more head, which does nothing but select at first."""
    return filled(cost, H=H + 1, G=G + 1)


def _step() -> Cost:
    """One step: F of each kept token is read, subtracted in every head, and written anew."""
    core, tokens = Core(batch=B * K), B * K * S
    state = Cost(
        other=tokens * T * (H + 2), read=STATE * tokens, written=4 * tokens, cache=STATE * tokens
    )
    return core.forward() + core.cache() + state


def _masking(group: Number, rows: int, materialise: bool) -> Cost:
    """Scores of the selecting head: once in the first pass, once for each group in the second.
    Inside a tile F is a product with a triangle of ones. All on half of the pairs.
    """
    half = B * T * S / 2
    first = Cost(flops=2 * half * d, launches=1)
    subtract = Cost(other=H * half)
    if materialise:
        return first + subtract + Cost(other=2 * half, read=4 * half * H / group, written=4 * half)
    programs = H / group
    carries = 4 * half / rows
    again = Cost(flops=(2 * half * d + 2 * half * rows) * programs, other=2 * half * programs)
    return first + again + subtract + Cost(other=half, written=carries, read=carries * programs)


def _masking_backward(group: Number, rows: int, materialise: bool) -> Cost:
    """F again, its gradient as a tensor, summed up backwards, and the three products that bring
    it to the selecting head: its scores again, dq and dk.
    """
    half = B * T * S / 2
    gradient = Cost(
        flops=6 * half * d, other=(H + 2) * half, read=8 * half, written=4 * half, launches=2
    )
    if materialise:
        kept = Cost(read=2 * 4 * half * H / group, saved=4 * half)
    else:
        again = (2 * half * d + 2 * half * rows) * H / group
        kept = Cost(flops=2 * again, read=2 * 4 * half / rows * H / group, saved=4 * half / rows)
    return gradient + kept
