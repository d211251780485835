"""Linear attention beyond a window: softmax near, sums over features of keys far.

    softmax(q k^T) v   ->   (sum_near exp(s) v + f(q) sum_far g(k) v) / (the same with v = 1)

Heads, projections and rotary positions stay. New are the maps f and g, learned for each head: a
model has to be taught with them, best from its own attention. Time is linear in the length, and
what generation keeps is a window and a sum.

Source: LoLCATs (arXiv 2410.10254); Hedgehog (arXiv 2402.04347) for the maps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attn_compiler.ir.site import AttentionSite, Reason
from attn_compiler.variants.base import (
    Fidelity,
    Lowering,
    NewModule,
    Scope,
    Variant,
    VariantSpec,
    Work,
    demand,
    is_size,
)

if TYPE_CHECKING:
    from attn_compiler.cost.letters import Cost

# the name of what a module gets; the number of the site in it follows
MAPS = "attn_far"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearAttention(VariantSpec):
    """Linear attention beyond a sliding window.

    In `generate()` a layer of an ordinary DynamicCache becomes one of constant size: the window and
    a sum over all tokens before it. Steps compute what a whole pass does.

    Attributes:
        window: keys that a row sees by softmax, its own among them; with as many as there are the
            function is as it was.

    Raises:
        BadOption: the window is no whole number above 0.
    """

    window: int = 64

    def __post_init__(self) -> None:
        demand(self, "window", is_size(self.window), "give a whole number of tokens, from 1")


def legality(site: AttentionSite, spec: LinearAttention) -> Iterator[Reason]:
    from attn_compiler.kernels.linear_masks import plain_mask, plain_score, says_causal
    from attn_compiler.kernels.selecting import forbidding

    if site.length is None and not site.cached and not site.obstacles:
        text = "the rows are not those of the keys, and no cache says where they stand"
        yield Reason("linear.not_square", text, site.location)
    for obstacle in site.obstacles or ():
        yield Reason(f"linear.{obstacle.code}", obstacle.text, obstacle.location)
    if not plain_score(site.program) or site.program.sink is not None:
        text = "a score beside q.k, a cap or a sink has no place in a product of features"
        yield Reason("linear.score", text, site.location)
    mask = forbidding(site.program).mask
    told = says_causal(mask)
    if not plain_mask(mask):
        text = "a sum over earlier keys has no place for a mask by rows but the causal one"
        yield Reason("linear.mask", text, site.location)
    elif site.crosses and (site.cached or not told):
        text = "the keys are those of another sequence, and every row sees them all"
        yield Reason("linear.not_causal", text, site.location)
    elif not (told or site.cached or site.length == 1):
        text = "a row sees keys after its own, which only causal sums leave out"
        yield Reason("linear.not_causal", text, site.location)
    if site.dropout:
        text = "weights are dropped at random, and far keys have none: set its dropout to 0"
        yield Reason("linear.dropout", text, site.location)
    if None in (site.query_heads, site.kv_heads, site.head_dim):
        text = "the number of heads, or their width, is not known"
        yield Reason("linear.heads", text, site.location)


def lower(site: AttentionSite, spec: LinearAttention, length: int, slots: int) -> Lowering:
    """A call that is given the maps, which start as a fixed multiple of the identity."""
    from attn_compiler.kernels.feature_maps import FeatureMaps
    from attn_compiler.kernels.selecting import forbidding

    heads, groups, width = site.query_heads, site.kv_heads, site.head_dim
    assert heads and groups and width  # see `legality`
    count = (heads + groups) * width**2 + heads
    return Lowering(
        forbidding(site.program),
        operator="linear_attention",
        options=(("window", spec.window),),
        memory=NewModule(MAPS, FeatureMaps, (heads, groups, width)),
        remembers=True,
        words=f"softmax over {spec.window} keys, {count:,} new parameters; "
        "the same PyTorch code on every device, no kernel of its own",
    )


def cost(spec: LinearAttention, work: Work) -> Cost:
    """What the core of one layer costs, causal, in the letters of `cost.letters`; C is the window,
    and a head has 2 d features.
    """
    from attn_compiler.kernels.far_tiles import rows_of_tile
    from attn_compiler.variants.costs import linear_attention

    return linear_attention.core(work, rows_of_tile(spec.window))


LINEAR = Variant(
    name="linear",
    spec=LinearAttention,
    scope=Scope.CORE,
    fidelity=Fidelity.RETRAINED,
    legality=legality,
    lower=lower,
    remembers=True,
)
