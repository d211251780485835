"""Keys of which a part is a linear image of x, and the rest is something else.

    cat([rotate(k[..., :8]), k[..., 8:]], -1)   ->   features 8... are views of k, 0..8 stand beside

The rest need not be understood: what a cache holds as it is may be any function. So partial rotary
embeddings of every layout are one case, and so are keys whose rotated part all heads share.

Source: EL-Attention (arXiv 2105.04779), its equations for keys whose features are split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir.affine import Blocked, is_linear_map
from attn_compiler.ir.axes import Axis, Index, along
from attn_compiler.ir.key_norm import norm_of
from attn_compiler.ir.pull import Coordinates, Puller, arguments, val
from attn_compiler.ir.region import FunctionalRegion
from attn_compiler.ir.views import placed


@dataclass(frozen=True)
class Beside:
    """Features of keys that a cache holds as they are.

    Attributes:
        start, features: features start, start + 1, ... of a key.
        heads: 1 where all heads have the same, else the number of kv heads.
    """

    start: int
    features: int
    heads: int


@dataclass(frozen=True)
class _Part:
    """Operand of a concatenation: its features in the key, and what it is a view of."""

    start: int
    size: int
    node: fx.Node
    where: Coordinates
    axis: Axis


def linear_part(
    puller: Puller,
    functional: FunctionalRegion,
    cat: fx.Node,
    where: Coordinates,
    axes: tuple[Axis, ...],
) -> tuple[fx.Node, Coordinates, tuple[Axis, ...], Beside] | None:
    """The linear part of keys that are joined from several.

    Args:
        cat: the concatenation, a node of the functional graph.
        where: coordinates of the keys in it.
        axes: batch, head, key, feature.

    Returns:
        A node that the region reads, the coordinates of the linear part in it, along the axes given
        back, the last of which runs along that part alone, and the rest; None where no part is a
        view of what a linear map makes.

    Raises:
        Blocked: `partial_rope`, if the rest is not one run of features.
    """
    parts = _parts(puller, cat, where, axes)
    linear = [p for p in parts if _is_linear(functional, p)]
    if not linear:
        return None
    best = max(linear, key=lambda p: p.size)
    rest = [p for p in parts if p is not best]
    if best.start != 0 and best is not parts[-1]:
        at = functional.read[best.node]
        text = "rotated features stand on both sides of those that can be read out of x"
        raise Blocked(at, ("partial_rope", text))
    heads = axes[1].extent if any(_may_run_along(axes[1], p.where) for p in rest) else 1
    if not rest or not isinstance(heads, int):
        return None
    beside = Beside(rest[0].start, sum(p.size for p in rest), heads)
    return best.node, best.where, (*axes[:3], best.axis), beside


def _parts(puller: Puller, cat: fx.Node, where: Coordinates, axes: tuple[Axis, ...]) -> list[_Part]:
    """The operands, each followed through its views; none if they are not joined along features."""
    given = arguments(cat)
    at = given["dim"] % len(where)
    along_features, others = where[at], (*where[:at], *where[at + 1 :])
    whole = isinstance(along_features, Index) and along_features.single() is axes[-1]
    if len(axes) != 4 or not whole or _may_run_along(axes[3], others):
        return []
    found, start = list[_Part](), 0
    # a number of features that the code reads from a tensor is demanded to be that of the example:
    # weights are split by it
    named = [ax.size_of(val(operand).shape[at]) for operand in given["tensors"]]
    sizes = [int(val(operand).shape[at]) for operand in given["tensors"]]
    known = {n: s for n, s in zip(named, sizes, strict=True) if not isinstance(n, int)}
    for operand, size in zip(given["tensors"], sizes, strict=True):
        axis = puller.new_axis(size)
        node, coordinates = puller.peel(operand, placed(where, at, along(axis)))
        found.append(_Part(start, size, node, _with(known, coordinates), axis))
        start += size
    return found if start == axes[3].extent else []


def _with(known: Mapping[ax.Size, int], where: Coordinates) -> Coordinates:
    """The coordinates with numbers for some sizes in their offsets."""

    def number(size: ax.Size) -> ax.Size:
        return size if isinstance(size, int) else ax.simple(size.subs(known))

    return tuple(
        Index(w.terms, number(w.const)) if isinstance(w, Index) and known else w for w in where
    )


def _may_run_along(axis: Axis, where: Coordinates) -> bool:
    """Does one of the coordinates move with an axis?"""
    leaves = set(axis.leaves())
    return any(not isinstance(w, Index) or bool(leaves & w.axes()) for w in where)


def _is_linear(functional: FunctionalRegion, part: _Part) -> bool:
    host = functional.read.get(part.node)
    return host is not None and (is_linear_map(host) or norm_of(host) is not None)
