"""What is done about one attention that was found: asked for, allowed, carried out, reported.

a core and its region --describe--> site --legality, lower or replace--> decision
  --rewrite_site, rewrite_states, rewrite_memory, replace_layer, replace_block, ...--> host graph
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import attn_compiler.kernels.operators  # noqa: F401  (registers them)
from attn_compiler.config import variant_of
from attn_compiler.ir.block_piece import find_block_piece
from attn_compiler.ir.core import Core
from attn_compiler.ir.layer import find_layer
from attn_compiler.ir.no_attention import NotAttention
from attn_compiler.ir.piece import Piece, Sought
from attn_compiler.ir.region import (
    FunctionalRegion,
)
from attn_compiler.ir.sides import State
from attn_compiler.ir.site import AttentionSite, Decision, Reason
from attn_compiler.ir.states import Kept, find_states, find_update
from attn_compiler.ir.trace import Region, RegionError
from attn_compiler.kernels.shown import Shown
from attn_compiler.passes.listen_layer import listen_layer
from attn_compiler.passes.replace_block import replace_block
from attn_compiler.passes.replace_layer import replace_layer
from attn_compiler.passes.rewrite_memory import rewrite_memory
from attn_compiler.passes.rewrite_site import rewrite_site
from attn_compiler.passes.rewrite_states import rewrite_states
from attn_compiler.passes.show_kernels import number, show_kernels, sizes_of_example
from attn_compiler.passes.show_states import show_states
from attn_compiler.planning import advice
from attn_compiler.together import join, passed
from attn_compiler.variants import ELAttention
from attn_compiler.variants.base import (
    Lowering,
    NewModule,
    NewTensor,
    Replacement,
    Scope,
    Shape,
    VariantSpec,
)
from attn_compiler.work import NEEDS_REWRITE, Raised, Work, accepted, note

Finder = Callable[[Region, FunctionalRegion, Core, State], Sought]
Replacer = Callable[[Region, FunctionalRegion, Piece, Replacement], tuple[NewTensor, ...]]
# what finds, and what replaces, the piece around a core for a variant with parameters of its own
WIDER: Mapping[Scope, tuple[Finder, Replacer]] = {
    Scope.SITE: (find_layer, replace_layer),
    Scope.BLOCK: (find_block_piece, replace_block),
}


def decide(work: Work, raised: Raised, site: AttentionSite) -> None:
    """Choose for a core, carry it out in the graph, and note the site; one that waits for the rest
    of its block is noted as it is, see
    `together`.
    """
    region, _, _ = raised
    target = work.config.wanted(site.path)
    if isinstance(target, VariantSpec) and variant_of(target).scope is Scope.SITE_AND_NET:
        join(work, raised, site, target)
        return
    passed(work, region.end)
    if target is None:
        reason = Reason("config.not_selected", "no pattern of `to` names this module")
        site = replace(site, decision=Decision(False, reasons=(reason,)))
    else:
        site = _chosen(work, raised, site, target)
    note(work, len(work.sites), site)


def _chosen(
    work: Work,
    raised: Raised,
    site: AttentionSite,
    target: VariantSpec | Literal["fastest"],
) -> AttentionSite:
    """The site with the decision about what is wanted for it, carried out."""
    variant, lowering = variant_of(target), None
    spec = variant.spec() if target == "fastest" else target
    region, _, core = raised
    if variant.replace is not None:
        return _replaced(work, raised, site, spec)
    site, kept = _with_cache(work, spec, raised, site)
    reasons = tuple(variant.legality(site, spec))
    new: tuple[NewTensor | NewModule, ...] = ()
    if variant.lower is not None and not reasons:
        lowering = variant.lower(site, spec, site.length or 0, len(core.reads))
        reasons = _not_installable(lowering, work)
    if not reasons and work.change:
        try:
            new = _carry_out(work, raised, _Way(spec, kept, lowering))
        except (NotAttention, RegionError) as refusal:
            reasons = (Reason(refusal.code, refusal.text, site.location),)
    if lowering is not None and lowering.words and not reasons:
        facts = {variant.name: lowering.words, "plan": _advice_on_core(work, raised, site, spec)}
        site = replace(site, facts={**site.facts, **facts})
    name, fidelity = "" if reasons else variant.name, variant.fidelity.value
    decision = Decision(not reasons, name, reasons, fidelity=fidelity, tensors=new)
    if lowering is None and kept is None and not reasons:
        seen = show_kernels(region, core, work.config.hardware, work.config.measure_top)
        if seen is not None:
            decision = replace(
                decision, tile=seen.tile, predicted_seconds=seen.seconds, limit=seen.limit,
                work=seen.work,
            )  # fmt: skip
            site = replace(site, facts={**site.facts, "kernel": _named(seen)})
            work.kernels |= {f"{name}: {site.program}": s for name, s in seen.sources.items()}
            decision = replace(decision, call=seen.call)
    return replace(site, decision=decision)


def _with_cache(
    work: Work,
    spec: VariantSpec,
    raised: Raised,
    site: AttentionSite,
) -> tuple[AttentionSite, Kept | None]:
    """The call of a cache that the variant would replace, and what is in its way."""
    variant = variant_of(spec)
    region, functional, core = raised
    if variant.scope is Scope.SITE and work.cache is not None:
        found = find_states(region.end, functional, core, work.state)
        kept, site = found.kept, replace(site, obstacles=found.obstacles)
        beams, told = spec.beams if isinstance(spec, ELAttention) else 1, None
        if kept is not None:
            told = show_states(region, core, kept, work.config.hardware, beams)
        return replace(
            site, facts=site.facts | ({} if told is None else {variant.name: told})
        ), kept
    if variant.remembers and work.memory is not None:
        kept, obstacles = find_update(functional, core, region.end)
        return replace(site, obstacles=obstacles, cached=kept is not None), kept
    return site, None


def _replaced(
    work: Work,
    raised: Raised,
    site: AttentionSite,
    spec: VariantSpec,
) -> AttentionSite:
    """The same for a variant that replaces more than the core, with parameters of its own."""
    region, functional, core = raised
    variant = variant_of(spec)
    if not work.config.installs:
        return replace(site, decision=Decision(False, reasons=NEEDS_REWRITE))
    find, carry_out = WIDER[variant.scope]
    sought = find(region, functional, core, work.state)
    piece = sought.piece
    site = replace(site, obstacles=sought.obstacles, remaining=sought.remaining)
    reasons = tuple(variant.legality(site, spec))
    if piece is None or variant.replace is None or reasons:
        return replace(site, decision=Decision(False, reasons=reasons))
    piece = replace(piece, facts={**piece.facts, "calls": work.cache})
    try:
        made = variant.replace(site, piece, spec)
        if made.listens:
            ear = listen_layer(region, functional, piece)
            return replace(site, decision=Decision(True, variant.name, tensors=ear))
        tensors = carry_out(region, functional, piece, made) if work.change else made.all_tensors
    except (NotAttention, RegionError) as refusal:
        reason = Reason(refusal.code, refusal.text, site.location)
        return replace(site, decision=Decision(False, reasons=(reason,)))
    return accepted(work, region, site, piece, (made, tensors))


def _advice_on_core(work: Work, raised: Raised, site: AttentionSite, spec: VariantSpec) -> str:
    """What the planner says about a core at the sizes of the example."""
    region, _, core = raised
    known = sizes_of_example(region)
    batch, rows, keys = (number(core.sizes[name], known) for name in "BTS")
    if not (batch and rows and keys and site.query_heads and site.head_dim):
        return ""
    shape = Shape(
        batch,
        rows,
        keys,
        site.query_heads,
        site.head_dim,
        kv_heads=site.kv_heads,
        value_dim=site.value_dim,
    )
    return advice(spec, shape, work.config.hardware, core.dtype)


def _named(seen: Shown) -> str:
    return f"{seen.name}: {seen.why}" if seen.why else seen.name


def _not_installable(lowering: Lowering, work: Work) -> tuple[Reason, ...]:
    """New tensors need a module that they can be put into, and a memory needs a living one."""
    living = work.memory is not None or not (lowering.own or lowering.remembers)
    if living and (work.config.installs or not lowering.tensors):
        return ()
    return NEEDS_REWRITE


@dataclass(frozen=True)
class _Way:
    """How a site is to be replaced: with a cache of hidden states, or by another operator."""

    spec: VariantSpec
    kept: Kept | None
    lowering: Lowering | None


def _carry_out(work: Work, raised: Raised, way: _Way) -> tuple[NewTensor | NewModule, ...]:
    """Rewrite, and note the nodes that may be dead now; what the module has to get."""
    region, functional, core = raised
    new: tuple[NewTensor | NewModule, ...] = ()
    lowering = way.lowering
    if work.memory is not None and lowering is not None and lowering.memory is not None:
        name = variant_of(way.spec).name
        new = rewrite_memory(region, functional, core, lowering, way.kept, work.memory, name)
    elif way.kept is None or work.cache is None:
        new = rewrite_site(region, functional, core, lowering)
    else:
        assert isinstance(way.spec, ELAttention)
        work.touched |= rewrite_states(region, functional, core, way.kept, work.cache, way.spec)
    work.touched |= set(region.nodes)
    return new
