"""What every launch of a generated kernel needs: a tile, arguments, constants.

Launch(kernel, grid, args, constants).run()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attn_compiler.ir.lasting import on_device, recorded
from attn_compiler.kernels import blocks, schedule
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.frame import Frame, Inputs, Made
from attn_compiler.kernels.schedule import Visit
from attn_compiler.kernels.triton_source import MadeInside, Structure, Visits
from attn_compiler.kernels.triton_text import Kind

# numbers of two axes of a launch, and of elements that 32 bits can count, are below these
MOST_OF_AN_AXIS = 65535
_FAR = 2**31


@dataclass(frozen=True, slots=True)
class Tile:
    """What is chosen for one launch.

    Attributes:
        rows: query rows times heads of a program, a power of two from 16.
        keys: keys of one step, a power of two from 16.
        warps: warps of a program.
        stages: depth of the pipeline of loads.
        heads: query heads of one kv head that a program takes together.
        splits: programs that share the keys of a block of rows.
        descriptors: what the loop runs over is copied by the tensor memory accelerator (capability
            9.0 and above), where the layout of the tensors allows it.
    """

    rows: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2
    heads: int = 1
    splits: int = 1
    descriptors: bool = False


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel with everything it is launched with."""

    kernel: Any
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    constants: dict[str, Any]

    def run(self) -> None:
        with torch.cuda.device_of(self.args[0]):  # Triton launches on the current device
            self.kernel[self.grid](*self.args, **self.constants)


def dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def with_descriptors(tile: Tile, x: Tensor, y: Tensor, rows: int) -> tuple[Tile, tuple[Any, ...]]:
    """Descriptors of two tensors, for so many rows of one head at a time.

    Returns:
        The tile as it was and the descriptors; or, where it asks for none or the hardware cannot
        read such tensors, the tile without descriptors and nothing.
    """
    if not tile.descriptors or not described(x, y):
        return replace(tile, descriptors=False), ()
    from triton.tools.tensor_descriptor import TensorDescriptor

    return tile, tuple(
        TensorDescriptor(t, list(t.shape), _strides(t), [1, 1, rows, power(t.shape[3])])
        for t in (x, y)
    )


def described(*tensors: Tensor) -> bool:
    """Can descriptors say where they lie: do all rows begin at multiples of 16 bytes, each in a
    place of its own?
    """
    for x in tensors:
        unit, strides = _unit(x), _strides(x)
        if strides[3] != 1 or not all(n > 0 and n % unit == 0 for n in strides[:3]):
            return False
        if x.data_ptr() % 16 != 0:
            return False
    return True


