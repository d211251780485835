"""Few combinations of options in which every two values meet.

covering({"a": (1, 2), "b": (3, 4), "c": (5, 6)}, valid)   ->   four rows instead of eight

Greedy: a row begins with two values that have not met, and takes of every other option the value
that meets most of the others for the first time (Cohen, Dalal, Fredman and Patton 1997).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Valid = Callable[[Row], bool]
_Pair = tuple[tuple[str, int], tuple[str, int]]


def pairs(options: Mapping[str, Sequence[Any]], valid: Valid) -> list[_Pair]:
    """Every two values, by position, that may stand in one row."""
    return [
        ((a, i), (b, j))
        for a, b in itertools.combinations(options, 2)
        for i, j in itertools.product(range(len(options[a])), range(len(options[b])))
        if valid({a: options[a][i], b: options[b][j]})
    ]


def covering(options: Mapping[str, Sequence[Any]], valid: Valid) -> list[Row]:
    """Rows that hold a value of every option.

    Args:
        options: their values.
        valid: may these values stand together? Also asked of a part of a row.
    """
    left, rows = dict.fromkeys(pairs(options, valid)), []
    while left:
        taken = dict(next(iter(left)))
        for name in sorted(options, key=lambda n: -len(options[n])):
            if name not in taken:
                taken[name] = _best(name, taken, options, left, valid, len(rows))
        for pair in list(left):
            if all(taken[name] == i for name, i in pair):
                del left[pair]
        rows.append({name: options[name][i] for name, i in taken.items()})
    return rows


def _best(
    name: str,
    taken: dict[str, int],
    options: Mapping[str, Sequence[Any]],
    left: Mapping[_Pair, None],
    valid: Valid,
    turn: int,
) -> int:
    begun = {n: options[n][i] for n, i in taken.items()}
    number = len(options[name])
    # of equal ones each has its turn
    allowed = [
        i
        for i in ((j + turn) % number for j in range(number))
        if valid({**begun, name: options[name][i]})
    ]

    def met(i: int) -> int:
        return sum(
            ((name, i), other) in left or (other, (name, i)) in left for other in taken.items()
        )

    return max(allowed, key=met)
