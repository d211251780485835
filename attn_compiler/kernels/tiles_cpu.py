"""Lists of the tiles that a map of blocks keeps, for a kernel that gathers them on a CPU.

    t0[q // 64, k // 64] & (k <= q)   ->   3 blocks of rows with 2 tiles each, 5 with 1, ...

Blocks of rows with equally many keys stand together, so that one call of a kernel serves them all
without padding. A map of each head makes the heads one long axis of rows and one of keys. The lists
are kept under the contents of the map: storage is reused, and not every tensor counts its changes.

nT and nS blocks of rows and of keys, R and C rows and keys of a tile.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from attn_compiler.ir.bounds import Tiling, tile_classes
from attn_compiler.ir.evaluate import evaluate
from attn_compiler.ir.expr import Call, Const, Expr, Read, Var, children, depends, slots
from attn_compiler.ir.mask import classify
from attn_compiler.ir.score import Program
from attn_compiler.ir.terms import has_reads
from attn_compiler.kernels.frame import Frame, Inputs
from attn_compiler.kernels.grid import Grid
from attn_compiler.kernels.plan import plan

# below so many elements of the grid the lists cost more than they save
_LEAST = 2**16
# rows and keys of a tile: smaller ones make slow matrix products
_LEAST_SIDE = 16
# share of kept elements above which gathering costs more than it saves; so few rows use what they
# gather too seldom
_MOST_DENSITY, _FEW_ROWS, _MOST_OF_FEW_ROWS = 0.4, 32, 0.2
# elements of a mask that are looked at in one go
_ELEMENTS = 2**21


@dataclass(frozen=True, slots=True)
class Cut:
    """What a program's mask says about tiles.

    Attributes:
        rows, keys: of a tile, R and C.
        listed: the terms that decide about tiles: those constant in a tile, and those without
            tensors.
        loose: the other terms, looked at element by element.
        slots: tensors that `listed` reads.
    """

    rows: int
    keys: int
    listed: Expr
    loose: Expr
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Blocks of rows with equally many keys.

    Attributes:
        rows: [n], which blocks; h * nT + block where heads differ.
        tiles: [n, c], the tiles of each; g * nS + tile where heads differ.
        width: keys of each; the last tile may reach over the edge.
        cut: is a tile among them in which `Cut.listed` forbids a part?
        mask: what it allows, [1, 1, R, width], where that is the same for all of them.
    """

    rows: Tensor
    tiles: Tensor
    width: int
    cut: bool = False
    mask: Tensor | None = None

    def parts(self, most: int) -> Iterator[Bucket]:
        """The same in pieces of at most so many blocks."""
        for rows, tiles in zip(self.rows.split(most), self.tiles.split(most), strict=True):
            yield replace(self, rows=rows, tiles=tiles)


@dataclass(frozen=True, slots=True)
class Lists:
    """The buckets of one mask.

    Attributes:
        cut: what the mask says about tiles.
        folded: do heads differ?
        density: share of the elements that lie in kept tiles.
        buckets: blocks of rows without a tile are in none.
    """

    cut: Cut
    folded: bool
    density: float
    buckets: tuple[Bucket, ...]


def without_full_maps(given: Inputs) -> Inputs:
    """A call without the maps of its mask that keep every block, as they do until they are written
    to: a dense attention is then no slower than before.
    """
    if given.q.device.type != "cpu":
        return given
    full = tuple(s for s in _maps(given.program) if bool(given.reads[s].all()))
    return replace(given, program=_without(given.program, full)) if full else given


@lru_cache(maxsize=512)
def _maps(program: str) -> dict[int, Expr]:
    """Terms of the mask that are a look into a map of blocks, by the slot of the map."""
    terms = [t.expr for t in classify(Program.parse(program).mask).terms]
    return {slot: e for e in terms if (slot := _looked_up(e)) is not None}


def _looked_up(term: Expr) -> int | None:
    """The slot of a term  t0[q // 64, k // 64]  or  t0[q // 64, k // 64] != 0."""
    if isinstance(term, Call) and term.op == "ne" and term.args[1] == Const(0):
        term = term.args[0]
    found = isinstance(term, Read) and not depends(term, "b") and _sides(term) is not None
    return term.slot if isinstance(term, Read) and found else None


@lru_cache(maxsize=512)
def _without(program: str, full: tuple[int, ...]) -> str:
    """The program without the terms that look into these maps."""
    parsed, dropped = Program.parse(program), [_maps(program)[slot] for slot in full]
    mask = classify(parsed.mask)
    mask = mask.without(*(t for t in mask.terms if t.expr in dropped))
    return str(replace(parsed, mask=mask.expr))


def lists(frame: Frame) -> Lists | None:
    """The lists of a call, None where gathering does not pay or is not possible."""
    grid, program, found = frame.grid, frame.plan.program, cut(frame.given.program)
    if found is None or grid.T * grid.S < _LEAST or not frame.random_access:
        return None
    if program.sink is None and program.empty not in ("any", "zero"):
        return None  # a row without keys reaches all of them
    tensors = [frame.given.reads[slot] for slot in found.slots]
    if any(t.device.type != "cpu" for t in tensors):
        return None
    contents = tuple(_Contents.of(t) for t in tensors)
    result = _lists(replace(grid, B=1), frame.given.k.shape[1], contents)
    most = _MOST_OF_FEW_ROWS if found.rows < _FEW_ROWS else _MOST_DENSITY
    return result if result.density <= most else None


