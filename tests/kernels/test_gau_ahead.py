"""The kernels of gated attention compiled ahead of time: no spills, matrix units, shared memory
within the chip's limit. Run in a process of its own: a driver stands in for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

pytest.importorskip("triton")

import torch
from ahead import SHARED, compile_for
from gau_cases import TENSORS, Case

from attn_compiler.kernels import gau_triton, gau_triton_backward
from attn_compiler.kernels.gau_schema import GauInputs
from attn_compiler.kernels.launch import Launch

pytestmark = pytest.mark.aot

MATRIX = {
    "sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma",
}  # fmt: skip
PAPER = Case(length=512, s=128, e=1024, chunk=256)
CROWDED = PAPER.but(packed=True, inside=True, dropout=0.1)
CASES = [
    ("sm_80", PAPER.but(packed=True, inside=True), torch.bfloat16),
    ("sm_80", PAPER.but(chunk=None, dropout=0.1), torch.bfloat16),
    ("sm_80", PAPER, torch.float32),
    ("sm_90", PAPER, torch.bfloat16),
    ("sm_90", PAPER.but(causal=False, padded=True), torch.float16),
]
# fewer of each: compilation takes seconds
BACKWARD = [
    ("sm_90", PAPER, torch.bfloat16, ("queries", "keys", "values")),
    ("sm_80", CROWDED, torch.bfloat16, ("keys",)),
    ("sm_80", PAPER.but(causal=False, padded=True, inside=True), torch.bfloat16, ("queries",)),
    ("sm_100", PAPER.but(chunk=None), torch.bfloat16, ("queries",)),
    ("gfx942", PAPER, torch.float16, ("keys", "values")),
    ("sm_90", PAPER, torch.float32, ("keys",)),
]


@pytest.fixture(autouse=True)
def _folders(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("ATTN_COMPILER_CACHE", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp() / name))


def inputs(case: Case, dtype: torch.dtype) -> GauInputs:
    drawn = case.drawn(dtype)
    return GauInputs.of(*(drawn[n] for n in TENSORS), **case.options)


def compiled(target: str, launch: Launch, matrix: bool) -> None:
    found = compile_for(target, launch)
    assert found.spilled == 0
    assert found.shared <= SHARED[target]
    if matrix:
        assert MATRIX[target] in found.text


@pytest.mark.parametrize(("target", "case", "dtype"), CASES)
def test_kernels(target: str, case: Case, dtype: torch.dtype) -> None:
    given = inputs(case, dtype)
    out = torch.empty_like(given.v), torch.empty_like(given.v)
    *sums, mix = gau_triton.prepare(given, gau_triton.tile(given), out)
    assert len(sums) == (0 if case.chunk is None else 2)
    matrix = dtype is not torch.float32
    compiled(target, mix, matrix)
    if sums:
        states, prefix = sums
        compiled(target, states, matrix)
        compiled(target, prefix, False)


@pytest.mark.parametrize(("target", "case", "dtype", "names"), BACKWARD)
def test_backward(target: str, case: Case, dtype: torch.dtype, names: Sequence[str]) -> None:
    given = inputs(case, dtype)
    tile = gau_triton_backward.tile(given, "amd" if target == "gfx942" else "")
    wanted = ["q", "k", "v", *(["q_lin", "k_lin"] if case.chunk else []), "bias"]
    launches, into = gau_triton_backward.prepare(given, tile, torch.empty_like(given.v), wanted)
    assert set(into) == set(wanted)
    found = [launch for launch in launches if launch.kernel.__name__ in names]
    assert len(launches) == (7 if case.chunk else 3) and len(found) == len(names)
    for launch in found:
        compiled(target, launch, dtype is not torch.float32)
