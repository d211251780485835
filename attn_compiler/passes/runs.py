"""Runs of axes: which part of a dimension of a tensor belongs to which group of axes.

a dimension over (batch, head, feature), groups (batch), (head), (feature)  ->  three runs
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir.axes import Axis, Index

Groups = tuple[tuple[Axis, ...], ...]


def extent(run: Iterable[Axis]) -> ax.Size:
    return ax.product(axis.extent for axis in run)


def real(where: Iterable[Index]) -> frozenset[Axis]:
    return frozenset(axis for w in where for axis, _ in w.resolved().terms if axis.extent != 1)


def covers(where: Sequence[Index], node: fx.Node) -> bool:
    """Is every element that is read read once, in one piece of each dimension?"""
    seen: set[Axis] = set()
    for index, size in zip(where, node.meta["val"].shape, strict=True):
        found = index.resolved()
        whole = ax.equal(extent(a for a, _ in found.terms), ax.size_of(size))
        if not isinstance(found.const, int) or (whole and found.const != 0 and found.terms):
            return False
        stride: ax.Size = 1
        for axis, coefficient in reversed(found.terms):
            if axis in seen or not ax.equal(coefficient, stride):
                return False
            seen.add(axis)
            stride = ax.simple(stride * axis.extent)
    return True


def runs_of(index: Index, groups: Groups) -> list[tuple[Axis, ...]]:
    """The axes of one dimension, cut where two neighbours are not neighbours in a group."""
    following = {pair[0]: pair[1] for group in groups for pair in itertools.pairwise(group)}
    members = {axis for group in groups for axis in group}
    runs: list[tuple[Axis, ...]] = []
    for axis, _ in index.terms:
        if axis not in members and axis.extent == 1:
            continue
        if runs and following.get(runs[-1][-1]) is axis:
            runs[-1] = (*runs[-1], axis)
        else:
            runs.append((axis,))
    return runs


def atoms_of(group: tuple[Axis, ...], atoms: Sequence[tuple[Axis, ...]]) -> list[tuple[Axis, ...]]:
    """The runs that belong to a group, in its order."""
    found = [run for run in atoms if run and run[0] in group]
    return sorted(found, key=lambda run: group.index(run[0]))
