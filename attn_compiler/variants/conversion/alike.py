"""Which heads of a trained layer attend alike.

    likeness[i, j] = 1 - mean over rows of JS(p_i, p_j), in bits

Source: heads grouped by their attention maps, as in DHA (arXiv 2406.06567).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

import torch
from torch import Tensor

from attn_compiler.variants.conversion.ordinary import Batches, Ordinary, calls, maps

# rounding must not swap for ever
_LEAST_GAIN = 1e-9


def similarity(layer: Ordinary, batches: Batches) -> Tensor:
    """1 less the mean Jensen-Shannon divergence of attention maps, in bits: [H, H], 1 for equal."""
    total = torch.zeros(layer.heads, layer.heads, dtype=torch.float64, device=layer.w_q.device)
    rows = 0
    for each, given in calls(layer, batches):
        for number, p in enumerate(maps(each, given)):
            if given.rows is not None and given.x_q is given.x_kv:
                p = p[:, given.rows[number]]
            rows += p.shape[1]
            entropies = _entropy(p)
            for head in range(layer.heads):
                mixed = _entropy((p + p[head]) / 2)
                total[head] += (mixed - (entropies + entropies[head]) / 2).sum(-1)
    return 1 - total / (max(rows, 1) * torch.log(torch.tensor(2.0)))


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1)


def balanced_groups(likeness: Tensor, number: int) -> tuple[tuple[int, ...], ...]:
    """Groups of equal size whose members are alike: greedy, then swaps of two while they help.

    Args:
        likeness: [H, H], symmetric.
        number: of groups, divides H.
    """
    alike = likeness.tolist()
    size = len(alike) // number
    left, groups = list(range(len(alike))), []
    while left:
        # the head that has the closest companions
        best = max(left, key=lambda h: sum(sorted(alike[h][o] for o in left)[-size:]))
        order = sorted(left, key=lambda h: (h != best, -alike[best][h]))
        groups.append(order[:size])
        left = sorted(order[size:])
    while _improved(alike, groups):
        pass
    return tuple(tuple(sorted(g)) for g in sorted(groups, key=min))


def _improved(alike: list[list[float]], groups: list[list[int]]) -> bool:
    """Swap the first two heads whose groups become more alike by it."""
    for a, b in combinations(groups, 2):
        for i, j in product(range(len(a)), range(len(b))):
            x, y = a[i], b[j]
            gain = sum(alike[y][h] - alike[x][h] for h in a if h != x)
            gain += sum(alike[x][h] - alike[y][h] for h in b if h != y)
            if gain > _LEAST_GAIN:
                a[i], b[j] = y, x
                return True
    return False


def medoid(likeness: Tensor, group: Sequence[int]) -> int:
    """The head of a group that is most like the others."""
    return max(group, key=lambda h: float(likeness[h, list(group)].sum()))
