"""The generated kernels of projections by experts in Triton's interpreter.

Run in a process of its own, with TRITON_INTERPRET=1 from the start. float32 and float16 only: the
interpreter computes with the raw bits of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from torch import Tensor

from attn_compiler.kernels import expert_forms as forms
from attn_compiler.kernels import experts, experts_triton
from attn_compiler.kernels.expert_forms import Routed
from attn_compiler.kernels.experts_triton import ExpertTile

pytestmark = pytest.mark.interpret

# tokens, heads, experts, k, width in, width out, merge, whether heads share their experts
CASES = {
    "project": (37, 3, 5, 2, 41, 19, False, False),
    "merge": (37, 3, 5, 2, 19, 41, True, False),
    "project, shared": (29, 2, 7, 3, 35, 21, False, True),
    "merge, shared": (29, 2, 7, 3, 21, 35, True, True),
    "all active": (19, 2, 3, 3, 18, 23, False, False),
    "more experts than routes": (2, 1, 9, 2, 17, 16, True, False),
    "one token": (1, 2, 4, 1, 33, 16, False, False),
}
TILES = (ExpertTile(16, 16, 16, 4, 2), ExpertTile(32, 32, 16, 4, 2), ExpertTile(16, 64, 32, 4, 2))


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("ATTN_COMPILER_CACHE", str(tmp_path_factory.getbasetemp()))


def drawn(
    name: str, dtype: torch.dtype, crowd: Callable[[Tensor], Tensor] = lambda index: index
) -> tuple[Routed, Tensor]:
    """A call, and a gradient of its result."""
    tokens, heads, number, k, ins, outs, merge, shared = CASES[name]
    draw = torch.Generator().manual_seed(tokens + ins)
    rows, results = (tokens * heads, tokens) if merge else (tokens, tokens * heads)
    # rows that are a part of wider ones
    a = torch.randn(rows, ins + 3, generator=draw)[:, :ins]
    w = torch.randn(number * (1 if shared else heads), ins, outs, generator=draw)
    scores = torch.rand(tokens, heads, number, generator=draw)
    index = crowd(scores.topk(k, -1).indices.to(torch.int32))
    gate = torch.rand(index.shape, generator=draw)
    grad = torch.randn(results, outs, generator=draw)
    call = Routed(a.to(dtype), w.to(dtype), index, gate, number, merge)
    return call, grad.to(dtype)


def results(kernels: Any, call: Routed, grad: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    return [kernels.forward(call), *kernels.backward(call, grad, needs)]


def judge(ours: Sequence[Tensor | None], call: Routed, grad: Tensor, needs: Sequence[bool]) -> None:
    """As near to float64 as the plain kernels."""
    plain = results(forms, call, grad, needs)
    wide = Routed(
        call.a.double(), call.w.double(), call.index, call.gate.double(), call.experts, call.merge
    )
    exact = results(forms, wide, grad.double(), needs)
    for mine, theirs, right in zip(ours, plain, exact, strict=True):
        if right is None:
            assert mine is None
            continue
        assert mine is not None and theirs is not None and mine.shape == right.shape
        error, allowed = (mine.double() - right).norm(), (theirs.double() - right).norm()
        eps = torch.finfo(call.a.dtype).eps
        assert error <= 2 * allowed + eps / 2 * right.norm(), (float(error), float(allowed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("turn", range(len(CASES)))
def test_numbers_and_gradients(
    turn: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, grad = drawn(list(CASES)[turn], dtype)
    monkeypatch.setattr(experts_triton, "tile", lambda call: TILES[turn % len(TILES)])
    needs = (True, True, True)
    judge(results(experts_triton, call, grad, needs), call, grad, needs)


@pytest.mark.parametrize("name", ["project", "merge", "merge, shared"])
def test_empty_experts_and_crowded_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody takes some experts, all take another, some twice: more routes than tokens."""
    call, grad = drawn(name, torch.float32, lambda index: torch.full_like(index, 1))
    monkeypatch.setattr(experts_triton, "tile", lambda call: TILES[0])
    needs = (True, True, True)
    found = results(experts_triton, call, grad, needs)
    judge(found, call, grad, needs)
    assert found[2] is not None and not found[2][0].any() and found[2][1].any()


@pytest.mark.parametrize("name", ["project", "merge"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_only_what_is_needed(
    name: str, wanted: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    call, grad = drawn(name, torch.float32)
    monkeypatch.setattr(experts_triton, "tile", lambda call: TILES[1])
    needs = tuple(i in wanted for i in range(3))
    judge(results(experts_triton, call, grad, needs), call, grad, needs)


@pytest.mark.parametrize("operator", ["expert_project", "expert_merge"])
def test_the_operators_run_them(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(3)
    merge = operator == "expert_merge"
    x = torch.randn(2, 7, 3, 18, generator=draw).transpose(1, 2)
    x = (x if merge else torch.randn(2, 7, 18, generator=draw)).requires_grad_()
    w = torch.randn(12, 18, 21, generator=draw).requires_grad_()
    index = torch.rand(2, 7, 3, 4, generator=draw).topk(2, -1).indices.int()
    gate = torch.rand(index.shape, generator=draw).requires_grad_()
    grads = []
    for ours in (False, True):
        monkeypatch.setattr(experts, "runs_triton", lambda call, ours=ours: ours)
        y = getattr(experts, operator)(x, w, index, gate, experts=4)
        grads.append([y, *torch.autograd.grad(y.square().sum(), (x, w, gate))])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_what_is_left_to_plain_kernels() -> None:
    call, _ = drawn("project", torch.float64)
    assert "float64" in experts_triton.refusal(call)
    call, _ = drawn("all active", torch.float32)
    assert "3 of 3" in experts_triton.refusal(call)
    call, _ = drawn("project", torch.float32)
    assert not experts_triton.refusal(call)
    torch.use_deterministic_algorithms(True)
    try:
        assert "order" in experts_triton.refusal(call)
    finally:
        torch.use_deterministic_algorithms(False)
