"""The kernels of projections by experts compiled ahead of time: no spills, matrix units, shared
memory within the chip's limit. Run in a process of its own: a driver stands in for the device.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

import torch
from ahead import SHARED, compile_for

from attn_compiler.kernels import experts_triton
from attn_compiler.kernels.expert_forms import Routed
from attn_compiler.kernels.launch import Launch

pytestmark = pytest.mark.aot

MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async"}


@pytest.fixture(autouse=True)
def _folders(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("ATTN_COMPILER_CACHE", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp() / name))


def paper(merge: bool, dtype: torch.dtype, tokens: int) -> tuple[Routed, torch.Tensor]:
    """4 heads 112 wide with 4 experts each, 2 of them active, in a model 1024 wide."""
    widths = (112, 1024) if merge else (1024, 112)
    a = torch.zeros(tokens * (4 if merge else 1), widths[0], dtype=dtype)
    w = torch.zeros(16, *widths, dtype=dtype)
    index = torch.arange(2, dtype=torch.int32).expand(tokens, 4, 2).contiguous()
    grad = torch.zeros(tokens * (1 if merge else 4), widths[1], dtype=dtype)
    return Routed(a, w, index, torch.zeros(index.shape), 4, merge), grad


def launches(merge: bool, dtype: torch.dtype, tokens: int, **changes: int) -> list[Launch]:
    """Of a forward and of a backward pass."""
    call, grad = paper(merge, dtype, tokens)
    tile = replace(experts_triton.tile(call), **changes)
    into = (torch.empty(call.a.shape), torch.empty_like(call.w), torch.empty(call.gate.shape))
    return [
        experts_triton.prepare_forward(call, tile, torch.empty(call.rows, call.w.shape[2])),
        *experts_triton.prepare_backward(call, grad, tile, into),
    ]


# a step of generation has few rows for an expert
@pytest.mark.parametrize(
    ("dtype", "tokens"),
    [(torch.bfloat16, 512), (torch.bfloat16, 8), (torch.float16, 512), (torch.float32, 512)],
)
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("target", MATRIX)
def test_kernels(target: str, merge: bool, dtype: torch.dtype, tokens: int) -> None:
    found = launches(merge, dtype, tokens)
    assert len(found) == (3 if merge else 4)
    for launch in found:
        compiled = compile_for(target, launch)
        assert compiled.spilled == 0
        assert compiled.shared <= SHARED[target]
        if dtype is not torch.float32 and launch.constants["BLOCK_M"] >= 64:
            assert MATRIX[target] in compiled.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", ["sm_89", "sm_100", "gfx942"])
def test_other_chips(target: str, dtype: torch.dtype) -> None:
    # where PyTorch is built for AMD, tiles have two stages
    changes = {"stages": 2} if target == "gfx942" else {}
    for merge in (False, True):
        for launch in launches(merge, dtype, 512, **changes):
            compiled = compile_for(target, launch)
            assert compiled.spilled == 0 and compiled.shared <= SHARED[target]
