"""A report as people read it in a terminal: at most 100 columns, coloured where rich is installed.

    show(report)    ->   sites (alike ones folded), what they compute, what was decided and why

`str(report)` is the short form of the same, always plain.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, TextIO

from attn_compiler.ir.site import AttentionSite, Break, Missed, heads_of, told
from attn_compiler.report import Report, alike, heading

WIDTH = 100
_LABEL = 10
_SIGNS = {
    " <= ": " ≤ ", " >= ": " ≥ ", " != ": " ≠ ", " == ": " = ", " & ": " ∧ ", " | ": " ∨ ",
    " * ": " · ", "~": "¬",
}  # fmt: skip
_COLOURS = {"rewritten": "green", "kept": "yellow", "left alone": "magenta", "not traced": "red"}
Verdict = Literal["rewritten", "kept", "left alone", "not traced"]


@dataclass(frozen=True, slots=True)
class Block:
    """What is said of one site, or of sites alike.

    Attributes:
        verdict: what happened to it.
        title: module path.
        location: "file.py:88".
        rows: pairs of a label and a text.
    """

    verdict: Verdict
    title: str
    location: str
    rows: tuple[tuple[str, str], ...]


def show(report: Report, file: TextIO | None = None) -> None:
    """Print a report; with colours where rich is installed and `file` is a terminal."""
    out = file or sys.stdout
    if out.isatty() and find_spec("rich") is not None:
        _draw(report, out)
    else:
        print(text(report), file=out)


def text(report: Report, width: int = WIDTH) -> str:
    """The plain form.

    Args:
        width: columns that no line exceeds.
    """
    lines = [heading(report)]
    for block in blocks(report):
        lines += ["", *_wrapped(f"{block.verdict}  ", f"{block.title}  {block.location}", width)]
        for label, words in block.rows:
            lines += _wrapped(f"  {label:<{_LABEL}}", words, width)
    return "\n".join(line.rstrip() for line in lines)


def _wrapped(first: str, words: str, width: int) -> list[str]:
    return textwrap.wrap(
        words,
        width,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_on_hyphens=False,
    ) or [first]


def blocks(report: Report) -> list[Block]:
    """One for each group of sites alike, then the near misses, then where the tracer let go."""
    found = [_site(group) for group in alike(report.sites)]
    found += [_miss(missed) for missed in report.missed]
    return found + [_break(cut) for cut in report.breaks]


# ---------------------------------------------------------------- what is said


def _site(sites: list[AttentionSite]) -> Block:
    first, last = sites[0], sites[-1]
    title = first.path or "the root"
    if len(sites) > 1:
        title += f" ... {last.path or 'the root'} ({len(sites)} alike)"
    verdict: Verdict = "rewritten" if first.decision.accepted else "kept"
    return Block(verdict, title, first.location or "no source line", tuple(_said(first)))


def _said(site: AttentionSite) -> Iterator[tuple[str, str]]:
    if site.line:
        yield "line", site.line
    yield "attends", _attends(site)
    yield "score", _score(site)
    yield "mask", _mask(site)
    if site.program.sink is not None:
        yield "sink", notation(str(site.program.sink))
    yield "computes", _computes(site)
    yield from _decided(site)


def _attends(site: AttentionSite) -> str:
    return ", ".join((f"{site.kind} attention", "/".join(map(str, site.phases)), heads_of(site)))


def _score(site: AttentionSite) -> str:
    scale = "scale · " if site.scale is None else f"{site.scale:.6g} · "
    dot = f"{'' if site.scale == 1 else scale}q·kᵀ"
    return f"s = {dot}" if site.score == "dot" else f"s = {notation(site.score)}, dot = {dot}"


def _mask(site: AttentionSite) -> str:
    name, formula = str(site.mask), notation(str(site.program.mask))
    if name == "none":
        return "none: every key is seen"
    # a tensor has a number in the program and a name in the mask
    return name if "[" in formula else f"{name}: key k is seen by row q where {formula}"


def _computes(site: AttentionSite) -> str:
    masked = "s" if str(site.mask) == "none" else "s where seen, else -∞"
    weights = f"softmax({masked})"
    if site.dropout:
        weights = f"dropout({weights}, {site.dropout:g})"
    return f"{weights} · v, normalised in {site.softmax_dtype}"


def _decided(site: AttentionSite) -> Iterator[tuple[str, str]]:
    decision = site.decision
    if decision.accepted:
        done = told(site.facts.get(decision.variant))
        words = f"{decision.variant} ({decision.fidelity})" + (f": {done}" if done else "")
        yield "decision", words
    if "experts" in site.facts:
        yield "experts", told(site.facts["experts"])
    for reason in decision.reasons:
        yield "reason", str(reason)
    if "kernel" in site.facts:
        yield "runs on", site.facts["kernel"]
    seconds = decision.predicted_seconds
    if seconds is not None:
        limit = f", bounded by {decision.limit}" if decision.limit else ""
        yield "time", f"{seconds * 1e6:,.1f} us predicted{limit}"


def _miss(missed: Missed) -> Block:
    rows = [("line", missed.line)] if missed.line else []
    rows.append(("reason", f"{missed.code}: {missed.text}"))
    if missed.operation:
        rows.append(("misfit", f"the first operation that does not fit: {missed.operation}"))
    where = missed.location or "no source line"
    return Block("left alone", missed.path or "the root", where, tuple(rows))


def _break(cut: Break) -> Block:
    rows = [("line", cut.line)] if cut.line else []
    rows.append(("reason", cut.text))
    if cut.location:
        rows.append(("means", "one graph ends here: an attention on both sides is not seen whole"))
    return Block("not traced", cut.location or "the model", "", tuple(rows))


def notation(expression: str) -> str:
    """An expression of the score language in mathematical signs: `k <= q` is `k ≤ q`."""
    for sign, shown in _SIGNS.items():
        expression = expression.replace(sign, shown)
    return expression


# ---------------------------------------------------------------- rich


def _draw(report: Report, out: TextIO) -> None:
    from rich.console import Console

    found = Console(file=out)
    console = Console(file=out, width=min(WIDTH, found.width), highlight=False)
    console.print(heading(report), style="bold", markup=False)
    for block in blocks(report):
        console.print()
        console.print(_panel(block))


def _panel(block: Block) -> Any:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    colour = _COLOURS[block.verdict]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", width=_LABEL)
    table.add_column(overflow="fold")
    for label, words in block.rows:
        style = {"line": "italic", "reason": colour, "decision": f"bold {colour}"}.get(label, "")
        table.add_row(label, Text(words, style=style))
    title = Text.assemble((block.verdict, f"bold {colour}"), f"  {block.title}  {block.location}")
    return Panel(table, title=title, title_align="left", border_style=colour)
