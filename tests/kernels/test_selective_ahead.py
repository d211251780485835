"""The kernels of Selective attention compiled ahead of time for GPUs that are not there.

Run in a process of its own: a driver stands in for the device.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
from ahead import SHARED, compile_for
from attention_cases import text

from attn_compiler.kernels import eviction_triton
from attn_compiler.kernels.frame import Inputs
from attn_compiler.kernels.launch import Launch
from attn_compiler.kernels.masking_triton import Scan

pytestmark = pytest.mark.aot

MATRIX = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}
PROGRAMS = {
    "causal": text(mask="(k <= q)"),
    "capped": text("5.0 * tanh(dot / 5.0)", "(k <= q) & (k > q - n0) & t0[b, k]"),
}
LENGTH = 1024


@pytest.fixture(autouse=True)
def _folders(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("ATTN_COMPILER_CACHE", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp() / name))


def launches(program: str, width: int, dtype: torch.dtype) -> dict[str, Launch]:
    q, k = (torch.empty(2, LENGTH, 1, width, dtype=dtype).transpose(1, 2) for _ in range(2))
    reads = [torch.empty(2, LENGTH, dtype=torch.bool)] if "t0" in program else []
    ints = [256] if "n0" in program else []
    given = Inputs.of(q, k, k, reads, ints, None, program=program, scale=0.125, dropout=0.0)
    start = torch.empty(2, LENGTH)
    scan = Scan(given, 0, start.to(torch.int8), start)
    whole = torch.empty(2, LENGTH, LENGTH)
    return {
        "protect": scan.protect(),
        "amounts": scan.launch("amounts", (start, whole, start)),
        "unmask": scan.launch("unmask", (whole, whole.to(dtype), start)),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("target", MATRIX)
def test_kernels_compile(target: str, width: int, dtype: torch.dtype) -> None:
    for title in ("causal", "capped") if width == 128 else ("causal",):
        for name, launch in launches(PROGRAMS[title], width, dtype).items():
            found = compile_for(target, launch)
            assert found.spilled == 0, name
            assert found.shared <= SHARED[target], name
            if name != "protect" and dtype is torch.bfloat16:
                assert MATRIX[target] in found.text, name


@pytest.mark.parametrize("keys", [1021, 4093, eviction_triton._MOST - 1, eviction_triton._MOST])
@pytest.mark.parametrize("target", MATRIX)
def test_eviction_compiles(target: str, keys: int) -> None:
    shape, rows = (2, keys), 128
    amount = torch.empty(2, rows, keys)
    bytes_of = [torch.empty(*shape, dtype=t) for t in (torch.int8, torch.int64)]
    cached = torch.empty(2, rows, dtype=torch.bool)
    launch = eviction_triton.launch(amount, bytes_of[0], cached, bytes_of[1], 128, 40)
    found = compile_for(target, launch)
    assert found.spilled == 0 and found.shared <= SHARED[target]
