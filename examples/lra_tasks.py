"""Tasks in the style of the Long Range Arena, generated: no download, any length, any number.

    listops      [MAX 4 [SM 9 3 ] 0 ]  ->  4                    ten classes
    retrieval    a key, then filler and pairs of key and value  ->  the value of that key
    image        a disc, a frame, a cross or stripes under noise, pixel by pixel
    pathfinder   two dots: are they the ends of one dashed path?

Sources: Long Range Arena (arXiv 2011.04006) for the forms; ListOps (arXiv 1804.06028), Pathfinder
(arXiv 1805.08315). Retrieval is associative recall with one question. Here a pixel of Pathfinder is
dark, dash or dot, and nothing is rendered or smoothed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

PAD = 0  # the token behind the end of a sequence
Item = tuple[list[int], int]


@dataclass(frozen=True, slots=True)
class Task:
    """What is learned.

    Attributes:
        tokens: size of the vocabulary, PAD included.
        classes: how many answers there are.
        padded: do sequences end before the length?
        item: one sequence of at most this length, and its answer.
    """

    tokens: int
    classes: int
    padded: bool
    item: Callable[[int, random.Random], Item]


def items(task: Task, length: int, number: int, seed: int) -> tuple[Tensor, Tensor]:
    """A data set: tokens [number, length] and answers [number], the same for the same seed."""
    draw = random.Random(seed)
    tokens, answers = torch.full((number, length), PAD), torch.empty(number, dtype=torch.long)
    for row in range(number):
        sequence, answers[row] = task.item(length, draw)
        tokens[row, : len(sequence)] = torch.tensor(sequence)
    return tokens, answers


# ---------------------------------------------------------------- nested operators on digits

DIGIT, OPERATORS = 1, ("MAX", "MIN", "MED", "SM")  # the digit n is the token DIGIT + n
OPEN = DIGIT + 10
CLOSE = OPEN + len(OPERATORS)
_NESTED, _ARGUMENTS, _DEPTH = 0.25, 10, 10


def _value(operator: str, arguments: list[int]) -> int:
    if operator in ("MAX", "MIN"):
        return max(arguments) if operator == "MAX" else min(arguments)
    if operator == "SM":
        return sum(arguments) % 10
    ordered, half = sorted(arguments), len(arguments) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) // 2


def _nested(most: int, draw: random.Random) -> Item | None:
    """An operator and its arguments; None if it became longer than `most`."""
    tokens: list[int] = []
    # operators that are open: which, how many arguments it still wants, those it has
    stack: list[tuple[str, int, list[int]]] = []
    while True:
        if len(tokens) + len(stack) >= most:  # one more token, and the ends of all
            return None
        if not stack or (len(stack) < _DEPTH and draw.random() < _NESTED):
            operator = draw.randrange(len(OPERATORS))
            tokens.append(OPEN + operator)
            stack.append((OPERATORS[operator], draw.randint(2, _ARGUMENTS), []))
            continue
        digit = draw.randrange(10)
        tokens.append(DIGIT + digit)
        stack[-1][2].append(digit)
        while len(stack[-1][2]) == stack[-1][1]:
            operator_, _, arguments = stack.pop()
            tokens.append(CLOSE)
            value = _value(operator_, arguments)
            if not stack:
                return tokens, value
            stack[-1][2].append(value)


def _listops(length: int, draw: random.Random) -> Item:
    """At least a quarter of the length, as the lengths 500 to 2000 of the Arena."""
    while True:
        found = _nested(length, draw)
        if found is not None and len(found[0]) * 4 >= length:
            return found


# ---------------------------------------------------------------- one question about pairs

KEYS, VALUES = 4, 4  # tokens: FILLER, 1 + FILLER + key for a question, PAIRS + key * VALUES + value
FILLER = 1
PAIRS = 1 + FILLER + KEYS


def _retrieval(length: int, draw: random.Random) -> Item:
    """Each key stands once behind the question, so that nothing else tells which is asked for."""
    values = [draw.randrange(VALUES) for _ in range(KEYS)]
    asked = draw.randrange(KEYS)
    tokens = [1 + FILLER + asked] + [FILLER] * (length - 1)
    for key, place in enumerate(draw.sample(range(1, length), KEYS)):
        tokens[place] = PAIRS + key * VALUES + values[key]
    return tokens, values[asked]


# ---------------------------------------------------------------- pictures

GREYS = 16
SHAPES = ("disc", "frame", "cross", "stripes")


def _image(length: int, draw: random.Random) -> Item:
    """A figure of random place, size and contrast under noise, row by row."""
    side, kind = isqrt(length), draw.randrange(len(SHAPES))
    size = draw.uniform(side / 5, side / 2.5)
    y0, x0 = (draw.uniform(size, side - 1 - size) for _ in range(2))
    ground, figure = draw.uniform(2, 6), draw.uniform(9, 13)
    tokens = []
    for place in range(side * side):
        y, x = (place // side - y0) / size, (place % side - x0) / size
        grey = draw.gauss(figure if inside(SHAPES[kind], y, x) else ground, 1.0)
        tokens.append(1 + min(GREYS - 1, max(0, round(grey))))
    return tokens, kind


def inside(shape: str, y: float, x: float) -> bool:
    """Does a point belong to a shape of size 1 around 0?"""
    far = max(abs(y), abs(x))
    if far > 1:
        return False
    if shape == "disc":
        return y * y + x * x <= 1
    if shape == "frame":
        return far > 0.55
    if shape == "cross":
        return min(abs(y), abs(x)) <= 0.25
    return int((y + 1) * 2.5) % 2 == 0


# ---------------------------------------------------------------- are two dots connected?

DARK, DASH, DOT = 1, 2, 3
_TRIES = 16  # second paths before there is another first one
GAP = 3  # cells between two paths, more than between two dashes of one
_TURNS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))
Cell = tuple[int, int]


def _path(side: int, cells: int, closed: set[Cell], draw: random.Random) -> list[Cell] | None:
    """A walk that turns by at most 45 degrees a step, apart from itself and from what is closed."""
    closed = set(closed)
    turn, y, x = draw.randrange(8), draw.randrange(side), draw.randrange(side)
    path: list[Cell] = []
    while 0 <= y < side and 0 <= x < side and (y, x) not in closed:
        path.append((y, x))
        if len(path) == cells:
            return path
        if len(path) > 2:
            closed.update(_around(path[-3], 1))
        turn = (turn + draw.choice((-1, 0, 0, 1))) % 8
        y, x = y + _TURNS[turn][0], x + _TURNS[turn][1]
    return None


def _around(place: Cell, far: int) -> list[Cell]:
    steps = range(-far, far + 1)
    return [(place[0] + down, place[1] + right) for down in steps for right in steps]


def _pathfinder(length: int, draw: random.Random) -> Item:
    """Two paths of equal length; the dots are the ends of one, or one end of each."""
    side = isqrt(length)
    cells = max(4, side * 3 // 4)
    first = second = None
    while first is None or second is None:
        first = _path(side, cells, set(), draw)
        closed = {cell for place in first or () for cell in _around(place, GAP - 1)}
        tries = range(_TRIES if first else 0)
        second = next(filter(None, (_path(side, cells, closed, draw) for _ in tries)), None)
    connected = draw.randrange(2)
    tokens = [DARK] * (side * side)
    for path in (first, second):
        for step, (y, x) in enumerate(path):
            if step % 3 != 2 or step == cells - 1:
                tokens[y * side + x] = DASH
    for y, x in (first[0], first[-1] if connected else second[-1]):
        tokens[y * side + x] = DOT
    return tokens, connected


TASKS = {
    "listops": Task(CLOSE + 1, 10, True, _listops),
    "retrieval": Task(PAIRS + KEYS * VALUES, VALUES, False, _retrieval),
    "image": Task(1 + GREYS, len(SHAPES), False, _image),
    "pathfinder": Task(1 + DOT, 2, False, _pathfinder),
}
