"""From the functional core to the site record: the same attention in the user's words."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir import ops
from attn_compiler.ir.core import Core
from attn_compiler.ir.expr import slots
from attn_compiler.ir.mask import classify
from attn_compiler.ir.provenance import (
    display_name,
    location,
    module,
    reaches,
    read_by,
    source_line,
    sources,
)
from attn_compiler.ir.pull import val
from attn_compiler.ir.region import FunctionalRegion
from attn_compiler.ir.roles import extent
from attn_compiler.ir.site import AttentionSite, Decision, Kind, Phase
from attn_compiler.ir.states import single_source
from attn_compiler.ir.trace import Region

_ROTARY = re.compile(r"^(sin|cos|polar|view_as_complex)$")


def describe(region: Region, functional: FunctionalRegion, core: Core) -> AttentionSite:
    """The record of a core; its decision is still open."""
    path, owner = module(region.end)
    host = {node: h for h, node in reversed(list(functional.of_host.items()))}
    names = [_name(node, host, functional) for node in core.reads]
    kinds = [_kind(node) for node in core.reads]
    roles = core.roles
    starts = _starts(core, functional)
    made = {name: sources(start)[1] for name, start in starts.items()}
    rows = core.sizes["T"]
    return AttentionSite(
        path=path,
        owner=owner,
        location=location(region.end),
        kind=Kind.SELF if _same_sequence(starts) else Kind.CROSS,
        phases=(Phase.DECODE,) if rows == 1 else (Phase.PREFILL,),
        query_heads=_static(extent(roles.query_heads)),
        kv_heads=_static(extent(roles.heads)),
        head_dim=_static(extent(roles.feature)),
        value_dim=_static(extent(roles.value)),
        mask=classify(core.program.mask, tuple(names), tuple(kinds)),
        score=_named(str(core.program.score), names, slots(core.program.score)),
        program=core.program,
        scale=None if core.factors else core.scale,
        softmax_dtype=str(core.dtype).removeprefix("torch."),
        dropout=core.dropout,
        decision=Decision(False),
        projections={name: p for name, p in made.items() if p is not None},
        facts=_facts(region, core),
        length=_length(region, core),
        line=source_line(region.end),
        width=_width(functional, core),
    )


def _length(region: Region, core: Core) -> int | None:
    """How many rows the example has, where they are as many as keys."""
    rows, keys = core.sizes["T"], core.sizes["S"]
    if not ax.equal(rows, keys):
        return None
    if isinstance(rows, int):
        return rows
    for node in (*region.inputs, *region.nodes):
        value = ops.value(node)
        for size in value.shape if isinstance(value, torch.Tensor) else ():
            if ax.equal(ax.size_of(size), rows):
                return int(ax.hint(size))
    return None


def _same_sequence(starts: dict[str, fx.Node]) -> bool:
    """Are the keys made of what the queries are made of, be it through a cache?"""
    if len(starts.keys() & {"q", "k"}) < 2:
        return False
    source, _ = sources(starts["q"])
    if source is sources(starts["k"])[0] or reaches(source, starts["k"]):
        return True
    # both may be more than one linear map away from it
    read = read_by(source)
    return bool(read) and read <= read_by(starts["k"])


def _width(functional: FunctionalRegion, core: Core) -> int | None:
    found = single_source(functional, core)
    return None if found is None else int(ops.value(found).shape[2])


def _static(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def _kind(node: fx.Node) -> str:
    found = val(node)
    if not isinstance(found, torch.Tensor) or found.dtype.is_floating_point:
        return "float"
    return "bool" if found.dtype is torch.bool else "int"


def _name(node: fx.Node, host: dict[fx.Node, fx.Node], functional: FunctionalRegion) -> str:
    found = functional.read.get(node) or host.get(node)
    return display_name(found) if found is not None else node.name


def _named(text: str, names: list[str], used: list[int]) -> str:
    for slot in used:
        text = re.sub(rf"\bt{slot}\[", f"{names[slot]}[", text)
    return text


def _starts(core: Core, functional: FunctionalRegion) -> dict[str, fx.Node]:
    """The host nodes that q, k and v begin at."""
    # what is written into holds what was written: what it was before says nothing
    written = {h for leaf, h in functional.read.items() if "overwritten" in leaf.meta}
    own = [(h, node) for h, node in functional.of_host.items() if h not in written]
    host = {node: h for h, node in reversed(own)}
    found: dict[str, fx.Node] = {}
    for name, operand in (("q", core.q), ("k", core.k), ("v", core.v)):
        nodes = [node for node, _ in operand.chain]
        start = next((host[node] for node in nodes if node in host), None)
        start = start or next((functional.read[n] for n in nodes if n in functional.read), None)
        if start is not None:
            found[name] = start
    return found


def _facts(region: Region, core: Core) -> dict[str, str]:
    facts: dict[str, str] = {}
    called = {ops.name(node) for node in region.nodes}
    if any(_ROTARY.match(name) for name in called) or {"neg", "cat"} <= called:
        facts["rotary"] = "a rotation stands between the projections and the scores"
    if region.mutated:
        facts["cache"] = "written in place"
    facts["spelling"] = "fused" if ops.name(region.end) in ops.SDPA else "spelled out"
    return facts
