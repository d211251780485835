"""The attentions of a block that are replaced together with its feed-forward net, or not at all.

    x + A(norm x); h + C(norm h, e); g + F(norm g)   ->   A waits, C waits, F follows: all or none

An attention waits until the net behind it is found, or the end of the graph.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from attn_compiler.config import variant_of
from attn_compiler.ir.affine import Blocked
from attn_compiler.ir.layer import find_layer
from attn_compiler.ir.net_piece import Added, Net, added, net_behind, net_of, with_net
from attn_compiler.ir.no_attention import NotAttention
from attn_compiler.ir.piece import Piece
from attn_compiler.ir.site import AttentionSite, Decision, Reason
from attn_compiler.ir.trace import RegionError
from attn_compiler.passes.replace_net import Job, replace_together
from attn_compiler.variants.base import Replacement, VariantSpec
from attn_compiler.work import NEEDS_REWRITE, Group, Member, Raised, Work, accepted, note


def join(work: Work, raised: Raised, site: AttentionSite, spec: VariantSpec) -> None:
    """Note an attention that is replaced with the rest of its block; if its net follows, decide."""
    place = len(work.sites)
    if not work.config.installs:
        note(work, place, replace(site, decision=Decision(False, reasons=NEEDS_REWRITE)))
        return
    found = find_layer(*raised, work.state)
    work.sites.append(replace(site, remaining=found.remaining))
    net, (where, missing) = None, _added(raised[0].end)
    near = (g for g in work.groups if where and g.last and where.behind(g.last))
    group = next(near, None) or Group()
    if not group.members:
        work.groups.append(group)
    group.members.append(Member(place, raised, spec, found.piece, found.obstacles))
    try:
        if where is not None and found.piece is not None:
            net = net_of(where, found.piece.facts["layer"])
    except Blocked as blocked:
        missing = blocked.reasons
    group.last, group.missing = where, missing
    if net is not None:
        _settle(work, group, net)


def passed(work: Work, end: fx.Node) -> None:
    """An attention that stays may stand before the net that others of its block wait for."""
    where = _added(end)[0] if work.groups else None
    for group in list(work.groups):
        last = group.last
        x = where.behind(last) if where is not None and last is not None else None
        if where is None or last is None or x is None:
            continue
        group.last = where
        try:
            net = net_behind(where, x, x is last.total)
        except Blocked as blocked:
            group.missing = blocked.reasons
        else:
            _settle(work, group, net)


def finish(work: Work) -> None:
    """Decide about what still waits, when all of a graph was read."""
    for group in list(work.groups):
        _settle(work, group, None)


def _added(end: fx.Node) -> tuple[Added | None, tuple[Reason, ...]]:
    """Where the result of an attention is added, or why it is not."""
    try:
        return added(end), ()
    except Blocked as blocked:
        return None, blocked.reasons


def _settle(work: Work, group: Group, net: Net | None) -> None:
    """Replace all of a group and the net behind it, or nothing."""
    work.groups.remove(group)
    members, reasons = group.members, list[tuple[Reason, ...]]()
    for member in members:
        obstacles = member.obstacles or (group.missing if net is None else ())
        site = replace(work.sites[member.place], obstacles=obstacles)
        work.sites[member.place] = site
        reasons.append(tuple(variant_of(member.spec).legality(site, member.spec)))
    if net is not None and not any(reasons):
        refusal = _together(work, members, net)
        if refusal is None:
            return
        reasons = [(refusal,)] * len(members)
    stays = next(m for m, why in zip(members, reasons, strict=True) if why)
    text = "all attentions of a block are replaced or none, and another one stays: "
    text += _named(work.sites[stays.place])
    for member, why in zip(members, reasons, strict=True):
        site = work.sites[member.place]
        why = why or (Reason("block.partly", text),)
        note(work, member.place, replace(site, decision=Decision(False, reasons=why)))


def _together(work: Work, members: list[Member], net: Net) -> Reason | None:
    """Replace them, the net with the last; why not, if not."""
    pieces, made, jobs = list[Piece](), list[Replacement](), list[Job]()
    for member in members:
        assert member.piece is not None
        pieces.append(with_net(member.piece, net if member is members[-1] else None))
    try:
        for member, piece in zip(members, pieces, strict=True):
            replacing = variant_of(member.spec).replace
            assert replacing is not None
            made.append(replacing(work.sites[member.place], piece, member.spec))
            jobs.append((*member.raised[:2], piece, made[-1]))
        tensors = replace_together(jobs) if work.change else [m.all_tensors for m in made]
    except (NotAttention, RegionError) as refusal:
        return Reason(refusal.code, refusal.text, work.sites[members[-1].place].location)
    for number, member in enumerate(members):
        done, site = (made[number], tensors[number]), work.sites[member.place]
        site = accepted(work, member.raised[0], site, pieces[number], done)
        note(work, member.place, site)
    return None


def _named(site: AttentionSite) -> str:
    """Without the number of the layer: other layers follow this one."""
    name = site.path.rpartition(".")[2]
    return f"{name} ({site.location})" if name else site.location
