"""The ways to compute the core of a site on a device, by the cost model, the fastest first.

the call of the example, h200   ->   triton 6 us, cudnn 8 us, keep 41 us, each with its parts
"""

from __future__ import annotations

from dataclasses import dataclass

from attn_compiler.cost import cpu
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.peers import peers
from attn_compiler.cost.points import Roofline, roofline
from attn_compiler.cost.problem import Problem, TileConfig, visible
from attn_compiler.cost.roofline import Time, time_of
from attn_compiler.cost.search import choose
from attn_compiler.cost.work import work
from attn_compiler.planning import summed

_TILES = 2


@dataclass(frozen=True, slots=True)
class Way:
    """One way.

    Attributes:
        name: "keep" is the code as it is written; else an implementation of the operator.
        detail: its tile, "" if it has none.
        time: predicted, with its limit and parts.
        flops, bytes: of matrix products; that cross the memory's bus.
    """

    name: str
    detail: str
    time: Time
    flops: float
    bytes: float


def ways(problem: Problem, hardware: Hardware) -> tuple[Way, ...]:
    """All that the cost model knows, the fastest first."""
    written = {name: summed(phases) for name, phases in cpu.ways(problem).items()}
    if hardware.kind == "cpu":
        found = [
            Way(name, "", time, written[name].flops, written[name].read + written[name].written)
            for name, time in cpu.ranked(hardware, problem)
        ]
        return tuple(found)
    keep = written["keep"]
    time = time_of(keep, hardware, problem.itemsize)
    found = [Way("keep", "", time, keep.flops, keep.read + keep.written)]
    pairs = problem.batch * problem.heads * visible(problem)
    flops = 2.0 * pairs * (problem.head_dim + problem.value_dim)
    for tile, predicted in choose(hardware, problem)[:_TILES]:
        moved = work(hardware, problem, "forward", tile).dram
        found.append(Way("triton", _tile(tile), predicted, flops, moved))
    # each tensor once: what a kernel that keeps its scores on the chip has to move
    once = written["sdpa"].read
    for name, predicted in peers(hardware, problem).items():
        found.append(Way(name, "", predicted, flops, once))
    return tuple(sorted(found, key=lambda way: way.time.seconds))


def _tile(tile: TileConfig) -> str:
    text = f"{tile.block_m} x {tile.block_n}, {tile.warps} warps, {tile.stages} stages"
    return text + (f", {tile.splits} splits" if tile.splits > 1 else "")


def drawn(problem: Problem, hardware: Hardware, found: tuple[Way, ...]) -> Roofline:
    """The roofs of the device, each way a point under them."""
    picture = roofline(hardware, problem.itemsize, problem.tf32)
    for way in found:
        picture = picture.with_point(
            way.name, (way.flops, way.bytes), way.time.seconds, way.time.limit
        )
    return picture
