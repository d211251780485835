"""A pattern of blocks over the attention it was found in.

    {"block": 32, "kept": [[1, 0], [1, 1]], "of": 1, "pooled": [[0.9, 0.0], [0.4, 0.5]], ...}

Shades are what a row gives to a block on average; squares with a frame are kept.

Source: SPION (arXiv 2309.12578), whose figures show patterns so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attn_compiler.html.squares import outlines

SHADES = 9


@dataclass(frozen=True, slots=True)
class PatternPicture:
    """What is drawn.

    Attributes:
        side: blocks along a side.
        block: rows of a block, None if nobody said.
        heads: how many patterns there are: 1, or one for each head.
        shades: path of the blocks of each shade, the lightest is 1; none where a pattern was given
            and no attention seen.
        kept: path of the blocks that at least one pattern keeps.
        density: share of blocks that are kept, the mean of all patterns.
        lost: share of the attention that is left out, None if nobody knows.
    """

    side: int
    block: int | None
    heads: int
    shades: tuple[tuple[int, str], ...]
    kept: str
    density: float
    lost: float | None


def picture(fact: Any) -> PatternPicture | None:
    """From what a variant says of a site; None if it says nothing of blocks."""
    if not isinstance(fact, dict) or not fact.get("kept"):
        return None
    kept: list[list[int]] = fact["kept"]
    heads = int(fact.get("of", 1))
    count = sum(map(sum, kept)) / heads
    return PatternPicture(
        side=len(kept),
        block=fact.get("block"),
        heads=heads,
        shades=_shades(fact["pooled"]) if fact.get("pooled") else (),
        kept=outlines([[n > 0 for n in row] for row in kept]).get(True, ""),
        density=count / len(kept) ** 2,
        lost=fact.get("lost_mass"),
    )


def _shades(pooled: Sequence[Sequence[float]]) -> tuple[tuple[int, str], ...]:
    """By the square root, so that weak blocks can be seen beside the diagonal."""
    most = max(max(row) for row in pooled)
    if most <= 0:
        return ()
    shade = [[math.ceil(SHADES * math.sqrt(max(0.0, x) / most)) for x in row] for row in pooled]
    return tuple(sorted((s, path) for s, path in outlines(shade).items() if s > 0))
