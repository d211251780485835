"""SwitchHead: few attention maps, and experts for values and outputs, chosen for every token.

    v_h = sum over k of E experts of g_e x W_V^{h,e}     y = sum over h and k of g_e r_h W_O^{h,e}

New parameters: a model has to be trained with it. Sizes are those that cost the parameters of the
layer that is replaced.

Source: SwitchHead (arXiv 2312.07987v3), sections 2 and 3; the closed form for the head width
reproduces table 9. Widths differ from the paper's where those leave tensor cores half empty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from attn_compiler.errors import BadOption
from attn_compiler.variants.base import (
    VariantSpec,
    Work,
    demand,
    demand_flag,
    demand_one_of,
    is_size,
)

if TYPE_CHECKING:
    from attn_compiler.cost.letters import Cost

Auto = Literal["auto"]

_MOST_ACTIVE = 4  # the paper raises k up to here
_MANY_HEADS = 16  # from here on it ends with 4 heads, below with 2
# of a feed-forward net: experts, active ones, hidden channels of one, as the paper has them
_NET_EXPERTS, _NET_ACTIVE, _NET_HIDDEN = (16, 32), 4, 128
# steps of an expert's width, the best for kernels first, and how far they may lead from the paper's
_NET_STEPS, _NET_SLACK = (16, 8, 4, 2, 1), 0.25
_TOLERANCE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchHead(VariantSpec):
    """Mixture-of-experts attention.

    Attributes:
        heads: attention maps.
        experts: of each head.
        k: of them active for a token, on each side.
        head_dim: width of queries, keys and values.
        experts_on: which projections are experts, out of q, k, v, o.
        shared_selection: one router for both sides.
        expert_dropout: probability that an expert is not chosen in training.
        init: "fresh", drawn at the scale of the weights that are replaced, which are best those of
            an untrained model; or "convert" from their heads: groups of them share a map, and each
            becomes an expert; with as many maps as heads, every expert is a copy of its head, and
            the function stays. It takes calibration.
        positions: what the layer itself knows of them, in self-attention: "rope" turns half of the
            channels, "transformer_xl" adds products of queries and projected distances, "none" is
            none. "auto" is "rope" where the layer that is replaced turns, "transformer_xl" where it
            makes relative positions of its queries or keys, else "none". These leave with it; what
            the model adds elsewhere stays.
        feed_forward: "sigma_moe" replaces the feed-forward net too (SwitchAll).

    Raises:
        BadOption: a field has a wrong value.
    """

    heads: int | Auto = "auto"
    experts: int | Auto = "auto"
    k: int | Auto = "auto"
    head_dim: int | Auto = "auto"
    experts_on: tuple[str, ...] = ("v", "o")
    shared_selection: bool = False
    expert_dropout: float = 0.0
    init: Literal["fresh", "convert"] = "fresh"
    positions: Literal["auto", "none", "rope", "transformer_xl"] = "auto"
    feed_forward: Literal["sigma_moe"] | None = None

    def __post_init__(self) -> None:
        for name in ("heads", "experts", "k", "head_dim"):
            value = getattr(self, name)
            good = value == "auto" or is_size(value)
            demand(self, name, good, 'give a whole number above 0, or "auto"')
        if isinstance(self.k, int) and isinstance(self.experts, int):
            why = f"a head has {self.experts} experts"
            demand(self, "k", self.k <= self.experts, "choose at most all experts", why)
        listed = isinstance(self.experts_on, tuple | list) and bool(self.experts_on)
        good = listed and set(self.experts_on) <= set("qkvo")
        do = 'give a tuple out of "q", "k", "v", "o", each at most once'
        demand(self, "experts_on", good and len(set(self.experts_on)) == len(self.experts_on), do)
        # the order says nothing: equal choices are equal specs
        object.__setattr__(self, "experts_on", tuple(x for x in "qkvo" if x in self.experts_on))
        demand_flag(self, "shared_selection")
        p = self.expert_dropout
        good = isinstance(p, int | float) and not isinstance(p, bool) and 0 <= p < 1
        demand(self, "expert_dropout", good, "give a probability from 0, below 1")
        demand_one_of(self, "init", "fresh", "convert")
        heads_alone = self.init == "fresh" or self.experts_on == ("v", "o")
        why = "heads become experts on values and outputs"
        demand(self, "experts_on", heads_alone, 'leave it ("v", "o") with init="convert"', why)
        demand_one_of(self, "positions", "auto", "none", "rope", "transformer_xl")
        kept = self.init == "fresh" or self.positions == "auto"
        why = "trained heads keep the positions that they were trained with"
        demand(self, "positions", kept, 'leave it "auto" with init="convert"', why)
        demand_one_of(self, "feed_forward", None, "sigma_moe")
        alone = self.init == "fresh" or self.feed_forward is None
        why = "the experts of a feed-forward net start afresh"
        demand(self, "feed_forward", alone, 'leave it None with init="convert"', why)


def cost(
    spec: SwitchHead,
    work: Work,
    *,
    causal: bool = False,
    strategy: Literal["grouped", "masked", "sorted"] = "grouped",
) -> Cost:
    """What one layer of self-attention with its projections costs, in the letters of
    `cost.letters`: H heads d wide, E experts, k active. Numbers that the spec gives stand in their
    place. Attention alone: a feed-forward net is not in it, see `net_cost`.
    """
    from attn_compiler.variants.costs import parts, switchhead

    found = switchhead.site(
        work,
        experts_on=spec.experts_on,
        shared=spec.shared_selection,
        strategy=strategy,
        share=parts.visited(work, causal),
        positions=spec.positions == "transformer_xl",
    )
    return parts.filled(found, H=spec.heads, E=spec.experts, k=spec.k, d=spec.head_dim)


def net_cost(
    sizes: NetSizes, work: Work, strategy: Literal["grouped", "masked", "sorted"] = "grouped"
) -> Cost:
    """What the feed-forward net of SwitchAll costs, in the letters of `cost.letters`."""
    from attn_compiler.variants.costs import switchhead

    return switchhead.net(
        work, experts=sizes.experts, k=sizes.k, hidden=sizes.hidden, strategy=strategy
    )


def filled(
    spec: SwitchHead, *, width: int, heads: int, head_dim: int, kv_heads: int | None = None
) -> SwitchHead:
    """The spec with numbers for "auto": E H = heads that are replaced, k about half of E, and the
    widest head that costs no more parameters.

    Args:
        spec: what is wanted.
        width: of the model.
        heads, head_dim, kv_heads: of the layer that is replaced.

    Raises:
        BadOption: not even the narrowest head fits the parameters.
    """
    maps = few_heads(heads) if spec.heads == "auto" else spec.heads
    experts = math.ceil(heads / maps) if spec.experts == "auto" else spec.experts
    if spec.experts == "auto" and isinstance(spec.k, int):
        experts = max(experts, spec.k)
    active = min(_MOST_ACTIVE, math.ceil(experts / 2)) if spec.k == "auto" else spec.k
    found = replace(spec, heads=maps, experts=experts, k=active)
    if spec.head_dim != "auto":
        return found
    budget = attention_parameters(width, heads, head_dim, kv_heads)
    return replace(found, head_dim=whole_width(largest_width(found, width, budget)))


def few_heads(heads: int) -> int:
    """Attention maps that replace so many heads: 4 from 16 on, else 2, as long as the heads can be
    divided among them; then every head becomes an expert.
    """
    wanted = 4 if heads >= _MANY_HEADS else 2
    return next(maps for maps in (wanted, 2, 1) if heads % maps == 0)


def attention_parameters(
    width: int,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    *,
    positions: bool = False,
) -> int:
    """Weights of an ordinary layer; `positions` adds the relative ones of Transformer-XL: a
    projection, and two biases a head.
    """
    kv = heads if kv_heads is None else kv_heads
    plain = width * head_dim * (2 * heads + 2 * kv)
    return plain + (width + 2) * heads * head_dim * int(positions)


def parameters(spec: SwitchHead, width: int, *, positions: bool = False) -> int:
    """Weights of a layer whose sizes are all numbers, routers included."""
    heads, experts, head_dim = int(spec.heads), int(spec.experts), int(spec.head_dim)
    routers = _routers(spec) * heads * experts * width
    return routers + head_dim * heads * width * _matrices(spec, positions)


def largest_width(spec: SwitchHead, width: int, budget: float, *, positions: bool = False) -> float:
    """Head width at which a layer costs a budget of parameters:
    (budget - 2 H E D) / (D H (q + 2 E)), q the projections that are no experts. Not whole.
    """
    heads, experts = int(spec.heads), int(spec.experts)
    free = budget - _routers(spec) * heads * experts * width
    return free / (width * heads * _matrices(spec, positions))


def whole_width(limit: float, multiples: tuple[int, ...] = (16, 8)) -> int:
    """The largest multiple of the first of `multiples` that is not 0 and within a limit.

    A width that is no multiple of 16 leaves a part of the matrix instructions empty, and one of 8
    is the least that kernels can load aligned. The paper takes multiples of 4.

    Raises:
        BadOption: nothing fits.
    """
    for multiple in multiples:
        if limit >= multiple:
            return multiple * math.floor(limit / multiple)
    raise BadOption(
        f"a head could be {limit:.1f} wide",
        where="option head_dim",
        why=["that is what is left of the parameters of the layer that is replaced"],
        do="give fewer heads or experts, or head_dim itself",
    )


def feed_forward_width(base: int, width: int, left: float) -> int:
    """Hidden channels of a feed-forward net that also takes the parameters that attention left:
    a channel has 2 D weights and a bias. To the nearest channel.
    """
    return base + round(left / (2 * width + 1))


@dataclass(frozen=True, slots=True)
class NetSizes:
    """Sizes of the feed-forward net of SwitchAll.

    Attributes:
        experts: N.
        hidden: G, channels of one expert.
    """

    experts: int
    hidden: int

    @property
    def k(self) -> int:
        """Experts of a token."""
        return min(_NET_ACTIVE, self.experts)

    def parameters(self, width: int) -> int:
        """N D (2 G + 1), the router included."""
        return self.experts * width * (2 * self.hidden + 1)


def net_sizes(width: int, parameters: int) -> NetSizes:
    """Sizes that cost the parameters of a feed-forward net: 16 to 32 experts 128 wide as in the
    paper where that fits, else wider or narrower ones; within 1 % where whole numbers allow it, in
    the largest steps of the width that do. Narrow nets may have fewer experts.

    Args:
        width: D.
        parameters: of the net that is replaced.

    Raises:
        BadOption: not even as many experts as are active, one channel wide, cost so little.
    """
    each, (least, most) = parameters / width, _NET_EXPERTS
    experts = min(most, max(least, round(each / (2 * _NET_HIDDEN + 1))))
    hidden = (each / experts - 1) / 2
    for step in _NET_STEPS:
        near = step * round(hidden / step)
        for wide in sorted((near - step, near, near + step), key=lambda g: abs(g - hidden)):
            if abs(wide - hidden) > _NET_SLACK * hidden:
                continue
            found = NetSizes(round(each / (2 * wide + 1)), wide)
            if least <= found.experts <= most and _off(found, each) <= _TOLERANCE:
                return found
    ways = (NetSizes(n, round((each / n - 1) / 2)) for n in range(_NET_ACTIVE, most + 1))
    possible = [found for found in ways if found.hidden > 0]
    if not possible:
        raise BadOption(
            f"a feed-forward net of {parameters} parameters is too small for experts",
            where="option feed_forward",
            do="leave its block as it is, by a glob in `to`",
        )
    return min(possible, key=lambda found: _off(found, each))


def _off(found: NetSizes, each: float) -> float:
    """Share by which the parameters, over D, are others than wanted."""
    return abs(found.parameters(1) / each - 1)


def break_even_length(
    spec: SwitchHead,
    *,
    width: int,
    inner: int,
    causal: bool = True,
    efficiency: float = 1.0,
) -> float:
    """Length from which a layer has less to do than ordinary attention: what experts cost too
    much, over what fewer and narrower heads save for each token of context. 0 if always, infinite
    if never.

    Args:
        spec: all sizes are numbers.
        width: of the model.
        inner: heads times head dim of the ordinary layer.
        causal: half of the pairs.
        efficiency: how fast products with experts are against plain ones.
    """
    heads, experts, active = int(spec.heads), int(spec.experts), int(spec.k)
    mine = heads * int(spec.head_dim)
    chosen = len(spec.experts_on)
    linear = (4 - chosen) * width * mine + chosen * active * mine * (width + 1) / efficiency
    extra = linear + _routers(spec) * heads * experts * width - 4 * width * inner
    saved = (1 if causal else 2) * (inner - mine)
    if saved <= 0:
        return 0.0 if extra <= 0 and saved == 0 else math.inf
    return max(0.0, extra / saved)


def _routers(spec: SwitchHead) -> int:
    sides = {"source" if name in "kv" else "destination" for name in spec.experts_on}
    return 1 if spec.shared_selection else len(sides)


def _matrices(spec: SwitchHead, positions: bool) -> int:
    """Matrices D x d a head: plain ones, experts, and the positions' projection."""
    experts = len(spec.experts_on) * int(spec.experts)
    projected = positions or spec.positions == "transformer_xl"
    return 4 - len(spec.experts_on) + experts + int(projected)
