"""The text of the kernels for one program: what is computed, and nothing about sizes.

Structure(program, kinds of its tensors, ...)   ->   forward.py.jinja, backward.py.jinja
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal

from attn_compiler.ir.expr import DOT, TRUE, Const, Expr, Read, walk
from attn_compiler.ir.score import Program
from attn_compiler.kernels.plan import plan
from attn_compiler.kernels.slope import ONE, slope
from attn_compiler.kernels.template import render
from attn_compiler.kernels.triton_text import Kind, Lines

Visits = Literal["all", "table", "lists", "whole lists"]


@dataclass(frozen=True, slots=True)
class MadeInside:
    """F of Selective attention where no tensor holds it.

    Attributes:
        slot: of the read that stands for it.
        program: of the selecting head.
        gated: is F multiplied with a number?
    """

    slot: int
    program: str
    gated: bool


@dataclass(frozen=True, slots=True)
class Structure:
    """What decides the text of a kernel.

    Attributes:
        program: the text of the program.
        kinds: of the tensors that it reads.
        ranks: their numbers of dimensions.
        ints: how many integers it takes.
        packed: a program of the forward kernel takes several heads.
        visits: which tiles: all, those of a table (the mask has structure), or those of lists (a
            tensor decides; "whole" where it decides about tiles and never about elements).
        dropout: whether any probability is dropped.
        descriptors: what a loop runs over is read through tensor descriptors.
        folded: pairs of batch item and head lie along two axes of the launch.
        needs: slots whose gradient the score has to give.
        made: a read that is made inside, None for none.
    """

    program: str
    kinds: tuple[Kind, ...]
    ranks: tuple[int, ...]
    ints: int
    packed: bool
    visits: Visits
    dropout: bool
    descriptors: bool = False
    folded: bool = False
    needs: tuple[int, ...] = ()
    made: MadeInside | None = None

    def lines(self, inner: str = "k") -> Lines:
        return Lines(self.kinds, inner, made=None if self.made is None else self.made.slot)

    def common(self) -> dict[str, Any]:
        program, made = Program.parse(self.program), self.made
        return {
            "made": made is not None,
            "gated": made is not None and made.gated,
            "selected": None if made is None else _selected(made.program, self.kinds),
            "title": str(program),
            "tensors": [_Tensor(f"t{i}", rank) for i, rank in enumerate(self.ranks)],
            "ints": [f"n{i}" for i in range(self.ints)],
            "plain": program.score == DOT,
            "table": self.visits == "table",
            "listed": "lists" in self.visits,
            "dropout": self.dropout,
            "descriptors": self.descriptors,
            "folded": self.folded,
        }

    def masks(self) -> dict[str, Expr]:
        """What is left to ask of an element in a tile of each kind."""
        full = TRUE if "lists" in self.visits else plan(self.program, sliced=False).loose
        whole = self.visits == "whole lists"
        return {"full": full, "cut": TRUE if whole else Program.parse(self.program).mask}


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    rank: int

    @property
    def arguments(self) -> str:
        names = [f"{self.name}_{letter}{i}" for letter in "sl" for i in range(self.rank)]
        return ", ".join([self.name, *names])


@dataclass(frozen=True, slots=True)
class _Keep:
    """In one kind of tile the names of the score, of the condition under which a key counts, of the
    derivative of the score, and the statements that add to gradients.
    """

    score: str
    mask: str
    slope: str = ""
    grads: tuple[str, ...] = ()


def keep(lines: Lines, score: Expr, mask: Expr) -> _Keep:
    """The names of the score (none for the product itself) and of the mask (none without one)."""
    name = "" if score == DOT else lines.as_kind(score, "float")
    return _Keep(name, "" if mask == TRUE else lines.as_kind(mask, "bool"))


@lru_cache(maxsize=512)
def forward_source(structure: Structure) -> str:
    """The text of the forward kernel."""
    program, masks = Program.parse(structure.program), structure.masks()
    lines = structure.lines()
    sink = None if program.sink is None else lines.as_kind(program.sink, "float")
    full, cut = lines.fork(), lines.fork()
    full_keep = keep(full, program.score, masks["full"])
    cut_keep = keep(cut, program.score, masks["cut"])
    return render(
        "forward",
        packed=structure.packed,
        sink=sink,
        row_lines=lines.outer,
        full_lines=full.body,
        full_keep=full_keep,
        cut_lines=cut.body,
        cut_keep=cut_keep,
        empty=of_empty_rows(program),
        **structure.common(),
    )


def of_empty_rows(program: Program) -> str:
    """What the kernels make of rows without keys: "mean", "nan" or "zero"."""
    names = {"uniform": "mean", "absorbed": "mean", "nan": "nan", "nan_added": "nan"}
    return names.get(program.empty, "zero") if program.sink is None else "zero"


@cache
def combine_source() -> str:
    """The text of the kernel that joins what several programs found for one row."""
    return render("combine")


@lru_cache(maxsize=128)
def el_source(structure: Structure, *, held: int, shifted: bool, split_query: bool) -> str:
    """The text of the kernels of attention over one tensor that is keys and values.

    Args:
        structure: of the call.
        held: slices of the result that a program makes.
        shifted: is something added to the scores of a row before the program sees them?
        split_query: are rounded queries and what rounding has lost multiplied one by one?
    """
    program = Program.parse(structure.program)
    lines = Lines(structure.kinds)
    sink = None if program.sink is None else lines.as_kind(program.sink, "float")
    kept = keep(lines, program.score, program.mask)
    return render(
        "el",
        held=held,
        shifted=shifted,
        split_query=split_query,
        sink=sink,
        row_lines=lines.outer,
        lines=lines.body,
        keep=kept,
        empty=of_empty_rows(program),
        **structure.common(),
    )


@lru_cache(maxsize=512)
def backward_source(structure: Structure) -> str:
    """The text of the three backward kernels."""
    program = Program.parse(structure.program)
    dead = program.empty if program.empty not in ("any", "zero") and program.sink is None else ""
    rows = structure.lines("k")
    sink = None if program.sink is None else rows.as_kind(program.sink, "float")
    return render(
        "backward",
        dead=dead,
        wide=_wide(program, structure),
        sink=sink,
        grads=[_Tensor(f"dt{i}", structure.ranks[i]).arguments for i in structure.needs],
        **_both_tiles("key", structure.lines("hq"), structure, ()),
        **_both_tiles("row", rows, structure, structure.needs),
        **structure.common(),
    )


@lru_cache(maxsize=512)
def masking_source(structure: Structure) -> str:
    """The text of the kernels that compute what Selective attention subtracts; the program is that
    of the selecting head.
    """
    by_row = structure.lines()
    mask = keep(by_row, DOT, Program.parse(structure.program).mask).mask
    common = structure.common() | {"selected": _selected(structure.program, structure.kinds)}
    return render("masking", row_lines=by_row.outer, mask_lines=by_row.body, mask=mask, **common)


@dataclass(frozen=True, slots=True)
class _Selected:
    """Of a selecting head: the statements of its score and mask, and of the score's derivative."""

    lines: tuple[str, ...]
    score: str
    mask: str
    slope_lines: tuple[str, ...]
    slope: str


