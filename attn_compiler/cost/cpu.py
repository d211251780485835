"""Attention on a CPU: what the ways to compute it cost, and which is the fastest.

    keep      as it is written: scores, scaled, masked, softmax, product, each through memory
    sdpa      PyTorch's fused kernel in one call: scores stay in cache, a causal half is skipped
    blocked   the same kernel by blocks of rows, each with the keys its band reaches

Good enough to rank these; a busy machine needs several times the seconds.
"""

from __future__ import annotations

from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.letters import Cost
from attn_compiler.cost.problem import Problem, Template, TileConfig, blocks, visible
from attn_compiler.cost.roofline import Time, time_of

# rows of a block of `blocked`
_ROWS = 128
_FORWARD: Template = "forward"


def ways(problem: Problem) -> dict[str, Cost]:
    """The costs in numbers, by name."""
    pairs = problem.batch * problem.heads
    grid = float(pairs * problem.rows * problem.keys)
    width = problem.head_dim + problem.value_dim
    once = float(
        problem.itemsize
        * problem.batch
        * (problem.heads * problem.rows + problem.kv_heads * problem.keys)
        * width
    )
    banded = problem.left is not None or problem.right is not None
    causal = problem.right == 0 and problem.left is None and problem.shift == 0
    masks = grid * problem.score_bytes
    # every step but the first reads what the one before wrote: scale, mask, softmax, product
    steps = 3 + (banded or problem.score_bytes > 0)
    scores = grid * problem.itemsize * steps
    keep = Cost(2 * grid * width, grid, 5 * grid, once + scores + masks, scores, steps + 1)
    seen = pairs * visible(problem) if causal else grid
    # a band that is not the kernel's own causal one is given to it as a bias
    bias = grid / pairs * 4 if banded and not causal else 0.0
    sdpa = Cost(2 * seen * width, seen, 5 * seen, once + masks + bias, 0, 1 + (bias > 0))
    tile = TileConfig(_ROWS, _ROWS, 1, 1)
    reached = sum(n * t for n, t in blocks(problem, _FORWARD, tile)) * _ROWS * _ROWS
    calls = -(-problem.rows // _ROWS)
    # the ragged last tiles are not computed in full
    reached = min(grid, reached)
    blocked = Cost(
        2 * reached * width, reached, 5 * reached, once + masks, 0, 3 * calls if banded else 1
    )
    return {"keep": keep, "sdpa": sdpa, "blocked": blocked}


def ranked(hardware: Hardware, problem: Problem) -> tuple[tuple[str, Time], ...]:
    """The ways with their times, the fastest first; of equal ones the one that changes less."""
    found = []
    for name, cost in ways(problem).items():
        held = cost.read + cost.written
        found.append((name, time_of(cost, hardware, problem.itemsize, held=held)))
    return tuple(sorted(found, key=lambda way: way[1].seconds))
