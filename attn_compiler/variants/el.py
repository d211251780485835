"""EL-attention: generation from one cached tensor instead of keys and values for every head.

    softmax(q (X W_K)^T) X W_V   ->   (softmax((q W_K^T) X^T) X) W_V

The same function up to rounding. It pays where a step of generation waits for its cache, never
where a sequence is read at once: attention has H times the operations.

Source: EL-Attention (arXiv 2105.04779); the break-even points follow from its two columns of
operations and bytes. Bounds here count caches and weights alone, not launches and activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from attn_compiler.ir.site import AttentionSite, Reason
from attn_compiler.variants.base import (
    Fidelity,
    Scope,
    Variant,
    VariantSpec,
    Work,
    demand,
    demand_flag,
    is_size,
)

if TYPE_CHECKING:
    from attn_compiler.cost.letters import Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class ELAttention(VariantSpec):
    """EL-attention.

    Attributes:
        keep_key_bias: compute the term of the key's bias. It is the same for all keys of a row,
            and falls out of a softmax over keys that all carry it.
        only_where_faster: a cache holds keys and values where the cost model says that a step of
            generation takes longer straight from X. Without it the smaller cache is what counts.
        beams: of each sample, that the report's prediction assumes; `plan` reads those of its
            shape, and a generation has its own.

    Raises:
        BadOption: a field has a wrong value.
    """

    keep_key_bias: bool = False
    only_where_faster: bool = False
    beams: int = 1

    def __post_init__(self) -> None:
        demand_flag(self, "keep_key_bias", "only_where_faster")
        demand(self, "beams", is_size(self.beams), "give at least 1")


def legality(site: AttentionSite, spec: ELAttention) -> Iterator[Reason]:
    """Codes: el.needs_rewrite where the door cannot change a cache, el.dropout, and one for each
    obstacle that `ir.states` names: el.no_cache, el.cache_form, el.cache_layout, el.cache_larger,
    el.no_projection, el.kv_sources_differ, el.rope_on_key, el.partial_rope, el.key_norm,
    el.key_scaled, el.convolved, el.head_layout, el.dtype, el.overwritten.
    """
    if site.obstacles is None:
        text = "a cache changes its layout only in a model that `rewrite` is given"
        yield Reason("el.needs_rewrite", text, site.location)
        return
    for obstacle in site.obstacles:
        yield Reason(f"el.{obstacle.code}", obstacle.text, obstacle.location or site.location)
    if site.dropout:
        text = "weights are dropped in training, which runs the ordinary attention"
        yield Reason("el.dropout", text, site.location)


class Beside(NamedTuple):
    """What is kept of each key besides X, such as its rotated features.

    Attributes:
        features: of a head.
        heads: that have their own.
        norms: sizes of a token's keys, kept in float32.
    """

    features: int = 0
    heads: int = 0
    norms: int = 0


def cost(
    spec: ELAttention,
    work: Work,
    *,
    causal: bool = False,
    cross: bool = False,
    beside: Beside = Beside(),  # noqa: B008  (immutable)
) -> Cost:
    """What one layer with its projections costs, in the letters of `cost.letters`; G kv heads,
    K beams of B samples, L layers that share the cache of cross-attention.
    """
    from attn_compiler.variants.costs import el, parts

    share = parts.visited(work, causal)
    found = el.site(work, cross=cross, key_bias=spec.keep_key_bias, share=share)
    return found + el.beside(work, *beside) if any(beside[::2]) else found


def memory_ratio(
    width: int,
    kv_inner: int,
    *,
    beams: int = 1,
    layers: int = 1,
    cross: bool = False,
    beside: int = 0,
) -> float:
    """Bytes of an ordinary cache over those of X, all layers.

    Args:
        width: channels of X.
        kv_inner: kv heads times head dim.
        beams: of a sample; an ordinary cache of cross-attention is repeated for each.
        layers: which share X in cross-attention.
        cross: cross-attention.
        beside: kv heads times the rotated features of a key, in self-attention.
    """
    return 2 * kv_inner / (width + beside) * (beams * layers if cross else 1)


def break_even_tokens(width: int, kv_inner: int, beams: int = 1) -> float:
    """Batch times length from which a step of cross-attention reads less: B S (2 K e - D) > 2 D e,
    as it also reads the weights of keys and values. Infinite where X is never the smaller.
    """
    saved = 2 * beams * kv_inner - width
    return 2 * width * kv_inner / saved if saved > 0 else math.inf


def reads_less(
    width: int, kv_inner: int, *, batch: int, length: int, beams: int = 1, cross: bool = False
) -> bool:
    """Does a step of generation read fewer bytes of cache and weights?"""
    if cross:
        return batch * length > break_even_tokens(width, kv_inner, beams)
    return width < 2 * kv_inner


def most_heads(flops_per_byte: float, element_bytes: int = 2) -> float:
    """Heads below which attention over X is done sooner than an ordinary cache is read, even
    where operations bound it: H D / e below this (e kv channels; H itself where e = D). Where
    reading bounds it, `reads_less` alone decides.

    Args:
        flops_per_byte: operations a second over bytes a second of the device.
        element_bytes: of the cache.
    """
    return flops_per_byte * element_bytes / 2


def compute_bound_rows(flops_per_byte: float, element_bytes: int = 2) -> float:
    """Heads times beams from which operations, and not the reading of X, bound its attention: it
    does 4 H K operations for each element.
    """
    return flops_per_byte * element_bytes / 4


def most_first_rows(width: int, heads: int, length: int) -> float:
    """Query rows below which a first step costs less straight from X than with keys and values
    built for it: H t n + t D < n D + t n (heads times head dim = D). About the head dim; prefill
    is beyond it.
    """
    return width * length / (heads * length + width - length)


EL = Variant(
    name="el", spec=ELAttention, scope=Scope.SITE, fidelity=Fidelity.EXACT, legality=legality
)
