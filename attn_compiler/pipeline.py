"""The order of things: find, cut, functionalise, raise, select, rewrite, clean up; for every graph
of a module.

host graph --find_candidates--> candidates --cut, functionalise--> regions --recognise--> cores
  --describe--> sites --select--> decisions --rewrite_site--> host graph with one operator per
  accepted site
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import fx

import attn_compiler.kernels.operators  # noqa: F401  (registers them)
from attn_compiler.config import CompileConfig, variant_of
from attn_compiler.errors import NoLegalVariant
from attn_compiler.ir import ops
from attn_compiler.ir.axes import hint
from attn_compiler.ir.block_piece import find_block_piece
from attn_compiler.ir.core import Core
from attn_compiler.ir.flex import recognise_flex
from attn_compiler.ir.layer import find_layer
from attn_compiler.ir.piece import Piece, Sought
from attn_compiler.ir.provenance import location, module
from attn_compiler.ir.recognise import recognise
from attn_compiler.ir.region import (
    FunctionalRegion,
    Memo,
    ambient,
    cut,
    functionalise,
    order,
)
from attn_compiler.ir.site import AttentionSite, Decision, Missed, Reason
from attn_compiler.ir.soft import NotAttention
from attn_compiler.ir.states import Kept, State, find_states
from attn_compiler.ir.trace import Region, RegionError
from attn_compiler.kernels.shown import Shown
from attn_compiler.passes.describe import describe
from attn_compiler.passes.expand_composite import Expansion, expand_composites
from attn_compiler.passes.find_regions import Candidate, find_candidates
from attn_compiler.passes.replace_block import replace_block
from attn_compiler.passes.replace_layer import replace_layer
from attn_compiler.passes.rewrite_site import erase_dead, live_nodes, rewrite_site
from attn_compiler.passes.rewrite_states import CacheCalls, rewrite_states
from attn_compiler.passes.show_kernels import show_kernels
from attn_compiler.planning import advice
from attn_compiler.report import Report
from attn_compiler.variants.base import Lowering, NewTensor, Replacement, Scope, Shape, VariantSpec

log = logging.getLogger("attn_compiler")
_NEEDS_REWRITE = (
    Reason(
        "needs_rewrite",
        "it needs new tensors in the module: use attn_compiler.rewrite on the model",
    ),
)
Finder = Callable[[Region, FunctionalRegion, Core, State], Sought]
Replacer = Callable[[Region, FunctionalRegion, Piece, Replacement], tuple[NewTensor, ...]]
# what finds, and what replaces, the piece around a core for a variant with parameters of its own
WIDER: Mapping[Scope, tuple[Finder, Replacer]] = {
    Scope.SITE: (find_layer, replace_layer),
    Scope.BLOCK: (find_block_piece, replace_block),
}


@dataclass
class _Work:
    """What is known about one graph while it is worked on."""

    graph: fx.Graph
    config: CompileConfig
    state: dict[fx.Node, tuple[Any, ...]]
    change: bool
    sites: list[AttentionSite] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)
    touched: set[fx.Node] = field(default_factory=set)
    done: set[fx.Node] = field(default_factory=set)
    memo: Memo = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    cache: CacheCalls | None = None


def compile_graph(
    gm: fx.GraphModule,
    config: CompileConfig,
    *,
    change: bool = True,
    cache: CacheCalls | None = None,
) -> Report:
    """Find every attention of a traced module, and rewrite in place those that may be.

    Args:
        gm: a graph whose nodes hold fake values, with the bodies of its higher-order operators as
            submodules.
        config: what is allowed.
        change: False only looks.
        cache: what may stand for the calls of a cache, where its layout may change.

    Raises:
        NoLegalVariant: `on_reject="raise"` and a site stays as it is.
    """
    before = gm.print_readable(print_output=False) if config.keep_graphs else ""
    works = list(_graphs(gm, config, change))
    for work in works:
        work.cache = cache
        _run(work)
    for _, child in gm.named_modules():
        if isinstance(child, fx.GraphModule):
            child.graph.lint()
            child.recompile()
    report = Report(
        sites=tuple(site for work in works for site in work.sites),
        missed=tuple(missed for work in works for missed in work.missed),
        graph_before=before,
        graph_after=gm.print_readable(print_output=False) if config.keep_graphs else "",
        kernels={name: text for work in works for name, text in work.kernels.items()},
    )
    _raise_rejected(report, config)
    return report


def _graphs(gm: fx.GraphModule, config: CompileConfig, change: bool) -> Iterator[_Work]:
    """The graph itself and the bodies of checkpoint, cond and nested regions, each once."""
    outer = ambient(gm.graph)
    yield _Work(gm.graph, config, outer, change)
    for name, child in gm.named_children():
        if not isinstance(child, fx.GraphModule):
            continue
        around = _around(gm.graph, name, outer)
        for work in _graphs(child, config, change):
            if around:
                work.state = {n: (*around, *work.state.get(n, ())) for n in work.graph.nodes}
            yield work


def _around(graph: fx.Graph, name: str, state: dict[fx.Node, tuple[Any, ...]]) -> tuple[Any, ...]:
    """Autocast state in which the graph runs the body it holds under this name."""
    for node in graph.nodes:
        if node.op == "get_attr" and node.target == name:
            for user in node.users:
                found = state.get(user, ())
                if ops.name(user) == "wrap_with_autocast":
                    device, dtype, enabled, cache = user.args[:4]
                    return (*found, (device, dtype, enabled, cache))
                return found
    return ()


def _run(work: _Work) -> None:
    expansions = expand_composites(work.graph, work.state)
    position = order(work.graph)
    writers = [n for n in work.graph.nodes if ops.written(n)]
    for node in work.graph.nodes:
        if ops.name(node) in ops.NATIVE:
            _miss(
                work,
                node,
                Reason("region.native", "this is fused already, in one native call of PyTorch"),
            )
    for candidate in list(find_candidates(work.graph)):
        _visit(work, candidate, position, writers)
        position = order(work.graph)
    _settle(work, expansions)
    if work.touched:
        erase_dead(work.graph, work.touched)


def _settle(work: _Work, expansions: list[Expansion]) -> None:
    """Take back the expansion of a fused module whose attention was not rewritten."""
    dead = work.touched - live_nodes(work.graph, work.touched, set()) if expansions else set()
    for expansion in expansions:
        if expansion.rewritten(dead):
            work.touched |= expansion.replaced()
        else:
            expansion.undo()
        work.touched -= {n for n in work.touched if n.graph is not work.graph or n._erased}


def _visit(
    work: _Work, candidate: Candidate, position: dict[fx.Node, int], writers: list[fx.Node]
) -> None:
    """Try the nodes that may end this candidate, the first that works is taken."""
    refusals: list[tuple[fx.Node, Reason]] = []
    if not candidate.ends:
        reason = Reason(
            "not_attention.no_value_product", "the softmax never meets a product with values"
        )
        refusals.append((candidate.anchor, reason))
    for end in candidate.ends:
        if end in work.done:
            return
        where = location(candidate.anchor)
        try:
            found = _raise(work, end, position, writers)
        except (NotAttention, RegionError) as refusal:
            refusals.append((end, Reason(refusal.code, refusal.text, where)))
        except Exception as error:  # only looked so far: the model compiles without this rewrite
            log.warning("internal error at %s, left as it is", where, exc_info=True)
            text = f"an error of attn_compiler, please report it: {type(error).__name__}: {error}"
            refusals.append((end, Reason("internal.error", text, where)))
        else:
            _decide(work, *found)
            work.done.add(end)
            return
    _miss(work, candidate.anchor, refusals[0][1])


def _raise(
    work: _Work, end: fx.Node, position: dict[fx.Node, int], writers: list[fx.Node]
) -> tuple[Region, FunctionalRegion, Core]:
    if ops.name(end) in ops.FLEX:
        return recognise_flex(end)
    region = cut(end, position, writers)
    functional = functionalise(region, work.state, work.memo)
    return region, functional, recognise(functional)


def _miss(work: _Work, node: fx.Node, reason: Reason) -> None:
    path, _ = module(node)
    log.info("%s: %s", path or location(node), reason)
    work.missed.append(Missed(location(node), reason.code, reason.text, path))


def _decide(work: _Work, region: Region, functional: FunctionalRegion, core: Core) -> None:
    site = describe(region, functional, core)
    target = work.config.wanted(site.path)
    if target is None:
        reason = Reason("config.not_selected", "no pattern of `to` names this module")
        site = replace(site, decision=Decision(False, reasons=(reason,)))
    else:
        site = _chosen(work, (region, functional, core), site, target)
    log.info("%s: %s, mask %s", site.path or site.location, site.decision, site.mask)
    work.sites.append(site)


def _chosen(
    work: _Work,
    raised: tuple[Region, FunctionalRegion, Core],
    site: AttentionSite,
    target: VariantSpec | Literal["fastest"],
) -> AttentionSite:
    """The site with the decision about what is wanted for it, carried out."""
    variant, kept, lowering = variant_of(target), None, None
    spec = variant.spec() if target == "fastest" else target
    region, functional, core = raised
    if variant.replace is not None:
        return _replaced(work, raised, site, spec)
    if variant.scope is Scope.SITE and work.cache is not None:
        found = find_states(region.end, functional, core, work.state)
        site, kept = replace(site, obstacles=found.obstacles), found.kept
    reasons = tuple(variant.legality(site, spec))
    tensors: tuple[NewTensor, ...] = ()
    if variant.lower is not None and not reasons:
        lowering = variant.lower(site, spec, site.length or 0, len(core.reads))
        reasons = _not_installable(lowering, work.config)
    if not reasons and work.change:
        try:
            tensors = _carry_out(work, raised, _Way(spec, kept, lowering))
        except (NotAttention, RegionError) as refusal:
            reasons = (Reason(refusal.code, refusal.text, site.location),)
    name, fidelity = "" if reasons else variant.name, variant.fidelity.value
    decision = Decision(not reasons, name, reasons, fidelity=fidelity, tensors=tensors)
    if lowering is None and kept is None and not reasons:
        seen = show_kernels(region, core, work.config.hardware)
        if seen is not None:
            decision = replace(decision, tile=seen.tile, predicted_seconds=seen.seconds)
            site = replace(site, facts={**site.facts, "kernel": _named(seen)})
            work.kernels |= {f"{name}: {site.program}": s for name, s in seen.sources.items()}
    return replace(site, decision=decision)


def _replaced(
    work: _Work,
    raised: tuple[Region, FunctionalRegion, Core],
    site: AttentionSite,
    spec: VariantSpec,
) -> AttentionSite:
    """The same for a variant that replaces more than the core, with parameters of its own."""
    region, functional, core = raised
    variant = variant_of(spec)
    if not work.config.installs:
        return replace(site, decision=Decision(False, reasons=_NEEDS_REWRITE))
    find, carry_out = WIDER[variant.scope]
    sought = find(region, functional, core, work.state)
    piece, site = sought.piece, replace(site, obstacles=sought.obstacles)
    reasons = tuple(variant.legality(site, spec))
    if piece is None or variant.replace is None or reasons:
        return replace(site, decision=Decision(False, reasons=reasons))
    piece = replace(piece, facts={**piece.facts, "calls": work.cache})
    try:
        made = variant.replace(site, piece, spec)
        tensors = carry_out(region, functional, piece, made) if work.change else made.tensors
    except (NotAttention, RegionError) as refusal:
        reason = Reason(refusal.code, refusal.text, site.location)
        return replace(site, decision=Decision(False, reasons=(reason,)))
    work.touched |= set(region.nodes) | piece.nodes | {piece.end}
    before = piece.facts.get("before")
    taken = piece.taken if before is None else before.taken
    decision = Decision(
        True, variant.name, fidelity=variant.fidelity.value, tensors=tensors, taken=taken,
        spec=made.spec, cached=None if made.cached is None else made.cached.sizes,
    )  # fmt: skip
    facts = {variant.name: made.words, "plan": _advice(work, piece, site, made.spec)}
    return replace(site, decision=decision, facts={**site.facts, **facts})


def _advice(work: _Work, piece: Piece, site: AttentionSite, spec: VariantSpec) -> str:
    """What the planner says about a piece at the sizes of the example."""
    x, y = (ops.value(node) for node in (piece.given[0], piece.given[-1]))
    if site.query_heads is None or site.head_dim is None:
        return ""
    batch, rows = (0, 1) if piece.facts.get("batch_first", True) else (1, 0)
    shape = Shape(
        hint(x.shape[batch]),
        hint(x.shape[rows]),
        hint(y.shape[rows]),
        site.query_heads,
        site.head_dim,
        kv_heads=site.kv_heads,
        width=hint(x.shape[-1]),
        causal="causal" in str(site.mask),
    )
    return advice(spec, shape, work.config.hardware, x.dtype)


def _named(seen: Shown) -> str:
    return f"{seen.name}: {seen.why}" if seen.why else seen.name


def _not_installable(lowering: Lowering, config: CompileConfig) -> tuple[Reason, ...]:
    """New tensors need a module that they can be put into."""
    if config.installs or not lowering.tensors:
        return ()
    return _NEEDS_REWRITE


@dataclass(frozen=True)
class _Way:
    """How a site is to be replaced: with a cache of hidden states, or by another operator."""

    spec: VariantSpec
    kept: Kept | None
    lowering: Lowering | None


def _carry_out(
    work: _Work, raised: tuple[Region, FunctionalRegion, Core], way: _Way
) -> tuple[NewTensor, ...]:
    """Rewrite, and note the nodes that may be dead now; what the module has to get."""
    region, functional, core = raised
    tensors: tuple[NewTensor, ...] = ()
    if way.kept is None or work.cache is None:
        tensors = rewrite_site(region, functional, core, way.lowering)
    else:
        key_bias = bool(getattr(way.spec, "keep_key_bias", True))
        work.touched |= rewrite_states(region, functional, core, way.kept, work.cache, key_bias)
    work.touched |= set(region.nodes)
    return tensors


def _raise_rejected(report: Report, config: CompileConfig) -> None:
    rejected = [
        s for s in report.sites if not s.decision.accepted and config.wanted(s.path) is not None
    ]
    if config.on_reject == "raise" and rejected:
        site = rejected[0]
        raise NoLegalVariant(
            "nothing may replace attention",
            where=f"{site.path or 'the root'} ({site.location})",
            why=[str(reason) for reason in site.decision.reasons],
            do='on_reject="keep" leaves the site as it is',
        )
