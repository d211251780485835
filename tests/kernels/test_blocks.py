"""Lists of tiles against those that FlexAttention makes of the same mask."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Shape, tensors, text
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from attn_compiler.kernels import blocks
from attn_compiler.kernels.frame import Frame, Inputs

SHAPE = Shape(H=3, G=1, T=192, S=256)


def frame(mask: str, reads: list[Tensor], empty: str = "zero", sink: str = "") -> Frame:
    program = text(mask=mask, empty=empty, sink=sink)
    given = tensors(SHAPE, torch.float32)
    return Frame(Inputs.of(*given, reads, [], None, program=program, scale=1.0, dropout=0.0))


IDS = torch.arange(256).expand(2, -1) // torch.tensor([[37], [50]])
KEPT = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(0)) > 0.5
MASKS = {
    "documents": (
        "(t0[b, q] == t0[b, k]) & (k <= q)",
        IDS,
        lambda b, h, q, k: (IDS[b, q] == IDS[b, k]) & (k <= q),
    ),
    "blocks of heads": (
        "t0[h, q // 16, k // 16]",
        KEPT,
        lambda b, h, q, k: KEPT[h, q // 16, k // 16],
    ),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (64, 32)])
def test_the_lists_are_those_of_a_block_mask(name: str, tile: tuple[int, int]) -> None:
    mask, read, rule = MASKS[name]
    theirs = create_block_mask(rule, 2, 3, 192, 256, device="cpu", BLOCK_SIZE=tile)
    for ours, names in (
        (blocks.by_rows(frame(mask, [read]), *tile), ("full_kv", "kv")),
        (blocks.by_keys(frame(mask, [read]), *tile), ("full_q", "q")),
    ):
        pairs = (ours.full_count, ours.full_index), (ours.part_count, ours.part_index)
        for (count, index), which in zip(pairs, names, strict=True):
            wanted_count = getattr(theirs, f"{which}_num_blocks")
            wanted_index = getattr(theirs, f"{which}_indices")
            assert torch.equal(count.expand_as(wanted_count), wanted_count)
            listed = torch.arange(index.shape[-1]) < wanted_count[..., None]
            found = index.expand(*wanted_index.shape)
            assert torch.equal(found[listed], wanted_index[listed])


def test_the_longest_come_first_and_every_block_comes() -> None:
    found = blocks.by_rows(frame(*_of("blocks of heads")), 16, 16)
    total = (found.full_count + found.part_count).gather(2, found.order.long())
    assert (total.diff(dim=-1) <= 0).all()
    assert torch.equal(found.order.sort(-1).values, torch.arange(12).int().expand(1, 3, 12))


def _of(name: str) -> tuple[str, list[Tensor]]:
    mask, read, _ = MASKS[name]
    return mask, [read]


@pytest.mark.parametrize("name", MASKS)
def test_strides_say_where_a_list_lies(name: str) -> None:
    found = blocks.by_rows(frame(*_of(name)), 16, 16)
    n_sb, n_sh, i_sb, i_sh, i_sn = found.strides
    for b, h, n in ((0, 0, 0), (1, 2, 11), (1, 0, 5)):
        count, index = (
            x.expand(2, 3, *x.shape[2:])[b, h, n] for x in (found.part_count, found.part_index)
        )
        assert found.part_count.flatten()[b * n_sb + h * n_sh + n] == count
        place = b * i_sb + h * i_sh + n * i_sn
        assert torch.equal(found.part_index.flatten()[place : place + len(index)], index)


def test_lists_are_made_only_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = _of("documents")
    assert not blocks.wanted(frame(*documents))  # small
    monkeypatch.setattr(blocks, "_LEAST", 0)
    assert blocks.wanted(frame(*documents))
    assert not blocks.wanted(frame("k <= q", []))  # no tensor decides
    # a row without keys reaches all of them
    assert not blocks.wanted(frame(*documents, empty="uniform"))
    assert blocks.wanted(frame(*documents, empty="any", sink="1.0"))
    monkeypatch.setattr(blocks, "_MOST_READ", 1)
    dense = torch.ones(2, 1, 192, 256, dtype=torch.bool)
    assert not blocks.wanted(frame("t0[b, 0, q, k]", [dense]))  # a whole mask to read


@pytest.mark.parametrize(
    ("mask", "tile", "whole"),
    [
        ("t0[h, q // 64, k // 64]", (64, 32), True),
        ("t0[h, q // 64, k // 64] & (q // 64 >= k // 64)", (64, 64), True),
        ("t0[h, q // 64, k // 64]", (128, 64), False),
        ("t0[h, q // 64, k // 64] & (k <= q)", (64, 64), False),
        ("t0[b, k]", (64, 64), False),
    ],
)
def test_a_map_of_blocks_says_all_about_its_tiles(
    mask: str, tile: tuple[int, int], whole: bool
) -> None:
    assert blocks.whole(text(mask=mask), *tile) is whole
