"""What a launch is given: places for all heads, whole tensors, precision, tables that stay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import CAUSAL, SCALE, Shape, tensors, text
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attn_compiler.ir import bounds, lasting
from attn_compiler.kernels import blocks, flash_triton, flash_triton_backward, launch
from attn_compiler.kernels.frame import Frame, Inputs
from attn_compiler.kernels.launch import Tile, constants_of, folded, precision, rows_visited

DOCUMENTS = text(mask=f"(t0[b, q] == t0[b, k]) & {CAUSAL}", empty="zero")
SHAPE = Shape(H=2, G=1, T=70, S=70)


def call(q: Tensor, k: Tensor, v: Tensor, program: str = text(mask=CAUSAL)) -> Inputs:
    return Inputs.of(q, k, v, [], [], None, program=program, scale=SCALE, dropout=0.0)


# ---------------------------------------------------------------- places


@given(st.integers(1, 2**22))
def test_pairs_fold_into_two_axes(pairs: int) -> None:
    second, third = folded(pairs)
    assert max(second, third) <= 65535
    if pairs <= 65535:
        assert (second, third) == (pairs, 1)
    elif second:
        assert second * third == pairs
    else:  # only what has no small divisor has no place
        assert all(pairs % n for n in range(-(-pairs // 65535), 65536))


def test_many_heads_have_a_place() -> None:
    # windows of images: more pairs than one axis of a launch holds
    q, k, v = (torch.empty(22000, 3, 5, 16, device="meta") for _ in "qkv")
    given, frame = call(q, k, v), Frame(call(q, k, v))
    assert not flash_triton.refusal(given)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device="meta")
    tile = Tile(16, 16)
    ahead = flash_triton.prepare(frame, tile, out[None], lse[None])
    back = flash_triton_backward.prepare_backward(
        frame, out, (out, lse), {}, (tile, tile), (q, k, v)
    )
    for each in (ahead, *back):
        assert each.grid[1] * each.grid[2] == 66000 and max(each.grid[1:]) <= 65535
    prime = torch.empty(65537, 1, 5, 16, device="meta")
    assert "no launch has a place" in flash_triton.refusal(call(prime, prime, prime))


# ---------------------------------------------------------------- tensors


def test_no_tensor_is_copied_whatever_its_strides() -> None:
    q, k, v = tensors(SHAPE, torch.float32)
    turned = k.transpose(2, 3).contiguous().transpose(2, 3)
    spread = torch.randn(*v.shape[:3], 2 * v.shape[3])[..., ::2]
    grad = torch.ones(()).expand(q.shape)
    frame, tile = Frame(call(q, turned, spread)), Tile(16, 16)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    ahead = flash_triton.prepare(frame, tile, out[None], lse[None])
    back = flash_triton_backward.prepare_backward(
        frame, grad, (out, lse), {}, (tile, tile), (q, k, v)
    )
    assert all(x is y for x, y in zip(ahead.args, (q, turned, spread), strict=False))
    for each in back[1:]:
        assert all(x is y for x, y in zip(each.args, (q, turned, spread, grad), strict=False))


def test_places_beyond_31_bits() -> None:
    import triton.language as tl

    def index(given: Inputs, *others: Tensor) -> Any:
        return constants_of(given, Tile(), *others)["INDEX"]

    def made(length: int, width: int) -> Tensor:
        return torch.empty(1, 1, length, width, device="meta")

    short = call(made(2**20, 16), made(64, 16), made(64, 16))
    assert index(short) is tl.int32
    assert index(call(made(2**27, 16), made(64, 16), made(64, 16))) is tl.int64
    # values are wider than queries and few: only the gradient of the result is so long
    assert index(short, made(2**23, 256)) is tl.int64
    far = torch.empty_strided((1, 1, 64, 16), (0, 0, 2**26, 1), device="meta")
    assert index(call(made(64, 16), far, made(64, 16))) is tl.int64


# ---------------------------------------------------------------- precision


def test_both_switches_of_pytorch_are_understood() -> None:
    """Its older one raises where the newer was used."""
    products: Any = torch.backends.cuda.matmul
    before = products.fp32_precision
    assert precision() == "ieee"
    try:
        products.fp32_precision = "tf32"
        assert precision() == "tf32"
        with pytest.raises(RuntimeError, match="mix of the legacy and new"):
            _ = products.allow_tf32
        products.fp32_precision = before
        products.allow_tf32 = True
        assert precision() == "tf32"
    finally:
        products.allow_tf32 = False
        products.fp32_precision = before


# ---------------------------------------------------------------- tables


class _Seen(TorchDispatchMode):
    """What the calling thread copies to a device: a CUDA graph's memory would hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.copied: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        moved = func is torch.ops.aten._to_copy.default and args[0].device != found.device
        if moved:
            self.copied.append(found.device.type)
        return found


@pytest.mark.parametrize("program", [text(mask=CAUSAL), DOCUMENTS])
def test_what_calls_share_does_not_lie_in_the_memory_of_a_graph(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the table of a structural mask nor what lists of tiles are made from."""
    monkeypatch.setattr(blocks, "_LEAST", 0)
    for cached in (launch._table_on, bounds._free, bounds._places):
        cached.cache_clear()
    q, k, v = (x.to("meta") for x in tensors(SHAPE, torch.float32))
    reads = [torch.empty(2, 70, dtype=torch.int64, device="meta")] if "t0" in program else []
    frame = Frame(replace(call(q, k, v, program), reads=reads))
    with _Seen() as seen:
        found = rows_visited(frame, Tile(16, 16))
    assert found.kind == ("lists" if reads else "table")
    assert seen.copied == [] and found.args[0].device.type == "meta"
    with _Seen() as seen:
        torch.zeros(1).to("meta")
    assert seen.copied == ["meta"]


def test_the_table_of_a_triangle() -> None:
    (table,) = rows_visited(Frame(call(*tensors(SHAPE, torch.float32))), Tile(16, 16)).args
    assert table.tolist() == [[i, 0, 0, i, i + 1] for i in (4, 3, 2, 1, 0)]


class _There:
    """Stands for a tensor on a GPU."""

    device = torch.device("cuda")


def test_what_a_graph_reads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lasting, "_kept", set())
    table: Any = _There()
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=capturing: c)
        lasting.recorded(table, torch.zeros(1))
        assert (table in lasting._kept) is capturing
    lasting.recorded(torch.zeros(1))
    assert len(lasting._kept) == 2
