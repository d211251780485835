"""What SwitchHead costs: the site, self-attention; and SwitchAll's feed-forward net.

    H heads d wide, E experts a head, k of them for a token     v, o:  2 B T H k d (D + 1) each
    N experts g wide, k of them for a token                     up, down:  2 B T k g (D + 1) each

Source: SwitchHead (arXiv 2312.07987v3), equations 7 to 10; counted from them, with routers and
gates, which the paper's own tables leave out or count in part (see `switchhead_tables`).
"""

from __future__ import annotations

from typing import Literal

from sympy import Min

from attn_compiler.cost.letters import B, Cost, D, E, H, K, Number, S, T, d, k, n
from attn_compiler.variants.base import Work
from attn_compiler.variants.costs.parts import Core, linear

Strategy = Literal["grouped", "masked", "sorted"]

# the gate, float32, and the number of the expert, int32, of one route
ROUTE = 8


def site(
    work: Work,
    *,
    experts_on: tuple[str, ...] = ("v", "o"),
    shared: bool = False,
    strategy: Strategy = "grouped",
    share: Number = 1,
    positions: bool = False,
) -> Cost:
    """The site.

    Args:
        work: see `Work`.
        experts_on: which of q, k, v, o are experts.
        shared: one router for both sides.
        strategy: "grouped" sorts routes by expert and computes those that were chosen; "masked"
            computes all E and gives the others a gate of 0, by products and sums of PyTorch, whose
            tensors go through memory, in 32 bits where something is added up; "sorted" is
            "grouped" by the kernels of a GPU, which add up in 32 bits in memory.
        share: of the pairs that are visited.
        positions: products of queries with projected distances, Transformer-XL's.
    """
    training = work == "training"
    rows = B * K * T if work == "decode" else B * T
    sides = _sides(experts_on, shared)
    dense = [name for name in "qkv" if name not in experts_on]
    # what reads x: the plain projections and the routers
    cost = linear(rows, D, H * d * len(dense) + sides * H * E, training=training)
    cost += _routes(rows * H, sides, strategy, training)
    for name in experts_on:
        cost += _experts(rows, strategy, training, out=name == "o", few=work == "decode")
    if "o" not in experts_on:
        cost += linear(rows, H * d, D, training=training, keeps=False)
    if positions:
        cost += _distances(rows, training)
    core = Core(batch=B * K if work == "decode" else B, groups=H, v=d, share=share)
    return cost + core.cost(training) + (Cost() if training else core.cache())


def _distances(rows: Number, training: bool) -> Cost:
    """T + S - 1 distances, projected once for all sequences, and their products with queries."""
    number = T + S - 1
    products, scores = 2 * rows * number * H * d, n * rows * number * H
    cost = linear(number, D, H * d, training=training)
    if not training:
        return cost + Cost(flops=products, read=scores, written=scores, launches=1)
    # the gradient of each score is written by the core, in float32, and read twice
    back = 4 * rows * number * H
    return cost + Cost(
        flops=3 * products, read=2 * scores + 2 * back, written=scores + back, launches=3,
        saved=scores,
    )  # fmt: skip


def _sides(experts_on: tuple[str, ...], shared: bool) -> int:
    """Routers: the keys' side chooses for k and v, the queries' side for q and o."""
    sides = {"source" if name in "kv" else "destination" for name in experts_on}
    return 1 if shared else len(sides)


def _routes(rows: Number, sides: int, strategy: Strategy, training: bool) -> Cost:
    """Sigmoids, the choice of k, and the sort by expert; rows are those of all heads."""
    chosen = ROUTE * sides * rows * k
    sort = sides if strategy == "grouped" else 0
    return Cost(
        exps=sides * rows * E, written=chosen, launches=sort, saved=chosen if training else 0
    )


def _experts(rows: Number, strategy: Strategy, training: bool, *, out: bool, few: bool) -> Cost:
    """One projection by experts, gates applied: [rows, D] to [rows, H d], or back if `out`.

    The backward has a product for the input and one for the weight, both d wide for each route;
    where the gate multiplies after the product (not `out`), that is computed again for its
    gradient. `few`: so few rows that only the experts chosen are read.
    """
    if strategy == "masked":
        return _all_experts(rows, H * E, d, training, out=out, each=H * d)
    touched = Min(E, rows * k) if few else E
    narrow, wide, weight = n * rows * H * d, n * rows * D, n * H * touched * d * D
    x, y = (narrow, wide) if out else (wide, narrow)
    gates = ROUTE * rows * H * k
    flops = 2 * rows * H * k * d * (D + 1)
    cost = Cost(flops=flops, read=x + weight + gates, written=y, launches=1)
    if strategy == "sorted":
        cost += _sums(y)
    if not training:
        return cost
    again = 0 if out else 1
    back = Cost(
        flops=(2 + again) * flops,
        read=2 * (x + y + gates) + weight,
        written=x + weight + gates,
        launches=2,
    )
    return cost + back + (_sums(x) if strategy == "sorted" else Cost())


