"""Attention over the kept tiles of a map of blocks, on CPUs, against the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import DTYPES, B, Case, Largest, Shape, draw, judge, padding, tensors, text
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_compiler.kernels import attention as composite
from attn_compiler.kernels import gathered_cpu, tiles_cpu
from attn_compiler.kernels.attention import reference
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.frame import Frame, Inputs
from attn_compiler.kernels.library import attention
from attn_compiler.kernels.tiles_cpu import Lists, cut

# T and S end inside a tile
SHAPES = (Shape(T=149, S=149), Shape(H=3, G=1, T=97, S=131, dv=8), Shape(H=5, G=5, T=83, S=67, d=8))
KEPT = "t0[q // 16, k // 16]"
OF_HEADS = "t0[h, q // 16, k // 16]"


def blocks(s: Shape, heads: bool = False, rows: int = 16, keys: int = 16) -> Tensor:
    """Some blocks, and one row of them without any."""
    kept = draw(s.H if heads else 1, -(-s.T // rows), -(-s.S // keys)) > 0.4
    kept[:, :, 0] |= kept.sum(-1) < 2
    kept[:, -2] = False
    return kept if heads else kept[0]


def case(mask: str, reads: Any, score: str = "dot", sink: str = "", empty: str = "zero") -> Case:
    return Case(text(score, mask, sink, empty), reads)


CASES = {
    "plain": case(KEPT, lambda s: [blocks(s)]),
    "of heads": case(OF_HEADS, lambda s: [blocks(s, True)]),
    "causal": case(f"{KEPT} & (k <= q)", lambda s: [blocks(s)]),
    "of heads, causal": case(f"{OF_HEADS} & (k <= q)", lambda s: [blocks(s, True)]),
    "window": case(f"{KEPT} & (k > q - 21)", lambda s: [blocks(s)]),
    "padding": case(f"{KEPT} & t1[b, k]", lambda s: [blocks(s), padding(s)]),
    "of heads, padding": case(
        f"{OF_HEADS} & t1[b, k] & (k <= q)", lambda s: [blocks(s, True), padding(s)]
    ),
    "oblong tiles": case(
        "t0[q // 16, k // 32] & (k <= q)", lambda s: [blocks(s, rows=16, keys=32)]
    ),
    "two maps": case(
        "t0[q // 32, k // 16] & t1[k // 48]",
        lambda s: [blocks(s, rows=32), torch.arange(-(-s.S // 48)) != 1],
    ),
    "a map of numbers": case("t0[q // 16, k // 16] > 0.3", lambda s: [draw(10, 10)]),
    "bias": case(KEPT, lambda s: [blocks(s), draw(s.H, s.T, s.S)], "dot + t1[h, q, k]"),
    "of heads, distance": case(
        f"{OF_HEADS} & t1[b, k]",
        lambda s: [blocks(s, True), padding(s), draw(s.H).abs()],
        "dot - t2[h] * float(q - k)",
    ),
    "sink": case(
        f"{KEPT} & (k <= q)",
        lambda s: [blocks(s), draw(10).masked_fill(torch.arange(10) == 2, -torch.inf)],
        sink="t1[q // 16]",
        empty="any",
    ),
}
CASES["learned sink"] = Case(
    text(mask=f"{OF_HEADS} & t1[b, k]", sink="t2[h]"),
    lambda s: [blocks(s, True), padding(s), draw(s.H)],
    (2,),
)


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Gather whatever can be; the passes that did."""
    passes: list[str] = []
    for name in ("forward", "backward"):
        inner = getattr(gathered_cpu, name)

        def outer(*args: Any, name: str = name, inner: Any = inner) -> Any:
            passes.append(name)
            return inner(*args)

        monkeypatch.setattr(gathered_cpu, name, outer)
    monkeypatch.setattr(tiles_cpu, "_LEAST", 0)
    monkeypatch.setattr(tiles_cpu, "_MOST_DENSITY", 2.0)
    monkeypatch.setattr(tiles_cpu, "_MOST_OF_FEW_ROWS", 2.0)
    yield passes


