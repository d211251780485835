"""What runs on a GPU: numbers and gradients of every kind of program, by each candidate."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    CASES,
    CAUSAL,
    SCALE,
    SOFTCAP,
    Case,
    Shape,
    judge,
    tensors,
    text,
)
from torch import Tensor

from attn_compiler.kernels import blocks, gpu, sdpa_gpu
from attn_compiler.kernels.frame import Inputs
from attn_compiler.kernels.library import attention

pytestmark = pytest.mark.gpu

SHAPES = (
    Shape(T=137, S=211),
    Shape(H=4, G=2, T=211, S=137, d=64, dv=64),
    Shape(H=3, G=1, T=257, S=257, d=128, dv=128),
    Shape(H=2, G=2, T=129, S=300, d=80, dv=40),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def on_gpu(case: Case, given: list[Tensor], reads: list[Tensor]) -> Inputs:
    return Inputs.of(
        *(x.cuda() for x in given), [r.cuda() for r in reads], case.ints, None,
        program=case.program, scale=SCALE, dropout=0.0,
    )  # fmt: skip


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the generated kernels, also where PyTorch's would come first."""
    monkeypatch.setattr(gpu, "backends", lambda device: ())


@pytest.mark.usefixtures("generated")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", CASES)
def test_numbers_and_gradients(name: str, dtype: torch.dtype) -> None:
    case, turn = CASES[name], list(CASES).index(name) + DTYPES.index(dtype)
    shape = SHAPES[turn % len(SHAPES)]
    given, reads = tensors(shape, dtype), case.reads(shape)
    assert next(gpu.candidates(on_gpu(case, given, reads))) == "triton"
    judge(case, given, reads, device="cuda")


@pytest.mark.usefixtures("generated")
@pytest.mark.parametrize("name", ["documents", "tensor mask"])
def test_tiles_from_lists(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_LEAST", 0)
    monkeypatch.setattr(blocks, "_MOST_READ", 100)
    case, shape = CASES[name], Shape(H=4, G=2, T=389, S=521, d=64, dv=64)
    case = Case(case.program.replace("uniform", "zero"), case.reads)
    judge(case, tensors(shape, torch.bfloat16), case.reads(shape), device="cuda")


@pytest.mark.parametrize("name", ["none", "causal"])
@pytest.mark.parametrize(
    ("backend", "kv_heads"),
    [("cudnn", 1), ("cudnn", 4), ("flash", 1), ("flash", 4), ("efficient", 4)],
)
def test_kernels_of_pytorch(
    backend: sdpa_gpu.Backend, name: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not sdpa_gpu.available(backend):
        pytest.skip(f"no {backend} here")
    case, shape = CASES[name], Shape(H=4, G=kv_heads, T=211, S=211, d=64, dv=64)
    given = tensors(shape, torch.bfloat16)
    monkeypatch.setattr(gpu, "backends", lambda device: (backend,))
    assert next(gpu.candidates(on_gpu(case, given, []))) == backend
    judge(case, given, [], device="cuda")


@pytest.mark.parametrize("rows", [1, 5])
def test_a_short_query(rows: int) -> None:
    shape = Shape(H=8, G=2, T=rows, S=4099, d=128, dv=128)
    for name in ("none", "offset", "softcap"):
        judge(CASES[name], tensors(shape, torch.bfloat16), CASES[name].reads(shape), device="cuda")


@pytest.mark.parametrize("program", [text(mask=CAUSAL), text("5.0 * tanh(dot / 5.0)", CAUSAL)])
def test_in_a_cuda_graph(program: str) -> None:
    q, k, v = (x.cuda() for x in tensors(Shape(T=128, S=128, d=64, dv=64), torch.bfloat16))

    def call() -> torch.Tensor:
        out, _ = attention(q, k, v, [], [], None, program=program, scale=SCALE, dropout=0.0)
        return out

    with torch.no_grad():
        expected = call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call()
        found.zero_()
        graph.replay()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("generated")
@pytest.mark.parametrize("mask", [CAUSAL, f"(t0[b, q] == t0[b, k]) & {CAUSAL}"])
def test_in_the_graphs_of_torch_compile(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts what its warm-up leaves in the memory of a graph, and refuses it."""
    monkeypatch.setattr(blocks, "_LEAST", 0)
    program = text(mask=mask, empty="zero")
    shape = Shape(T=193, S=193, d=64, dv=64)
    given = [x.cuda().requires_grad_() for x in tensors(shape, torch.bfloat16)]
    ids = torch.arange(193, device="cuda").div(50, rounding_mode="floor").expand(2, -1)
    reads = [ids] if "t0" in mask else []

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = attention(q, k, v, reads, [], None, program=program, scale=SCALE, dropout=0.0)
        return out * 2

    compiled = torch.compile(call, mode="reduce-overhead")
    grad = torch.randn(2, shape.H, 193, 64, device="cuda", dtype=torch.bfloat16)
    expected = [call(*given), *torch.autograd.grad(call(*given), given, grad)]
    for _ in range(4):  # warm-up, recording, replays
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(*given)
        found = [out.clone(), *(g.clone() for g in torch.autograd.grad(out, given, grad))]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_places_beyond_31_bits() -> None:
    """Rows so far from each other that 32 bits do not count the elements between them."""
    long = torch.randn(2**31 + 2**21, device="cuda", dtype=torch.bfloat16)
    far = torch.as_strided(long, (1, 1, 200, 64), (0, 0, 10_795_000, 1))
    near, k = far.contiguous(), torch.randn(1, 1, 300, 64, device="cuda", dtype=torch.bfloat16)
    one, other = (
        attention(q, k, k, [], [], None, program=text(SOFTCAP), scale=SCALE, dropout=0.0)[0]
        for q in (far, near)
    )
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_more_heads_than_one_axis_of_a_launch_holds() -> None:
    q, k, v = (torch.randn(33000, 2, 17, 16, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    given = [x.requires_grad_() for x in (q, k, v)]
    out, _ = attention(*given, [], [], None, program=text(SOFTCAP), scale=SCALE, dropout=0.0)
    grads = torch.autograd.grad(out.sum(), given)
    last = [x[-3:].detach().requires_grad_() for x in given]
    wanted, _ = attention(*last, [], [], None, program=text(SOFTCAP), scale=SCALE, dropout=0.0)
    pairs = zip((wanted, *torch.autograd.grad(wanted.sum(), last)), (out, *grads), strict=True)
    for few, many in pairs:
        torch.testing.assert_close(many[-3:], few, rtol=2e-2, atol=2e-2)