def _strides(x: Tensor) -> list[int]:
    """Its strides; a dimension of one element has any, and gets a good one."""
    unit = _unit(x)
    first = [unit if n == 1 else s for n, s in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return [*first, x.stride(3)]


def _unit(x: Tensor) -> int:
    return 16 // x.element_size()


def structure_of(
    frame: Frame, tile: Tile, visits: Visits, needs: tuple[int, ...] = ()
) -> Structure:
    given = frame.given
    kinds = tuple(_kind(read) for read in given.reads)
    ranks = tuple(read.dim() for read in given.reads)
    drops, made = given.drop.rate > 0, frame.made
    return Structure(
        given.program,
        kinds,
        ranks,
        len(given.ints),
        tile.heads > 1,
        visits,
        drops,
        tile.descriptors,
        folded(frame.grid.B * frame.grid.H)[1] > 1,
        needs,
        None if made is None else MadeInside(made.slot, made.alone.program, made.gate is not None),
    )


def _kind(read: Tensor) -> Kind:
    if read.dtype is torch.bool:
        return "bool"
    return "float" if read.is_floating_point() else "int"


def program_arguments(given: Inputs) -> list[Any]:
    found: list[Any] = []
    for read in given.reads:
        found += [read, *read.stride(), *read.shape]
    found += given.ints
    if given.drop.rate > 0:
        drawn = given.drop.part or (0, given.q.shape[2])
        found += [*drop_arguments(given.drop), given.drop.gain, *drawn]
    return found


def drop_arguments(drop: Drop) -> tuple[Tensor | None, int]:
    """The seed, and the threshold below which a hash is dropped."""
    return drop.seed, min(round(drop.rate * 2.0**32) - 2**31, 2**31 - 1)


def made_arguments(frame: Frame) -> tuple[Any, ...]:
    """Of a read that the kernels of a frame make inside; nothing where there is none."""
    made = frame.made
    if made is None:
        return ()
    q, k = dense(made.alone.q), dense(made.alone.k)
    gate = () if made.gate is None else (made.gate,)
    strides = (q.stride(0), q.stride(2), k.stride(0), k.stride(2))
    return (q, k, made.protected, made.carries, *gate, *strides, made.carries.shape[1], made.past)


@lru_cache(maxsize=256)
def folded(pairs: int) -> tuple[int, int]:
    """Pairs of batch item and head as the second and third size of a launch: a device takes so many
    along either, and any number along the first. (0, 0) where no two numbers give that many.
    """
    parts = -(-pairs // MOST_OF_AN_AXIS)
    while parts <= MOST_OF_AN_AXIS:
        if pairs % parts == 0:
            return pairs // parts, parts
        parts += 1
    return 0, 0


def constants_of(
    given: Inputs, tile: Tile, *others: Tensor, made: Made | None = None
) -> dict[str, Any]:
    """What a kernel of a call is compiled for.

    Args:
        others: what it reads beside the tensors of the call.
        made: what it makes instead of reading it.
    """
    import triton.language as tl

    width, value_width = given.q.shape[3], given.v.shape[3]
    reads = [x for i, x in enumerate(given.reads) if made is None or i != made.slot]
    tensors = (*given.qkv, *reads, *others, *([] if made is None else [made.carries]))
    # gradients of reads are dense, also where a read is expanded
    reach = max(
        max(x.numel(), sum((n - 1) * abs(s) for n, s in zip(x.shape, x.stride(), strict=True)))
        for x in tensors
    )
    return {
        "GROUP": given.q.shape[1] // given.k.shape[1],
        "HEADS": tile.heads,
        "SPLITS": tile.splits,
        "D": width,
        "DV": value_width,
        "BLOCK_D": power(width),
        "BLOCK_DV": power(value_width),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "PRECISION": precision(),
        "INDEX": tl.int64 if reach >= _FAR else tl.int32,
        **({} if made is None else _of_made(made)),
    }


def _of_made(made: Made) -> dict[str, Any]:
    width = made.alone.q.shape[3]
    return {"E": width, "BLOCK_E": power(width), "CARRY": made.rows}


def precision() -> str:
    """How products of 32-bit numbers are computed: "tf32" only where PyTorch would round them too.

    PyTorch's older switch, `allow_tf32`, raises where the newer one was used.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def power(n: int) -> int:
    """The next power of two, at least 16: what a matrix unit takes."""
    return max(16, 1 << (n - 1).bit_length())


# ---------------------------------------------------------------- which tiles


@dataclass(frozen=True, slots=True)
class Visited:
    """How the blocks of a launch learn which tiles to run over, and the arguments that say it."""

    kind: Visits
    args: tuple[Any, ...]


def rows_visited(frame: Frame, tile: Tile, band: tuple[int, int] | None = None) -> Visited:
    """Blocks of rows that run over keys, all or those from one to before another."""
    if tile.heads == tile.splits == 1 and blocks.wanted(frame):
        return _lists(frame, tile, blocks.by_rows(frame, tile.rows, tile.keys))
    visits = schedule.by_rows(frame.grid, tile.rows, tile.keys, tile.heads)
    if visits is not None and band is not None:
        visits = tuple(v for v in visits if band[0] <= v.block < band[1])
    return _table(visits, frame.device)


def keys_visited(frame: Frame, tile: Tile) -> Visited:
    """Blocks of keys that run over rows."""
    if blocks.wanted(frame):
        return _lists(frame, tile, blocks.by_keys(frame, tile.rows, tile.keys))
    return _table(schedule.by_keys(frame.grid, tile.rows, tile.keys), frame.device)


def _lists(frame: Frame, tile: Tile, found: blocks.Blocks) -> Visited:
    whole = blocks.whole(frame.given.program, tile.rows, tile.keys)
    return Visited("whole lists" if whole else "lists", (*found.tensors, *found.strides))


def _table(visits: Sequence[Visit] | None, device: torch.device) -> Visited:
    if visits is None:
        return Visited("all", ())
    table = _table_on(visits, device)
    recorded(table)
    return Visited("table", (table,))


@lru_cache(maxsize=256)
def _table_on(visits: Sequence[Visit], device: torch.device) -> Tensor:
    """A schedule on the device; a shape that was seen costs no transfer."""
    rows = [(v.block, v.lo, v.full_lo, v.full_hi, v.hi) for v in visits]
    return on_device(torch.tensor(rows, dtype=torch.int32), device)
