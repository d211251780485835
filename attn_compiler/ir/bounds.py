"""How a mask lies over all tiles of the grid at once, tensors that it reads included.

    (t0[b, q] == t0[b, k]) & (k <= q)   ->   some, every   [B, 1, row tiles, key tiles]

Interval arithmetic: a number becomes its least and its largest value in each tile, a predicate
whether it holds everywhere and whether it may hold somewhere. A tensor is read once, in runs of a
tile, so documents cost B (T + S) elements and not T x S. What is not understood may be anything, so
`some` is never too small and `every` never too large. `tiles` answers the same question
for masks without tensors, more sharply and without touching a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attn_compiler.ir.evaluate import inside
from attn_compiler.ir.expr import Call, Const, Dot, Expr, Int, Read, Var, walk
from attn_compiler.ir.lasting import on_device, recorded

# low and high, ends included; of a predicate: holds everywhere, may hold somewhere
Pair = tuple[Tensor, Tensor]
# elements that may be looked at for one read
_MOST = 2**26


@dataclass(frozen=True, slots=True)
class Tiling:
    """A grid of B x H x T x S cut into tiles of `rows` x `keys`, with the program's integers."""

    B: int
    H: int
    T: int
    S: int
    rows: int
    keys: int
    ints: tuple[int, ...] = ()


