"""What a generated kernel does per tile and per call: operations, exponentials, bytes.

forward           s = q k^T,  out += p v                            2 (d + e) flop per score
queries           s,  dp = g v^T,  dq += ds k                       2 (2 d + e)
keys_and_values   s,  dp,  dv += p^T g,  dk += ds^T q               2 (2 d + 2 e)

Source: the kernels in `kernels/templates`; how matrix instructions read their operands, NVIDIA's
PTX manual.
"""

from __future__ import annotations

from dataclasses import dataclass

from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.problem import Blocks, Problem, Template, TileConfig, blocks, visible

# operations on a score beside its products and its exponential
_OTHER = {"forward": 5, "queries": 8, "keys_and_values": 8}
# what Hopper reaches without its asynchronous matrix instruction (assumed)
_WITHOUT_WGMMA = 0.6
# bytes that shared memory hands to a processor per clock
_SHARED_RATE = 128.0


@dataclass(frozen=True, slots=True)
class Step:
    """Clocks of one processor for one tile, by what is busy.

    Attributes:
        tensor: matrix units.
        shared: shared memory, feeding them.
        special: exponentials and what else is done to scores.
        bytes: loaded from beyond the processor.
    """

    tensor: float
    shared: float
    special: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Work:
    """A call: its programs, one tile of them, and the bytes that cross memory's bus.

    Attributes:
        blocks: programs and how many tiles each visits.
        step: one tile.
        l2: bytes from the last cache to the processors.
        dram: bytes between memory and the last cache.
        launches: kernels.
    """

    blocks: Blocks
    step: Step
    l2: float
    dram: float
    launches: int


def work(hardware: Hardware, problem: Problem, template: Template, tile: TileConfig) -> Work:
    """What a call does with a tile."""
    found = blocks(problem, template, tile)
    step = _step(hardware, problem, template, tile)
    programs, tiles = sum(n for n, _ in found), sum(n * t for n, t in found)
    own = _bytes_of_a_program(problem, template, tile)
    l2 = tiles * step.bytes + programs * own
    dram = min(l2, _dram(hardware, problem, template, tile, programs))
    merged = _merging(problem) * tile.splits if tile.splits > 1 else 0.0
    return Work(found, step, l2 + merged, dram + merged, 2 if tile.splits > 1 else 1)


def matrix_rate(hardware: Hardware, itemsize: int, tf32: bool) -> float:
    """Operations per clock of one processor in matrix products."""
    if itemsize >= 4:
        return (tf32 and hardware.flops_tf32) or hardware.flops32
    return hardware.flops16 or hardware.flops32


def _step(hardware: Hardware, problem: Problem, template: Template, tile: TileConfig) -> Step:
    m, n, d, e = tile.block_m, tile.block_n, problem.width, problem.value_width
    rate = matrix_rate(hardware, problem.itemsize, problem.tf32)
    # the side of the products that the accumulator's rows run along
    side = n if template == "keys_and_values" else m
    wgmma = hardware.arch in ("sm_90", "sm_100") and side >= 64 and problem.itemsize == 2
    if hardware.arch == "sm_90" and not wgmma:
        rate *= _WITHOUT_WGMMA
    depth = {"forward": d + e, "queries": 2 * d + e, "keys_and_values": 2 * d + 2 * e}[template]
    # with mma each warp reads the whole other operand for its 16 rows or more; with wgmma four
    # warps and 64 rows do
    readers = min(tile.warps // 4, side // 64) if wgmma else min(tile.warps, max(1, side // 16))
    other_side = m if template == "keys_and_values" else n
    shared = max(1, readers) * other_side * depth * problem.itemsize / _SHARED_RATE
    lanes = hardware.flops32 / 2
    others = m * n * _OTHER[template] + (m * e if template == "forward" else 0)
    special = m * n / hardware.exps + others / lanes
    loaded = other_side * (problem.head_dim + problem.value_dim) * problem.itemsize
    return Step(
        tensor=2 * m * n * depth / rate,
        shared=shared,
        special=special,
        bytes=loaded + m * n * problem.score_bytes,
    )


def _bytes_of_a_program(problem: Problem, template: Template, tile: TileConfig) -> float:
    """What it reads once and writes."""
    d, e, size = problem.head_dim, problem.value_dim, problem.itemsize
    if template == "forward":
        return tile.block_m * (d * size + e * (size if tile.splits == 1 else 4) + 4)
    if template == "queries":
        return tile.block_m * (2 * d * size + e * size + 8)
    return tile.block_n * 2 * (d + e) * size


def _dram(
    hardware: Hardware, problem: Problem, template: Template, tile: TileConfig, programs: float
) -> float:
    """Every tensor once, and the side that all programs of a head share once more for each wave
    that finds it no longer in the last cache."""
    d, e, size = problem.head_dim, problem.value_dim, problem.itemsize
    if template == "keys_and_values":
        pairs = problem.batch * problem.heads
        shared = problem.rows * ((d + e) * size + 8)
        own = problem.batch * problem.kv_heads * problem.keys * 2 * (d + e) * size
        per_pair = float(-(-problem.keys // tile.block_n))
    else:
        pairs = problem.batch * problem.kv_heads
        shared = problem.keys * (d + e) * size
        ways = {"forward": d + e, "queries": 2 * d + e}[template]
        own = problem.batch * problem.heads * problem.rows * (ways * size + 4)
        per_pair = programs / pairs
    at_once = min(programs, hardware.processors)
    held = min(pairs, at_once / per_pair + 1) * shared
    passes = 1.0 if held <= hardware.l2 else max(1.0, per_pair / at_once)
    scores = 0.0
    if problem.score_bytes:
        scores = problem.score_bytes * visible(problem) * problem.batch * problem.heads
    return float(pairs * shared * passes + own + scores)


def _merging(problem: Problem) -> float:
    """Bytes written and read again for each part of the keys."""
    return 8.0 * problem.batch * problem.heads * problem.rows * (problem.value_dim + 1)
