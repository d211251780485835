"""Attention on a CPU: what the ways to compute it cost, and which is the fastest.

    keep      as it is written: scores, scaled, masked, softmax, product, each through memory
    sdpa      PyTorch's fused kernel in one call: scores stay in cache, a causal half is skipped
    blocked   the same kernel by blocks of rows, each with the keys its band reaches
    gathered  the same kernel on the tiles that a map of blocks keeps, copied side by side

    time = sum over phases of   calls + pages + max(work, memory) + (1 - hidden) min(work, memory)

Every phase waits for the one before. Work is products and exponentials; memory is the last cache
for what fits into it and main memory for the rest; pages that are new to the process are cleared by
the system first. Good enough to rank these; a busy machine needs several times the seconds.

Source: the loops of `_scaled_dot_product_flash_attention_for_cpu` in PyTorch, and of `kernels.
flash_cpu` and `kernels.gathered_cpu`; glibc's malloc for what is a fresh page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from attn_compiler.cost.calibration import Calibration
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.problem import Problem, TileConfig, blocks
from attn_compiler.cost.roofline import Time
from attn_compiler.cost.work import matrix_rate

if TYPE_CHECKING:
    from attn_compiler.cost.letters import Cost

Way = Literal["keep", "sdpa", "blocked", "gathered"]
# keys that PyTorch's kernel takes at once
_KEYS_OF_THE_KERNEL = 512
# rows of a block of `blocked`
_ROWS = 128
# allocations from here on are handed back to the system when they are freed
_FRESH, _PAGE = 2.0**25, 4096.0
# what an element of an expression costs beside an exponential (assumed)
_PASS = 0.6
# elements that a call of `gathered` copies, and its calls of PyTorch
_GATHERED, _CALLS_OF_A_BUCKET = 2.0**22, 25
_CALLS_OF_A_BLOCK = 14


@dataclass(frozen=True, slots=True)
class Phase:
    """What has to be done before the next phase begins.

    Attributes:
        flops: of matrix products.
        exps: exponentials, and what belongs to a softmax.
        other: elements that expressions make, each once for each of their operators.
        moved: bytes read and written.
        held: bytes among which they lie.
        fresh: bytes of them in memory that is new to the process.
        programs: pieces that threads can take.
        calls: of PyTorch.
    """

    flops: float = 0.0
    exps: float = 0.0
    other: float = 0.0
    moved: float = 0.0
    held: float = 0.0
    fresh: float = 0.0
    programs: float = math.inf
    calls: float = 1.0


Phases = tuple[Phase, ...]


# ---------------------------------------------------------------- what is done


def ways(problem: Problem, density: float | None = None, side: int = 64) -> dict[Way, Phases]:
    """The ways that a call can take.

    Args:
        problem: the call; its band holds for a map of blocks too.
        density: share of the blocks that a map keeps, None where there is no map.
        side: rows and keys of such a block.
    """
    masked = density is not None
    found: dict[Way, Phases] = {"keep": _written(problem, masked), "sdpa": _fused(problem, masked)}
    if density is not None:
        found["gathered"] = _gathered(problem, density, side)
    elif _banded(problem) and not _causal(problem):
        found["blocked"] = _blocked(problem)
    return found


def _banded(problem: Problem) -> bool:
    return problem.left is not None or problem.right is not None


def _causal(problem: Problem) -> bool:
    """Is it the mask that PyTorch's kernel knows by itself?"""
    return problem.right == 0 and problem.left is None and problem.shift == 0


def _bytes_of(problem: Problem, heads: int, length: float) -> float:
    width = problem.head_dim + problem.value_dim
    return float(problem.itemsize * problem.batch * heads * length * width)


def _fresh(size: float) -> float:
    return size if size >= _FRESH else 0.0


