"""Blocks of a band against counting every tile that holds a visible score."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attn_compiler.cost.problem import (
    TEMPLATES,
    Problem,
    Template,
    TileConfig,
    blocks,
    padded,
    visible,
)

SMALL = Problem(2, 6, 3, 37, 53, 8, 8)
bands = st.one_of(st.none(), st.integers(0, 60))


def sees(problem: Problem, q: int, k: int) -> bool:
    left = problem.left is None or k >= q + problem.shift - problem.left
    return left and (problem.right is None or k <= q + problem.shift + problem.right)


def counted(problem: Problem, template: Template, tile: TileConfig) -> list[int]:
    """Tiles of every program, one by one: from the first to the last that holds a visible score."""
    found = []
    by_key = template == "keys_and_values"
    own, step = (tile.block_n, tile.block_m) if by_key else (tile.block_m, tile.block_n)
    length, other = (problem.keys, problem.rows) if by_key else (problem.rows, problem.keys)
    packed = 1 if by_key else tile.heads
    for start in range(0, length * packed, own):
        mine = {i // packed for i in range(start, min(start + own, length * packed))}
        hit = [
            j // step
            for j in range(other)
            if any(sees(problem, j, i) if by_key else sees(problem, i, j) for i in mine)
        ]
        found.append(hit[-1] - hit[0] + 1 if hit else 0)
    pairs = problem.batch * (problem.kv_heads if by_key else problem.heads // packed)
    return sorted(found * pairs, reverse=True)


sides = st.sampled_from([16, 32])


@given(
    st.sampled_from(TEMPLATES),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.tuples(bands, bands, st.integers(-20, 20)),
    st.builds(TileConfig, sides, sides, st.just(4), st.just(2), st.sampled_from([1, 2])),
)
def test_blocks_are_those_of_the_band(
    template: Template,
    lengths: tuple[int, int],
    band: tuple[int | None, int | None, int],
    tile: TileConfig,
) -> None:
    left, right, shift = band
    problem = replace(SMALL, rows=lengths[0], keys=lengths[1], left=left, right=right, shift=shift)
    each = problem.group if template == "keys_and_values" else 1
    if template == "keys_and_values":
        tile = replace(tile, heads=1)
    expanded = [t for count, t in blocks(problem, template, tile) for _ in range(round(count))]
    assert expanded == [each * t for t in counted(problem, template, tile)]


def test_causal_blocks() -> None:
    problem = Problem(1, 1, 1, 256, 256, 64, 64, right=0)
    tile = TileConfig(64, 64, 4, 2)
    assert blocks(problem, "forward", tile) == ((1, 4), (1, 3), (1, 2), (1, 1))
    assert blocks(problem, "keys_and_values", tile) == ((1, 4), (1, 3), (1, 2), (1, 1))
    # a longer one is sampled: as many programs, nearly as many tiles
    longer = replace(problem, rows=64 * 1000, keys=64 * 1000)
    found = blocks(longer, "forward", tile)
    assert sum(n for n, _ in found) == pytest.approx(1000)
    assert sum(n * t for n, t in found) == pytest.approx(1000 * 1001 / 2, rel=0.01)


def test_splits_share_the_tiles() -> None:
    problem = Problem(2, 8, 2, 1, 1000, 64, 64)
    tile = TileConfig(16, 64, 4, 3, heads=4, splits=3)
    assert blocks(problem, "forward", tile) == ((2 * 2 * 3, 6),)


def test_visible_scores() -> None:
    assert visible(replace(SMALL, rows=31, keys=31, right=0)) == 31 * 32 / 2
    assert visible(SMALL) == 37 * 53
    long = Problem(1, 1, 1, 5000, 5000, 64, 64, left=99, right=0)
    assert visible(long) == pytest.approx(5000 * 100 - 99 * 100 / 2, rel=0.02)


def test_padding_and_classes() -> None:
    assert [padded(n) for n in (1, 16, 17, 64, 80)] == [16, 16, 32, 64, 128]
    decode = Problem(1, 8, 8, 1, 1001, 64, 64, right=0, shift=1000)
    assert decode.bucketed() == replace(decode, keys=1024, shift=1023)
    window = replace(decode, left=700).bucketed()
    assert window.left == 768
    # where nothing is hidden the corner does not matter
    assert replace(decode, right=None).bucketed() == replace(decode, right=None, keys=1024)
