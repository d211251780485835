"""Relative positions by blocks of rows: the same numbers, and less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_compiler.ir.score import Program
from attn_compiler.kernels import relative
from attn_compiler.kernels.relative import (
    Relative,
    attend_by_distance,
    programs,
    relative_positions,
)

B, H, T, S, C, D = 2, 3, 37, 53, 5, 12
PROGRAMS = {
    "causal": "score: dot; mask: k <= q + (S - T); empty: any",
    "padding, cap": "score: 5.0 * tanh(dot / 5.0); mask: t0[b, k]; empty: any",
    "bias, window": "score: dot + t0[q, k]; mask: (k <= q + n0) & (k > q + n0 - 9); empty: any",
}


def given(name: str) -> tuple[Relative, list[Tensor]]:
    torch.manual_seed(0)
    reads = {
        "padding, cap": [torch.rand(B, S) < 0.7],
        "bias, window": [torch.randn(T, S, dtype=torch.float64)],
    }.get(name, [])
    ints = [S - T] if "n0" in PROGRAMS[name] else []
    q, k, v = (torch.randn(B, H, n, C, dtype=torch.float64) for n in (T, S, S))
    offsets = relative_positions(torch.randn(H, D, C, dtype=torch.float64), T, S, S - T)
    tensors = [t.requires_grad_() for t in (q, k, v, offsets)]
    texts = programs(Program.parse(PROGRAMS[name]), len(reads), len(ints))
    return Relative(*texts, reads, ints, 0.4, 0.0), tensors


@pytest.mark.parametrize("name", PROGRAMS)
def test_blocks_of_rows_give_what_all_rows_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rest, tensors = given(name)
    found = []
    for most in (2**22, 1):
        monkeypatch.setitem(relative._ELEMENTS, "cpu", most)
        y = attend_by_distance(*tensors, rest, None)
        found.append((y, *torch.autograd.grad(y.square().sum(), tensors)))
        with torch.no_grad():
            assert torch.equal(attend_by_distance(*tensors, rest, None), y)
    for whole, blocks in zip(*found, strict=True):
        torch.testing.assert_close(blocks, whole, rtol=1e-11, atol=1e-12)


def test_dropout_is_drawn_for_every_block_and_twice_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(relative._ELEMENTS, "cpu", 1)
    _, tensors = given("causal")
    _, k, v, offsets = (t.detach() for t in tensors)
    same = torch.zeros(B, H, T, C, dtype=torch.float64, requires_grad=True)
    everywhere = Relative(*programs(Program(), 0, 0), (), (), 1.0, 0.5)
    seed = torch.tensor([7])
    y = attend_by_distance(same, k, v, offsets, everywhere, seed)
    assert not torch.equal(y[:, :, :16], y[:, :, 16:32])
    assert torch.equal(attend_by_distance(same, k, v, offsets, everywhere, seed), y)
    # the backward drops what the forward dropped
    step = torch.zeros_like(same)
    step[..., 0] = 1e-6
    ahead, behind = (
        attend_by_distance(same.detach() + s, k, v, offsets, everywhere, seed)
        for s in (step, -step)
    )
    (grad,) = torch.autograd.grad(y.sum(), same)
    torch.testing.assert_close(
        grad[..., 0].sum(), (ahead - behind).sum() / 2e-6, rtol=1e-5, atol=1e-6
    )


def test_compilers_and_exporters_see_through_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(relative._ELEMENTS, "cpu", 1)
    rest, tensors = given("causal")

    class Attention(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return attend_by_distance(*tensors, rest, None)

    want = Attention()(*tensors)
    compiled = torch.compile(Attention(), backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(*tensors), want)
    program = torch.export.export(Attention(), tuple(t.detach() for t in tensors))
    torch.testing.assert_close(program.module()(*tensors), want)
