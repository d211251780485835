"""The page: everything gathered, and put into the template.

The page allows itself no request and no script but its own, whose hash it names, so that no text
of a model can do anything but be read.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from attn_compiler.html import words
from attn_compiler.html.graph_view import GraphView, Places, exchanged, noted, views
from attn_compiler.html.site_view import SiteView, view
from attn_compiler.html.source_text import pieces
from attn_compiler.ir.listing import Listing
from attn_compiler.ir.site import AttentionSite, Break, Missed, heads_of, told

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class Found:
    """The parts of a report.

    Attributes:
        groups: sites, those that differ in nothing but their path together.
        missed: near misses.
        breaks: where the tracer let go of the model.
        graphs: before and after, line by line.
        kernels: generated sources by name.
        numbers: sites and near misses as the report's JSON has them.
    """

    groups: tuple[tuple[AttentionSite, ...], ...]
    missed: tuple[Missed, ...]
    breaks: tuple[Break, ...]
    graphs: tuple[Listing, ...]
    kernels: Mapping[str, str]
    numbers: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A generated source in coloured pieces, and the sites that run it."""

    number: int
    kind: str
    program: str
    pieces: list[tuple[str, str]]
    lines: int
    sites: tuple[SiteView, ...]


def render(found: Found) -> str:
    """The text of the page."""
    script, style = _text("page.js"), _text("page.css")
    order = {name: number for number, name in enumerate(found.kernels, 1)}
    sites = [view(number, group, order) for number, group in enumerate(found.groups, 1)]
    places = Places(
        [(v.number, s) for v, group in zip(sites, found.groups, strict=True) for s in group],
        found.missed,
    )
    graphs = views(found.graphs, places)
    sites = [_exchanged(site, sites, graphs) for site in sites]
    return str(
        _environment()
        .get_template("page.html.jinja")
        .render(
            sites=sites,
            missed=_alike(found.missed),
            breaks=found.breaks,
            graphs=graphs,
            kernels=[_kernel(n, name, found.kernels[name], sites) for name, n in order.items()],
            total=Totals.of(sites, found.missed),
            numbers=found.numbers,
            script=script,
            script_hash=_hash(script),
            style=style,
            words=words,
            noted=noted(graphs),
            code=_code(found.graphs),
        )
    )


def _exchanged(site: SiteView, sites: list[SiteView], graphs: tuple[GraphView, ...]) -> SiteView:
    """With the operations that were exchanged, where its module has no other site."""
    path = site.paths[0]
    alone = sum(other.paths.count(path) for other in sites) == 1
    if not alone or not site.site.decision.accepted:
        return site
    gone, come = exchanged(graphs, path)
    return replace(site, gone=gone, come=come)


@dataclass(frozen=True, slots=True)
class Totals:
    """The numbers at the top; seconds of all cores as they are written and as they will run, None
    where one of them is not known; `exact`, if no rewriting changes a function.
    """

    sites: int
    rewritten: int
    missed: int
    before: float | None
    after: float | None
    hardware: str
    exact: bool

    @classmethod
    def of(cls, sites: list[SiteView], missed: tuple[Missed, ...]) -> Totals:
        count = sum(len(v.paths) for v in sites)
        rewritten = sum(len(v.paths) for v in sites if v.site.decision.accepted)
        keeps = [(v.keep.way.time.seconds if v.keep else None, len(v.paths)) for v in sites]
        runs = [(v.chosen.way.time.seconds if v.chosen else None, len(v.paths)) for v in sites]
        names = {v.call.hardware.name for v in sites if v.call is not None}
        done = [v.site.decision for v in sites if v.site.decision.accepted]
        return cls(
            sites=count,
            rewritten=rewritten,
            missed=len(missed),
            before=_sum(keeps),
            after=_sum(runs),
            hardware=", ".join(sorted(names)),
            exact=all(decision.fidelity == "exact" for decision in done),
        )


def _sum(times: list[tuple[float | None, int]]) -> float | None:
    known = [(seconds, count) for seconds, count in times if seconds is not None]
    if not known or len(known) < len(times):
        return None
    return sum(seconds * count for seconds, count in known)


def _code(graphs: tuple[Listing, ...]) -> dict[str, str]:
    """The user's lines by their places."""
    return {line.place: line.code for graph in graphs for line in graph.before if line.code}


def _alike(missed: Iterable[Missed]) -> list[tuple[Missed, list[str]]]:
    """Near misses with one reason at one line, and their paths."""
    groups: dict[tuple[str, str, str], list[Missed]] = {}
    for one in missed:
        groups.setdefault((one.location, one.code, one.text), []).append(one)
    return [(group[0], [m.path for m in group]) for group in groups.values()]


def _kernel(number: int, name: str, source: str, sites: list[SiteView]) -> Kernel:
    kind, _, program = name.partition(": ")
    users = tuple(v for v in sites if number in [n for n, _ in v.kernels])
    return Kernel(number, kind, program, pieces(source), source.count("\n") + 1, users)


# ---------------------------------------------------------------- text


def _text(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """As a Content-Security-Policy names a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(value: Any) -> Any:
    """JSON that may stand in a script element: no tag can begin in it."""
    from markupsafe import Markup

    text = json.dumps(value)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


@cache
def _environment() -> Any:
    import jinja2
    from markupsafe import Markup

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        seconds=words.seconds,
        amount=words.amount,
        span=words.span,
        json=_json,
        told=told,
        heads=heads_of,
        kind=lambda item: type(item).__name__,
        own=Markup,  # our own style and script, never a text of a model
    )
    return made