def _written(problem: Problem, masked: bool) -> Phases:
    pairs = problem.batch * problem.heads
    grid = float(pairs * problem.rows * problem.keys)
    scores, rows = grid * problem.itemsize, _bytes_of(problem, problem.heads, problem.rows)
    keys = _bytes_of(problem, problem.heads, problem.keys)
    once = Phase(moved=2 * scores, held=2 * scores, fresh=_fresh(scores))
    masks = _banded(problem) or masked or problem.score_bytes > 0
    found = [
        # keys and values of a group are copied for each of its heads
        replace(once, moved=keys + keys / problem.group, held=2 * keys, fresh=_fresh(keys / 2))
        if problem.group > 1
        else Phase(calls=0),
        replace(once, flops=2 * grid * problem.head_dim, moved=scores + (keys + rows) / 2),
        once,
        # a copy of the scores, and what the mask overwrites there
        replace(once, other=grid, moved=4 * scores + grid * problem.score_bytes)
        if masks
        else Phase(calls=0),
        replace(once, exps=grid),
        replace(
            once, flops=2 * grid * problem.value_dim, moved=scores + (keys + rows) / 2, fresh=0
        ),
    ]
    return tuple(phase for phase in found if phase.calls)


def _fused(problem: Problem, masked: bool) -> Phases:
    """One call; a band that is not the kernel's own causal one is given to it as a bias."""
    grid = float(problem.batch * problem.heads * problem.rows * problem.keys)
    rows = _rows_of_the_kernel(problem.rows)
    seen = grid * _causal_share(problem, rows) if _causal(problem) and not masked else grid
    biased = masked or problem.score_bytes > 0 or (_banded(problem) and not _causal(problem))
    kernel = _kernel(problem, seen, rows)
    if not biased:
        return (kernel,)
    bias = float(problem.rows * problem.keys)
    made = Phase(other=2 * bias, moved=9 * bias, held=9 * bias, fresh=_fresh(4 * bias), calls=3)
    return made, replace(kernel, other=seen)


def _rows_of_the_kernel(rows: int) -> int:
    """Rows that PyTorch's kernel takes at once."""
    return 256 if rows >= 768 else 64 if rows >= 192 else 32


