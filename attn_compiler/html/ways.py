"""The ways to compute the core of a site on a device, by the cost model, the fastest first.

the call of the example, h200   ->   triton 6 us, cudnn 8 us, keep 41 us, each with its parts
"""

from __future__ import annotations

from dataclasses import dataclass

from sympy import Rational

from attn_compiler.cost import cpu
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.letters import rho
from attn_compiler.cost.peers import peers
from attn_compiler.cost.points import Roofline, roofline
from attn_compiler.cost.problem import Problem, TileConfig, visible
from attn_compiler.cost.roofline import Time, time_of
from attn_compiler.cost.search import choose
from attn_compiler.cost.work import work
from attn_compiler.errors import BadOption
from attn_compiler.ir.site import AttentionSite
from attn_compiler.planning import summed
from attn_compiler.variants import VARIANTS, ELAttention, Flash, costed
from attn_compiler.variants.base import Shape
from attn_compiler.variants.costs import flash

_TILES = 2
# tokens where the length of a sequence is not known
_LENGTH = 1024


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


def formulas(site: AttentionSite, problem: Problem | None) -> dict[str, str]:
    """What the site costs in the letters of `cost.letters`: its core, or what a variant with
    parameters of its own put there. Empty where no formula is known.

    Args:
        problem: of the exact operator, None where another one runs.
    """
    if problem is not None:
        banded = problem.left is not None or problem.right is not None
        causal = problem.left is None and problem.right == 0 and problem.shift == 0
        share = Rational(1, 2) if causal else rho if banded else 1
        return flash.core("prefill", share=share).texts()
    decision = site.decision
    named = [v.spec() for v in VARIANTS if decision.accepted and v.name == decision.variant]
    spec = decision.spec or next(iter(named), None)
    if spec is None or isinstance(spec, Flash) or not (site.query_heads and site.head_dim):
        return {}
    length = site.length or _LENGTH
    shape = Shape(
        batch=1,
        query=1 if isinstance(spec, ELAttention) else length,
        key=length,
        heads=site.query_heads,
        head_dim=site.head_dim,
        kv_heads=site.kv_heads,
        causal="causal" in str(site.mask),
    )
    try:
        return costed(spec, shape)[1].texts()
    except BadOption:  # a variant of another package, or sizes that it fills in elsewhere
        return {}


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
