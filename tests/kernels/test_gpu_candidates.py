"""What a GPU would run for a call, decided without one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import CAUSAL, OFFSET, SOFTCAP, text
from torch._subclasses.fake_tensor import FakeTensorMode

from attn_compiler.cost import peers
from attn_compiler.cost.hardware import Hardware
from attn_compiler.kernels import gpu, sdpa_gpu
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.frame import Inputs, empty_heads, empty_lse


def call(
    program: str, T: int = 64, S: int = 64, d: int = 64, G: int = 2, device: str = "cuda"
) -> Inputs:
    def made(length: int, heads: int) -> torch.Tensor:
        x = torch.empty(2, length, heads, d, dtype=torch.bfloat16, device=device)
        return x.transpose(1, 2)

    q, k, v = made(T, 8), made(S, G), made(S, G)
    return Inputs.of(q, k, v, [], [], None, program=program, scale=0.1, dropout=0.0)


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "family", lambda device: "hopper")
    monkeypatch.setattr(gpu, "backends", lambda device: ("cudnn", "flash"))
    monkeypatch.setattr(gpu, "hardware", lambda device: Hardware.named("h200"))
    monkeypatch.setattr(sdpa_gpu, "available", lambda backend: True)


def names(given: Inputs) -> list[str]:
    return list(gpu.candidates(given))


def test_kernels_of_pytorch_come_first_where_they_express_a_call() -> None:
    with FakeTensorMode():
        everything = ["cudnn", "flash", "triton", "composite"]
        assert names(call(text())) == names(call(text(mask=CAUSAL))) == everything
        assert names(call(text(mask=OFFSET))) == everything  # T == S: the same
        assert names(call(text(), S=96)) == everything
        wide = call(text(mask=CAUSAL), d=256)
        assert names(wide) == ["flash", "triton", "composite"]


def test_the_cost_model_orders_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_cudnn(row: Hardware, problem: object, work: str) -> dict[str, float]:
        return {"cudnn": 3.0, "flash": 2.5, "triton": 2.0}

    monkeypatch.setattr(peers, "predicted", slow_cudnn)
    peers.order.cache_clear()
    with FakeTensorMode():
        given = call(text(), T=256, S=256)
        # shares of other machines decide nothing that is near
        assert names(given) == ["flash", "triton", "cudnn", "composite"]
        measured = replace(Hardware.named("h200"), mark="measured")
        monkeypatch.setattr(gpu, "hardware", lambda device: measured)
        assert names(given) == ["triton", "flash", "cudnn", "composite"]
        monkeypatch.setattr(gpu, "hardware", lambda device: None)
        assert names(given) == ["cudnn", "flash", "triton", "composite"]
    peers.order.cache_clear()


@pytest.mark.parametrize(
    "program",
    [text(SOFTCAP), text(mask="(k <= q) & (k > q - 9)"), text(mask=CAUSAL, sink="1.0")],
)
def test_what_only_a_generated_kernel_expresses(program: str) -> None:
    with FakeTensorMode():
        assert names(call(program)) == ["triton", "composite"]


def test_what_keeps_pytorchs_kernels_out() -> None:
    with FakeTensorMode():
        given = call(text(mask=CAUSAL), S=96)
        assert names(given) == ["triton", "composite"]  # its causal masks are of squares
        assert names(call(text(), T=1)) == ["triton", "composite"]
        given = call(text(mask=CAUSAL))
        dropped = replace(given, drop=Drop(torch.tensor([1]), 0.1))
        assert names(dropped) == ["triton", "composite"]
        single = replace(given, q=given.q.float(), k=given.k.float(), v=given.v.float())
        assert names(single) == ["triton", "composite"]
        assert names(replace(given, scale=-0.1)) == ["triton", "composite"]
        assert names(call(text(), d=60)) == ["triton", "composite"]
        assert names(call(text(), T=0)) == ["composite"]


@pytest.mark.parametrize(
    ("backend", "kv_heads"),
    [("cudnn", 1), ("cudnn", 8), ("flash", 1), ("flash", 8), ("efficient", 8)],
)
def test_results_lie_where_the_operator_says(backend: sdpa_gpu.Backend, kv_heads: int) -> None:
    with FakeTensorMode():
        given = call(text(mask=CAUSAL), G=kv_heads)
        out, lse = sdpa_gpu.forward(backend, given)
        wanted = empty_heads(given.v, out.shape), empty_lse(given.q, torch.float32)
        for found, like in zip((out, lse), wanted, strict=True):
            assert (found.shape, found.stride(), found.dtype) == (
                like.shape, like.stride(), like.dtype,
            )  # fmt: skip
        grads = sdpa_gpu.backward(backend, given, out, (out, lse))
        assert [g.shape for g in grads] == [x.shape for x in given.qkv]


def test_the_efficient_kernel_takes_what_the_others_do_not() -> None:
    given = call(text(mask=CAUSAL), T=61, S=61, G=8, device="meta")
    single = replace(given, q=given.q.float(), k=given.k.float(), v=given.v.float())
    narrow = replace(single, v=single.v[..., :20])
    for each in (given, single, narrow):
        assert not sdpa_gpu.refusal("efficient", each)
        out, lse = sdpa_gpu.forward("efficient", each)
        assert out.shape == (*each.q.shape[:3], each.v.shape[3]) and lse.shape == (2, 8, 61)
        grads = sdpa_gpu.backward("efficient", each, out, (out, lse))
        assert [g.shape for g in grads] == [x.shape for x in each.qkv]
    assert "share" in sdpa_gpu.refusal("efficient", call(text(), G=2, device="meta"))
    assert "head dims" in sdpa_gpu.refusal("efficient", call(text(), G=8, d=60, device="meta"))


def test_a_backend_that_fails_is_asked_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What torch refuses only when it is called: the next candidate runs, here that of a CPU."""
    asked: list[str] = []

    def fails(backend: str, *_: object) -> None:
        asked.append(backend)
        raise RuntimeError("no plan for this shape")

    monkeypatch.setattr(gpu, "family", lambda device: "")
    monkeypatch.setattr(gpu, "hardware", lambda device: None)
    monkeypatch.setattr(gpu, "_given_up", set())
    monkeypatch.setattr(sdpa_gpu, "forward", fails)
    monkeypatch.setattr(sdpa_gpu, "backward", fails)
    q, k, v = (torch.randn(2, 4, 33, 16, dtype=torch.float16) for _ in range(3))
    given = Inputs.of(q, k, v, [], [], None, program=text(), scale=0.25, dropout=0.0)
    for _ in range(2):
        out, lse = gpu.forward(given)
        torch.testing.assert_close(out, (q @ k.mT * 0.25).softmax(-1) @ v, rtol=1e-2, atol=1e-2)
        gpu.backward(given, torch.ones_like(out), (out, lse), [])
    assert asked == ["cudnn", "flash"]
    assert "no plan for this shape" in caplog.text
