"""A step of decoding over one tensor that is keys and values, by generated Triton kernels.

    u, lse, mass = forward(frame, tile, queries)        u = P x,  mass = P 1

All heads, beams and query rows of a sample are the rows of one matrix, so x is read once for them.
Keys are shared among programs, `combine` joins what they found; a result that is wider than a
program's registers is made by several, each of which multiplies by all of x.

Expanded queries come in float32. In 16 bits a rounded one would no longer be orthogonal to what the
keys do not see of x: what rounding has lost is multiplied, too, and rows are divided by their
largest element, since float16 does not reach far.

Source: EL-Attention (arXiv 2105.04779). Tiles were chosen by what the compiler says; none of it was
measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_compiler.ir.score import Program
from attn_compiler.kernels import flash_triton
from attn_compiler.kernels.frame import Frame, Inputs
from attn_compiler.kernels.launch import (
    Launch,
    Tile,
    dense,
    precision,
    program_arguments,
    structure_of,
)
from attn_compiler.kernels.template import load
from attn_compiler.kernels.triton_source import el_source

WIDEST = 4096
# rows from which it is no step of decoding any more
MOST_ROWS = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_COMBINED = 512
Parts = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class WideTile:
    """What is chosen for one launch.

    Attributes:
        rows, keys: of a step, powers of two from 16.
        slice: features that are multiplied at once, a power of two.
        held: slices of the result that a program makes.
        splits: programs that share the keys.
        warps, stages: of a program.
    """

    rows: int = 16
    keys: int = 32
    slice: int = 128
    held: int = 4
    splits: int = 1
    warps: int = 8
    stages: int = 2


def refusal(given: Inputs) -> str:
    """Why no kernel can be generated for this call, whose keys are x [Bx, 1, S, D]; empty if one
    can.
    """
    x = given.k
    if x.dtype not in _DTYPES or given.q.dtype is torch.float64:
        return f"x is {x.dtype}, queries are {given.q.dtype}"
    if x.shape[3] > WIDEST:
        return f"width {x.shape[3]} is above {WIDEST}"
    rows = given.q.shape[0] // x.shape[0] * given.q.shape[1] * given.q.shape[2]
    if rows > MOST_ROWS:
        return f"{rows} rows of a sample are above {MOST_ROWS}"
    if any(read.dtype is torch.float64 or read.is_complex() for read in given.reads):
        return "the program reads a tensor in double"
    program = Program.parse(given.program)
    missing = flash_triton.untold(program)
    if missing:
        return f"no Triton for {', '.join(missing)}"
    return ""


def tile(given: Inputs, processors: int, arch: str = "") -> WideTile:
    """The tile of a call: without spills on sm_80, sm_90 and sm_100, not measured on a GPU.

    Args:
        given: with x [Bx, 1, S, D] as keys.
        processors: that may share the keys.
        arch: of the device, such as "sm_100"; for Blackwell the compiler needs more registers.
    """
    x, wide = given.k, given.k.dtype is torch.float32
    usual = WideTile(held=2, stages=1) if arch.startswith("sm_1") else WideTile()
    slices = -(-x.shape[3] // 128)
    base = WideTile(keys=16, held=2, stages=1) if wide else usual
    # several programs make parts of one size
    held = -(-slices // -(-slices // base.held))
    rows = given.q.shape[0] // x.shape[0] * given.q.shape[1] * given.q.shape[2]
    programs = x.shape[0] * -(-rows // base.rows) * -(-slices // held)
    # what the parts cost to join is little beside x: splits <= S n / (32 rows)
    most = max(1, x.shape[2] * x.element_size() // (32 * rows))
    splits = max(1, min(2 * processors // programs, most, -(-x.shape[2] // base.keys)))
    return WideTile(base.rows, base.keys, 128, held, splits, base.warps, base.stages)


def forward(
    frame: Frame, tile: WideTile, queries: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """P x, lse and P 1.

    Args:
        frame: of the call, with x [Bx, 1, S, D] as keys.
        tile: what is launched.
        queries: expanded and scaled, float32 [B, H, T, D].
        shift: what is added to the scores of a row, float32 [B, H, T, 1], or None.

    Returns:
        float32 [B, H, T, D], [B, H, T], [B, H, T].
    """
    queries = queries.contiguous()
    parts = empty_parts(queries, tile.splits)
    prepare(frame, tile, (queries, shift), parts).run()
    out, lse, mass, _ = empty_parts(queries, 1)
    joined(frame, parts, (out, lse, mass)).run()
    shape = queries.shape[:3]
    return out.view(queries.shape), lse.view(shape), mass.view(shape)


def empty_parts(queries: Tensor, splits: int) -> Parts:
    """What so many programs find for each row: weighted x, maximum, sum, and sum without a sink."""
    rows = queries.shape[:3].numel()
    top, total, mass = (queries.new_empty((splits, rows)) for _ in range(3))
    return queries.new_empty((splits, rows, queries.shape[3])), top, total, mass


def prepare(
    frame: Frame,
    tile: WideTile,
    rows: tuple[Tensor, Tensor | None],
    into: Parts,
) -> Launch:
    """The launch that fills the parts."""
    given, grid, (queries, shift) = frame.given, frame.grid, rows
    x = dense(given.k[:, 0])
    batch, keys, width = x.shape
    count = grid.B // batch * grid.H * grid.T
    slices = -(-width // tile.slice)
    parts = -(-slices // tile.held)
    split_query = x.dtype is not torch.float32
    size = queries.new_ones(queries.shape[:3])
    if split_query:
        size = queries.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
    source = _source(frame, tile, shift is not None, split_query)
    return Launch(
        load("el", source).attend,
        (-(-count // tile.rows) * parts, batch, tile.splits),
        (
            *(queries, size, size if shift is None else shift.contiguous(), x, *into),
            *(*program_arguments(given), *x.stride()[:2]),
            *(grid.B, grid.H, grid.T, keys, count),
        ),
        _constants(given, tile, (width, parts, parts * tile.held)),
    )


def joined(frame: Frame, parts: Parts, into: tuple[Tensor, Tensor, Tensor]) -> Launch:
    """The launch that joins what the programs of a row have found."""
    splits, count, width = parts[0].shape
    block = min(_COMBINED, 1 << (width - 1).bit_length())
    constants = {
        "SPLITS": splits,
        "D": width,
        "BLOCK": block,
        "num_warps": 4,
    }
    module = load("el", _source(frame, WideTile(), False, False))
    return Launch(module.combine, (count, -(-width // block), 1), (*parts, *into, count), constants)


def _constants(given: Inputs, tile: WideTile, sizes: tuple[int, int, int]) -> dict[str, Any]:
    import triton.language as tl

    width, parts, slices = sizes
    reach = max(
        (
            sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride(), strict=True))
            for t in given.reads
        ),
        default=0,
    )
    return {
        "SPLITS": tile.splits,
        "PARTS": parts,
        "D": width,
        "SLICES": slices,
        "SLICE": tile.slice,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "PRECISION": precision(),
        "INDEX": tl.int64 if reach >= 2**31 else tl.int32,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _source(frame: Frame, tile: WideTile, shifted: bool, split_query: bool) -> str:
    structure = structure_of(frame, Tile(), "all")
    return el_source(structure, held=tile.held, shifted=shifted, split_query=split_query)
