"""SPION: operation counts, and how many blocks a pattern can have."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_compiler.cost.letters import B, C, G, H, S, T, d, e, n, rho
from attn_compiler.errors import BadOption
from attn_compiler.kernels.pattern import spion_pattern
from attn_compiler.variants.costs import spion as formulas
from attn_compiler.variants.flash import Flash
from attn_compiler.variants.flash import cost as flash_cost
from attn_compiler.variants.spion import (
    SPION,
    block_side,
    cost,
    filled,
    most_blocks,
    most_blocks_of_share,
    most_density,
)

SQUARE = {S: T, e: d, G: H}


def same(one: object, other: object) -> bool:
    return bool(sympy.expand(one - other) == 0)  # type: ignore[operator]


# length, block, alpha, density -> the most blocks of CF and of C, and their shares in percent
SETTINGS = {
    "listops": (2048, 64, 0.98, 0.04, 53, 40, 5.18, 3.91),
    "pathfinder": (1024, 32, 0.96, 0.05, 73, 51, 7.13, 4.98),
    "retrieval": (4096, 64, 0.99, 0.021, 105, 86, 2.56, 2.10),
    "image": (1024, 32, 0.96, 0.04, 73, 40, 7.13, 3.91),
    "text": (4096, 64, 0.99, 0.03, 105, 122, 2.56, 2.98),
}


@pytest.mark.parametrize("task", SETTINGS)
def test_bounds_of_the_authors_settings(task: str) -> None:
    length, block, alpha, density, followed, taken, share, share_taken = SETTINGS[task]
    side = length // block
    assert most_blocks(side, alpha) == followed
    assert most_blocks_of_share(side, density) == taken
    shares = [round(100 * count / side**2, 2) for count in (followed, taken)]
    assert shares == [share, share_taken]


@pytest.mark.parametrize("task", SETTINGS)
def test_auto_gives_the_authors_settings(task: str) -> None:
    length, block, alpha, *_ = SETTINGS[task]
    found = filled(SPION(), length)
    assert found.block == block and found.filter == 31
    assert round(float(found.alpha), 6) == alpha
    # mode C then takes at most as many as CF can keep
    side = length // block
    assert most_blocks_of_share(side, float(found.density)) == most_blocks(side, alpha)


@given(st.integers(2, 23), st.floats(0.01, 0.99), st.integers(0, 10**6))
def test_no_more_blocks_lie_above_the_quantile(side: int, alpha: float, seed: int) -> None:
    pool = torch.rand(
        side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    above = pool > torch.quantile(pool, alpha)
    assert int(above.sum()) <= most_blocks(side, alpha) - side


def test_operations_of_one_head() -> None:
    dense = formulas.operations(T * S)
    assert dense.subs({T: 16, S: 16, d: 8}) == 8560
    parts = T**2 * (2 * d - 1) + (3 * T**2 - T) + T * d * (2 * T - 1)
    assert same(dense.subs(S, T), parts)
    assert same(formulas.operations().subs(rho, 1), dense)


def test_costs_of_a_sequence() -> None:
    found = cost(SPION(), "prefill")
    assert same(found.flops.subs(SQUARE), 4 * B * H * rho * T**2 * d)
    assert same(found.exps, B * H * rho * T * S)
    index = 4 * (T / C + 1 + rho * (T / C) ** 2)
    assert same((found.read + found.written).subs(SQUARE), 4 * B * H * T * d * n + index)
    dense = flash_cost(Flash(), "training")
    both = cost(SPION(), "training")
    assert same((both.flops - found.flops).subs(SQUARE), 14 * B * H * rho * T**2 * d)
    # the list along rows and the list along columns, and nothing of the size of the scores
    assert same((both.saved - dense.saved).subs(SQUARE), 2 * index)
    # one of them forward, both backward
    assert same((both.read - dense.read).subs(SQUARE), 3 * index)
    assert same(both.flops.subs(rho, 1), dense.flops)


def test_options_in_the_costs() -> None:
    plain = cost(SPION(), "prefill")
    assert same(cost(SPION(softmax="zero_logit"), "prefill").other, 3 * B * H * T)
    sizes = {"B": 1, "H": 5, "G": 5, "T": 64, "S": 64, "d": 3, "e": 3, "n": 2, "C": 16, "rho": 0.5}
    index = 4 * (4 + 1 + 8)
    one = plain.numbers(**sizes).read
    assert cost(SPION(per_head=True), "prefill").numbers(**sizes).read - one == 4 * index
    half = [[True, False], [False, True]]
    given = cost(SPION(pattern=half, block=32), "prefill")
    assert same(given.flops, plain.flops.subs(rho, 0.5))
    assert not {C, rho} & given.read.free_symbols


def test_there_is_no_step_of_generation() -> None:
    with pytest.raises(BadOption, match="whole sequence"):
        cost(SPION(), "decode")


def test_blocks_of_short_and_odd_lengths() -> None:
    assert [block_side(length) for length in (64, 512, 1023, 2047, 10**5)] == [16, 16, 16, 32, 64]
    assert block_side(10**5, 128) == 128


def test_the_filter_does_not_leave_a_block() -> None:
    """A key that all queries attend to: its column of blocks is kept, not the one beside it."""
    assert [filled(SPION(block=b), 4096).filter for b in (1, 2, 8, 16, 32, 128)] == [
        1, 1, 7, 15, 31, 31,
    ]  # fmt: skip
    assert filled(SPION(filter=31), 256).filter == 31
    stripe = torch.full((64, 64), 1e-3)
    stripe[:, 0] = 1
    column = torch.zeros(8, 8, dtype=torch.bool)
    column[:, 0] = True
    for filter, kept in ((filled(SPION(block=8), 64).filter, True), (31, False)):
        found = spion_pattern(stripe, alpha=0.85, block=8, filter=filter)
        assert bool((found | ~column).all()) is kept


def test_a_given_pattern_says_its_block() -> None:
    eye = torch.eye(8, dtype=torch.bool)
    assert filled(SPION(pattern=eye), 1000).block == 128
    assert filled(SPION(pattern={"a": eye}), 1000, path="a").block == 128
    assert filled(SPION(pattern={"a": eye}), 1000, path="b").block == 16
    with pytest.raises(BadOption, match="does not fit"):
        filled(SPION(pattern=torch.eye(7, dtype=torch.bool)), 1000)
    with pytest.raises(BadOption, match="blocks of 8 tokens were asked for"):
        filled(SPION(pattern=torch.ones(3, 3, dtype=torch.bool), block=8), 64)


def test_density_above_which_dense_wins() -> None:
    causal, sparse = flash_cost(Flash(), "prefill", causal=True), cost(SPION(), "prefill")
    assert sympy.solve(causal.flops - sparse.flops, rho) == [sympy.Rational(1, 2)]
    assert most_density(causal=True) == 0.5
    assert most_density(efficiency=0.6, imbalance=2.0) == 0.3