def tile_classes(mask: Expr, tiling: Tiling, reads: Sequence[Tensor]) -> Pair:
    """Which tiles a mask lets through.

    Args:
        mask: a predicate over b h q k.
        tiling: the sizes.
        reads: the tensor of each slot, all on one device.

    Returns:
        `some` and `every`, boolean, [B or 1, H or 1, row tiles, key tiles]: tiles of which an
        element may pass, and tiles of which all elements pass.
    """
    device = reads[0].device if reads else torch.device("cpu")
    every, some = _predicate(_bounds(mask, tiling, reads, device))
    tiles = (-(-tiling.T // tiling.rows), -(-tiling.S // tiling.keys))
    shape = (*some.shape[:2], *tiles)
    return some.to(device).expand(shape), every.to(device).expand(shape)


def _bounds(expr: Expr, tiling: Tiling, reads: Sequence[Tensor], device: torch.device) -> Pair:
    if not any(isinstance(node, Read | Dot) for node in walk(expr)):
        pair = _free(expr, tiling, device)
        recorded(*pair)
        return pair
    if isinstance(expr, Read):
        return _read(expr, tiling, reads[expr.slot])
    if not isinstance(expr, Call):
        return _anything(device)
    return _apply(expr, [_bounds(a, tiling, reads, device) for a in expr.args], tiling)


@lru_cache(maxsize=1024)
def _free(expr: Expr, tiling: Tiling, device: torch.device) -> Pair:
    """Of what reads no tensor: computed by the CPU, once, and then kept on the device."""
    low, high = _numbers(expr, tiling)
    return on_device(low, device), on_device(high, device)


def _numbers(expr: Expr, tiling: Tiling) -> Pair:
    if isinstance(expr, Const):
        return _constant(expr.value)
    if isinstance(expr, Int):
        return _constant(tiling.ints[expr.slot])
    if isinstance(expr, Var):
        return _variable(expr.name, tiling)
    assert isinstance(expr, Call)
    return _apply(expr, [_numbers(a, tiling) for a in expr.args], tiling)


def _constant(value: bool | int | float) -> Pair:
    if not isinstance(value, float):
        found = torch.tensor(value).reshape(1, 1, 1, 1)
        return found, found
    # kernels and references may round it to the dtype of what it is compared with
    number = torch.tensor(value, dtype=torch.float64).reshape(1, 1, 1, 1)
    exact = bool((number.to(torch.bfloat16).double() == number).all())
    slack = 0.0 if exact else abs(value) / 64
    return number - slack, number + slack


def _variable(name: str, tiling: Tiling) -> Pair:
    if name in "BHTS":
        return _constant(int(getattr(tiling, name)))
    axis = "bhqk".index(name)
    length, size = (
        (tiling.B, 1), (tiling.H, 1), (tiling.T, tiling.rows), (tiling.S, tiling.keys)
    )[axis]  # fmt: skip
    low = torch.arange(0, max(length, 1), size)
    low = low.view([-1 if i == axis else 1 for i in range(4)])
    return low, (low + size - 1).clamp(max=max(length - 1, 0))


def _anything(device: torch.device) -> Pair:
    limit = torch.full((1, 1, 1, 1), math.inf, dtype=torch.float64, device=device)
    return -limit, limit


# ---------------------------------------------------------------- reads


def _read(expr: Read, tiling: Tiling, tensor: Tensor) -> Pair:
    """Least and largest of the elements that a tile reads."""
    places = _places(expr, tiling, tensor.device)
    if places is None or tensor.dtype.is_complex or tensor.numel() == 0:
        return _anything(tensor.device)
    recorded(*places)
    found = tensor[inside(tensor, places)] if places else tensor.view(1, 1, 1, 1)
    if found.dtype is torch.bool:
        every, some = found, found
        for axis in range(found.dim() - 1, 3, -1):
            every, some = every.all(axis), some.any(axis)
        return every, some
    if found.is_floating_point():  # a tile with NaN may be anything
        found = found.double()
        low, high = (found.nan_to_num(nan, math.inf, -math.inf) for nan in (-math.inf, math.inf))
    else:
        low = high = found.long()
    for axis in range(found.dim() - 1, 3, -1):
        low, high = low.amin(axis), high.amax(axis)
    return low, high


@lru_cache(maxsize=1024)
def _places(expr: Read, tiling: Tiling, device: torch.device) -> tuple[Tensor, ...] | None:
    """Per dimension of a tensor what a tile reads: [b, h, q, k tiles, one axis per dimension].

    None where that depends on another tensor, or is too much.
    """
    if any(isinstance(node, Read | Dot) for index in expr.index for node in walk(index)):
        return None
    ranges = [_numbers(index, tiling) for index in expr.index]
    if any(low.is_floating_point() or low.dtype is torch.bool for low, _ in ranges):
        return None
    widths = [int((high - low).max()) + 1 for low, high in ranges]
    shape = torch.broadcast_shapes(*(low.shape for low, _ in ranges)) if ranges else ()
    if math.prod(shape) * math.prod(widths) > _MOST:
        return None
    found = []
    for axis, ((low, high), width) in enumerate(zip(ranges, widths, strict=True)):
        steps = torch.arange(width).view([-1 if i == axis else 1 for i in range(len(widths))])
        ends = [x.view(*x.shape, *(1 for _ in widths)) for x in (low, high)]
        found.append(on_device(torch.minimum(ends[0] + steps, ends[1]), device))
    return tuple(found)


# ---------------------------------------------------------------- arithmetic


def _apply(expr: Call, args: list[Pair], tiling: Tiling) -> Pair:
    op, fractions = expr.op, any(x.is_floating_point() for pair in args for x in pair)
    if op in _LOGIC:
        return _LOGIC[op](*map(_predicate, args))
    if op == "where":
        return _where(_predicate(args[0]), args[1], args[2])
    if op == "bool":
        return _predicate(args[0])
    if op in _COMPARISONS or op in _EXACT:
        return (_COMPARISONS.get(op) or _EXACT[op])(*map(_number, args))
    if op == "float" and (fractions or _small(args[0])):
        return args[0]
    if op in ("floordiv", "mod") and not fractions and (by := _divisor(expr.args[1], tiling)) > 0:
        return _divided(op, _number(args[0]), by)
    if op in _WHOLE and not fractions:
        return _WHOLE[op](*map(_number, args))
    return _anything(args[0][0].device)  # fractions are rounded by whoever computes them


def _small(pair: Pair) -> bool:
    """Integers that single precision holds; what a device has computed is not asked."""
    low, high = _number(pair)
    return low.device.type == "cpu" and max(-int(low.min()), int(high.max())) <= 2**24


def _divisor(expr: Expr, tiling: Tiling) -> int:
    if isinstance(expr, Const):
        return int(expr.value)
    return tiling.ints[expr.slot] if isinstance(expr, Int) else 0


def _number(pair: Pair) -> Pair:
    return (pair[0].long(), pair[1].long()) if pair[0].dtype is torch.bool else pair


def _predicate(pair: Pair) -> Pair:
    low, high = pair
    if low.dtype is torch.bool:
        return pair
    return (low > 0) | (high < 0), (low != 0) | (high != 0)


def _where(chosen: Pair, yes: Pair, no: Pair) -> Pair:
    (a, b), (c, d) = _number(yes), _number(no)
    low = torch.where(chosen[0], a, torch.where(chosen[1], _least(a, c), c))
    high = torch.where(chosen[0], b, torch.where(chosen[1], _most(b, d), d))
    logic = yes[0].dtype is torch.bool and no[0].dtype is torch.bool
    return (low > 0, high > 0) if logic else (low, high)


def _divided(op: str, a: Pair, by: int) -> Pair:
    low, high = (torch.div(x, by, rounding_mode="floor") for x in a)
    if op == "floordiv":
        return low, high
    same = low == high
    return torch.where(same, a[0] - low * by, 0), torch.where(same, a[1] - high * by, by - 1)


def _least(a: Tensor, b: Tensor) -> Tensor:
    return torch.minimum(*_alike(a, b))


def _most(a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum(*_alike(a, b))


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    kind = torch.promote_types(a.dtype, b.dtype)
    return a.to(kind), b.to(kind)


def _equal(a: Pair, b: Pair) -> Pair:
    every = (a[0] == a[1]) & (b[0] == b[1]) & (a[0] == b[0])
    return every, (a[0] <= b[1]) & (b[0] <= a[1])


def _not(a: Pair) -> Pair:
    return ~a[1], ~a[0]


def _times(a: Pair, b: Pair) -> Pair:
    corners = [x * y for x, y in ((a[0], b[0]), (a[0], b[1]), (a[1], b[0]), (a[1], b[1]))]
    low, high = corners[0], corners[0]
    for corner in corners[1:]:
        low, high = torch.minimum(low, corner), torch.maximum(high, corner)
    return low, high


def _magnitude(a: Pair) -> Pair:
    low, high = a[0].abs(), a[1].abs()
    around = (a[0] <= 0) & (a[1] >= 0)
    return torch.where(around, 0, torch.minimum(low, high)), torch.maximum(low, high)


_LOGIC: dict[str, Callable[..., Pair]] = {
    "and": lambda a, b: (a[0] & b[0], a[1] & b[1]),
    "or": lambda a, b: (a[0] | b[0], a[1] | b[1]),
    "xor": lambda a, b: _not(_equal(_number(a), _number(b))),
    "not": _not,
}
_COMPARISONS: dict[str, Callable[..., Pair]] = {
    "le": lambda a, b: (a[1] <= b[0], a[0] <= b[1]),
    "lt": lambda a, b: (a[1] < b[0], a[0] < b[1]),
    "ge": lambda a, b: (a[0] >= b[1], a[1] >= b[0]),
    "gt": lambda a, b: (a[0] > b[1], a[1] > b[0]),
    "eq": _equal,
    "ne": lambda a, b: _not(_equal(a, b)),
}
# the same in every precision
_EXACT: dict[str, Callable[..., Pair]] = {
    "neg": lambda a: (-a[1], -a[0]),
    "abs": _magnitude,
    "min": lambda a, b: (_least(a[0], b[0]), _least(a[1], b[1])),
    "max": lambda a, b: (_most(a[0], b[0]), _most(a[1], b[1])),
}
# exact for integers
_WHOLE: dict[str, Callable[..., Pair]] = {
    "add": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "sub": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "mul": _times,
    "int": lambda a: a,
}
