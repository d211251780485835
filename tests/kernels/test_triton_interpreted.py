"""The generated kernels in Triton's interpreter: numbers and gradients of every kind of program.

Run in a process of its own, with TRITON_INTERPRET=1 from the start. float32 and float16 only: the
interpreter computes with the raw bits of bfloat16.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

pytest.importorskip("triton")

import torch
from attention_cases import (
    CASES,
    CAUSAL,
    OFFSET,
    SCALE,
    SOFTCAP,
    B,
    Case,
    Shape,
    draw,
    judge,
    tensors,
    text,
)
from torch import Tensor

from attn_compiler.kernels import blocks, devices, flash_triton, flash_triton_backward, gpu
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.frame import Frame, Inputs
from attn_compiler.kernels.gpu_tiles import forward_tile
from attn_compiler.kernels.launch import Tile, keys_visited, rows_visited, with_descriptors
from attn_compiler.kernels.library import attention

pytestmark = pytest.mark.interpret

# more rows than keys and fewer, ragged edges, every kind of dv, head dims that are no power of two
SHAPES = (
    Shape(H=2, G=1),
    Shape(H=4, G=2, T=53, S=37),
    Shape(H=3, G=1, T=35, S=67, dv=8),
    Shape(H=2, G=2, T=29, S=50, d=24, dv=40),
)
TILES = (Tile(32, 16), Tile(16, 32), Tile(32, 32))


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("ATTN_COMPILER_CACHE", str(tmp_path_factory.getbasetemp()))
    monkeypatch.setitem(
        devices.IMPLEMENTATIONS, "cpu", devices.Implementation(gpu.forward, gpu.backward)
    )
    monkeypatch.setattr(gpu, "family", lambda device: "ampere")
    monkeypatch.setattr(gpu, "hardware", lambda device: None)
    monkeypatch.setattr(gpu, "backends", lambda device: ())


@pytest.mark.parametrize("name", CASES)
def test_numbers_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = list(CASES).index(name)
    tile = TILES[turn % len(TILES)]
    monkeypatch.setattr(gpu, "forward_tile", lambda given, family, hardware: tile)
    monkeypatch.setattr(
        gpu,
        "backward_tiles",
        lambda given, family, hardware: (tile, TILES[(turn + 1) % len(TILES)]),
    )
    case, shape = CASES[name], SHAPES[turn % len(SHAPES)]
    given = tensors(shape, (torch.float32, torch.float32, torch.float16)[turn % 3])
    inputs = Inputs.of(
        *given, case.reads(shape), case.ints, None, program=case.program, scale=SCALE, dropout=0.0
    )
    assert next(gpu.candidates(inputs)) == "triton", flash_triton.refusal(inputs)
    judge(case, given, case.reads(shape))


@pytest.mark.parametrize(
    "name", ["none", "causal", "offset", "causal & padding, nan", "softcap", "sink"]
)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_short_query_on_an_idle_device(name: str, rows: int) -> None:
    case, shape = CASES[name], Shape(H=6, G=2, T=rows, S=461)
    inputs = Inputs.of(
        *tensors(shape, torch.float32), case.reads(shape), case.ints, None,
        program=case.program, scale=SCALE, dropout=0.0,
    )  # fmt: skip
    tile = forward_tile(inputs, "ampere", None)
    assert tile.heads == 3 and tile.splits > 1
    with torch.no_grad():
        found = flash_triton.forward(Frame(inputs), tile)
        for one, other in zip(found, devices.COMPOSITE.forward(inputs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)


def block_map(s: Shape) -> Tensor:
    """Which blocks of 8 rows and 8 keys are kept, with one row of blocks that keeps nothing."""
    kept = draw(s.H, -(-s.T // 8), -(-s.S // 8)) > 0.6
    kept[:, 1] = False
    return kept


KEPT = "t0[h, q // 8, k // 8]"
LISTED = {
    "documents": CASES["documents"],
    "tensor mask": CASES["tensor mask"],
    "blocks": Case(text(mask=KEPT, empty="zero"), lambda s: [block_map(s)]),
    "blocks and causal": Case(
        text(SOFTCAP, f"{KEPT} & {OFFSET}", empty="zero"), lambda s: [block_map(s)]
    ),
    "blocks and a sink": Case(
        text(mask=KEPT, sink="t1[h, q // 8]"),
        lambda s: [block_map(s), (s.S - 8.0 * block_map(s).sum(-1)).clamp(min=1.0).log()],
    ),
    "blocks and a learned bias": Case(
        text("dot + t1[h, q, k]", KEPT, empty="zero"),
        lambda s: [block_map(s), draw(s.H, s.T, s.S)],
        (1,),
    ),
    "blocks of one head": Case(
        text(mask="t0[q // 8, k // 8]", empty="zero"), lambda s: [block_map(s)[0]]
    ),
}


@pytest.mark.parametrize("name", LISTED)
def test_tiles_from_lists(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = list(LISTED).index(name)
    by_row, by_key = TILES[turn % len(TILES)], TILES[(turn + 1) % len(TILES)]
    monkeypatch.setattr(blocks, "_LEAST", 0)
    monkeypatch.setattr(blocks, "_MOST_READ", 100)
    monkeypatch.setattr(gpu, "forward_tile", lambda given, family, hardware: by_row)
    monkeypatch.setattr(gpu, "backward_tiles", lambda given, family, hardware: (by_key, by_row))
    case, shape = LISTED[name], (Shape(H=4, G=2, T=53, S=67), Shape(H=2, G=1, T=70, S=37))[turn % 2]
    case = replace(case, program=case.program.replace("uniform", "zero"))
    given, reads = tensors(shape, torch.float32), case.reads(shape)
    inputs = Inputs.of(*given, reads, [], None, program=case.program, scale=SCALE, dropout=0.0)
    assert rows_visited(Frame(inputs), by_row).kind.endswith("lists")
    assert keys_visited(Frame(inputs), by_key).kind.endswith("lists")
    judge(case, given, reads)


# with tiles, sizes and what else a kernel may have: tests/kernels/test_triton_covering.py
@pytest.mark.parametrize(
    ("name", "turn"),
    [("causal", 0), ("documents", 1), ("softcap and sink", 2), ("learned bias", 3)],
)
def test_loads_by_descriptors(name: str, turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = replace(TILES[turn % len(TILES)], descriptors=True)
    monkeypatch.setattr(blocks, "_LEAST", 0)
    monkeypatch.setattr(gpu, "forward_tile", lambda given, family, hardware: tile)
    monkeypatch.setattr(gpu, "backward_tiles", lambda given, family, hardware: (tile, tile))
    case, shape = CASES[name], SHAPES[turn]
    case = replace(case, program=case.program.replace("uniform", "zero"))
    given, reads = tensors(shape, torch.float32), case.reads(shape)
    seen: list[bool] = []

    def spy(*args: object) -> object:
        seen.append(with_descriptors(*args)[0].descriptors)
        return with_descriptors(*args)

    for module in (flash_triton, flash_triton_backward):
        monkeypatch.setattr(module, "with_descriptors", spy)
    judge(case, given, reads)
    assert seen == [True] * 3


def test_what_a_descriptor_cannot_say_is_read_by_pointers() -> None:
    tile = Tile(descriptors=True)
    x = torch.zeros(2, 3, 40, 16)
    assert len(with_descriptors(tile, x, x, 32)[1]) == 2
    broadcast, turned = x[:1].expand(2, -1, -1, -1), x.transpose(2, 3)
    odd, shifted = torch.zeros(2, 3, 40, 9), torch.zeros(2, 3, 40, 20)[..., 1:17]
    for bad in (broadcast, turned, odd, shifted):
        found, nothing = with_descriptors(tile, x, bad, 32)
        assert not found.descriptors and nothing == ()


@pytest.mark.parametrize("score", ["dot", "5.0 * tanh(dot / 5.0)"])
def test_dropout_is_that_of_every_device(score: str) -> None:
    shape, program = Shape(T=41, S=47), text(score, CAUSAL)
    results = []
    for implementation in (devices.COMPOSITE, devices.IMPLEMENTATIONS["cpu"]):
        given = [x.requires_grad_() for x in tensors(shape, torch.float32)]
        inputs = Inputs(*given, [], [], Drop(torch.tensor([17]), 0.3), program, SCALE)
        with torch.no_grad():
            out, lse = implementation.forward(inputs)
            grads = implementation.backward(inputs, torch.ones_like(out), (out, lse), [])[:3]
        results.append([out, lse, *grads])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


FUNCTIONS = (
    "exp(dot / 9.0) + exp2(dot / 9.0) - log(abs(dot) + 1.0)",
    "log2(abs(dot) + 1.0) + sqrt(abs(dot) + 1.0) * rsqrt(abs(dot) + 2.0)",
    "reciprocal(abs(dot) + 2.0) + sin(dot) + cos(dot) * tanh(dot) - sigmoid(dot)",
    "relu(dot) + erf(dot) + floor(dot) + ceil(dot) - trunc(dot) + sign(dot)",
    "square(dot / 2.0) - -dot + min(dot, 1.0) + max(dot, float(k)) + dot % 1.5",
    "where(~(k == q), dot, 2.0) + float((k - q) // 3) + float((k - q) % 3)",
    "dot * float((k > 3) | (q > 5)) + float((k > q) ^ (q > 2)) + float(int(k > q) + h)",
)


@pytest.mark.parametrize("score", FUNCTIONS)
def test_every_operation(score: str) -> None:
    judge(Case(text(score)), tensors(Shape(H=2, G=2, T=19, S=23), torch.float32), [])


# every fifth of all combinations: each pair of values occurs
SIZES = list(product((1, 17, 64), (1, 16, 130), (16, 64), (16, 32), (1, 2)))[::5]


@pytest.mark.parametrize(("rows", "keys", "block", "tile", "heads"), SIZES)
def test_sizes_around_the_tiles(rows: int, keys: int, block: int, tile: int, heads: int) -> None:
    program = text(mask="(k <= q + (S - T)) | (k < 3)")
    q, k, v = tensors(Shape(H=2, G=1, T=rows, S=keys), torch.float32)
    inputs = Inputs.of(q, k, v, [], [], None, program=program, scale=SCALE, dropout=0.0)
    out, lse = flash_triton.forward(Frame(inputs), Tile(block, tile, heads=heads))
    exact, exact_lse = devices.COMPOSITE.forward(inputs)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-5)


def test_through_the_operator() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(Shape(T=40, S=40), torch.float32))
    out, _ = attention(q, k, v, [], [], None, program=text(mask=CAUSAL), scale=SCALE, dropout=0.0)
    out.sum().backward()
    assert out.shape == (B, 6, 40, 16) and q.grad is not None and q.grad.isfinite().all()
