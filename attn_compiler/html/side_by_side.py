"""Two graphs as one: lines that stayed face each other, lines that went face what came.

    before  a  b  c  d          rows   a | a    b | x    c |      d | d
    after   a  x     d

Rows are put into a tree of modules. A module that says the same as an earlier one beside it, but
for the names of its nodes and parameters, is only named: 48 layers are as long as one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import takewhile, zip_longest
from typing import Literal

from attn_compiler.ir.listing import Line, Listing

# a name that no bracket or = follows is that of a value; what is quoted is no name
_NAME = re.compile(r"'[^']*'|[A-Za-z_][\w.]*(?![\w(=])")
Kind = Literal["same", "removed", "added", "changed"]
Modules = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of each side, None where a side has nothing."""

    before: Line | None
    after: Line | None

    @property
    def kind(self) -> Kind:
        if self.before is None:
            return "added"
        if self.after is None:
            return "removed"
        return "same" if self.before is self.after else "changed"

    @property
    def line(self) -> Line:
        """What tells where the row belongs."""
        found = self.before or self.after
        assert found is not None
        return found


@dataclass(slots=True)
class Part:
    """A module, for as long as the graph stays in it.

    Attributes:
        path, owner: of the module, "" for the whole graph.
        parts: rows and modules inside, in the graph's order.
        like: path of an earlier module that says the same; then `parts` is not shown.
    """

    path: str
    owner: str
    parts: list[Row | Part] = field(default_factory=list)
    like: str = ""

    def rows(self) -> Iterator[Row]:
        for part in self.parts:
            if isinstance(part, Row):
                yield part
            else:
                yield from part.rows()

    @property
    def size(self) -> int:
        return sum(1 for _ in self.rows())

    @property
    def changed(self) -> int:
        """How many rows are not as before."""
        return sum(row.kind != "same" for row in self.rows())


def aligned(before: Sequence[Line], after: Sequence[Line]) -> list[Row]:
    """Rows of both sides; lines of one name face each other."""
    matcher = SequenceMatcher(None, [x.name for x in before], [x.name for x in after], False)
    rows: list[Row] = []
    for tag, i, j, m, n in matcher.get_opcodes():
        pairs = zip_longest(before[i:j], after[m:n])
        if tag == "equal":
            rows += [Row(x, x if x and y and x.text == y.text else y) for x, y in pairs]
        else:
            rows += [Row(*pair) for pair in pairs]
    return rows


def tree(listing: Listing) -> Part:
    """The rows of a graph by module, repeated modules folded; inputs are left out."""
    before = [line for line in listing.before if line.kind != "input"]
    after = [line for line in listing.after if line.kind != "input"]
    root = Part("", listing.name)
    stack = [root]
    rows = aligned(before, after)
    for row, modules in zip(rows, _homes(rows), strict=True):
        _descend(stack, modules).parts.append(row)
    names = {line.name for line in (*listing.before, *listing.after)}
    _fold(root, names)
    return root


def _homes(rows: Sequence[Row]) -> list[Modules]:
    """The modules of each row. A line of no module is where the lines around it both are."""
    known = [row.line.modules for row in rows]
    after: list[Modules] = [()] * len(rows)
    for i in range(len(rows) - 2, -1, -1):
        after[i] = known[i + 1] or after[i + 1]
    found: list[Modules] = []
    last: Modules = ()
    for own, following in zip(known, after, strict=True):
        last = own or last
        both = takewhile(lambda pair: pair[0] == pair[1], zip(last, following, strict=False))
        found.append(own or tuple(module for module, _ in both))
    return found


def _descend(stack: list[Part], modules: Modules) -> Part:
    """The innermost part of these modules; parts that the graph has left are closed."""
    paths = [path for path, _ in modules]
    while len(stack) > 1 and [part.path for part in stack[1:]] != paths[: len(stack) - 1]:
        stack.pop()
    for path, owner in modules[len(stack) - 1 :]:
        part = Part(path, owner)
        stack[-1].parts.append(part)
        stack.append(part)
    return stack[-1]


def _fold(part: Part, names: set[str]) -> None:
    seen: dict[tuple[str, ...], str] = {}
    for child in part.parts:
        if isinstance(child, Part):
            child.like = seen.setdefault(_signature(child, names), child.path)
            if child.like == child.path:
                child.like = ""
                _fold(child, names)


def _signature(part: Part, names: set[str]) -> tuple[str, ...]:
    """What it says, with the names of nodes numbered in the order in which they appear."""
    numbers: dict[str, str] = {}

    def plain(found: re.Match[str]) -> str:
        word = found[0]
        return numbers.setdefault(word, f"%{len(numbers)}") if word in names else word

    def said(line: Line | None) -> str:
        if line is None:
            return ""
        inner = "/".join(path.removeprefix(part.path) for path, _ in line.modules)
        text = f"{line.name} = {line.text}"
        return f"{_NAME.sub(plain, text)} {line.type} {line.place} {inner}"

    return (part.owner, *(f"{said(row.before)} | {said(row.after)}" for row in part.rows()))
