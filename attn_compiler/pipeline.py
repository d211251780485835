"""The order of things: find, cut, functionalise, raise, select, rewrite, clean up; for every graph
of a module.

host graph --find_candidates--> candidates --cut, functionalise--> regions --recognise--> cores
  --describe--> sites --select--> decisions --rewrite_site--> host graph with one operator per
  accepted site
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

import attn_compiler.kernels.operators  # noqa: F401  (registers them)
from attn_compiler.config import CompileConfig
from attn_compiler.cost.points import Roofline, roofline
from attn_compiler.decide import decide
from attn_compiler.errors import NoLegalVariant
from attn_compiler.ir import ops
from attn_compiler.ir.flex import recognise_flex
from attn_compiler.ir.listing import Line, Listing, lines
from attn_compiler.ir.mixing import mixed_heads
from attn_compiler.ir.no_attention import NotAttention
from attn_compiler.ir.provenance import location, module, source_line
from attn_compiler.ir.recognise import recognise
from attn_compiler.ir.region import (
    FunctionalRegion,
    ambient,
    cut,
    functionalise,
    order,
)
from attn_compiler.ir.site import AttentionSite, Missed, Reason
from attn_compiler.ir.trace import RegionError
from attn_compiler.passes.describe import describe
from attn_compiler.passes.expand_composite import Expansion, expand_composites
from attn_compiler.passes.find_regions import Candidate, find_candidates
from attn_compiler.passes.rewrite_site import erase_dead, live_nodes
from attn_compiler.passes.rewrite_states import CacheCalls
from attn_compiler.report import Report
from attn_compiler.together import finish
from attn_compiler.work import Raised, Work

log = logging.getLogger("attn_compiler")


def compile_graph(
    gm: fx.GraphModule,
    config: CompileConfig,
    *,
    change: bool = True,
    cache: CacheCalls | None = None,
    memory: CacheCalls | None = None,
) -> Report:
    """Find every attention of a traced module, and rewrite in place those that may be.

    Args:
        gm: a graph whose nodes hold fake values, with the bodies of its higher-order operators as
            submodules.
        config: what is allowed.
        change: False only looks.
        cache: what may stand for the calls of a cache, where its layout may change.
        memory: the same for attentions that remember, where a living module does it for them.

    Raises:
        NoLegalVariant: `on_reject="raise"` and a site stays as it is.
    """
    before = gm.print_readable(print_output=False) if config.keep_graphs else ""
    works = list(_graphs(gm, config, change))
    listed = [lines(work.graph) for work in works] if config.keep_graphs else []
    for work in works:
        work.cache, work.memory = cache, memory
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
        roofline=_roofline(config, [site for work in works for site in work.sites]),
        graphs=tuple(_listing(*pair) for pair in zip(works, listed, strict=False)),
    )
    _raise_rejected(report, config)
    return report


def _roofline(config: CompileConfig, sites: Sequence[AttentionSite]) -> Roofline | None:
    """The predictions as points, where a hardware is named."""
    if config.hardware is None:
        return None
    found = roofline(config.hardware, 4 if config.hardware.kind == "cpu" else 2)
    for site in sites:
        decision, name = site.decision, site.path or site.location
        if decision.predicted_seconds is not None:
            found = found.with_point(
                name, decision.work, decision.predicted_seconds, decision.limit
            )
    return found


def _listing(work: Work, before: tuple[Line, ...]) -> Listing:
    return Listing(work.name, before, lines(work.graph))


def _graphs(gm: fx.GraphModule, config: CompileConfig, change: bool) -> Iterator[Work]:
    """The graph itself and the bodies of checkpoint, cond and nested regions, each once."""
    outer = ambient(gm.graph)
    yield Work(gm.graph, config, outer, change)
    for name, child in gm.named_children():
        if not isinstance(child, fx.GraphModule):
            continue
        around = _around(gm.graph, name, outer)
        for work in _graphs(child, config, change):
            work.name = f"{name}.{work.name}".rstrip(".")
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


def _run(work: Work) -> None:
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
    finish(work)
    _settle(work, expansions)
    if work.touched:
        erase_dead(work.graph, work.touched)


def _settle(work: Work, expansions: list[Expansion]) -> None:
    """Take back the expansion of a fused module whose attention was not rewritten."""
    dead = work.touched - live_nodes(work.graph, work.touched, set()) if expansions else set()
    for expansion in expansions:
        if expansion.rewritten(dead):
            work.touched |= expansion.replaced()
        else:
            expansion.undo()
        work.touched -= {n for n in work.touched if n.graph is not work.graph or n._erased}


def _visit(
    work: Work, candidate: Candidate, position: dict[fx.Node, int], writers: list[fx.Node]
) -> None:
    """Try the nodes that may end this candidate, the first that works is taken."""
    refusals: list[tuple[Reason, fx.Node | None]] = []
    if not candidate.ends:
        reason = Reason(
            "not_attention.no_value_product", "the softmax never meets a product with values"
        )
        refusals.append((reason, None))
    for end in candidate.ends:
        if end in work.done:
            return
        where = location(candidate.anchor)
        try:
            raised = _raise(work, end, position, writers)
            site = describe(*raised)
        except (NotAttention, RegionError) as refusal:
            node = refusal.node if isinstance(refusal, NotAttention) else None
            refusals.append((Reason(refusal.code, refusal.text, where), node))
        except Exception as error:  # only looked so far: the model compiles without this rewrite
            log.warning("internal error at %s, left as it is", where, exc_info=True)
            text = f"an error of attn_compiler, please report it: {type(error).__name__}: {error}"
            refusals.append((Reason("internal.error", text, where), None))
        else:
            decide(work, raised, site)
            work.done.add(end)
            return
    mixed = mixed_heads(candidate.anchor)
    if mixed:
        where = location(candidate.anchor)
        reason = Reason("not_attention.heads_mixed", f"{mixed}: no head attends by itself", where)
        refusals.insert(0, (reason, refusals[0][1]))
    _miss(work, candidate.anchor, *refusals[0])


def _raise(
    work: Work, end: fx.Node, position: dict[fx.Node, int], writers: list[fx.Node]
) -> Raised:
    if ops.name(end) in ops.FLEX:
        return recognise_flex(end)
    region = cut(end, position, writers)
    functional = functionalise(region, work.state, work.memo)
    try:
        return region, functional, recognise(functional)
    except NotAttention as refusal:
        node = _in_host(functional, refusal.node)
        raise NotAttention(refusal.code, refusal.text, node) from refusal


def _in_host(functional: FunctionalRegion, node: fx.Node | None) -> fx.Node | None:
    """The operation of the user's graph that a functional one belongs to."""
    host = {n: h for h, n in reversed(list(functional.of_host.items()))}
    pending = [node] if node is not None else []
    for found in pending:  # one operation may be several functional ones: the last has a host
        if found in host:
            return host[found]
        pending += [user for user in found.users if user not in pending]
    return None


def _miss(work: Work, node: fx.Node, reason: Reason, misfit: fx.Node | None = None) -> None:
    path, _ = module(node)
    log.info("%s: %s", path or location(node), reason)
    operation = ""
    if misfit is not None and location(misfit):
        operation = f"{ops.name(misfit)} at {location(misfit)}: {source_line(misfit)}"
    line = source_line(node)
    work.missed.append(Missed(location(node), reason.code, reason.text, path, line, operation))


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
