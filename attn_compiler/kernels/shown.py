"""What would run for a call on a device that need not be there: who, how long, and its text.

call, h200   ->   Shown("triton", Tile(128, 64, ...), 0.00042, {"forward": "...", ...})
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from attn_compiler.cost.cpu import ranked
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.peers import order, peers
from attn_compiler.cost.problem import Problem, visible
from attn_compiler.cost.roofline import Time
from attn_compiler.cost.search import choose
from attn_compiler.ir.expr import slots
from attn_compiler.kernels import blocks, flash_triton, schedule
from attn_compiler.kernels.frame import Frame, Inputs
from attn_compiler.kernels.gpu_tiles import forward_tile, problem_of
from attn_compiler.kernels.launch import Tile, structure_of
from attn_compiler.kernels.sdpa_gpu import refusal
from attn_compiler.kernels.triton_source import Visits, backward_source, forward_source


@dataclass(frozen=True, slots=True)
class Call:
    """What the cost model was asked: sizes, and a device."""

    problem: Problem
    hardware: Hardware


@dataclass(frozen=True, slots=True)
class Shown:
    """What would run.

    Attributes:
        name: "cudnn", "flash", "triton", "composite" (PyTorch's operators), or on a CPU "sdpa",
            "blocked".
        why: why no kernel is generated, "" if one is or none is needed.
        tile: of the generated kernel.
        seconds: predicted for the forward, None where nothing is known.
        limit: what bounds it.
        work: operations of matrix products, and bytes that have to cross memory's bus.
        sources: texts of generated kernels, by name.
        call: what was asked, None where there is nothing to compute.
    """

    name: str
    why: str = ""
    tile: Tile | None = None
    seconds: float | None = None
    limit: str = ""
    work: tuple[float, float] = (0.0, 0.0)
    sources: dict[str, str] = field(default_factory=dict)
    call: Call | None = None


def shown(given: Inputs, hardware: Hardware) -> Shown:
    """Whatever runs a call, whose tensors need no data.

    Args:
        given: the call; tensors on the "meta" device do.
        hardware: of any kind.
    """
    if any(x.numel() == 0 for x in given.qkv):
        return Shown("composite", "no elements")
    problem = problem_of(given)
    return replace(_runs(given, hardware, problem), call=Call(problem, hardware))


def _runs(given: Inputs, hardware: Hardware, problem: Problem) -> Shown:
    if hardware.kind == "cpu":
        name, time = _on_a_cpu(hardware, problem)
        return Shown(name, seconds=time.seconds, limit=time.limit, work=_work(problem))
    family = family_of(hardware)
    why = (
        flash_triton.refusal(given) if family else f"{hardware.arch} has no matrix units in Triton"
    )
    if why:
        return Shown("composite", why)
    # a band is nearly the mask; what a kernel is given has to be exactly that
    theirs = {n: t for n, t in peers(hardware, problem).items() if not refusal(n, given)}
    name = order(hardware, problem.bucketed(), (*theirs, "triton"))[0]
    if name != "triton":
        time = {str(peer): time for peer, time in theirs.items()}[name]
        return Shown(name, seconds=time.seconds, limit=time.limit, work=_work(problem))
    tile = forward_tile(given, family, hardware)
    made = Shown("triton", tile=tile, work=_work(problem), sources=_sources(given, tile))
    found = choose(hardware, problem, "forward")
    if not found:
        return made
    return replace(made, seconds=found[0][1].seconds, limit=found[0][1].limit)


def _work(problem: Problem) -> tuple[float, float]:
    """Operations and bytes of a forward, each tensor once."""
    pairs, width = problem.batch * problem.heads, problem.head_dim + problem.value_dim
    seen = pairs * visible(problem)
    rows = pairs * problem.rows
    keys = problem.batch * problem.kv_heads * problem.keys
    moved = problem.itemsize * (rows + keys) * width + seen * problem.score_bytes
    return 2 * seen * width, moved


def family_of(hardware: Hardware) -> str:
    """Which tiles suit a device; empty where Triton uses no matrix units."""
    if hardware.kind == "amd":
        return "amd"
    capability = int(hardware.arch.removeprefix("sm_"))
    return "hopper" if 90 <= capability < 120 else "ampere" if capability >= 80 else ""


@lru_cache(maxsize=1024)
def _on_a_cpu(hardware: Hardware, problem: Problem) -> tuple[str, Time]:
    return next(way for way in ranked(hardware, problem) if way[0] != "keep")


def _sources(given: Inputs, tile: Tile) -> dict[str, str]:
    frame = Frame(given)
    kind = _visits(frame, tile)
    needs = tuple(
        i for i in slots(frame.plan.program.score) if given.reads[i].dtype.is_floating_point
    )
    structure = structure_of(frame, tile, kind)
    return {
        "forward": forward_source(structure),
        "backward": backward_source(structure_of(frame, tile, kind, needs)),
    }


def _visits(frame: Frame, tile: Tile) -> Visits:
    """As `launch.rows_visited` says it, without making the lists."""
    if tile.heads == tile.splits == 1 and blocks.wanted(frame):
        whole = blocks.whole(frame.given.program, tile.rows, tile.keys)
        return "whole lists" if whole else "lists"
    found = schedule.by_rows(frame.grid, tile.rows, tile.keys, tile.heads)
    return "all" if found is None else "table"


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """[B, heads, rows, features] without data, as a model lays it out."""
    batch, heads, rows, width = shape
    return torch.empty(batch, rows, heads, width, dtype=dtype, device="meta").transpose(1, 2)