def _selected(text: str, kinds: tuple[Kind, ...]) -> _Selected:
    program = Program.parse(text)
    lines, chain = Lines(kinds), Lines(kinds)
    kept, through = keep(lines, program.score, program.mask), slope(program.score, DOT)
    name = "" if through == ONE else chain.as_kind(through, "float")
    both = (*lines.outer, *lines.body), (*chain.outer, *chain.body)
    return _Selected(both[0], kept.score, kept.mask, both[1], name)


def _both_tiles(
    name: str, lines: Lines, structure: Structure, needs: tuple[int, ...]
) -> dict[str, Any]:
    program = Program.parse(structure.program)
    found: dict[str, Any] = {}
    for kind, mask in structure.masks().items():
        inner = lines.fork()
        kept = keep(inner, program.score, mask)
        through = slope(program.score, DOT)
        chain = "" if through == ONE else inner.as_kind(through, "float")
        grads = tuple(
            text
            for read in _reads(program.score, needs)
            for text in _gradient(inner, read, program)
        )
        found[f"{name}_{kind}_keep"] = _Keep(kept.score, kept.mask, chain, grads)
        found[f"{name}_{kind}_lines"] = inner.body
    return found | {f"{name}_lines": lines.outer}


def _wide(program: Program, structure: Structure) -> bool:
    """May a score be so large that nothing can be added to it? F only lowers scores."""
    nodes = list(walk(program.score))
    made = None if structure.made is None else structure.made.slot
    reads = {n.slot for n in nodes if isinstance(n, Read)} - {made}
    constants = [abs(n.value) for n in nodes if isinstance(n, Const)]
    return any(structure.kinds[slot] == "float" for slot in reads) or any(
        c > 1e4 for c in constants
    )


def _reads(score: Expr, needs: tuple[int, ...]) -> list[Read]:
    return list(dict.fromkeys(n for n in walk(score) if isinstance(n, Read) and n.slot in needs))


def _gradient(lines: Lines, read: Read, program: Program) -> list[str]:
    factor = slope(program.score, read)
    if factor == ONE:
        return lines.accumulate(read, "ds")
    name = lines.as_kind(factor, "float")
    return lines.accumulate(read, f"tl.where({name} == 0.0, 0.0, ds * {name})")
