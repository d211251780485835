"""Attention by generated Triton kernels: any program, on a GPU (or in Triton's interpreter).

    out, lse = launch(Call.of(frame), tile)

A short query shares its keys among the heads of a group and, where that leaves the device idle,
among several programs: each takes a part of the keys, `combine` joins what they found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attn_compiler.ir.expr import Call, walk
from attn_compiler.ir.score import Program
from attn_compiler.kernels.frame import Frame, Inputs, empty_heads
from attn_compiler.kernels.rows import pull_back
from attn_compiler.kernels.schedule import Visit, by_keys, by_rows
from attn_compiler.kernels.template import load, render
from attn_compiler.kernels.triton_source import Structure, backward_source, forward_source
from attn_compiler.kernels.triton_text import UNPRINTABLE, Kind

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256


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
    """

    rows: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2
    heads: int = 1
    splits: int = 1


def refusal(given: Inputs) -> str:
    """Why no kernel can be generated for this call; empty if one can."""
    dtypes = {x.dtype for x in given.qkv}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        return f"q, k and v are {', '.join(sorted(str(d) for d in dtypes))}"
    if max(given.q.shape[3], given.v.shape[3]) > WIDEST:
        return f"head dim {max(given.q.shape[3], given.v.shape[3])} is above {WIDEST}"
    if any(read.dtype is torch.float64 or read.is_complex() for read in given.reads):
        return "the program reads a tensor in double"
    program = Program.parse(given.program)
    missing = sorted(_operations(program) & UNPRINTABLE)
    if missing:
        return f"no Triton for {', '.join(missing)}"
    if program.empty in ("uniform", "absorbed") and given.drop.rate:
        return "dropout of a row without keys"
    return ""


def _operations(program: Program) -> set[str]:
    parts = [program.score, program.mask, *([program.sink] if program.sink is not None else [])]
    return {n.op for part in parts for n in walk(part) if isinstance(n, Call)}


# ---------------------------------------------------------------- launch


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel with everything it is launched with."""

    kernel: Any
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    constants: dict[str, Any]

    def run(self) -> None:
        self.kernel[self.grid](*self.args, **self.constants)


def forward(frame: Frame, tile: Tile) -> tuple[Tensor, Tensor]:
    """out [B, H, T, dv] and lse [B, H, T] in the layout of `empty_heads`."""
    given, q, v = frame.given, frame.given.q, frame.given.v
    out = empty_heads(v, (*q.shape[:3], v.shape[3]))
    lse = empty_heads(q, q.shape[:3], torch.float32)
    part, part_lse = out[None], lse[None]
    if tile.splits > 1:
        part = torch.empty((tile.splits, *out.shape), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((tile.splits, *lse.shape), dtype=torch.float32, device=q.device)
    prepare(frame, tile, part, part_lse).run()
    if tile.splits > 1:
        _combine(part, part_lse, out, lse, given)
    return out, lse


def prepare(frame: Frame, tile: Tile, part: Tensor, part_lse: Tensor) -> Launch:
    """The forward kernel of a call; its results are [splits, B, H, T, dv] and [splits, B, H, T]."""
    given, grid = frame.given, frame.grid
    q, k, v = (_dense(x) for x in given.qkv)
    visits = by_rows(grid, tile.rows, tile.keys, tile.heads)
    table = part_lse if visits is None else _table(visits, q.device)
    strides = [n for x in (q, k, v) for n in x.stride()[:3]]
    strides += [*part.stride()[:4], *part_lse.stride()]
    sizes = (grid.B, grid.H, grid.T, grid.S)
    return Launch(
        load("forward", forward_source(_structure(frame, tile, visits is not None))).forward,
        (-(-grid.T * tile.heads // tile.rows), grid.B * grid.H // tile.heads, tile.splits),
        (q, k, v, part, part_lse, table, *_program_arguments(given), *strides, *sizes, given.scale),
        _constants(given, tile) | {"num_warps": tile.warps, "num_stages": tile.stages},
    )


def _combine(part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, given: Inputs) -> None:
    batch, heads, rows, width = out.shape
    empty = Program.parse(given.program).empty in ("nan", "nan_added")
    kernel = load("combine", render("combine")).combine
    kernel[rows, batch * heads](
        *(part, part_lse, out, lse),
        *(*part.stride()[:4], *part_lse.stride(), *out.stride()[:3], *lse.stride()),
        heads,
        SPLITS=part.shape[0],
        DV=width,
        BLOCK_DV=_power(width),
        BLOCK_SPLITS=_power(part.shape[0]),
        NAN=empty,
        num_warps=4,
    )


# ---------------------------------------------------------------- backward


def backward(
    frame: Frame,
    grad: Tensor,
    saved: tuple[Tensor, Tensor],
    into: Mapping[int, Tensor],
    tiles: tuple[Tile, Tile],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; those of the reads are added to `into` (float32), by slot.

    Args:
        frame: the call.
        grad: the gradient of out.
        saved: out and lse.
        into: where gradients of reads go.
        tiles: of the kernel that runs over rows for a block of keys, and of its opposite.
    """
    dq, dk, dv = (empty_heads(x, x.shape) for x in frame.given.qkv)
    for launch in prepare_backward(frame, grad, saved, into, tiles, (dq, dk, dv)):
        launch.run()
    plan = frame.plan
    if plan.sink is not None and plan.program.sink is not None:
        # d sink = -p_sink * sum(g * out),  p_sink = exp(sink - lse)
        out, lse = (x.to(frame.dtype) for x in saved)
        whole = frame.grid.whole()
        tensors = frame.tensors(whole)
        share = torch.exp(frame.value(plan.sink, whole, tensors) - lse.unsqueeze(-1))
        delta = (grad.to(frame.dtype) * out).sum(-1, keepdim=True)
        pull_back(frame, whole, plan.sink, -share * delta, into, tensors)
    return dq, dk, dv


