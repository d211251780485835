"""Random graphs compute the same before and after, whatever was decided about them.

The default run takes a few; the slow tier 2,400. A seed that ever failed is listed below and stays.
"""

from __future__ import annotations

from typing import Any

import claims
import pytest
import torch
from torch.utils._pytree import tree_map

from zoo.fuzz import draw
from zoo.library import compiled

CHUNK = 100
REMEMBERED = (
    151, 201, 217, 263, 342, 349, 363, 506, 517, 523, 536, 637, 756, 774, 984,
    1027, 1118, 1127, 1144, 1191, 1316, 1377, 1460, 1621,
)  # fmt: skip


def _shuffled(inputs: Any, seed: int) -> Any:
    """The same numbers in other places."""
    generator = torch.Generator().manual_seed(seed)

    def shuffle(leaf: Any) -> Any:
        if not (isinstance(leaf, torch.Tensor) and leaf.is_floating_point()):
            return leaf
        order = torch.randperm(leaf.numel(), generator=generator)
        other = leaf.detach().clone()
        other.copy_(leaf.detach().flatten()[order].view(leaf.shape))
        return other.requires_grad_(leaf.requires_grad)

    return tree_map(shuffle, inputs)


def _try(seed: int, dynamic: bool) -> int:
    """How many sites were rewritten."""
    import attn_compiler

    module, inputs, training = draw(seed)
    try:
        claims.run(module, inputs, {}, module, training)
    except RuntimeError as error:
        # a write that autograd refuses in the original too
        assert "modified by an inplace operation" in str(error), error
        return 0
    fast = compiled(module, dynamic=dynamic)
    try:
        try:
            claims.same_numbers(module, fast, inputs, training=training)
        except claims.Beyond as found:
            # the rounding of one draw has a tail; a wrong result comes back with other numbers
            if found.ratio > 2:
                raise
            for again in range(3):
                claims.same_numbers(module, fast, _shuffled(inputs, again), training=training)
    except Exception as error:
        told = claims.decisions(attn_compiler.last_report())
        raise AssertionError(
            f"seed {seed}, dynamic={dynamic}: {type(error).__name__}: {error}\n{told}"
        ) from error
    return claims.accepted(attn_compiler.last_report())


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("seed", REMEMBERED)
def test_seeds_that_once_failed(seed: int, dynamic: bool) -> None:
    _try(seed, dynamic)


def test_a_few_random_graphs() -> None:
    assert sum(_try(seed, bool(seed % 2)) for seed in range(12)) > 2


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(25))
def test_many_random_graphs(chunk: int) -> None:
    first = chunk * CHUNK
    assert sum(_try(seed, bool(seed % 2)) for seed in range(first, first + CHUNK)) > 20
