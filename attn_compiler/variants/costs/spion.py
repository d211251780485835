"""What SPION costs: the core over the blocks of a pattern.

    kept = rho T S scores a head     flops = 4 B H kept d     one list of blocks for all heads

Blocks are C rows by C keys, rho is the share of them that is kept.

Source: SPION (arXiv 2309.12578); the operation counts are derived, and hold for the dense
attention too (kept = T S).
"""

from __future__ import annotations

from attn_compiler.cost.letters import B, C, Cost, H, Number, S, T, d, rho
from attn_compiler.variants.costs.parts import Core


def core(training: bool, *, zero_logit: bool = False, per_head: bool = False) -> Cost:
    """The core of a whole sequence.

    Args:
        training: forward and backward, else forward alone.
        zero_logit: a block that is left out counts as logits of 0 in the denominator: three more
            operations a row.
        per_head: every head has a list of its own.
    """
    index = index_bytes() * (H if per_head else 1)
    cost = Core(share=rho).cost(training) + Cost(read=index)
    if zero_logit:
        cost += Cost(other=3 * B * H * T)
    # the backward walks the list along rows for dq, and one along columns for dk and dv
    return cost + Cost(read=2 * index, saved=2 * index) if training else cost


def index_bytes() -> Number:
    """One list of blocks, int32: where each row of blocks starts, and the columns."""
    side = S / C
    return 4 * (side + 1 + rho * side**2)


def operations(kept: Number = rho * T * S) -> Number:
    """Multiplications and additions of one head of one sample, each counted as one: kept scores,
    their exponentials, sums and divisions, the products with the values.

        kept (2 d - 1)  +  3 kept - T  +  2 kept d - T d
    """
    return 2 * kept * (2 * d + 1) - T * (d + 1)