def prepare_backward(
    frame: Frame,
    grad: Tensor,
    saved: tuple[Tensor, Tensor],
    into: Mapping[int, Tensor],
    tiles: tuple[Tile, Tile],
    results: tuple[Tensor, Tensor, Tensor],
) -> list[Launch]:
    """The three kernels in the order they run."""
    given, grid, (out, lse) = frame.given, frame.grid, saved
    q, k, v, grad, out = (_dense(x) for x in (*given.qkv, grad, out))
    delta = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    dead = torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device)
    wanted = {n: into[n] for n in sorted(into.keys() & frame.plan.score_slots)}
    dq, dk, dv = results
    inputs = [n for x in (q, k, v, grad) for n in x.stride()[:3]] + list(lse.stride())
    sizes = (grid.B, grid.H, grid.T, grid.S, given.scale)
    by_key, by_row = tiles

    def part(name: str, visits: Any, tile: Tile, tensors: Any, grads: Any, strides: Any) -> Launch:
        structure = _structure(frame, tile, visits is not None, tuple(wanted))
        table = lse if visits is None else _table(visits, q.device)
        constants = _constants(given, tile)
        del constants["HEADS"], constants["SPLITS"]
        heads, blocks = (
            (grid.H, -(-grid.T // tile.rows))
            if name == "queries"
            else (k.shape[1], -(-grid.S // tile.keys))
        )
        return Launch(
            getattr(load("backward", backward_source(structure)), name),
            (blocks, grid.B * heads, 1),
            (*tensors, table, *_program_arguments(given), *grads, *inputs, *strides, *sizes),
            constants | {"num_warps": tile.warps, "num_stages": tile.stages},
        )

    keys = by_keys(grid, by_key.rows, by_key.keys)
    rows = by_rows(grid, by_row.rows, by_row.keys)
    to_grads = [n for d in wanted.values() for n in (d, *d.stride(), *d.shape)]
    first = part(
        "keys_and_values", keys, by_key, (q, k, v, grad, lse, delta, dead, dk, dv), (),
        [*dk.stride()[:3], *dv.stride()[:3]],
    )  # fmt: skip
    second = part(
        "queries", rows, by_row, (q, k, v, grad, lse, delta, dq), to_grads, dq.stride()[:3]
    )
    block = 64
    before = Launch(
        load(
            "backward", backward_source(_structure(frame, by_key, keys is not None, tuple(wanted)))
        ).prepare,
        (-(-grid.T // block), grid.B * grid.H, 1),
        (
            out,
            grad,
            lse,
            delta,
            dead,
            *out.stride()[:3],
            *grad.stride()[:3],
            *lse.stride(),
            grid.H,
            grid.T,
        ),
        {"DV": v.shape[3], "BLOCK_DV": _power(v.shape[3]), "BLOCK_M": block, "num_warps": 4},
    )
    return [before, first, second]


# ---------------------------------------------------------------- arguments


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _structure(frame: Frame, tile: Tile, table: bool, needs: tuple[int, ...] = ()) -> Structure:
    given = frame.given
    kinds = tuple(_kind(read) for read in given.reads)
    ranks = tuple(read.dim() for read in given.reads)
    drops = given.drop.rate > 0
    return Structure(
        given.program, kinds, ranks, len(given.ints), tile.heads > 1, table, drops, needs
    )


def _kind(read: Tensor) -> Kind:
    if read.dtype is torch.bool:
        return "bool"
    return "float" if read.is_floating_point() else "int"


def _program_arguments(given: Inputs) -> list[Any]:
    found: list[Any] = []
    for read in given.reads:
        found += [read, *read.stride(), *read.shape]
    found += given.ints
    if given.drop.rate > 0:
        threshold = round(given.drop.rate * 2.0**32) - 2**31
        found += [given.drop.seed, min(threshold, 2**31 - 1), given.drop.gain]
    return found


def _constants(given: Inputs, tile: Tile) -> dict[str, Any]:
    import triton.language as tl

    width, value_width = given.q.shape[3], given.v.shape[3]
    tensors = (*given.qkv, *given.reads)
    reach = max(
        sum((n - 1) * abs(s) for n, s in zip(x.shape, x.stride(), strict=True)) for x in tensors
    )
    return {
        "GROUP": given.q.shape[1] // given.k.shape[1],
        "HEADS": tile.heads,
        "SPLITS": tile.splits,
        "D": width,
        "DV": value_width,
        "BLOCK_D": _power(width),
        "BLOCK_DV": _power(value_width),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "INDEX": tl.int64 if reach >= 2**31 else tl.int32,
    }


def _power(n: int) -> int:
    """The next power of two, at least 16: what a matrix unit takes."""
    return max(16, 1 << (n - 1).bit_length())


@lru_cache(maxsize=256)
def _table(visits: Sequence[Visit], device: torch.device) -> Tensor:
    """A schedule on the device; a shape that was seen costs no transfer."""
    rows = [(v.block, v.lo, v.full_lo, v.full_hi, v.hi) for v in visits]
    return torch.tensor(rows, dtype=torch.int32, device=device)
