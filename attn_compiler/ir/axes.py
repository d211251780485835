"""Index maps: which axis of the attention each dimension of a tensor runs along.

Each dimension of the attention's output, and each dimension summed over, is an `Axis`. The element
of a tensor that
contributes is described by one `Index` per dimension, an affine form  const + sum(coefficient *
axis). Views only
rewrite indices, so every order of permutes, reshapes, expands and slices comes to the same map:

    [B*H, T, d] viewed from [B, H, T, d]:   index e of the first dimension splits, e -> H*b + h

Splitting is a refinement of the axis and is remembered, so that a head axis that meets `repeat_kv`
becomes
(kv head, repeat) everywhere, and the keys are seen not to depend on the second.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy

Size = Any  # int or sympy.Expr

_ids = itertools.count()
_known: weakref.WeakValueDictionary[str, Axis] = weakref.WeakValueDictionary()


class CannotSplit(Exception):
    """A view cuts an index where no axis boundary can be proved."""


@dataclass(eq=False)
class Axis:
    """One loop of the attention; `parts` is (high, low) once it has been split."""

    extent: Size
    parts: tuple[Axis, Axis] | None = None
    id: int = field(default_factory=lambda: next(_ids))

    def __post_init__(self) -> None:
        _known[self.name] = self

    def __repr__(self) -> str:
        return f"{self.name}<{self.extent}>"

    @property
    def name(self) -> str:
        """Name of the variable that stands for this axis in expressions."""
        return f"a{self.id}"

    def leaves(self) -> tuple[Axis, ...]:
        if self.parts is None:
            return (self,)
        return self.parts[0].leaves() + self.parts[1].leaves()


@dataclass(frozen=True)
class Index:
    """const + sum(coefficient * axis), the largest coefficient first."""

    terms: tuple[tuple[Axis, Size], ...] = ()
    const: Size = 0

    def resolved(self) -> Index:
        """The same index in axes that are not split."""
        if all(axis.parts is None for axis, _ in self.terms):
            return self
        terms: list[tuple[Axis, Size]] = []
        for axis, coefficient in self.terms:
            terms += _split_terms(axis, coefficient)
        return Index(tuple(terms), self.const)

    def axes(self) -> frozenset[Axis]:
        return frozenset(axis for axis, _ in self.resolved().terms)

    def plus(self, other: Index | Size) -> Index:
        if not isinstance(other, Index):
            return Index(self.terms, simple(self.const + other))
        merged: dict[Axis, Size] = {}
        for axis, coefficient in (*self.resolved().terms, *other.resolved().terms):
            merged[axis] = simple(merged.get(axis, 0) + coefficient)
        return Index(
            tuple((a, c) for a, c in merged.items() if c != 0), simple(self.const + other.const)
        )

    def times(self, factor: Size) -> Index:
        if factor == 0:
            return ZERO
        return Index(
            tuple((a, simple(c * factor)) for a, c in self.terms), simple(self.const * factor)
        )

    def single(self) -> Axis | None:
        """The axis, if the index is exactly one axis."""
        found = self.resolved()
        if len(found.terms) == 1 and found.const == 0 and found.terms[0][1] == 1:
            return found.terms[0][0]
        return None

    def largest(self) -> Size:
        """Largest value the index takes (coefficients are positive or this is not called)."""
        return simple(self.const + sum(c * (a.extent - 1) for a, c in self.resolved().terms))


ZERO = Index()


def by_name(name: str) -> Axis | None:
    """The axis that a variable of an expression stands for, None for other variables."""
    return _known.get(name)


def along(axis: Axis) -> Index:
    return Index(((axis, 1),))


def _split_terms(axis: Axis, coefficient: Size) -> list[tuple[Axis, Size]]:
    if axis.parts is None:
        return [(axis, coefficient)]
    high, low = axis.parts
    return _split_terms(high, simple(coefficient * low_extent(axis))) + _split_terms(
        low, coefficient
    )


def low_extent(axis: Axis) -> Size:
    assert axis.parts is not None
    return axis.parts[1].extent


# ---------------------------------------------------------------- sizes


def size_of(size: Any) -> Size:
    """An int, or the sympy expression of a SymInt."""
    if isinstance(size, int):
        return size
    return simple(size.node.expr) if hasattr(size, "node") else simple(size)


def hint(size: Any) -> int:
    """A size to sort by: that of the example, asked without a guard."""
    if isinstance(size, int):
        return size
    found = getattr(size.node, "hint", None)
    return int(found) if isinstance(found, int) else 1


def simple(size: Size) -> Size:
    if isinstance(size, int):
        return size
    if isinstance(size, sympy.Integer):
        return int(size)
    expanded = sympy.expand(size)
    return int(expanded) if isinstance(expanded, sympy.Integer) else expanded


def equal(left: Size, right: Size) -> bool:
    return bool(simple(left - right) == 0)


def quotient(size: Size, divisor: Size) -> Size | None:
    """size / divisor where that is provably a whole number."""
    if isinstance(size, int) and isinstance(divisor, int):
        return size // divisor if divisor and size % divisor == 0 else None
    ratio = simple(sympy.cancel(sympy.sympify(size) / sympy.sympify(divisor)))
    if isinstance(ratio, int):
        return ratio
    numerator, denominator = ratio.as_numer_denom()
    return ratio if denominator == 1 and numerator.is_integer else None


def at_most(left: Size, right: Size) -> bool:
    """Is left <= right for all sizes?"""
    gap = simple(right - left)
    return gap >= 0 if isinstance(gap, int) else bool(gap.is_nonnegative)


def product(sizes: Iterable[Size]) -> Size:
    result: Size = 1
    for size in sizes:
        result = simple(result * size)
    return result


# ---------------------------------------------------------------- division


def divide(index: Index, divisor: Size) -> tuple[Index, Index]:
    """(index // divisor, index % divisor), splitting axes where the boundary runs through them.

    Raises:
        CannotSplit: no mixed-radix reading of the index has a boundary there.
    """
    high: list[tuple[Axis, Size]] = []
    low: list[tuple[Axis, Size]] = []
    for axis, coefficient in index.resolved().terms:
        whole = quotient(coefficient, divisor)
        if whole is not None:
            high.append((axis, whole))
        elif at_most(simple(coefficient * axis.extent), divisor):
            low.append((axis, coefficient))
        else:
            _split_for(axis, coefficient, divisor, high, low)
    return _checked_division(index, high, low, divisor)


def _split_for(
    axis: Axis,
    coefficient: Size,
    divisor: Size,
    high: list[tuple[Axis, Size]],
    low: list[tuple[Axis, Size]],
) -> None:
    inner = quotient(divisor, coefficient)
    outer = None if inner is None else quotient(axis.extent, inner)
    if inner is None or outer is None:
        raise CannotSplit(f"{coefficient} * {axis} by {divisor}")
    axis.parts = (Axis(outer), Axis(inner))
    high.append((axis.parts[0], 1))
    low.append((axis.parts[1], coefficient))


def _checked_division(
    index: Index, high: list[tuple[Axis, Size]], low: list[tuple[Axis, Size]], divisor: Size
) -> tuple[Index, Index]:
    const = index.const
    if isinstance(const, int) and isinstance(divisor, int):
        whole, rest = divmod(const, divisor)
    elif const == 0 or quotient(const, divisor) is not None:
        whole, rest = (quotient(const, divisor) or 0), 0
    else:
        whole, rest = 0, const
    remainder = Index(tuple(low), rest)
    if not at_most(remainder.largest(), simple(divisor - 1)):
        raise CannotSplit(f"remainder {remainder} of {divisor}")
    return Index(tuple(high), whole), remainder


# ---------------------------------------------------------------- views


def reshape(index: Sequence[Index], new: Sequence[Size], old: Sequence[Size]) -> tuple[Index, ...]:
    """Indices into a tensor of shape `old`, given those into its reshape of shape `new`.

    Raises:
        CannotSplit: the two shapes do not line up.
    """
    result: list[Index] = []
    i = j = 0
    while i < len(new) or j < len(old):
        group_new: list[int] = []
        group_old: list[int] = []
        i, j = _aligned(new, old, i, j, group_new, group_old)
        flat = ZERO
        for position in group_new:
            flat = flat.times(new[position]).plus(index[position])
        result += _unflatten(flat, [old[position] for position in group_old])
    return tuple(result)


def _aligned(
    new: Sequence[Size],
    old: Sequence[Size],
    i: int,
    j: int,
    group_new: list[int],
    group_old: list[int],
) -> tuple[int, int]:
    """Take the shortest runs of both shapes that hold equally many elements."""
    if i < len(new) and new[i] == 1:
        return i + 1, j
    if j < len(old) and old[j] == 1:
        group_old.append(j)
        return i, j + 1
    if i >= len(new) or j >= len(old):
        raise CannotSplit(f"{list(old)} as {list(new)}")
    group_new.append(i)
    group_old.append(j)
    left, right = new[i], old[j]
    i, j = i + 1, j + 1
    while not equal(left, right):
        if j < len(old) and quotient(left, right) is not None:
            group_old.append(j)
            right = simple(right * old[j])
            j += 1
        elif i < len(new) and (quotient(right, left) is not None or j >= len(old)):
            group_new.append(i)
            left = simple(left * new[i])
            i += 1
        elif j < len(old):
            group_old.append(j)
            right = simple(right * old[j])
            j += 1
        else:
            raise CannotSplit(f"{list(old)} as {list(new)}")
    return i, j


def _unflatten(flat: Index, sizes: Sequence[Size]) -> list[Index]:
    """Indices of the dimensions `sizes` whose flattened position is `flat`."""
    result: list[Index] = []
    for size in reversed(sizes[1:]):
        if size == 1:
            result.append(ZERO)
            continue
        flat, low = divide(flat, size)
        result.append(low)
    return [*([flat] if sizes else []), *reversed(result)]
