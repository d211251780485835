"""The graphs as the page shows them: rows, the user's lines over them, folded modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from attn_compiler.html.side_by_side import Part, Row, tree
from attn_compiler.ir.listing import Line, Listing
from attn_compiler.ir.site import AttentionSite, Missed

Note = Literal["", "attention", "kept", "missed"]
# of a layer in a path; x_0 and x_1 are names of their own
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# lines as before that are shown between others
_LONG = 4


@dataclass(frozen=True, slots=True)
class SourceView:
    """The user's line that the rows after it come from."""

    place: str
    code: str


@dataclass(frozen=True, slots=True)
class RowView:
    """A row; `note` says that it is the operator of a site, or the place of one that was kept."""

    row: Row
    note: Note
    site: int


@dataclass(frozen=True, slots=True)
class RunView:
    """Lines as before, too many to be read on the way to what changed."""

    items: tuple[SourceView | RowView, ...]
    count: int


@dataclass(slots=True)
class FoldView:
    """Modules that say the same as earlier ones."""

    parts: list[Part] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PartView:
    """A module: how many lines, how many of them not as before, open at first or not."""

    part: Part
    size: int
    changed: int
    noted: int
    items: tuple[Item, ...]

    @property
    def open(self) -> bool:
        return bool(self.changed or self.noted)


Item = SourceView | RowView | RunView | FoldView | PartView


@dataclass(frozen=True, slots=True)
class InputView:
    """Inputs and parameters of one type whose names differ in nothing but numbers."""

    names: tuple[str, ...]
    type: str


@dataclass(frozen=True, slots=True)
class GraphView:
    """A graph: its name, the inputs, everything else as a tree."""

    name: str
    inputs: tuple[InputView, ...]
    top: PartView

    @property
    def count(self) -> int:
        """Of inputs and parameters."""
        return sum(len(item.names) for item in self.inputs)


@dataclass(frozen=True, slots=True)
class Places:
    """Where sites and near misses are, by module path and source line."""

    sites: Sequence[tuple[int, AttentionSite]]
    missed: Sequence[Missed]

    def note(self, row: Row) -> tuple[Note, int]:
        line = row.after or row.line
        path = line.modules[-1][0] if line.modules else ""
        if row.kind in ("added", "changed") and line.text.startswith("attn_compiler."):
            for number, site in self.sites:
                if site.decision.accepted and site.path == path:
                    return "attention", number
            return "attention", 0
        if line.place and row.kind == "same":
            return self._left(path, line.place)
        return "", 0

    def _left(self, path: str, place: str) -> tuple[Note, int]:
        for number, site in self.sites:
            if not site.decision.accepted and (site.path, site.location) == (path, place):
                return "kept", number
        if any((m.path, m.location) == (path, place) for m in self.missed):
            return "missed", 0
        return "", 0


def views(graphs: Sequence[Listing], places: Places) -> tuple[GraphView, ...]:
    """Every graph that computes something."""
    found = []
    for graph in graphs:
        inputs = tuple(_inputs(line for line in graph.before if line.kind == "input"))
        top = _part(tree(graph), places)
        if top.size:
            found.append(GraphView(graph.name, inputs, top))
    return tuple(found)


def _inputs(lines: Iterable[Line]) -> Iterator[InputView]:
    """layers.0.w, layers.1.w   ->   one view: as many layers as there are, the list is as long as
    that of one.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        groups.setdefault((_NUMBER.sub("*", line.name), line.type), []).append(line.name)
    for (_, kind), names in groups.items():
        yield InputView(tuple(names), kind)


def noted(graphs: Sequence[GraphView]) -> dict[int, RowView]:
    """The first row of each site, by its number: where a link leads."""
    found: dict[int, RowView] = {}
    for graph in graphs:
        for row in _rows(graph.top):
            if row.site:
                found.setdefault(row.site, row)
    return found


def _rows(part: PartView) -> Iterator[RowView]:
    for item in part.items:
        if isinstance(item, RowView):
            yield item
        elif isinstance(item, PartView):
            yield from _rows(item)


def exchanged(graphs: Sequence[GraphView], path: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the operations of a module that are gone, and of those that came."""
    gone: list[str] = []
    come: list[str] = []
    for row in (row for graph in graphs for row in graph.top.part.rows()):
        if row.kind == "same" or (row.line.modules[-1][0] if row.line.modules else "") != path:
            continue
        before = row.before.op if row.before else ""
        after = row.after.op if row.after else ""
        if before != after:  # else one operation that reads something else now
            gone += [before] * bool(before)
            come += [after] * (after not in ("", "getitem"))
    return tuple(gone), tuple(come)


def _part(part: Part, places: Places) -> PartView:
    items = tuple(_items(part, places))
    noted = sum(
        (isinstance(item, RowView) and item.note != "")
        or (isinstance(item, PartView) and item.noted > 0)
        for item in items
    )
    items = tuple(_runs(items)) if part.changed or noted else items
    return PartView(part, part.size, part.changed, noted, items)


def _runs(items: Sequence[Item]) -> Iterator[Item]:
    """Long stretches of lines as before put together."""
    source: SourceView | None = None
    for quiet, group in groupby(items, _is_quiet):
        found = list(group)
        # the last source line may belong to what follows
        sources = [item for item in found if isinstance(item, SourceView)]
        last = found.pop() if quiet and isinstance(found[-1], SourceView) else None
        rows = [item for item in found if isinstance(item, RowView)]
        if quiet and len(rows) >= _LONG:
            yield RunView(tuple(x for x in found if isinstance(x, SourceView | RowView)), len(rows))
            source = sources[-1] if sources else None
        else:
            if not quiet and source is not None and isinstance(found[0], RowView):
                yield source
            source = None
            yield from found
        if last is not None:
            yield last
            source = None


def _is_quiet(item: Item) -> bool:
    same = isinstance(item, RowView) and item.row.kind == "same" and not item.note
    return same or isinstance(item, SourceView)


def _items(part: Part, places: Places) -> Iterator[Item]:
    place, fold = "", FoldView()
    for item in part.parts:
        if isinstance(item, Part) and item.like:
            fold.parts.append(item)
            continue
        if fold.parts:
            yield fold
            fold = FoldView()
        if isinstance(item, Part):
            yield _part(item, places)
            place = ""
            continue
        if item.line.place and item.line.place != place:
            place = item.line.place
            yield SourceView(place, item.line.code)
        yield RowView(item, *places.note(item))
    if fold.parts:
        yield fold
