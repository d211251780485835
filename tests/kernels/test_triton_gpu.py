"""The generated kernels on a GPU: numbers and gradients of every kind of program."""

from __future__ import annotations

import pytest
import torch
from attention_cases import CASES, CAUSAL, SCALE, Shape, judge, tensors, text

from attn_compiler.kernels import gpu
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


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", CASES)
def test_numbers_and_gradients(name: str, dtype: torch.dtype) -> None:
    case, turn = CASES[name], list(CASES).index(name) + DTYPES.index(dtype)
    shape = SHAPES[turn % len(SHAPES)]
    given, reads = tensors(shape, dtype), case.reads(shape)
    on_gpu = Inputs.of(
        *(x.cuda() for x in given), [r.cuda() for r in reads], case.ints, None,
        program=case.program, scale=SCALE, dropout=0.0,
    )  # fmt: skip
    assert gpu.runs(on_gpu)
    judge(case, given, reads, device="cuda")


@pytest.mark.parametrize("rows", [1, 5])
def test_a_short_query(rows: int) -> None:
    shape = Shape(H=8, G=2, T=rows, S=4099, d=128, dv=128)
    for name in ("none", "offset", "softcap"):
        judge(CASES[name], tensors(shape, torch.bfloat16), CASES[name].reads(shape), device="cuda")


def test_in_a_cuda_graph() -> None:
    q, k, v = (x.cuda() for x in tensors(Shape(T=128, S=128, d=64, dv=64), torch.bfloat16))

    def call() -> torch.Tensor:
        out, _ = attention(
            q, k, v, [], [], None, program=text(mask=CAUSAL), scale=SCALE, dropout=0.0
        )
        return out

    with torch.no_grad():
        expected = call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call()
        found.zero_()
        graph.replay()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
