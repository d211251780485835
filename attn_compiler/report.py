"""What the compiler found and did: for people, for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

from attn_compiler.cost.points import Roofline
from attn_compiler.errors import BadOption
from attn_compiler.ir.listing import Listing
from attn_compiler.ir.site import AttentionSite, Break, Decision, Missed, heads_of, many, told


class Chosen(Protocol):
    """What is known of a router, as `expert_usage` gives it."""

    def plain(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Report:
    """Sites, near misses and graphs of one run.

    Attributes:
        sites: every attention found, with its decision.
        missed: what looked like attention and was left alone.
        graph_before, graph_after: readable text, where the door keeps it.
        kernels: source of generated kernels by name.
        roofline: the roofs of the hardware that was named, with a point for each predicted site.
        graphs: the same graphs node by node, with the source line and the module of each.
        breaks: where the tracer let go of the model, as `explain` sees it.
    """

    sites: tuple[AttentionSite, ...] = ()
    missed: tuple[Missed, ...] = ()
    graph_before: str = ""
    graph_after: str = ""
    kernels: dict[str, str] = field(default_factory=dict)
    roofline: Roofline | None = None
    graphs: tuple[Listing, ...] = ()
    breaks: tuple[Break, ...] = ()

    @property
    def rewritten(self) -> int:
        return sum(site.decision.accepted for site in self.sites)

    def with_usage(self, usage: Mapping[str, Mapping[str, Chosen]]) -> Report:
        """The same with the usage of its experts, for all forms of the report.

        Args:
            usage: by module path and router, what `expert_usage(model, batches)` returned.

        Raises:
            BadOption: a path is none of a site.
        """
        unknown = sorted(usage.keys() - {site.path for site in self.sites})
        if unknown:
            raise BadOption(
                f'this report has no site "{unknown[0]}"',
                where="option usage",
                do="give the report that `last_report()` held after the rewriting",
            )
        facts = {path: {"experts": _experts(routers)} for path, routers in usage.items()}
        sites = (replace(s, facts=s.facts | facts.get(s.path, {})) for s in self.sites)
        return replace(self, sites=tuple(sites))

    def __add__(self, other: Report) -> Report:
        return Report(
            self.sites + other.sites,
            self.missed + other.missed,
            "\n\n".join(filter(None, (self.graph_before, other.graph_before))),
            "\n\n".join(filter(None, (self.graph_after, other.graph_after))),
            {**self.kernels, **other.kernels},
            _joined(self.roofline, other.roofline),
            self.graphs + other.graphs,
            self.breaks + other.breaks,
        )

    def __str__(self) -> str:
        lines = [heading(self)]
        for sites in alike(self.sites):
            lines += _site_lines(sites)
        for missed in self.missed:
            where = missed.path or "the root"
            lines.append(f"  left alone  {where} ({missed.location or 'no source line'})")
            lines.append(f"      {missed.code}: {missed.text}")
        for cut in self.breaks:
            lines.append(f"  not traced  {cut.location or 'the model'}")
            lines.append(f"      {cut.text}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The same as a JSON object with the keys `sites`, `missed`, `breaks`, `graph_before`,
        `graph_after`, `kernels`.
        """
        return json.dumps(
            {
                "sites": [_site_dict(site) for site in self.sites],
                "missed": [vars_of(missed) for missed in self.missed],
                "breaks": [vars_of(cut) for cut in self.breaks],
                "graph_before": self.graph_before,
                "graph_after": self.graph_after,
                "kernels": self.kernels,
            },
            indent=2,
        )

    def to_html(self, path: str | Path) -> None:
        """Write the same as one page for a browser, which needs no other file and no network.

        Args:
            path: of the file; one that is there is replaced.
        """
        from attn_compiler.html import page  # what draws it is loaded only where it is wanted

        found = json.loads(self.to_json())
        shown = page.Found(
            groups=tuple(map(tuple, alike(self.sites))),
            missed=self.missed,
            breaks=self.breaks,
            graphs=self.graphs,
            kernels=self.kernels,
            numbers={name: found[name] for name in ("sites", "missed", "breaks")},
        )
        Path(path).write_text(page.render(shown), encoding="utf-8")


def heading(report: Report) -> str:
    """Counts in one line."""
    sites, missed = len(report.sites), len(report.missed)
    return (
        f"{sites} attention {many('site', sites)}, {report.rewritten} rewritten; "
        f"{missed} {many('look-alike', missed)} left alone"
    )


def _experts(routers: Mapping[str, Chosen]) -> dict[str, Any]:
    """A fact, in words and in numbers."""
    text = "; ".join(f"{name}: {usage}" for name, usage in routers.items())
    return {"text": text, "routers": {name: usage.plain() for name, usage in routers.items()}}


def _joined(a: Roofline | None, b: Roofline | None) -> Roofline | None:
    if a is None or b is None:
        return a or b
    return replace(a, points=(*a.points, *b.points))


_SAME = (
    "location", "owner", "mask", "score", "query_heads", "kv_heads", "head_dim", "dropout",
    "kind", "phases", "length", "decision", "decision.call", "facts",
)  # fmt: skip


def alike(sites: Iterable[AttentionSite]) -> list[list[AttentionSite]]:
    """Repeated layers folded: sites that differ in nothing but their path."""
    groups: dict[Any, list[AttentionSite]] = {}
    for site in sites:
        key = tuple(str(attrgetter(name)(site)) for name in _SAME)
        groups.setdefault(key, []).append(site)
    return list(groups.values())


def _site_lines(sites: list[AttentionSite]) -> list[str]:
    first, last = sites[0], sites[-1]
    path = first.path or "the root"
    where = path if len(sites) == 1 else f"{path} ... {last.path} ({len(sites)} alike)"
    verdict = "rewritten" if first.decision.accepted else "kept"
    phases = "/".join(str(p) for p in first.phases)
    lines = [
        f"  {verdict}  {where} ({first.location or 'no source line'})",
        f"      {first.kind} attention, {phases}, {heads_of(first)}",
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
    done = told(first.facts.get(first.decision.variant))
    lines.append(f"      {first.decision}{f': {done}' if done else ''}")
    if "experts" in first.facts:
        lines.append(f"      experts {told(first.facts['experts'])}")
    return lines


def _seconds(decision: Decision) -> str:
    """A prediction in words; microseconds are what people compare."""
    seconds = decision.predicted_seconds
    if seconds is None:
        return ""
    limit = f", bounded by {decision.limit}" if decision.limit else ""
    return f", {seconds * 1e6:,.0f} us predicted{limit}"


def _site_dict(site: AttentionSite) -> dict[str, Any]:
    decision = site.decision
    return {
        "path": site.path,
        "owner": site.owner,
        "location": site.location,
        "line": site.line,
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
            "limit": decision.limit,
            "reasons": [vars_of(reason) for reason in decision.reasons],
        },
    }


def vars_of(value: Any) -> dict[str, Any]:
    """Fields of a flat dataclass."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}
