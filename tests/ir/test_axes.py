"""Index maps: every view comes to the same arithmetic, and what cannot be proved is refused."""

from __future__ import annotations

import itertools

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from attn_compiler.ir import axes as ax
from attn_compiler.ir.axes import Axis, CannotSplit, Index, along, divide, reshape


def value(index: Index, at: dict[Axis, int]) -> int:
    found = index.resolved()
    return int(found.const + sum(c * at[axis] for axis, c in found.terms))


def points(indices: list[Index]) -> list[dict[Axis, int]]:
    leaves = sorted({a for i in indices for a, _ in i.resolved().terms}, key=lambda a: a.id)
    return [
        dict(zip(leaves, place, strict=True))
        for place in itertools.product(*(range(a.extent) for a in leaves))
    ]


def flat(values: list[int], sizes: list[int]) -> int:
    position = 0
    for v, size in zip(values, sizes, strict=True):
        position = position * size + v
    return position


@given(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4), st.data())
def test_a_reshape_keeps_the_flat_position(factors: list[int], data: st.DataObject) -> None:
    def grouping() -> list[int]:
        cuts = data.draw(st.lists(st.booleans(), min_size=len(factors), max_size=len(factors)))
        sizes = [1]
        for factor, cut in zip(factors, cuts, strict=True):
            if cut:
                sizes.append(factor)
            else:
                sizes[-1] *= factor
        return sizes

    new, old = grouping(), grouping()
    given_at = [along(Axis(size)) for size in new]
    found = list(reshape(given_at, new, old))
    for at in points([*given_at, *found]):
        assert flat([value(i, at) for i in given_at], new) == flat(
            [value(i, at) for i in found], old
        )


def test_a_repeated_head_axis_splits_and_the_keys_lose_the_repeat() -> None:
    head = Axis(8)
    (at,) = ax.reshape([along(head)], [8], [8])
    high, low = divide(at, 4)
    assert head.parts is not None
    assert (high.single(), low.single()) == head.parts
    assert [a.extent for a in along(head).axes()] and {a.extent for a in along(head).axes()} == {
        2,
        4,
    }


def test_symbolic_sizes_merge_and_split() -> None:
    b, t = (sympy.Symbol(n, integer=True, positive=True) for n in ("s0", "s1"))
    merged = Axis(ax.simple(4 * b))
    batch, head, row = reshape([along(merged), along(Axis(t))], [4 * b, t], [b, 4, t])
    assert [i.resolved().terms[0][0].extent for i in (batch, head, row)] == [b, 4, t]


def test_a_boundary_that_cannot_be_proved_is_refused() -> None:
    with pytest.raises(CannotSplit):
        divide(along(Axis(6)), 4)
    with pytest.raises(CannotSplit):
        divide(along(Axis(8)).plus(1), 4)
    with pytest.raises(CannotSplit):
        reshape([along(Axis(5))], [5], [2, 3])
