"""What is measured on a GPU: the list of cases, and which of them a budget of seconds allows.

next_case(cases, 40.0)   ->   the most important case that needs no more than 40 seconds
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from gpu_rules import BLOCK, RULES, Rule, Sizes

Section = Literal[
    "ceilings", "forward", "backward", "tiles", "tiles backward", "variants",
    "variants backward", "selective", "selective training", "selective decode", "decode", "el",
    "summaries", "blocks", "expert project", "expert merge", "switchhead", "switchhead training",
    "gau", "gau backward", "gau block", "gau block training", "numerics", "launch",
]  # fmt: skip
# by head dim, so that the work is nearly the same
HEADS = {64: 32, 128: 16, 256: 8}
_TOKENS = 16384
_FORWARD = ("triton", "gluon", "cudnn", "flash", "flex")
_NUMERICS = ("triton", "gluon", "cudnn", "flash")
_SPLITS = (1, 4, 16, 32, 64)
# kernels whose tiles are measured: a name without a number is the picked tile of a backward's
_ALONE = ("queries", "keys_and_values")
KERNELS = ("tile", *_ALONE)
_BACKWARD = ("triton", *_ALONE, "cudnn", "flash", "flex")
# more than the cost model knows tiles, and parts of the keys, for any call
_TILES = 64
# experts that a token takes of each head
EXPERTS_ACTIVE = 2
# parts of the S tokens of a selective cache
BUDGETS = {"budget": 1, "half of it": 2, "a quarter": 4}


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison of several ways.

    Attributes:
        section: what it shows.
        rule: of `gpu_rules.RULES`.
        sizes: of the tensors.
        ways: by name, the first is ours.
        importance: 1 is measured first.
        guess: seconds on an H200, compilation included (assumed).
        density: of a map of blocks.
    """

    section: Section
    rule: str
    sizes: Sizes
    ways: tuple[str, ...]
    importance: int
    guess: float
    density: float = 1.0

    @property
    def name(self) -> str:
        """Tells it from all others."""
        s = self.sizes
        parts = [self.section, self.rule, f"B{s.B}", f"H{s.H}", f"G{s.G}", f"T{s.T}", f"S{s.S}"]
        parts.append(f"d{s.d}")
        if self.rule == "blocks":
            parts.append(f"density {self.density:g}")
        return " ".join(parts)

    @property
    def plan(self) -> Rule:
        return RULES[self.rule]


