"""A picture made of squares, as data of SVG paths: one path for all squares that look alike.

[[1, 1, 0]]   ->   {1: "M0 0h2v1h-2z", 0: "M2 0h1v1h-1z"}
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import groupby
from typing import TypeVar

Look = TypeVar("Look", bound=Hashable)


def outlines(rows: Sequence[Sequence[Look]]) -> dict[Look, str]:
    """The squares of each look, in runs along the rows."""
    found: dict[Look, list[str]] = {}
    for y, row in enumerate(rows):
        x = 0
        for look, run in groupby(row):
            length = len(list(run))
            found.setdefault(look, []).append(f"M{x} {y}h{length}v1h-{length}z")
            x += length
    return {look: "".join(runs) for look, runs in found.items()}
