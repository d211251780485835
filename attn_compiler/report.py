"""What the compiler found and did: for people, for programs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from attn_compiler.ir.site import AttentionSite, Decision, Missed


@dataclass(frozen=True)
class Report:
    """Sites, near misses and graphs of one run.

    Attributes:
        sites: every attention found, with its decision.
        missed: what looked like attention and was left alone.
        graph_before, graph_after: readable text, where the door keeps it.
        kernels: source of generated kernels by name.
    """

    sites: tuple[AttentionSite, ...] = ()
    missed: tuple[Missed, ...] = ()
    graph_before: str = ""
    graph_after: str = ""
    kernels: dict[str, str] = field(default_factory=dict)

    @property
    def rewritten(self) -> int:
        return sum(site.decision.accepted for site in self.sites)

    def __add__(self, other: Report) -> Report:
        return Report(
            self.sites + other.sites,
            self.missed + other.missed,
            "\n\n".join(filter(None, (self.graph_before, other.graph_before))),
            "\n\n".join(filter(None, (self.graph_after, other.graph_after))),
            {**self.kernels, **other.kernels},
        )

    def __str__(self) -> str:
        found = f"{len(self.sites)} attention sites, {self.rewritten} rewritten"
        lines = [f"{found}, {len(self.missed)} look-alikes left alone"]
        for sites in _alike(self.sites):
            lines += _site_lines(sites)
        for missed in self.missed:
            where = missed.path or "the root"
            lines.append(f"  left alone  {where} ({missed.location or 'no source line'})")
            lines.append(f"      {missed.code}: {missed.text}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The same as a JSON object with the keys `sites`, `missed`, `graph_before`, `graph_after`,
        `kernels`.
        """
        return json.dumps(
            {
                "sites": [_site_dict(site) for site in self.sites],
                "missed": [vars_of(missed) for missed in self.missed],
                "graph_before": self.graph_before,
                "graph_after": self.graph_after,
                "kernels": self.kernels,
            },
            indent=2,
        )


_SAME = (
    "location", "owner", "mask", "score", "query_heads", "kv_heads", "head_dim", "dropout",
    "kind", "phases", "decision", "facts",
)  # fmt: skip


def _alike(sites: tuple[AttentionSite, ...]) -> list[list[AttentionSite]]:
    """Repeated layers folded: sites that differ in nothing but their path."""
    groups: dict[Any, list[AttentionSite]] = {}
    for site in sites:
        key = tuple(str(getattr(site, name)) for name in _SAME)
        groups.setdefault(key, []).append(site)
    return list(groups.values())


def _site_lines(sites: list[AttentionSite]) -> list[str]:
    first, last = sites[0], sites[-1]
    path = first.path or "the root"
    where = path if len(sites) == 1 else f"{path} ... {last.path} ({len(sites)} alike)"
    heads = f"{first.query_heads or '?'} heads"
    if first.kv_heads != first.query_heads:
        heads += f" over {first.kv_heads or '?'} kv heads"
    verdict = "rewritten" if first.decision.accepted else "kept"
    phases = "/".join(str(p) for p in first.phases)
    lines = [
        f"  {verdict}  {where} ({first.location or 'no source line'})",
        f"      {first.kind} attention, {phases}, {heads} of {first.head_dim or '?'}",
        f"      mask {first.mask}",
    ]
    if first.score != "dot":
        lines.append(f"      score {first.score}")
    if first.program.sink is not None:
        lines.append(f"      sink {first.program.sink}")
    if first.dropout:
        lines.append(f"      dropout {first.dropout}")
    if "kernel" in first.facts:
        lines.append(f"      runs on {first.facts['kernel']}{_seconds(first.decision)}")
    if first.facts.get("plan"):
        lines.append(f"      plan {first.facts['plan']}")
    done = first.facts.get(first.decision.variant)
    lines.append(f"      {first.decision}{f': {done}' if done else ''}")
    return lines


def _seconds(decision: Decision) -> str:
    """A prediction in words; microseconds are what people compare."""
    seconds = decision.predicted_seconds
    return "" if seconds is None else f", {seconds * 1e6:,.0f} us predicted"


def _site_dict(site: AttentionSite) -> dict[str, Any]:
    decision = site.decision
    return {
        "path": site.path,
        "owner": site.owner,
        "location": site.location,
        "kind": str(site.kind),
        "phases": [str(p) for p in site.phases],
        "query_heads": site.query_heads,
        "kv_heads": site.kv_heads,
        "head_dim": site.head_dim,
        "value_dim": site.value_dim,
        "mask": str(site.mask),
        "score": site.score,
        "scale": site.scale,
        "softmax_dtype": site.softmax_dtype,
        "dropout": site.dropout,
        "projections": {name: vars_of(projection) for name, projection in site.projections.items()},
        "facts": site.facts,
        "decision": {
            "accepted": decision.accepted,
            "variant": decision.variant,
            "fidelity": decision.fidelity,
            "predicted_seconds": decision.predicted_seconds,
            "reasons": [vars_of(reason) for reason in decision.reasons],
        },
    }


def vars_of(value: Any) -> dict[str, Any]:
    """Fields of a flat dataclass."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}
