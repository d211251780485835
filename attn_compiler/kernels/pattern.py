"""From an attention map to the blocks that are kept.

    map --conv along diagonals, mean of blocks--> pool --quantile, walks--> pattern, diagonal forced

A walk starts in each block of the first row and the first column and steps right, down or across,
to the largest of the three; it marks what it enters if that lies above the quantile, and goes on
if not. It is no flood fill: a block above the quantile that no walk enters stays out.

Source: SPION (arXiv 2309.12578) and its authors' code; where the two may differ, the code. The form
for causal maps is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from attn_compiler.errors import BadOption
from attn_compiler.kernels.pooled import BlockMap

Mode = Literal["CF", "C", "F"]


def spion_pattern(
    attention_map: Tensor,
    *,
    mode: Mode = "CF",
    alpha: float | None = None,
    density: float | None = None,
    block: int,
    filter: int = 31,
    causal: bool = False,
) -> Tensor:
    """The pattern of a whole map.

    Args:
        attention_map: [L, L] or [H, L, L], mean or sum of probabilities; rows are queries.
        mode, alpha, density, causal: see `pattern_of`; a causal map loses its upper triangle.
        block: rows and columns of a block; a last block may be shorter.
        filter: elements of the diagonal filter, odd.

    Returns:
        Boolean [nb, nb] or [H, nb, nb] on the CPU.

    Raises:
        BadOption: an option has a wrong value, or the map is no map of probabilities.
    """
    given = attention_map.tril() if causal else attention_map
    pooled = BlockMap.of(given, block=block, filter=filter)
    return pattern_of(pooled, mode=mode, alpha=alpha, density=density, causal=causal)


def pattern_of(
    pooled: BlockMap,
    *,
    mode: Mode = "CF",
    alpha: float | None = None,
    density: float | None = None,
    causal: bool = False,
) -> Tensor:
    """The pattern of a map that is summed by blocks.

    Args:
        pooled: the sums.
        mode: "CF" walks over the convolved map, "F" over the map itself; "C" takes the largest
            blocks of the convolved map.
        alpha: quantile that a block has to be above (CF, F), between 0 and 1.
        density: share of blocks that is taken (C): floor(density n - nb) of n, and the diagonal.
        causal: only blocks on and below the diagonal count, in the quantile and in n too.

    Returns:
        Boolean [nb, nb] or [H, nb, nb] on the CPU.

    Raises:
        BadOption: an option has a wrong value, or the map is no map of probabilities.
    """
    if mode not in ("CF", "C", "F"):
        raise BadOption(f"mode={mode!r}", where="option mode", do='give "CF", "C" or "F"')
    pool = (pooled.plain if mode == "F" else pooled.convolved).cpu()
    if not bool((pool.isfinite() & (pool >= 0)).all()):
        raise BadOption(
            "an attention map holds negative numbers, or numbers that are not finite",
            where="option attention_map",
            do="give sums or means of softmax probabilities",
        )
    side = pool.shape[-1]
    counts = torch.ones(side, side, dtype=torch.bool)
    counts = counts.tril() if causal else counts
    pool = torch.where(counts, pool, 0.0)
    chosen = _chooser(mode, alpha, density, counts)
    kept = torch.stack([chosen(one) for one in pool.view(-1, side, side)]).view(pool.shape)
    kept.diagonal(dim1=-2, dim2=-1).fill_(True)
    return kept & counts


def _chooser(
    mode: Mode, alpha: float | None, density: float | None, counts: Tensor
) -> Callable[[Tensor], Tensor]:
    """What selects the blocks of one map, before the diagonal is forced."""
    if mode == "C":
        if density is None or not 0 < density <= 1:
            raise BadOption(
                f"mode C with density={density}",
                where="option density",
                do="give a number above 0, at most 1",
            )
        number = max(0, math.floor(density * int(counts.sum()) - len(counts)))
        return lambda pool: _largest(pool, number, counts)
    if alpha is None or not 0 < alpha < 1:
        raise BadOption(
            f"mode {mode} with alpha={alpha}",
            where="option alpha",
            do="give a number between 0 and 1",
        )
    level = alpha
    return lambda pool: entered(pool) & (pool > quantile(pool[counts], level))


def _largest(pool: Tensor, number: int, counts: Tensor) -> Tensor:
    """The largest blocks that count; of equal ones the first."""
    order = torch.where(counts, pool, -1.0).flatten().argsort(descending=True, stable=True)
    kept = torch.zeros(pool.numel(), dtype=torch.bool)
    kept[order[:number]] = True
    return kept.view_as(pool)


def quantile(values: Tensor, alpha: float) -> Tensor:
    """The value at position alpha (n - 1) of the sorted values, linear between two of them."""
    ordered = values.flatten().sort().values
    # 0.7 * 30 is no whole number in binary, and a block at the quantile is not above it
    position = round(alpha * (len(ordered) - 1), 9)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], position - low)


def entered(pool: Tensor) -> Tensor:
    """Blocks that some walk steps onto, boolean [nb, nb].

    The next step depends on the block alone, so a walk that meets an earlier one ends there.
    """
    side = len(pool)
    width = side + 1  # one more row and column of zeros, where walks end
    edge = pad(pool, (0, 1, 0, 1))
    down, right, across = edge[1:, :-1], edge[:-1, 1:], edge[1:, 1:]
    # equal neighbours: right before down, across before both
    step = torch.where(
        down > right,
        torch.where(down > across, width, width + 1),
        torch.where(right > across, 1, width + 1),
    )
    steps: list[int] = pad(step, (0, 1, 0, 1)).flatten().tolist()
    left, reached = bytearray(width * width), bytearray(width * width)
    for place in (*range(side), *range(0, side * width, width)):
        while steps[place] and not left[place]:
            left[place] = 1
            place += steps[place]
            reached[place] = 1
    found = torch.frombuffer(reached, dtype=torch.bool).view(width, width)
    return found[:side, :side].clone()
