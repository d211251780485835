"""Random graphs compute the same before and after, whatever was decided about them.

The default run takes a few; the slow tier 2,400. A seed that ever failed is listed below and stays.
"""

from __future__ import annotations

import claims
import pytest

from zoo.fuzz import draw
from zoo.library import compiled

CHUNK = 100
REMEMBERED = (
    151, 201, 217, 263, 342, 349, 363, 506, 523, 637, 756, 774, 984,
    1027, 1118, 1127, 1144, 1191, 1460, 1621,
)  # fmt: skip


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
    try:
        claims.same_numbers(module, compiled(module, dynamic=dynamic), inputs, training=training)
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
    assert sum(_try(seed, bool(seed % 2)) for seed in range(60)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(1, 25))
def test_many_random_graphs(chunk: int) -> None:
    first = chunk * CHUNK
    assert sum(_try(seed, bool(seed % 2)) for seed in range(first, first + CHUNK)) > 20
