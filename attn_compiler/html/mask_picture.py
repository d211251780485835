"""A mask as a small picture, drawn from its predicate and not from data.

    causal & padding(m), T = S = 64   ->   32 x 32 squares, each of one class:
        never       no query of the square may see any of its keys
        always      every query sees every key
        edge        positions decide, element by element
        data        only tensors decide

Queries go down, keys to the right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from attn_compiler.html.squares import outlines
from attn_compiler.ir.mask import Mask, Tile, classify

Class = Literal["never", "always", "edge", "data"]
CLASSES: tuple[Class, ...] = ("always", "data", "edge", "never")
# squares along the longer side
_SQUARES = 32


@dataclass(frozen=True, slots=True)
class MaskPicture:
    """What is drawn.

    Attributes:
        rows, keys: of the attention.
        step: queries and keys along the side of a square.
        example: the sizes are those of the example; else they are made up.
        classes: of the squares, row by row.
    """

    rows: int
    keys: int
    step: int
    example: bool
    classes: tuple[tuple[Class, ...], ...]

    @property
    def width(self) -> int:
        return len(self.classes[0])

    @property
    def height(self) -> int:
        return len(self.classes)

    def shares(self) -> dict[Class, float]:
        """Which share of the squares is of each class, where any is."""
        flat = [c for row in self.classes for c in row]
        return {c: flat.count(c) / len(flat) for c in CLASSES if c in flat}

    def outlines(self) -> list[tuple[Class, str]]:
        """The squares of each class that may be seen, as data of SVG paths."""
        found = outlines(self.classes)
        return [(name, found[name]) for name in CLASSES if name in found and name != "never"]


def picture(
    mask: Mask, rows: int, keys: int, batch: int, heads: int, *, example: bool
) -> MaskPicture:
    """Draw a mask.

    Args:
        mask: the predicate.
        rows, keys, batch, heads: sizes; integers known only when it runs are taken as 0.
        example: are the sizes those of the example?
    """
    step = max(1, -(-max(rows, keys) // _SQUARES))
    sizes = {"B": batch, "H": heads, "T": rows, "S": keys}
    structural = classify(mask.split()[0])
    ints = [0] * 16
    squares = tuple(
        tuple(_classes(mask, structural, row, keys, step, sizes, ints))
        for row in range(0, rows, step)
    )
    return MaskPicture(rows, keys, step, example, squares)


def _classes(
    mask: Mask,
    structural: Mask,
    row: int,
    keys: int,
    step: int,
    sizes: dict[str, int],
    ints: list[int],
) -> Iterator[Class]:
    band = (row, row + step)
    for key in range(0, keys, step):
        square = (key, key + step)
        positions = structural.tile(band, square, sizes, ints)
        if positions is not Tile.FULL:
            yield "never" if positions is Tile.SKIP else "edge"
        else:
            known = mask.tile(band, square, sizes, ints)
            yield "always" if known is Tile.FULL else "data" if known is Tile.PARTIAL else "never"
