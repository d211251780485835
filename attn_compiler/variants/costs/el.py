"""What EL-attention costs: the site, a step of generation.

    Q' = Q W_K^T [rows, H, D]     P = softmax(Q' X^T)     O = (P X) W_V      X is keys and values

Attention is that of one key head D wide: H times the operations (where H d = D), and X is read
once for all heads, and in cross-attention for all beams and kept once for all layers.

Source: EL-Attention (arXiv 2105.04779); the two columns of a decoding step, derived from its
equations.
"""

from __future__ import annotations

from attn_compiler.cost.letters import B, Cost, D, G, H, K, L, M, Number, S, T, d, e, n
from attn_compiler.variants.base import Work
from attn_compiler.variants.costs import flash
from attn_compiler.variants.costs.parts import Core, linear


def site(work: Work, *, cross: bool = False, key_bias: bool = False, share: Number = 1) -> Cost:
    """The site.

    Args:
        work: decoding; prefill of cross-attention is a first step without keys and values: T rows
            straight from X. Prefill of self-attention and training run the ordinary attention,
            which is cheaper there, and keep X.
        cross: X is the encoder's output, one for all layers and beams.
        key_bias: the term of the key's bias is kept.
        share: of the pairs that the ordinary attention visits.
    """
    if work == "training":
        return flash.site(work, share=share, cross=cross)
    if work == "prefill" and not cross:
        ordinary = flash.site(work, share=share)
        return Cost(
            ordinary.flops, ordinary.exps, ordinary.other, ordinary.read, ordinary.written,
            ordinary.launches, cache=n * B * S * D,
        )  # fmt: skip
    beams = K if work == "decode" else 1
    return _projections(B * beams * T) + _attention(beams, cross, key_bias)


def beside(work: Work, features: Number, heads: Number, norms: Number) -> Cost:
    """What a step costs more where so many features of a key do not come from X: they are kept and
    multiplied by themselves, and the keys of new tokens are made to the end. So they are where keys
    are normalised, whose sizes are kept in float32.

    Args:
        work: only a step of generation differs; what others keep is counted.
        features, heads: of a key; 1 head where all share them.
        norms: sizes of a token's keys.
    """
    rows = B * K if work == "decode" else B
    sizes = 4 * rows * S * norms
    kept = n * rows * heads * S * features
    if work == "training":
        return Cost()
    if work == "prefill":
        return Cost(cache=kept + sizes)
    new = linear(rows * T, D, G * d) + Cost(
        read=sizes, cache=sizes, other=rows * H * T * S if norms else 0
    )
    if not features:
        return new
    scores = 4 * rows * H * T * S
    # not expanded by W_K, but multiplied by what is kept; the sums wait in float32
    expansion = Cost(flops=-2 * rows * T * H * features * D, read=-n * G * features * D)
    product = Cost(
        flops=2 * rows * H * T * S * features, read=kept + scores, written=scores, launches=1
    )
    return new + expansion + product + Cost(cache=kept)


def _projections(rows: Number) -> Cost:
    """Q, its expansion by W_K, the products of P X with W_V, and the output."""
    expand = Cost(
        flops=2 * rows * H * d * D,
        read=n * (rows * H * d + G * d * D),
        written=n * rows * H * D,
        launches=1,
    )
    shrink = Cost(
        flops=2 * rows * H * D * e,
        read=n * (rows * H * D + G * D * e),
        written=n * rows * H * e,
        launches=1,
    )
    return linear(rows, D, H * d) + expand + shrink + linear(rows, H * e, D)


def _attention(beams: Number, cross: bool, key_bias: bool) -> Cost:
    """H expanded queries a row against X; in cross-attention the beams are rows of one sample."""
    if cross:
        core, layers = Core(batch=B, heads=H * beams, groups=1, qk=D, v=D), L
    else:
        core, layers = Core(batch=B * beams, groups=1, qk=D, v=D), 1
    states = n * core.batch * S * D
    # the values are the keys: what Core counts as a second tensor is not there
    again = n * core.pairs * D / M
    cost = core.forward() + Cost(read=-states, cache=states / layers, near=-again)
    if key_bias:
        rows = B * beams * T * H
        cost += Cost(flops=2 * rows * d, other=core.pairs, read=n * G * d)
    return cost
