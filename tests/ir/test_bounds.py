"""Tile classes of masks that read tensors, against the mask itself, element by element."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attn_compiler.ir.bounds import Tiling, tile_classes
from attn_compiler.ir.evaluate import evaluate
from attn_compiler.ir.expr import parse

INF, NAN = float("inf"), float("nan")
# t0 document of a place, t1 padding, t2 blocks, t3 blocks of a head, t4 numbers, t5 a whole mask
ATOMS = (
    "t0[b, q] == t0[b, k]", "t0[b, q] >= t0[b, k]", "t1[b, k]", "~t1[b, k + n0]",
    "t2[q // 8, k // 8]", "t3[h, q // 8, k // 8] > 0", "k <= q", "k <= q + (S - T)",
    "abs(q - k) < n0", "t4[k] > 0.3", "t4[q] + t4[k] > 0.1",
    "where(t1[b, k], k <= q, q % 5 < 2)", "t5[b, 0, q, k]", "t0[b, q] != 0",
    "min(t0[b, q], t0[b, k]) * 3 > k // 7", "t2[t0[b, q], k // 8]", "float(q - k) < t4[k]",
    "t1[b, k] ^ t1[b, q]", "t0[b, q - 1] == t0[b, q]", "(q - k) % n0 == 0", "t4[h] < 0.5",
)  # fmt: skip


def tensors(B: int, H: int, T: int, S: int, seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    longest = max(T, S)
    steps = torch.rand(B, longest + 9, generator=draw) < 0.1
    numbers = torch.randn(longest + 9, generator=draw)
    numbers[:: max(2, seed % 11)] = INF if seed % 2 else NAN
    blocks = torch.rand(-(-T // 8), -(-S // 8), generator=draw) < 0.4
    return [
        steps.cumsum(1),
        torch.arange(longest + 9)[None] < torch.randint(0, longest, (B, 1), generator=draw),
        blocks,
        (torch.rand(H, *blocks.shape, generator=draw) < 0.3).int(),
        numbers,
        torch.rand(B, 1, T, S, generator=draw) < 0.97,
    ]


@st.composite
def predicates(draw: st.DrawFn) -> str:
    parts = draw(st.lists(st.sampled_from(ATOMS), min_size=1, max_size=3))
    text = f"({parts[0]})"
    for part in parts[1:]:
        text = f"({text} {draw(st.sampled_from('&|'))} ({part}))"
    return draw(st.sampled_from(["", "~"])) + text


def brute(mask: str, sizes: tuple[int, int, int, int], reads: list[Tensor], n: int) -> Tensor:
    B, H, T, S = sizes
    env = {
        **dict(zip("BHTS", sizes, strict=True)),
        "b": torch.arange(B).view(-1, 1, 1, 1),
        "h": torch.arange(H).view(-1, 1, 1),
        "q": torch.arange(T)[:, None],
        "k": torch.arange(S),
    }
    return evaluate(parse(mask), env, reads, (n,)).bool().expand(sizes)


def tiles(found: Tensor, rows: int, keys: int, edge: bool) -> Tensor:
    """[B, H, T, S] in tiles [B, H, nq, nk, rows * keys]; beyond the grid stands `edge`."""
    T, S = found.shape[2:]
    padded = torch.nn.functional.pad(found.int(), (0, -S % keys, 0, -T % rows), value=int(edge))
    parts = padded.bool().unflatten(3, (-1, keys)).unflatten(2, (-1, rows)).transpose(3, 4)
    return parts.flatten(4)


@given(
    mask=predicates(),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    cut=st.sampled_from([(8, 8), (16, 8), (4, 16), (5, 7)]),
    seed=st.integers(0, 99),
    n=st.integers(1, 9),
)
def test_no_tile_is_missed_and_full_tiles_are_full(
    mask: str, sizes: tuple[int, int, int, int], cut: tuple[int, int], seed: int, n: int
) -> None:
    reads = tensors(*sizes, seed)
    some, every = tile_classes(parse(mask), Tiling(*sizes, *cut, (n,)), reads)
    exact = brute(mask, sizes, reads, n)
    passing = tiles(exact, *cut, False).any(-1)
    assert (some.expand_as(passing) | ~passing).all()
    assert (~every.expand_as(passing) | tiles(exact, *cut, True).all(-1)).all()


USUAL = (
    "t0[b, q] == t0[b, k]", "t2[q // 8, k // 8]", "t3[h, q // 8, k // 8] > 0", "t1[b, k]",
    "t5[b, 0, q, k]",
)  # fmt: skip


@pytest.mark.parametrize("mask", USUAL)
@pytest.mark.parametrize("cut", [(8, 8), (16, 8), (8, 4)])
def test_the_usual_masks_are_classified_exactly(mask: str, cut: tuple[int, int]) -> None:
    sizes = (2, 3, 48, 64)
    reads = tensors(*sizes, 7)
    some, every = tile_classes(parse(mask), Tiling(*sizes, *cut, (1,)), reads)
    parts = tiles(brute(mask, sizes, reads, 1), *cut, False)
    assert torch.equal(some.expand_as(parts[..., 0]), parts.any(-1))
    assert torch.equal(every.expand_as(parts[..., 0]), parts.all(-1))


def test_a_mask_of_one_batch_item_is_classified_once() -> None:
    reads = tensors(3, 5, 64, 64, 1)
    some, every = tile_classes(parse("t2[q // 8, k // 8]"), Tiling(3, 5, 64, 64, 8, 8), reads)
    assert some.shape == every.shape == (1, 1, 8, 8)


def test_documents_cost_their_length_and_not_their_square() -> None:
    length = 2**20
    ids = torch.arange(length)[None] // 5000
    some, _ = tile_classes(
        parse("t0[b, q] == t0[b, k]"), Tiling(1, 1, length, length, 1024, 1024), [ids]
    )
    assert int(some.sum()) < 8 * some.shape[2]