@pytest.mark.parametrize("name", CASES)
def test_numbers_and_gradients(name: str, gathered: list[str]) -> None:
    turn = list(CASES).index(name)
    for step, dtype in enumerate(DTYPES):
        shape = SHAPES[(turn + step) % len(SHAPES)]
        judge(CASES[name], tensors(shape, dtype), CASES[name].reads(shape))
    assert gathered == ["forward", "backward"] * len(DTYPES)


@pytest.mark.parametrize("name", CASES)
def test_in_many_small_pieces(
    name: str, gathered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathered_cpu, "_BUDGET", 1)
    monkeypatch.setattr(tiles_cpu, "_ELEMENTS", 1)
    tiles_cpu._lists.cache_clear()
    shape = SHAPES[0]
    judge(CASES[name], tensors(shape, torch.float32), CASES[name].reads(shape))
    tiles_cpu._lists.cache_clear()
    assert gathered


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 67), st.integers(1, 83), st.integers(0, 10**6),
    st.sampled_from(["", " & (k <= q)", " & (q - k < 9)"]), st.booleans(), st.floats(0, 1),
)  # fmt: skip
def test_any_pattern(
    length: int, keys: int, seed: int, also: str, heads: bool, share: float
) -> None:
    shape = Shape(H=4, G=2, T=length, S=keys, d=8, dv=8)
    random = torch.Generator().manual_seed(seed)
    kept = torch.rand(4, -(-length // 16), -(-keys // 16), generator=random) < share
    program = text(mask=(OF_HEADS if heads else KEPT) + also, empty="zero")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles_cpu, "_LEAST", 0)
        patch.setattr(tiles_cpu, "_MOST_DENSITY", 2.0)
        patch.setattr(tiles_cpu, "_MOST_OF_FEW_ROWS", 2.0)
        judge(Case(program), tensors(shape, torch.float64), [kept if heads else kept[0]])


@pytest.mark.parametrize("name", ["of heads, causal", "sink", "padding"])
def test_gradcheck(name: str, gathered: list[str]) -> None:
    shape = Shape(H=2, G=1, T=37, S=41, d=2, dv=3)
    reads = [r.double() if r.is_floating_point() else r for r in CASES[name].reads(shape)]
    reads = [r[:3] if name == "sink" and r.dim() == 1 else r for r in reads]
    kwargs = {"program": CASES[name].program, "scale": 0.7, "dropout": 0.0}
    weight = torch.randn(B, 2, 37, 3, generator=torch.Generator().manual_seed(1)).double()

    def fn(*qkv: Tensor) -> Tensor:
        return (attention(*qkv, reads, [], None, **kwargs)[0] * weight).sum()

    leaves = [x.requires_grad_() for x in tensors(shape, torch.float64)]
    assert torch.autograd.gradcheck(fn, leaves, fast_mode=True)
    assert gathered


def test_all_blocks_are_dense_attention(
    gathered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(composite, "without_full_maps", lambda given: given)
    s = Shape(T=149, S=149)
    q, k, v = tensors(s, torch.float64)
    every = torch.ones(10, 10, dtype=torch.bool)
    for sink in ("", "t1[q // 16]"):
        program = text(mask=KEPT, sink=sink)
        reads = [every, torch.full((10,), -torch.inf)]
        kwargs = {"scale": 0.35, "dropout": 0.0}
        out, lse = attention(q, k, v, reads, [], None, program=program, **kwargs)
        dense, dense_lse = attention(q, k, v, [], [], None, program=text(), **kwargs)
        assert (out - dense).abs().max() < 1e-12 and (lse - dense_lse).abs().max() < 1e-12
    assert gathered == ["forward"] * 2


def test_pruned_pairs_have_no_gradient(gathered: list[str]) -> None:
    """Keys that no block keeps, and queries of a row without blocks."""
    s = Shape(T=149, S=149)
    kept = blocks(s)
    kept[:, 2] = False
    q, k, v = (x.requires_grad_() for x in tensors(s, torch.float32))
    program = text(mask=KEPT, empty="zero")
    out, _ = attention(q, k, v, [kept], [], None, program=program, scale=0.35, dropout=0.0)
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert not dq[:, :, 128:144].any() and not dk[:, :, 32:48].any() and not dv[:, :, 32:48].any()
    assert dk[:, :, :32].all() and gathered == ["forward", "backward"]


# ---------------------------------------------------------------- what is gathered, and when


def frame(mask: str, reads: list[Tensor], empty: str = "zero", s: Shape = SHAPES[0]) -> Frame:
    given = tensors(s, torch.float32)
    program = text(mask=mask, empty=empty)
    return Frame(Inputs.of(*given, reads, [], None, program=program, scale=1.0, dropout=0.0))


def tiles_of(lists: Lists) -> dict[int, list[int]]:
    return {
        row: tiles
        for b in lists.buckets
        for row, tiles in zip(b.rows.tolist(), b.tiles.tolist(), strict=True)
    }


def test_memory_follows_the_kept_blocks() -> None:
    s = Shape(H=4, G=4, T=4096, S=4096, d=8, dv=8)
    kept = torch.eye(64, dtype=torch.bool)
    kept[::16, ::4] = True
    program = text(mask="t0[q // 64, k // 64] & (k <= q)")
    given = Inputs(*tensors(s, torch.float32), [kept], [], Drop(None, 0.0), program, 0.35)
    with Largest() as seen:
        out, lse = composite.forward(given)
        composite.backward(given, torch.ones_like(out), (out, lse), [False])
    assert tiles_cpu.lists(Frame(given)) is not None
    assert seen.elements <= 2**20 < B * s.H * s.T * s.S // 64


def test_lists_follow_the_contents_of_a_map() -> None:
    kept = torch.eye(10, dtype=torch.bool)
    first = tiles_cpu.lists(frame("t0[q // 16, k // 16]", [kept]))
    assert first is None  # small
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles_cpu, "_LEAST", 0)
        one = tiles_cpu.lists(frame(KEPT, [kept]))
        assert tiles_cpu.lists(frame(KEPT, [kept.clone()])) is one
        kept.data[0, 5] = True  # a change that no version counts
        two = tiles_cpu.lists(frame(KEPT, [kept]))
        with torch.inference_mode():
            assert tiles_cpu.lists(frame(KEPT, [kept.clone()])) is two
        transposed = tiles_cpu.lists(frame(KEPT, [kept.T]))
    assert one is not None and two is not None and transposed is not None
    assert [len(b.rows) for b in one.buckets] == [9, 1]  # the last block is shorter
    assert tiles_of(two) == {0: [0, 5]} | {i: [i] for i in range(1, 10)}
    assert tiles_of(transposed) == {5: [0, 5]} | {i: [i] for i in range(10) if i != 5}


def test_buckets_hold_each_kept_tile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_cpu, "_LEAST", 0)
    monkeypatch.setattr(tiles_cpu, "_MOST_OF_FEW_ROWS", 2.0)
    s = SHAPES[0]
    kept = blocks(s, True)
    found = tiles_cpu.lists(frame(OF_HEADS, [kept]))
    assert found is not None and found.folded
    pairs = [(row, tile) for row, tiles in tiles_of(found).items() for tile in tiles]
    # heads 0, 1, 2 use the first kv head
    wanted = [(10 * h + i, 10 * (h // 3) + j) for h, i, j in kept.nonzero().tolist()]
    assert sorted(pairs) == sorted(wanted)
    assert found.density == pytest.approx(float(kept.sum()) * 16**2 / (6 * 149**2))


def test_causal_tiles_share_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_cpu, "_LEAST", 0)
    monkeypatch.setattr(tiles_cpu, "_MOST_OF_FEW_ROWS", 2.0)
    kept = torch.ones(10, 10, dtype=torch.bool)
    found = tiles_cpu.lists(frame(f"{KEPT} & (k <= q)", [kept]))
    assert found is not None and all(b.cut and b.mask is not None for b in found.buckets)
    # some rows see the first tile whole and some do not: their masks differ
    found = tiles_cpu.lists(frame(f"{KEPT} & (k > q - 40)", [kept]))
    assert found is not None and any(b.cut and b.mask is None for b in found.buckets)


@pytest.mark.parametrize("also", ["", " & (k <= q)", " & t1[b, k]"])
@pytest.mark.parametrize("heads", [False, True])
def test_a_map_that_keeps_every_block_is_not_looked_at(
    also: str, heads: bool, gathered: list[str]
) -> None:
    shape = SHAPES[0]
    reads = [torch.ones_like(blocks(shape, heads)), padding(shape)]
    program = text(mask=(OF_HEADS if heads else KEPT) + also)
    q, k, v = tensors(shape, torch.float32)
    given = Inputs(q, k, v, reads, [], Drop(None, 0.0), program, 0.5)
    assert "t0" not in tiles_cpu.without_full_maps(given).program
    judge(Case(program), [q, k, v], reads)
    assert gathered == []
    reads[0][..., -1, 0] = False
    assert tiles_cpu.without_full_maps(given) is given


def test_few_rows_are_gathered_only_for_few_keys() -> None:
    """A quarter of the tiles: enough for tiles of 32 rows, too many for tiles of 16."""
    for size, gathers in ((16, False), (32, True)):
        kept = torch.eye(4, dtype=torch.bool).repeat_interleave(4, 0).repeat_interleave(4, 1)
        shape = Shape(T=16 * size, S=16 * size)
        found = tiles_cpu.lists(frame(f"t0[q // {size}, k // {size}]", [kept], s=shape))
        assert (found is not None) is gathers


def test_what_is_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_cpu, "_LEAST", 0)
    few, many = torch.eye(10, dtype=torch.bool), torch.ones(10, 10, dtype=torch.bool)
    assert tiles_cpu.lists(frame(KEPT, [few])) is not None
    assert tiles_cpu.lists(frame(KEPT, [many])) is None  # dense
    assert tiles_cpu.lists(frame(KEPT, [few], "uniform")) is None  # such a row has all keys


@pytest.mark.parametrize(
    ("mask", "tile"),
    [
        ("t0[q // 64, k // 64]", (64, 64)),
        ("t0[h, q // 64, k // 32] & t1[q // 96, k // 32]", (32, 32)),
        ("t0[q // 64, k // 64] & (k <= q) & t1[b, k]", (64, 64)),
        ("t0[q // 64, k // 64] | (k < 5)", None),
        ("t0[b, q // 64, k // 64]", None),
        ("t0[q // 64, k]", None),
        ("t0[k // 64]", None),
        ("t0[q // 8, k // 8]", None),
        ("(t0[b, q] == t0[b, k])", None),
        ("k <= q", None),
    ],
)
def test_which_masks_have_tiles(mask: str, tile: tuple[int, int] | None) -> None:
    found = cut(text(mask=mask))
    assert (None if found is None else (found.rows, found.keys)) == tile


def test_padding_is_left_to_the_elements() -> None:
    found = cut(text(mask=f"{KEPT} & (k <= q) & t1[b, k]"))
    assert found is not None and found.slots == (0,)
    assert str(found.loose) == "t1[b, k] != 0"


def test_a_bias_that_is_learned_and_dropout_take_another_way(gathered: list[str]) -> None:
    s = SHAPES[0]
    learned = Case(
        text("dot + t1[h, q, k]", KEPT), lambda s: [blocks(s), draw(s.H, s.T, s.S)], (1,)
    )
    reads = learned.reads(s)
    reads[0][-2, 0] = True
    judge(learned, tensors(s, torch.float64), reads)
    assert gathered == ["forward"]
    q, k, v = tensors(s, torch.float64)
    program, seed = text(mask=KEPT), torch.tensor([3])
    out, _ = attention(q, k, v, reads[:1], [], seed, program=program, scale=0.5, dropout=0.2)
    drop = Drop(seed, 0.2)
    dropped = drop.dropped((s.H, s.T), (0, B), (0, s.T), (0, s.S))
    assert dropped is not None
    exact, _ = reference(q, k, v, reads[:1], [], program, 0.5, (~dropped).double() * drop.gain)
    assert torch.allclose(out, exact, 1e-12, 1e-12) and gathered == ["forward"]
