"""Projections by experts on a GPU: the generated kernels, through the operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_compiler.kernels import experts

pytestmark = pytest.mark.gpu

# batch, tokens, heads, experts, k, D, c
SIZES = [(2, 301, 4, 4, 2, 1024, 112), (1, 1, 2, 5, 2, 412, 76), (3, 67, 1, 16, 4, 256, 128)]


def drawn(operator: str, sizes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    batch, tokens, heads, number, k, wide, narrow = sizes
    merge = operator == "expert_merge"
    draw = torch.Generator().manual_seed(tokens)
    ins, outs = (narrow, wide) if merge else (wide, narrow)
    shape = (batch, tokens, heads, ins) if merge else (batch, tokens, ins)
    x = torch.randn(shape, generator=draw).to(dtype)
    w = (torch.randn(heads * number, ins, outs, generator=draw) / ins**0.5).to(dtype)
    index = torch.rand(batch, tokens, heads, number, generator=draw).topk(k, -1).indices.int()
    gate = torch.rand(index.shape, generator=draw)
    return [x.transpose(1, 2) if merge else x, w, index, gate]


def results(call: Any, args: list[Tensor], experts: int) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in args]
    y = call(*leaves, experts=experts)
    wanted = [t for t in leaves if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.double().square().sum(), wanted)]


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        *((sizes, torch.bfloat16) for sizes in SIZES),
        *((SIZES[0], dtype) for dtype in (torch.float16, torch.float32)),
    ],
)
@pytest.mark.parametrize("operator", ["expert_project", "expert_merge"])
def test_numbers_and_gradients(
    operator: str, sizes: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near to float64 as the plain kernels on the same device."""
    args = [t.cuda() for t in drawn(operator, sizes, dtype)]
    reference = getattr(experts, operator.replace("expert", "reference"))
    exact = results(reference, [t.double() if t.is_floating_point() else t for t in args], sizes[3])
    runs, ran = experts.runs_triton, []
    monkeypatch.setattr(experts, "runs_triton", lambda call: ran.append(runs(call)) or ran[-1])
    ours = results(getattr(experts, operator), args, sizes[3])
    assert ran == [True, True]
    monkeypatch.setattr(experts, "runs_triton", lambda call: False)
    plain = results(getattr(experts, operator), args, sizes[3])
    for mine, theirs, right in zip(ours, plain, exact, strict=True):
        error, allowed = (mine.double() - right).norm(), (theirs.double() - right).norm()
        assert error <= 2 * allowed + torch.finfo(dtype).eps / 2 * right.norm()


@pytest.mark.parametrize("operator", ["expert_project", "expert_merge"])
def test_in_a_cuda_graph(operator: str) -> None:
    """The host waits for nothing."""
    args = [t.cuda() for t in drawn(operator, SIZES[0], torch.bfloat16)]

    def call() -> Tensor:
        return getattr(experts, operator)(*args, experts=4)  # type: ignore[no-any-return]

    with torch.no_grad():
        expected = call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call()
        found.zero_()
        graph.replay()
    # sums of few numbers in any order
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
