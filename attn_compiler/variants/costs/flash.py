"""What exact attention costs: the core, the site with its projections, the block with its
feed-forward net. Every other variant is compared with these.

    core   4 B H T S d              site   + 2 B T D (2 H d + 2 G d)           block   + 4 B T D F

Source: FlashAttention-2 (arXiv 2307.08691), section 3.
"""

from __future__ import annotations

from attn_compiler.cost.letters import B, Cost, D, G, H, K, Number, S, T, d, e
from attn_compiler.variants.base import Work
from attn_compiler.variants.costs.parts import Core, linear


def core(work: Work, *, share: Number = 1) -> Cost:
    """The core: in decoding B samples of K beams, each beam with a cache of its own."""
    if work == "decode":
        step = Core(batch=B * K, share=share)
        return step.forward() + step.cache()
    return Core(share=share).cost(work == "training") + (
        Cost() if work == "training" else Core().cache()
    )


def site(work: Work, *, share: Number = 1, cross: bool = False) -> Cost:
    """The core with its four projections.

    Args:
        work: prefill and training project T rows for queries and S rows for keys and values (T =
            S when they come from one sequence); decoding projects T new rows, and no keys and
            values in cross-attention, which has them.
        share: of the pairs that are visited.
        cross: keys and values come from another sequence.
    """
    training = work == "training"
    queries = B * K * T if work == "decode" else B * T
    out = linear(queries, H * e, D, training=training, keeps=False)
    if not cross:
        projected = linear(queries, D, H * d + G * (d + e), training=training)
    else:
        projected = linear(queries, D, H * d, training=training)
        if work != "decode":
            projected += linear(B * S, D, G * (d + e), training=training)
    return core(work, share=share) + projected + out


def feed_forward(work: Work, hidden: Number = 4 * D) -> Cost:
    """Two products with an activation between them; 4 D hidden channels unless told otherwise."""
    rows, training = (B * K * T if work == "decode" else B * T), work == "training"
    up = linear(rows, D, hidden, training=training) + Cost(exps=rows * hidden)
    return up + linear(rows, hidden, D, training=training)


def block(work: Work, *, share: Number = 1, hidden: Number = 4 * D) -> Cost:
    """Self-attention with its projections, and the feed-forward net."""
    return site(work, share=share) + feed_forward(work, hidden)