def _sums(result: Number) -> Cost:
    """Sums in 32 bits in place of a result of so many bytes: filled with 0, added to, brought to
    its dtype; and the routes sorted before. Source: `kernels.experts_triton`.
    """
    wide = 4 * result / n
    return Cost(read=2 * wide, written=2 * wide, launches=12)


def _all_experts(
    rows: Number,
    experts: Number,
    narrow: Number,
    training: bool,
    *,
    out: bool,
    each: Number,
    shared: Number = 1,
) -> Cost:
    """One projection through every expert, of which a row's gates keep some.

    In: the product of each expert is written, brought to 32 bits and added up by its gate. Out:
    what goes in is multiplied by every gate and brought back to its dtype, then one product merges
    all. The backward has the products of in for the gates' gradients, those of out for the rest.

    Args:
        experts, narrow: matrices, and the columns of one.
        each: columns of a row that goes in, or out of it.
        shared: heads that share the matrices.

    Source: `kernels.expert_forms`, "masked".
    """
    all_, weight, wide = rows * experts * narrow, n * experts * narrow * D, n * rows * D
    flops = 2 * all_ * (D + 1)
    looped = Cost(read=experts * wide + n * all_, written=(4 + n) * all_, launches=2 * experts)
    added = Cost(read=8 * all_, written=4 * all_, launches=experts).times(shared)
    dots = Cost(read=12 * all_, written=4 * all_, launches=3 * experts).times(shared)
    spread = Cost(read=4 * all_, written=(4 * shared + n) * all_, launches=2)
    if shared != 1:
        spread += Cost(read=4 * shared * all_, written=4 * all_, launches=1)
    merged = Cost(read=n * all_, launches=1)
    gates = Cost(launches=2)
    # in 32 bits: filled with 0, added to, brought back; or brought there after one product
    narrow_sum = Cost(read=4 * rows * each, written=(4 + n) * rows * each, launches=2)
    wide_sum = Cost(read=(8 + n) * rows * D, written=(12 + 2 * n) * rows * D, launches=4)
    cost = Cost(flops=flops, read=weight) + gates
    cost += spread + merged + wide_sum if out else looped + added + narrow_sum
    if not training:
        return cost
    # products for the rows and for the weights, whose gradients are added up in 32 bits too
    of_weights = Cost(
        read=2 * weight + wide + 8 * weight / n, written=(2 + 8 / n) * weight, launches=4
    )
    back = spread + merged + looped + dots + gates + of_weights
    back += added + narrow_sum if out else merged + wide_sum
    return cost + Cost(flops=(2 if out else 3) * flops) + back


def net(work: Work, *, experts: int, k: int, hidden: int, strategy: Strategy = "grouped") -> Cost:
    """The feed-forward net.

    Args:
        work: see `Work`.
        experts, k, hidden: N, those of a token, channels of one.
        strategy: as of `site`.
    """
    training = work == "training"
    rows = B * K * T if work == "decode" else B * T
    if strategy == "masked":
        cost = Cost(exps=rows * experts) + linear(rows, D, experts, training=training)
        for out in (False, True):
            cost += _all_experts(
                rows, experts, hidden, training, out=out, each=k * hidden, shared=k
            )
        return cost + Cost(saved=(n * k * hidden + ROUTE * k) * rows if training else 0)
    inner, routes = rows * k * hidden, ROUTE * rows * k
    touched = Min(experts, rows * k) if work == "decode" else experts
    flops, weight = 2 * inner * (D + 1), n * touched * D * hidden
    # up and down read and write the same: the input or output of the net, and hidden channels
    tensors = n * (rows * D + inner)
    cost = Cost(
        flops=2 * flops, read=tensors + 2 * (weight + routes), written=tensors + routes, launches=3
    )
    cost += Cost(exps=rows * experts) + linear(rows, D, experts, training=training)
    if strategy == "sorted":
        both = _sums(n * rows * D) + _sums(n * inner)
        cost += both.times(2 if training else 1)
    if not training:
        return cost
    return cost + Cost(
        flops=4 * flops,
        read=2 * (2 * tensors + 2 * routes) + 2 * weight,
        written=tensors + 2 * (weight + routes),
        launches=4,
        saved=n * inner + routes,
    )