def kinds(of: Iterable[Case]) -> list[Case]:
    """One of the cases that need the same kernels, for each such kind: the smallest."""
    found: dict[tuple[object, ...], Case] = {}
    for case in sorted(of, key=lambda case: case.sizes.B * case.sizes.T * case.sizes.S):
        s = case.sizes
        found.setdefault((case.section, case.rule, s.d, s.H // s.G, s.T == 1), case)
    return list(found.values())


def square(length: int, dim: int) -> Sizes:
    """16384 tokens of one model."""
    return Sizes(max(1, _TOKENS // length), HEADS[dim], HEADS[dim], length, length, dim)


def cases() -> tuple[Case, ...]:
    """All of them, in the order of the report."""
    return (
        Case("ceilings", "full", Sizes(1, 1, 1, 8192, 8192, 8192), CEILINGS, 1, 4),
        *_dense(),
        *_tiles(),
        *_variants(),
        *_selective(),
        *_decode(),
        *_states(),
        Case("summaries", "full", Sizes(1, 16, 16, 4, 1024, 64), SUMMARIES, 2, 32),
        *_maps(),
        *_experts(),
        *_units(),
        *_numerics(),
        *(
            Case("launch", rule, Sizes(1, 4, 4, 64, 64, 64), LAUNCH, early, 12)
            for rule, early in (("softcap", 2), ("causal", 4))
        ),
    )


# rule, head dim, heads of a group, then batch, heads, rows, keys
_HELD_OUT = (
    ("causal", 128, 4, (
        (1, 8, 1040, 1040), (4, 32, 2000, 2000), (1, 32, 3088, 3088), (2, 16, 5008, 5008),
        (1, 16, 12016, 12016), (24, 16, 528, 528),
    )),
    ("causal", 64, 1, (
        (1, 12, 1040, 1040), (8, 12, 2000, 2000), (2, 20, 3088, 3088), (2, 8, 6000, 6000),
        (1, 12, 12016, 12016), (32, 12, 272, 272),
    )),
    ("full", 128, 1, (
        (1, 6, 1040, 1040), (3, 16, 1504, 1504), (2, 12, 3088, 3088), (1, 10, 7008, 7008),
        (4, 16, 432, 4016), (1, 24, 5008, 272),
    )),
    ("causal", 256, 1, (
        (1, 8, 1040, 1040), (6, 8, 1504, 1504), (2, 8, 3088, 3088), (1, 4, 7008, 7008),
        (1, 16, 4112, 4112), (16, 8, 400, 400),
    )),
    ("full", 128, 4, (
        (1, 32, 1, 4000), (2, 32, 1, 24000), (8, 16, 1, 6000), (32, 32, 1, 3008), (96, 8, 1, 1040),
        (4, 8, 1, 100000),
    )),
)  # fmt: skip
SUMMARIES = ("el", "dynamic", "static, compiled")
CEILINGS = ("sum", "largest", "copy", "product")
LAUNCH = (
    "ours, no grad", "ours, grad", "ours, forward and backward", "ours, CUDA graph",
    "SDPA, no grad", "SDPA, grad", "SDPA, forward and backward",
)  # fmt: skip


def _dense() -> Iterator[Case]:
    shapes = list(product((64, 128, 256), ("full", "causal")))
    for length, (dim, rule) in product((4096, 8192), shapes):
        late = length == 4096 or (dim, rule) == (256, "full")
        early = (4 if length == 4096 else 3) if late else 1 if dim == 128 else 2
        yield Case("forward", rule, square(length, dim), _FORWARD, early, 14)
    for length, (dim, rule) in product((4096, 8192), shapes):
        late = length == 4096 or (dim, rule) == (64, "full")
        early = 5 if late else {64: 2, 128: 1, 256: 4}[dim]
        yield Case("backward", rule, square(length, dim), _BACKWARD, early, 20)


def _tiles() -> Iterator[Case]:
    """Every tile that the cost model may choose, for shapes that its constants are not fitted to.

    Lengths are multiples of 16 and groups of heads alike, so that few kernels serve many shapes;
    most lengths are multiples of no tile.
    """
    numbers = {kind: tuple(f"{kind} {n}" for n in range(_TILES)) for kind in KERNELS}
    own = ("triton", *numbers["tile"])
    each = ("triton", *_ALONE, *numbers["queries"], *numbers["keys_and_values"], "cudnn", "flash")
    for rule, dim, group, shapes in _HELD_OUT:
        for batch, heads, rows, keys in shapes:
            sizes, short = Sizes(batch, heads, heads // group, rows, keys, dim), rows == 1
            yield Case("tiles", rule, sizes, own if short else (*own, "cudnn", "flash"), 3, 4)
            if not short:
                yield Case("tiles backward", rule, sizes, each, 5, 6)


def _variants() -> Iterator[Case]:
    both = ("triton", "flex")
    for rule in ("softcap", "alibi", "documents", "window"):
        yield Case("variants", rule, square(8192, 128), both, 1, 8)
    for rule in ("softcap", "documents"):
        yield Case("variants backward", rule, square(8192, 128), both, 2, 16)


def _decode() -> Iterator[Case]:
    """Half a gigabyte of keys and values each: many short caches, one long one."""
    ways = ("triton", *(f"splits {n}" for n in _SPLITS), "cudnn", "flash", "flex")
    yield Case("decode", "full", Sizes(16, 64, 8, 1, 8192, 128), ways, 1, 14)
    yield Case("decode", "full", Sizes(1, 32, 8, 1, 131072, 128), ways, 2, 12)


def _states() -> Iterator[Case]:
    """Steps over a quarter of a gigabyte of hidden states 1024 wide; T is beams, and heads times
    beams 16, 64 and 32.
    """
    ways = ("el", "el kernel", "own decode")
    for early, (batch, beams, length) in enumerate(((32, 1, 4096), (64, 4, 2048), (32, 2, 4096))):
        yield Case("el", "full", Sizes(batch, 16, 16, beams, length, 64), ways, early + 1, 6)


def _selective() -> Iterator[Case]:
    """Few heads, so that the one that selects costs most beside them, and many. The least budget
    keeps 64 MiB of keys and values.
    """
    few, many = Sizes(8, 8, 8, 2048, 2048, 128), Sizes(2, 16, 16, 8192, 8192, 128)
    ways = ("selective", "dense", "masks much")
    for early, sizes in enumerate((few, many), start=3):
        yield Case("selective", "causal", sizes, ways, early, 8)
        yield Case("selective training", "causal", sizes, ways, early, 14)
    budgets = (*BUDGETS, "whole step")
    yield Case("selective decode", "full", Sizes(64, 32, 8, 1, 1024, 128), budgets, 3, 4)


def _maps() -> Iterator[Case]:
    for density in (1.0, 0.1, 0.3, 0.6):
        ways = ("triton", "dense", "flex")
        early = 1 if density in (1.0, 0.1) else 3
        yield Case("blocks", "blocks", square(8192, 128), ways, early, 10, density)


def _experts() -> Iterator[Case]:
    """Products of 1024, 256 and 8192 rows for an expert, G of them a head; whole causal blocks."""
    ways = ("triton", "kernel", "masked", "cublas", "grouped mm")
    for early, (length, experts) in ((2, (8192, 16)), (3, (4096, 32)), (3, (16384, 4))):
        for section in ("expert project", "expert merge"):
            sizes = Sizes(1, 4, experts, length, length, 128)
            yield Case(section, "full", sizes, ways, early, 6)  # type: ignore[arg-type]
    blocks = ("switchhead", "own", "cudnn", "flash")
    for early, length in ((2, 8192), (3, 1024), (3, 32768)):
        sizes = Sizes(32768 // length, 16, 16, length, length, 64)
        yield Case("switchhead", "causal", sizes, blocks, early, 10)
        yield Case("switchhead training", "causal", sizes, blocks, early, 12)


def _units() -> Iterator[Case]:
    """Gated attention units of width 1024 beside 16 or 8 heads: what mixes tokens, then whole
    blocks over 65536 tokens, short enough for the dense one and so long that it cannot win.
    """
    ways = ("gau", "plain", "chunk kernel", "triton", "cudnn")
    for dim, length in product((128, 64), (8192, 16384)):
        sizes = Sizes(32768 // length, 1024 // dim, 1024 // dim, length, length, dim)
        yield Case("gau", "causal", sizes, ways, 3, 6)
        yield Case("gau backward", "causal", sizes, ("gau", "plain", "triton", "cudnn"), 3, 8)
    for length in (8192, 32768, 2048, 3072, 16384, 65536):
        sizes = Sizes(65536 // length, 16, 16, length, length, 64)
        yield Case("gau block", "causal", sizes, ("pair", "own", "cudnn"), 3, 10)
        if length in (8192, 32768):
            yield Case("gau block training", "causal", sizes, ("pair", "own", "cudnn"), 3, 16)


def _numerics() -> Iterator[Case]:
    for dim, rule in product((128, 64, 256), ("full", "causal")):
        sizes = Sizes(1, 8, 8, 4096, 4096, dim)
        yield Case("numerics", rule, sizes, _NUMERICS, 1 if dim == 128 else 4, 6)


def next_case(left: Sequence[Case], remaining: float) -> Case | None:
    """The most important case that fits into the remaining seconds; None if none does."""
    fitting = [case for case in left if case.guess <= remaining]
    return min(fitting, key=lambda case: case.importance, default=None)


def shrunk(case: Case) -> Case:
    """The same case for a machine without a GPU: its code and not its speed."""
    s = case.sizes
    if case.section == "ceilings":
        return replace(case, sizes=Sizes(1, 1, 1, 64, 64, 64))
    group = s.H // s.G
    if case.section == "decode":
        # one long cache, or several shorter ones
        length = 300 if s.B > 1 else 500
        return replace(case, sizes=Sizes(min(s.B, 2), group, 1, 1, length, 16))
    if case.section.startswith("expert"):
        return replace(case, sizes=Sizes(1, 2, 5, s.T // 4096 + 50, 53, 16))
    if case.section == "selective decode":
        return replace(case, sizes=Sizes(2, group, 1, 1, 64, 16))
    if case.section in ("el", "summaries"):
        return replace(case, sizes=Sizes(2, 2, 2, s.T, 53, 16))
    # a map has blocks of its own size; others want some tiles and a ragged edge
    length = 2 * BLOCK if case.rule == "blocks" else 53 if s.T < 8192 else 67
    rows = min(s.T, length)
    return replace(case, sizes=Sizes(1, 2, 2 // min(2, group), rows, length, s.d // 4))