def _causal_share(problem: Problem, rows: int) -> float:
    """Scores of whole blocks of rows up to the block of keys that holds their last column."""
    seen = 0
    for first in range(0, problem.rows, rows):
        last = min(first + rows, problem.rows, problem.keys)
        columns = min(problem.keys, -(-last // _KEYS_OF_THE_KERNEL) * _KEYS_OF_THE_KERNEL)
        seen += min(rows, problem.rows - first) * columns
    return seen / (problem.rows * problem.keys)


def _kernel(problem: Problem, seen: float, rows: int, calls: float = 1.0) -> Phase:
    """PyTorch's kernel over so many scores; each block of rows reads the keys it sees."""
    pairs = problem.batch * problem.heads
    blocks_of_rows = -(-problem.rows // rows)
    width = problem.head_dim + problem.value_dim
    share = seen / (pairs * problem.rows * problem.keys)
    read = _bytes_of(problem, problem.heads, problem.keys) * blocks_of_rows * share
    return Phase(
        flops=2 * seen * width,
        exps=seen,
        moved=read + _bytes_of(problem, problem.heads, problem.rows),
        # one head's keys are read again and again before the next head's
        held=_bytes_of(problem, problem.kv_heads, problem.keys)
        / (1.0 if blocks_of_rows == 1 else problem.batch * problem.kv_heads),
        programs=float(pairs * blocks_of_rows),
        calls=calls,
    )


def _blocked(problem: Problem) -> Phases:
    reached = sum(n * t for n, t in blocks(problem, "forward", TileConfig(_ROWS, _ROWS, 1, 1)))
    grid = float(problem.batch * problem.heads * problem.rows * problem.keys)
    # the ragged last tiles are not computed in full
    seen = min(grid, reached * _ROWS * _ROWS)
    number = -(-problem.rows // _ROWS)
    bias = seen / (problem.batch * problem.heads)
    kernel = _kernel(problem, seen, 32, number)
    rows = _bytes_of(problem, problem.heads, problem.rows)
    return (
        Phase(other=5 * bias, moved=12 * bias, held=12 * bias / number, calls=8 * number),
        replace(kernel, other=seen, programs=kernel.programs / number),
        Phase(moved=rows, held=rows, calls=5 * number),
    )


def _gathered(problem: Problem, density: float, side: int) -> Phases:
    pairs = problem.batch * problem.heads
    blocks_of_rows = -(-problem.rows // side)
    kept = density * -(-problem.keys // side) * side
    seen = pairs * problem.rows * kept
    copied = _bytes_of(problem, problem.kv_heads, kept * blocks_of_rows)
    rows = _bytes_of(problem, problem.heads, problem.rows)
    # blocks of rows with equally many tiles go together, if that is not too much at once
    parts = max(min(blocks_of_rows, 8.0), copied / problem.itemsize / _GATHERED)
    number = _CALLS_OF_A_BUCKET * parts
    return (
        Phase(moved=2 * copied + 2 * rows, held=2 * copied / parts, calls=number),
        Phase(
            flops=2 * seen * (problem.head_dim + problem.value_dim),
            exps=seen,
            moved=copied * problem.group * -(-side // 32),
            held=copied / parts,
            programs=float(pairs * blocks_of_rows) / parts,
        ),
    )


# ---------------------------------------------------------------- how long it takes


def time_of(phases: Iterable[Phase], hardware: Hardware, itemsize: int, fit: Calibration) -> Time:
    """Phases, one after the other."""
    sums: dict[str, float] = {}
    total = 0.0
    for phase in phases:
        parts = _parts(phase, hardware, itemsize, fit)
        for name, seconds in parts.items():
            sums[name] = sums.get(name, 0.0) + seconds
        busy, moved = parts["tensor"] + parts["special"], parts["l2"] + parts["dram"]
        total += max(busy, moved) + (1.0 - fit.hidden) * min(busy, moved)
        total += parts["launch"] + parts["pages"]
    return Time(total, max(sums, key=lambda name: sums[name]), tuple(sums.items()))


def _parts(phase: Phase, hardware: Hardware, itemsize: int, fit: Calibration) -> dict[str, float]:
    """Seconds of each kind of work by itself."""
    # a core that has one piece more than others is waited for
    busy = 1.0
    if phase.programs < math.inf:
        rounds = math.ceil(phase.programs / hardware.processors)
        busy = phase.programs / (rounds * hardware.processors)
    clock = hardware.clock * hardware.sustained * hardware.processors * busy
    near = min(1.0, hardware.l2 / phase.held) if phase.held else 1.0
    cached = hardware.l2_rate * hardware.clock * fit.l2 * busy
    return {
        "tensor": phase.flops / (clock * matrix_rate(hardware, itemsize, False) * fit.clock),
        "special": (phase.exps + _PASS * phase.other) / (clock * hardware.exps),
        "l2": phase.moved * near / cached,
        "dram": phase.moved * (1.0 - near) / (hardware.dram_rate * fit.dram * busy),
        "launch": phase.calls * fit.launch,
        "pages": phase.fresh / _PAGE * fit.prologue / hardware.clock,
    }


def ranked(
    hardware: Hardware, problem: Problem, density: float | None = None, side: int = 64
) -> tuple[tuple[Way, Time], ...]:
    """The ways with their times, the fastest first; of equal ones the one that changes less."""
    found = [
        (name, time_of(phases, hardware, problem.itemsize, hardware.constants_of(name)))
        for name, phases in ways(problem, density, side).items()
    ]
    return tuple(sorted(found, key=lambda way: way[1].seconds))


def phase_of(cost: Cost) -> Phase:
    """A cost in numbers, of operators of which no more is known."""
    moved = cost.read + cost.written
    return Phase(cost.flops, cost.exps, cost.other, moved, moved, calls=cost.launches)


def time_of_cost(
    cost: Cost, hardware: Hardware, itemsize: int = 4, template: str = "layer"
) -> Time:
    """The time of a cost in numbers."""
    return time_of((phase_of(cost),), hardware, itemsize, hardware.constants_of(template))
