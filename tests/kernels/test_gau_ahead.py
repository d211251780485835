"""The kernels of gated attention compiled ahead of time: no spills, matrix units, shared memory
within the chip's limit. Run in a process of its own: a driver stands in for the device.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
from ahead import SHARED, compile_for
from gau_cases import TENSORS, Case

from attn_compiler.kernels import gau_triton
from attn_compiler.kernels.gau_schema import GauInputs

pytestmark = pytest.mark.aot

MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async"}
PAPER = Case(length=512, s=128, e=1024, chunk=256)
CASES = [PAPER, PAPER.but(causal=False, padded=True), PAPER.but(packed=True, inside=True)]


@pytest.fixture(autouse=True)
def _folders(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("ATTN_COMPILER_CACHE", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp() / name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", MATRIX)
def test_kernels(target: str, case: Case, dtype: torch.dtype) -> None:
    drawn = case.drawn(dtype)
    given = GauInputs.of(*(drawn[n] for n in TENSORS), **case.options)
    out = torch.empty_like(given.v), torch.empty_like(given.v)
    states, prefix, mix = gau_triton.prepare(given, gau_triton.tile(given), out)
    for launch in (states, prefix, mix):
        compiled = compile_for(target, launch)
        assert compiled.spilled == 0
        assert compiled.shared <= SHARED[target]
        if launch is not prefix and dtype is not torch.float32:
            assert MATRIX[target] in compiled.text
