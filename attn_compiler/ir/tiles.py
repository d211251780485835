"""Which tiles of the T x S grid a predicate lets through, without looking at single elements.

    k <= q  on rows 4..7:  columns 0..3 FULL, 4..7 PARTIAL, 8..11 SKIP

The box rows x columns is made smaller by each bound in turn until nothing changes (bounds
propagation); an empty box means that no element passes. For differences of row and column, single
indices and chunks this is exact: the lower corner of the box that is left is itself an element that
passes. What reads tensors is taken to go either way.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from attn_compiler.ir.expr import Call, Const, Expr, Var
from attn_compiler.ir.predicate import Bound, Junction, Predicate, conjuncts

_ROUNDS = (
    64  # unequal coefficients may converge slowly; stopping early only makes the answer coarser
)
_CASES = 256

# ends included; floats appear only as +-inf
Range = tuple[float, float]
ANY: Range = (-math.inf, math.inf)


class Tile(enum.Enum):
    """No element of the tile may be seen, some may, all may."""

    SKIP = "skip"
    PARTIAL = "partial"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Box:
    """Ranges of the index variables and sizes by name, ends included."""

    ranges: Mapping[str, Range]

    @classmethod
    def of(
        cls, rows: tuple[int, int], cols: tuple[int, int], sizes: Mapping[str, int]
    ) -> Box | None:
        """Half-open rows and columns, cut to the grid; None if nothing is left."""
        ranges: dict[str, Range] = {
            n: (0, sizes[s] - 1) for n, s in (("b", "B"), ("h", "H")) if s in sizes
        }
        for name, (start, stop), size in (("q", rows, "T"), ("k", cols, "S")):
            low, high = max(start, 0), min(stop, sizes.get(size, stop)) - 1
            if low > high:
                return None
            ranges[name] = (low, high)
        ranges.update({n: (sizes[n], sizes[n]) if n in sizes else (1, math.inf) for n in "BHTS"})
        return cls(ranges)

    def within(self, name: str, limits: Range) -> Box | None:
        old = self.ranges.get(name, (0, math.inf))
        new = (max(old[0], limits[0]), min(old[1], limits[1]))
        if new == old:
            return self
        return Box({**self.ranges, name: new}) if new[0] <= new[1] else None


def tile(p: Predicate, opposite: Predicate, box: Box | None) -> Tile:
    if box is None or narrow(p, box) is None:
        return Tile.SKIP
    return Tile.FULL if narrow(opposite, box) is None else Tile.PARTIAL


def narrow(p: Predicate, box: Box, cases: int = _CASES) -> Box | None:
    """A box that holds every element of `box` for which `p` may be true; None if there is none."""
    bounds: list[Bound] = []
    choices: list[tuple[Predicate, ...]] = []
    for part in conjuncts(p):
        if isinstance(part, Junction):
            choices.append(part.parts)
        elif isinstance(part, Bound) and part.rel == "ne":
            choices.append(
                (Bound(part.part, "le", part.value - 1), Bound(part.part, "ge", part.value + 1))
            )
        elif isinstance(part, Bound):
            bounds.append(part)
    smaller = _fixpoint(bounds, box)
    if smaller is None or not choices:
        return smaller
    return _by_cases(bounds, choices, smaller, cases)


def _by_cases(
    bounds: list[Bound], choices: list[tuple[Predicate, ...]], box: Box, cases: int
) -> Box | None:
    options, rest = choices[0], [Junction("or", c) for c in choices[1:]]
    if len(options) > cases:
        return box
    # with too many cases each choice is looked at alone, which is coarser
    joint = math.prod(map(len, choices)) <= cases
    together = [*bounds, *(rest if joint else ())]
    found = [
        smaller
        for option in options
        if (smaller := narrow(Junction("and", (*together, *conjuncts(option))), box, cases))
        is not None
    ]
    if not found:
        return None
    hull = Box({n: _hull(b.ranges.get(n, r) for b in found) for n, r in box.ranges.items()})
    return hull if joint or not rest else narrow(Junction("and", (*bounds, *rest)), hull, cases)


def _hull(ranges: Iterable[Range]) -> Range:
    lows, highs = zip(*ranges, strict=True)
    return min(lows), max(highs)


def _fixpoint(bounds: Sequence[Bound], box: Box) -> Box | None:
    for _ in range(_ROUNDS):
        before = box
        for bound in bounds:
            smaller = _revise(bound, box)
            if smaller is None:
                return None
            box = smaller
        if box is before or len(bounds) < 2:
            return box
    return box


def _revise(bound: Bound, box: Box) -> Box | None:
    """Every term may only take what the others leave to it."""
    low = bound.value if bound.rel != "le" else -math.inf
    high = bound.value if bound.rel != "ge" else math.inf
    ranges = [_scaled(interval(atom, box), c) for atom, c in bound.part]
    for i, (atom, c) in enumerate(bound.part):
        rest = [r for j, r in enumerate(ranges) if j != i]
        left = (low - sum(r[1] for r in rest), high - sum(r[0] for r in rest))
        if left[0] > ranges[i][1] or left[1] < ranges[i][0]:
            return None
        smaller = _project(atom, _divided(left, c), box)
        if smaller is None:
            return None
        box = smaller
    return box


def _project(expr: Expr, limits: Range, box: Box) -> Box | None:
    """The box where `expr` may lie within the limits."""
    if isinstance(expr, Var):
        return box.within(expr.name, limits)
    if not isinstance(expr, Call):
        return box
    if (
        expr.op == "floordiv"
        and isinstance(expr.args[1], Const)
        and (by := int(expr.args[1].value)) > 0
    ):
        return _project(expr.args[0], (limits[0] * by, limits[1] * by + by - 1), box)
    if expr.op == "neg":
        return _project(expr.args[0], (-limits[1], -limits[0]), box)
    if expr.op == "mul" and isinstance(expr.args[0], Const):
        return _project(expr.args[1], _divided(limits, int(expr.args[0].value)), box)
    if expr.op in ("add", "sub"):
        return _project_sum(expr, limits, box)
    return box


def _project_sum(expr: Call, limits: Range, box: Box) -> Box | None:
    left, right = expr.args
    (a, b), (c, d) = interval(left, box), interval(right, box)
    if expr.op == "add":
        outer, inner = (limits[0] - d, limits[1] - c), (limits[0] - b, limits[1] - a)
    else:
        outer, inner = (limits[0] + c, limits[1] + d), (a - limits[1], b - limits[0])
    smaller = _project(left, outer, box)
    return _project(right, inner, smaller) if smaller is not None else None


# ---------------------------------------------------------------- intervals


def interval(expr: Expr, box: Box) -> Range:
    """Where an integer expression may lie."""
    if isinstance(expr, Const):
        return int(expr.value), int(expr.value)
    if isinstance(expr, Var):
        return box.ranges.get(expr.name, (0, math.inf))
    if isinstance(expr, Call) and expr.op in _INTERVALS:
        return _INTERVALS[expr.op](*(interval(a, box) for a in expr.args))
    if isinstance(expr, Call) and expr.op == "where":
        return _hull(interval(a, box) for a in expr.args[1:])
    return ANY


def _scaled(r: Range, c: int) -> Range:
    return (r[0] * c, r[1] * c) if c > 0 else (r[1] * c, r[0] * c)


def _divided(r: Range, c: int) -> Range:
    """The integers whose c-fold lies in the range."""
    low, high = r if c > 0 else (-r[1], -r[0])
    c = abs(c)
    return (low if math.isinf(low) else -(-low // c)), (high if math.isinf(high) else high // c)


def _times(a: Range, b: Range) -> Range:
    if a[0] == a[1] and not math.isinf(a[0]):
        return _scaled(b, int(a[0])) if a[0] else (0, 0)
    if b[0] == b[1]:
        return _times(b, a) if not math.isinf(b[0]) else ANY
    if math.inf in (*map(abs, a), *map(abs, b)):
        return ANY
    corners = [x * y for x in a for y in b]
    return min(corners), max(corners)


def _quotient(a: Range, b: Range) -> Range:
    if b[0] != b[1] or b[0] <= 0 or math.isinf(b[0]):
        return ANY
    low, high = (x if math.isinf(x) else x // b[0] for x in a)
    return low, high


def _remainder(a: Range, b: Range) -> Range:
    if b[0] != b[1] or b[0] <= 0 or math.isinf(b[0]):
        return ANY
    if not math.isinf(a[0]) and not math.isinf(a[1]) and a[0] // b[0] == a[1] // b[0]:
        return a[0] % b[0], a[1] % b[0]
    return 0, b[0] - 1


def _magnitude(a: Range) -> Range:
    return (0 if a[0] <= 0 <= a[1] else min(abs(a[0]), abs(a[1]))), max(abs(a[0]), abs(a[1]))


_INTERVALS: dict[str, Callable[..., Range]] = {
    "add": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "sub": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "neg": lambda a: (-a[1], -a[0]),
    "mul": _times,
    "floordiv": _quotient,
    "mod": _remainder,
    "abs": _magnitude,
    "min": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "max": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
}
