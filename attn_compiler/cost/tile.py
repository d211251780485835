"""The tiles that a call may use on a device: known to fit and not to spill.

    h200, forward, head dim 128   ->   (64, 32, 4, 2) ... (128, 128, 8, 3), each with residents

The lattice is what the compiler was asked about (`limits`) for the architecture, and for those that
run its code; a target it was never asked about has no tiles, nor have those below sm_80, where
Triton uses no matrix units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.limits import Facts, compiled_tiles, facts, resident
from attn_compiler.cost.problem import SHORT, Problem, Template, TileConfig, padded

_WIDEST = 256
# narrower heads take no more than these
_NARROWEST = 64
# rows of the heads of a group that share their keys (see `SHORT`)
_PACKED = 64
_SPLITS = (1, 2, 4, 8, 16, 32, 64)
# no split where programs fill so much of the processors
_BUSY = 0.8
# what a score program may take beside the plain kernel: registers, bytes per score and buffer
_EXTRA_REGISTERS = 48
_EXTRA_BYTES = 4


def legal(hardware: Hardware, problem: Problem, template: Template) -> list[tuple[TileConfig, int]]:
    """Tiles with the number of programs that live on a processor at once."""
    width = max(_NARROWEST, problem.width, problem.value_width)
    # the compiler was asked about exact products of 32-bit numbers only
    if width > _WIDEST or (problem.itemsize == 4 and problem.tf32):
        return []
    found = []
    fitting = _fitting(hardware, template, width, problem.itemsize)
    if template == "forward":
        # rows that are not there cost as much as others
        enough = max(16, padded(problem.rows * _heads(problem)))
        least = min((tile.block_m for tile, _ in fitting), default=0)
        fitting = tuple(f for f in fitting if f[0].block_m <= max(enough, least))
    for tile, takes in fitting:
        if problem.extra or problem.score_bytes:
            takes = _with_extra(takes, tile)
        count = resident(hardware, tile.warps, takes.registers, takes.shared)
        if count:
            found += [(t, count) for t in _launched(hardware, problem, template, tile)]
    return found


@lru_cache(maxsize=64)
def _fitting(
    hardware: Hardware, template: Template, width: int, itemsize: int
) -> tuple[tuple[TileConfig, Facts], ...]:
    """Every tile of the lattice that runs at all."""
    found = []
    for tile in compiled_tiles(hardware.arch, template, width, itemsize):
        takes = facts(hardware, template, width, itemsize, tile)
        if takes is None or takes.spilled:
            continue
        if resident(hardware, tile.warps, takes.registers, takes.shared):
            found.append((tile, takes))
    return tuple(found)


def _with_extra(takes: Facts, tile: TileConfig) -> Facts:
    """The most that a kernel takes whose score is a program."""
    more = tile.block_m * tile.block_n * _EXTRA_BYTES * tile.stages
    return replace(takes, shared=takes.shared + more, registers=takes.registers + _EXTRA_REGISTERS)


def _heads(problem: Problem) -> int:
    """Query heads that a program takes together."""
    together = problem.rows <= SHORT and problem.group * problem.rows <= _PACKED
    return problem.group if together else 1


def _launched(
    hardware: Hardware, problem: Problem, template: Template, tile: TileConfig
) -> Iterator[TileConfig]:
    """The ways to launch a tile: packed heads of a short query, and parts of the keys."""
    if template != "forward":
        yield tile
        return
    heads = _heads(problem)
    programs = -(-problem.rows * heads // tile.block_m) * problem.batch * problem.heads // heads
    for splits in _SPLITS:
        if splits == 1 or programs < _BUSY * hardware.processors:
            yield replace(tile, heads=heads, splits=splits)
