"""From maps to patterns: the worked cases of the method, plain versions of every step, and what
must hold for any map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from attn_compiler.errors import BadOption
from attn_compiler.kernels.pattern import entered, pattern_of, quantile, spion_pattern
from attn_compiler.kernels.pooled import BlockMap

SMALL = torch.tensor(
    [[0.7, 0.1, 0.1, 0.1], [0.2, 0.5, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1], [0.4, 0.1, 0.1, 0.4]],
    dtype=torch.float64,
)
SIX = torch.tensor(
    [
        [0.50, 0.46, 0.49, 0.86, 0.25, 0.31],
        [0.24, 0.88, 0.90, 0.53, 0.15, 0.38],
        [0.87, 0.56, 0.84, 0.61, 0.68, 0.44],
        [0.16, 0.35, 0.78, 0.57, 0.51, 0.82],
        [0.39, 0.52, 0.59, 0.06, 0.62, 0.83],
        [0.07, 0.66, 0.75, 0.19, 0.58, 0.60],
    ],
    dtype=torch.float64,
)
WALKED = {(1, 1), (1, 2), (2, 2), (3, 2), (3, 5), (4, 5), (5, 2)}
DIAGONAL = {(i, i) for i in range(6)}


def places(kept: Tensor) -> set[tuple[int, int]]:
    return {(i, j) for i, j in kept.nonzero().tolist()}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the steps, as plainly as possible


def convolved(a: Tensor, filter: int) -> Tensor:
    kernel = torch.eye(filter, dtype=torch.float64)[None, None]
    found: Tensor = torch.nn.functional.conv2d(a[None, None], kernel, padding=filter // 2)
    return found[0, 0]


def means(a: Tensor, block: int) -> Tensor:
    found: Tensor = torch.nn.functional.avg_pool2d(a[None, None], block)
    return found[0, 0]


def walk(pool: Tensor, level: float, kept: Tensor, seed: tuple[int, int]) -> None:
    """One walk to its end, over whatever was visited before."""
    side, e, (x, y) = len(pool), pad(pool, (0, 1, 0, 1)), seed
    while x < side and y < side:
        down, right, across = e[x + 1, y], e[x, y + 1], e[x + 1, y + 1]
        if down > right:
            x, y = (x + 1, y) if down > across else (x + 1, y + 1)
        else:
            x, y = (x, y + 1) if right > across else (x + 1, y + 1)
        if e[x, y] > level:
            kept[x, y] = True


def walked(pool: Tensor, alpha: float, order: list[int] | None = None) -> Tensor:
    side, level = len(pool), float(quantile(pool, alpha))
    seeds = [(0, k) for k in range(side)] + [(k, 0) for k in range(side)]
    kept = torch.zeros(side + 1, side + 1, dtype=torch.bool)
    for index in order or range(2 * side):
        walk(pool, level, kept, seeds[index])
    assert not kept[side].any() and not kept[:, side].any()
    return kept[:side, :side] | torch.eye(side, dtype=torch.bool)


# ---------------------------------------------------------------- worked cases


def test_convolution_and_means() -> None:
    wanted = [
        [1.2, 0.3, 0.2, 0.1],
        [0.8, 1.4, 0.4, 0.2],
        [0.2, 0.9, 1.1, 0.3],
        [0.4, 0.2, 0.7, 0.6],
    ]
    torch.testing.assert_close(convolved(SMALL, 3), torch.tensor(wanted).double())
    found = BlockMap.of(SMALL, block=2, filter=3)
    torch.testing.assert_close(
        found.convolved, torch.tensor([[0.925, 0.225], [0.425, 0.675]]).double()
    )
    torch.testing.assert_close(found.plain, torch.tensor([[0.375, 0.125], [0.3, 0.2]]).double())


def test_walks_fills_and_thresholds_all_differ() -> None:
    level = quantile(SIX, 0.75)
    assert float(level) == pytest.approx(0.6975, abs=1e-12)
    above = torch.gt(SIX, level)
    ours = entered(SIX) & above
    assert places(ours) == WALKED
    final = spion_pattern(SIX, mode="F", alpha=0.75, block=1)
    assert places(final) == WALKED | DIAGONAL and int(final.sum()) == 11
    assert places(final) == places(walked(SIX, 0.75))
    # neither a threshold nor a fill from seeds above it
    threshold = places(above) | DIAGONAL
    assert threshold == places(final) | {(0, 3), (2, 0)}
    fill = {(0, 3), (2, 0)} | DIAGONAL
    assert len({frozenset(x) for x in (places(final), threshold, fill)}) == 3


def test_the_best_blocks() -> None:
    found = spion_pattern(SIX, mode="C", density=0.35, block=1, filter=1)
    assert places(found) == {(0, 3), (1, 1), (1, 2), (2, 0), (2, 2), (4, 5)} | DIAGONAL
    assert int(found.sum()) == 10


@pytest.mark.parametrize("mode", ["CF", "F"])
def test_queries_are_rows(mode: Any) -> None:
    a = draw(5, 24, 24)
    one = spion_pattern(a, mode=mode, alpha=0.6, block=3, filter=5)
    other = spion_pattern(a.T, mode=mode, alpha=0.6, block=3, filter=5)
    assert torch.equal(one, other.T) and not torch.equal(one, other)


def test_equal_neighbours() -> None:
    right_of_both = torch.tensor([[0.0, 1.0], [1.0, 0.5]])
    assert places(entered(right_of_both)) == {(0, 1), (1, 1)}
    assert places(entered(torch.ones(3, 3))) == {(1, 1), (2, 2), (1, 2), (2, 1)}


# ---------------------------------------------------------------- any map

SIDES = st.integers(2, 13)
ALPHAS = st.floats(0.02, 0.98)
SEEDS = st.integers(0, 10**6)


@settings(deadline=None)
@given(st.integers(1, 41), st.integers(1, 9), st.integers(0, 17), SEEDS)
def test_sums_by_blocks_are_means_of_the_convolution(
    length: int, block: int, half: int, seed: int
) -> None:
    a, filter = draw(seed, 2, length, length), 2 * half + 1
    found = BlockMap.of(a, block=block, filter=filter)
    over = -length % block
    for head in range(2):
        whole = pad(a[head], (0, over, 0, over))
        torch.testing.assert_close(found.convolved[head], means(convolved(whole, filter), block))
        torch.testing.assert_close(found.plain[head], means(whole, block))


@settings(deadline=None)
@given(SIDES, ALPHAS, SEEDS, st.randoms(use_true_random=False))
def test_walks_in_any_order_of_seeds(side: int, alpha: float, seed: int, shuffle: Any) -> None:
    # few values, so that neighbours are often equal
    pool = (draw(seed, side, side) * 8).floor()
    ours = spion_pattern(pool, mode="F", alpha=alpha, block=1)
    assert torch.equal(ours, walked(pool, alpha))
    order = list(range(2 * side))
    shuffle.shuffle(order)
    assert torch.equal(ours, walked(pool, alpha, order))


@settings(deadline=None)
@given(SIDES, ALPHAS, SEEDS, st.floats(1e-3, 1e3), st.booleans())
def test_what_holds_for_every_pattern(
    blocks: int, alpha: float, seed: int, scale: float, causal: bool
) -> None:
    a = draw(seed, 4 * blocks - 1, 4 * blocks - 1)
    options: dict[str, Any] = {"block": 4, "filter": 5, "causal": causal}
    pooled = BlockMap.of(a.tril() if causal else a, block=4, filter=5)
    eye = torch.eye(blocks, dtype=torch.bool)
    counts = torch.ones(blocks, blocks, dtype=torch.bool)
    counts = counts.tril() if causal else counts
    number = int(counts.sum())
    for mode in ("CF", "F", "C"):
        given = {"density": 1 - alpha} if mode == "C" else {"alpha": alpha}
        kept = spion_pattern(a, mode=mode, **given, **options)  # type: ignore[arg-type]
        assert kept.diagonal().all() and not (kept & ~counts).any()
        assert torch.equal(kept, spion_pattern(scale * a, mode=mode, **given, **options))  # type: ignore[arg-type]
        pool = pooled.plain if mode == "F" else pooled.convolved
        if mode != "C":
            above = counts & (pool > quantile(pool[counts], alpha))
            assert not (kept & ~above & ~eye).any()
            assert int(above.sum()) <= number - 1 - int(alpha * (number - 1))
        else:
            assert int(kept.sum()) <= max(0, int(number * (1 - alpha) - blocks)) + blocks
            left = pool[counts & ~kept]
            taken = pool[kept & ~eye]
            assert not left.numel() or not taken.numel() or taken.min() >= left.max()


def test_a_map_constant_along_diagonals() -> None:
    line = draw(3, 2 * 40 - 1)
    index = torch.arange(40)[None, :] - torch.arange(40)[:, None] + 39
    found = BlockMap.of(line[index], block=4, filter=7)
    torch.testing.assert_close(found.convolved[1:-1, 1:-1], 7 * found.plain[1:-1, 1:-1])


def test_each_head_has_its_own() -> None:
    a = draw(1, 3, 37, 37)
    found = spion_pattern(a, alpha=0.7, block=5, filter=7)
    for head in range(3):
        assert torch.equal(found[head], spion_pattern(a[head], alpha=0.7, block=5, filter=7))


def test_a_quantile_that_is_an_entry() -> None:
    values = torch.arange(101.0, dtype=torch.float64)
    assert 0.29 * 100 < 29  # in binary
    assert float(quantile(values, 0.29)) == 29


def test_another_length() -> None:
    pooled = BlockMap.of(draw(2, 48, 48), block=4, filter=3)
    assert torch.equal(pooled.resized(47).convolved, pooled.convolved)
    flat = BlockMap.of(torch.ones(48, 48), block=4, filter=1)
    for length, side in ((21, 6), (95, 24)):
        found = flat.resized(length)
        assert (found.length, found.plain.shape) == (length, (side, side))
        torch.testing.assert_close(found.plain, torch.ones(side, side).double())
        assert pattern_of(pooled.resized(length), alpha=0.8).shape == (side, side)
    # a vertical stripe stays where it was
    stripe = torch.zeros(48, 48)
    stripe[:, :4] = 1
    wide = BlockMap.of(stripe, block=4, filter=1).resized(96).plain
    assert (wide[:, :2] >= 0.75).all() and (wide[:, 3:] == 0).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "FC", "alpha": 0.5}, "mode='FC'"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"alpha": 1.0}, "alpha=1.0"),
        ({}, "alpha=None"),
        ({"mode": "C"}, "density=None"),
        ({"mode": "C", "density": 1.5}, "density=1.5"),
        ({"alpha": 0.5, "block": 0}, "block 0"),
        ({"alpha": 0.5, "filter": 4}, "filter 4"),
        ({"alpha": 0.5, "attention_map": torch.ones(3, 4)}, "not square"),
        ({"alpha": 0.5, "attention_map": -torch.ones(4, 4)}, "negative"),
        ({"alpha": 0.5, "attention_map": torch.full((4, 4), float("nan"))}, "not finite"),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"attention_map": torch.ones(4, 4), "block": 2} | given
    with pytest.raises(BadOption, match=message):
        spion_pattern(options.pop("attention_map"), **options)