def places(grid: Grid, given: Lists, bucket: Bucket) -> dict[str, Tensor | int]:
    """Sizes, and the indices of a bucket's elements: [n, heads, R, width], without the batch."""
    rows, keys = given.cut.rows, given.cut.keys
    blocks, tiles = -(-grid.T // rows), -(-grid.S // keys)
    q = (bucket.rows % blocks * rows).view(-1, 1, 1, 1) + torch.arange(rows).view(1, 1, -1, 1)
    k = (bucket.tiles % tiles * keys).unsqueeze(-1) + torch.arange(keys)
    heads = (bucket.rows // blocks).view(-1, 1, 1, 1)
    return {
        **grid.sizes,
        "h": heads if given.folded else torch.arange(grid.H).view(1, -1, 1, 1),
        "q": q.clamp_(max=grid.T - 1),  # rows over the edge are dropped afterwards
        "k": k.flatten(1)[:, None, None, : bucket.width],
    }


# ---------------------------------------------------------------- a program's mask


@lru_cache(maxsize=512)
def cut(program: str) -> Cut | None:
    """How the mask of a program falls into tiles; None where no tensor of blocks decides."""
    mask = classify(plan(program).program.mask)
    rows = keys = 0
    loose = []
    for term in mask.terms:
        if not has_reads(term.expr) and not depends(term.expr, "b"):
            continue
        sides = None if depends(term.expr, "b") else _sides(term.expr)
        if sides is None:
            loose.append(term)
        else:
            rows, keys = math.gcd(rows, sides[0]), math.gcd(keys, sides[1])
    if min(rows, keys) < _LEAST_SIDE:
        return None
    listed = mask.without(*loose).expr
    rest = mask.without(*(term for term in mask.terms if term not in loose)).expr
    return Cut(rows, keys, listed, rest, tuple(slots(listed)))


def _sides(expr: Expr) -> tuple[int, int] | None:
    """Rows and keys of the tiles in which a predicate is constant (0: any number), None if none."""
    if isinstance(expr, Var) and expr.name in ("q", "k"):
        return None
    if isinstance(expr, Call) and expr.op == "floordiv":
        index, by = expr.args
        size = by.value if isinstance(by, Const) and isinstance(by.value, int) else 0
        if isinstance(index, Var) and index.name in ("q", "k") and size > 0:
            return (size, 0) if index.name == "q" else (0, size)
    rows = keys = 0
    for child in children(expr):
        found = _sides(child)
        if found is None:
            return None
        rows, keys = math.gcd(rows, found[0]), math.gcd(keys, found[1])
    return rows, keys


# ---------------------------------------------------------------- making the lists


@dataclass(frozen=True, slots=True)
class _Contents:
    """A tensor by value."""

    dtype: torch.dtype
    shape: torch.Size
    data: bytes

    @staticmethod
    def of(tensor: Tensor) -> _Contents:
        flat = tensor.detach().contiguous()
        data = ctypes.string_at(flat.data_ptr(), flat.nbytes) if flat.nbytes else b""
        return _Contents(tensor.dtype, tensor.shape, data)

    def tensor(self) -> Tensor:
        if not self.data:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(bytearray(self.data), dtype=self.dtype).view(self.shape)


@lru_cache(maxsize=128)
def _lists(grid: Grid, groups: int, contents: tuple[_Contents, ...]) -> Lists:
    """`grid` has one batch item, `groups` is the number of kv heads."""
    found = cut(grid.program)
    assert found is not None
    reads = _table(found, contents)
    tiling = Tiling(1, grid.H, grid.T, grid.S, found.rows, found.keys, grid.ints)
    some, every = (x[0] for x in tile_classes(found.listed, tiling, reads))
    folded = some.shape[0] > 1
    heads, blocks, tiles = some.shape
    over = tiles * found.keys - grid.S
    # what counts comes first: full tiles, then cut ones, and the one over the edge last
    rank = torch.where(some, (some & ~every).byte(), 4).view(-1, tiles)
    if over:
        rank[:, -1] |= 2
    order = rank.argsort(dim=-1, stable=True)
    if folded:
        order += (torch.arange(heads) // (heads // groups) * tiles).repeat_interleave(blocks)[
            :, None
        ]
    count, partial = some.flatten(0, 1).sum(-1), (some & ~every).flatten(0, 1).any(-1)
    edge = some[..., -1].flatten() if over else torch.zeros_like(partial)
    kept = int(count.sum()) * found.rows * found.keys
    lists = Lists(found, folded, kept / (heads * grid.T * grid.S), ())
    kinds = (count * 2 + edge) * 2 + partial
    buckets = []
    for kind in kinds[count > 0].unique().tolist():
        rows, number = (kinds == kind).nonzero().squeeze(1), kind >> 2
        width = number * found.keys - (over if kind & 2 else 0)
        bucket = Bucket(rows, order[rows, :number], width, bool(kind & 1))
        buckets.append(replace(bucket, mask=_common(grid, lists, bucket, reads)))
    return replace(lists, buckets=tuple(buckets))


def _table(found: Cut, contents: tuple[_Contents, ...]) -> list[Tensor]:
    """The tensor of each slot that decides about tiles."""
    table = [torch.empty(0)] * (1 + max(found.slots))
    for slot, content in zip(found.slots, contents, strict=True):
        table[slot] = content.tensor()
    return table


def _common(grid: Grid, given: Lists, bucket: Bucket, reads: Sequence[Tensor]) -> Tensor | None:
    """The mask that all blocks of a bucket share, None where there is none or they differ."""
    if not bucket.cut:
        return None
    first: Tensor | None = None
    for part in bucket.parts(max(1, _ELEMENTS // (given.cut.rows * bucket.width))):
        mask = evaluate(given.cut.listed, places(grid, given, part), reads, grid.ints)
        first = mask[:1] if first is None else first
        if first.shape[1] > 1 or not bool((mask == first).all()):
            return None
    return first
