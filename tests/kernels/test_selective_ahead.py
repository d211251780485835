"""The kernels of Selective attention compiled ahead of time for GPUs that are not there.

Run in a process of its own: a driver stands in for the device.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
from ahead import SHARED, compile_for
from attention_cases import text

from attn_compiler.kernels import (
    eviction_triton,
    flash_triton,
    flash_triton_backward,
    gpu,
    selective_inside,
)
from attn_compiler.kernels.frame import Inputs, empty_heads, empty_lse
from attn_compiler.kernels.launch import Launch
from attn_compiler.kernels.masking_triton import Scan
from attn_compiler.kernels.selection import Selection

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
    whole, sums = torch.empty(2, LENGTH, LENGTH), torch.empty(2, LENGTH // scan.tile.rows, LENGTH)
    return {
        "protect": scan.protect(),
        "sums": scan.launch("sums", (sums,)),
        "scan": scan.scan(sums, start, start, up=True),
        "amounts": scan.launch("amounts", (sums, whole)),
        "unmask": scan.launch("unmask", (sums, whole, whole.to(dtype), sums)),
    }


def attention(program: str, width: int, dtype: torch.dtype) -> dict[str, Launch]:
    """The kernels that make F inside, in the tiles they are launched with."""
    q, k, v = (torch.empty(2, LENGTH, n, width, dtype=dtype).transpose(1, 2) for n in (8, 4, 4))
    reads = [torch.empty(2, LENGTH, dtype=torch.bool)] if "t0" in program else []
    ints = [256] if "n0" in program else []
    given = Inputs.of(q, k, v, reads, ints, None, program=program, scale=0.125, dropout=0.0)
    gate = torch.ones(1) if reads else None
    selection, start = Selection(given, [], gate, None, 0, "qk"), torch.empty(2, LENGTH)
    scan = Scan(selection.alone, 0, start.to(torch.int8), start, fine=True)
    carries = torch.empty(2, LENGTH // scan.tile.rows, LENGTH)
    frame = selective_inside._frame(selection, scan, carries)
    tiles = selective_inside.tiles(given, width)
    assert tiles is not None
    out, lse = empty_heads(v, q.shape), empty_lse(q, torch.float32)
    call = flash_triton_backward._Call.of(frame, out, lse, {len(reads): out}, tiles[1:])
    call.wanted[len(reads)] = torch.empty(2, 512, LENGTH)
    return {
        "sums": scan.launch("sums", (carries,)),
        "forward": flash_triton.prepare(frame, tiles[0], out[None], lse[None]),
        "queries": call.queries(q, (512, 1024)),
        "keys_and_values": call.keys_and_values(k, v),
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
            if name not in ("protect", "scan") and dtype is torch.bfloat16:
                assert MATRIX[target] in found.text, name


@pytest.mark.parametrize(
    ("target", "title", "width"),
    [
        ("sm_80", "causal", 64),
        ("sm_90", "causal", 64),
        ("sm_100", "causal", 64),
        ("sm_80", "capped", 128),
        ("sm_90", "capped", 128),
        ("sm_100", "causal", 128),
    ],
)
def test_attention_that_makes_it_inside_compiles(
    target: str, title: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = "ampere" if target == "sm_80" else "hopper"
    monkeypatch.setattr(gpu, "family", lambda device: family)
    for name, launch in attention(PROGRAMS[title], width, torch.bfloat16).items():
        found = compile_for(target, launch)
        assert found.spilled == 0, name
        assert found.shared <= SHARED[target], name
        assert MATRIX["sm_80"] in found.text or MATRIX[target] in found.text, name


@pytest.mark.parametrize("budget", [40, 1021, eviction_triton._MOST])
@pytest.mark.parametrize("target", MATRIX)
def test_eviction_compiles(target: str, budget: int) -> None:
    rows, keys = 128, 2**17
    amount = torch.empty(2, 1, keys).expand(2, rows, keys)
    death = torch.empty(2, keys, dtype=torch.int64)
    kept = eviction_triton.nothing_kept(2, budget, death.device)
    cached = torch.empty(2, rows, dtype=torch.bool)
    launch = eviction_triton.launch(amount, death.to(torch.int8), cached, death, kept, 128, budget)
    found = compile_for(target, launch)
    assert found.spilled == 0 and found.shared <= SHARED[target]
