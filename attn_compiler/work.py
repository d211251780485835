"""What is known about one graph while it is worked on, and what is noted about an attention in it.

sites, in the order of the graph; groups of those that wait for the rest of their block
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from attn_compiler.config import CompileConfig, variant_of
from attn_compiler.ir import ops
from attn_compiler.ir.axes import hint
from attn_compiler.ir.core import Core
from attn_compiler.ir.net_piece import Added
from attn_compiler.ir.piece import Piece
from attn_compiler.ir.region import FunctionalRegion, Memo
from attn_compiler.ir.site import AttentionSite, Decision, Missed, Reason
from attn_compiler.ir.trace import Region
from attn_compiler.passes.rewrite_states import CacheCalls
from attn_compiler.planning import advice
from attn_compiler.variants.base import NewTensor, Replacement, Shape, VariantSpec

log = logging.getLogger("attn_compiler")
NEEDS_REWRITE = (
    Reason(
        "needs_rewrite",
        "it needs new tensors in the module: use attn_compiler.rewrite on the model",
    ),
)
Raised = tuple[Region, FunctionalRegion, Core]


@dataclass
class Member:
    """An attention that is replaced with the others of its block, and the net, or not at all.

    Attributes:
        place: in `Work.sites`.
        raised: what was recognised.
        spec: what is wanted.
        piece: its layer, None where `obstacles` are in the way.
    """

    place: int
    raised: Raised
    spec: VariantSpec
    piece: Piece | None
    obstacles: tuple[Reason, ...]


@dataclass
class Group:
    """The attentions of one block, as far as the graph was read.

    Attributes:
        members: those that are to be replaced.
        last: where the result of the last attention is added, whether to be replaced or not.
        missing: why no net follows it.
    """

    members: list[Member] = field(default_factory=list)
    last: Added | None = None
    missing: tuple[Reason, ...] = ()


@dataclass
class Work:
    """What is known about one graph while it is worked on."""

    graph: fx.Graph
    config: CompileConfig
    state: dict[fx.Node, tuple[Any, ...]]
    change: bool
    name: str = ""
    sites: list[AttentionSite] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)
    touched: set[fx.Node] = field(default_factory=set)
    done: set[fx.Node] = field(default_factory=set)
    memo: Memo = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    cache: CacheCalls | None = None
    memory: CacheCalls | None = None


def note(work: Work, place: int, site: AttentionSite) -> None:
    """What is known of a site, at its place in the list."""
    log.info("%s: %s, mask %s", site.path or site.location, site.decision, site.mask)
    work.sites[place : place + 1] = [site]


def accepted(
    work: Work,
    region: Region,
    site: AttentionSite,
    piece: Piece,
    done: tuple[Replacement, tuple[NewTensor, ...]],
) -> AttentionSite:
    """The site, replaced by parameters of its own."""
    made, tensors = done
    variant, before = variant_of(made.spec), piece.facts.get("before")
    work.touched |= set(region.nodes) | piece.nodes | {piece.end}
    taken = piece.taken if before is None else before.taken
    decision = Decision(
        True, variant.name, fidelity=variant.fidelity.value, tensors=tensors, taken=taken,
        spec=made.spec, cached=None if made.cached is None else made.cached.sizes,
        origin=made.origin, causal=made.causal,
    )  # fmt: skip
    facts = {variant.name: made.words, "plan": _advice(work, piece, site, made.spec)}
    return replace(site, decision=decision, facts={**site.facts, **facts})


def _advice(work: Work, piece: Piece, site: AttentionSite, spec: VariantSpec) -> str:
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
