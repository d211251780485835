"""The generated kernels of gated attention in Triton's interpreter.

Run in a process of its own, with TRITON_INTERPRET=1 from the start. float32 and float16 only: the
interpreter computes with the raw bits of bfloat16.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
from gau_cases import TENSORS, Case, mixed, with_gradients

from attn_compiler.kernels import gau, gau_cpu, gau_triton
from attn_compiler.kernels.gau_schema import GauInputs
from attn_compiler.kernels.gau_triton import GauTile

pytestmark = pytest.mark.interpret

# chunks that are no multiple of a tile, shorter ones at the end, widths that are no power of two
BASE = Case(length=53, s=13, e=37, chunk=20)
CASES = [
    BASE,
    BASE.but(causal=False),
    BASE.but(gated=False, biased=False, chunk=53),
    BASE.but(padded=True, chunk=16),
    BASE.but(padded=True, causal=False, scale_mode="valid"),
    BASE.but(packed=True, batch=3),
    BASE.but(packed=True, padded=True, scale_mode="fixed(9)", chunk=7),
    BASE.but(inside=True, scale_mode="seqlen"),
    BASE.but(inside=True, padded=True),
    BASE.but(batch=1, inside=True, scale_mode="chunk", gated=False, causal=False),
]
TILES = (GauTile(16, 16, 16), GauTile(32, 16, 32), GauTile(16, 32, 64))


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("ATTN_COMPILER_CACHE", str(tmp_path_factory.getbasetemp()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("turn", range(len(CASES)))
def test_numbers(turn: int, dtype: torch.dtype) -> None:
    case, tile = CASES[turn], TILES[turn % len(TILES)]
    drawn = case.drawn(dtype)
    given = GauInputs.of(*(drawn[n] for n in TENSORS), **case.options)
    assert not gau_triton.refusal(given)
    ours, plain = gau_triton.forward(given, tile), gau_cpu.forward(given)
    wide = {
        n: x.double() if x is not None and x.is_floating_point() else x for n, x in drawn.items()
    }
    exact = gau_cpu.forward(GauInputs.of(*(wide[n] for n in TENSORS), **case.options))
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous()
        error, allowed = (a.double() - c).norm(), (b.double() - c).norm()
        assert error <= 2 * allowed + torch.finfo(dtype).eps / 2 * c.norm()


def test_the_operator_runs_them_and_has_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    case, calls = BASE.but(padded=True), []
    drawn = case.drawn(torch.float32)
    exact = with_gradients(case, drawn)

    def forward(given: GauInputs, tile: GauTile, run: object = gau_triton.forward) -> object:
        calls.append(tile)
        return run(given, tile)  # type: ignore[operator]

    monkeypatch.setattr(gau_triton, "forward", forward)
    monkeypatch.setattr(gau, "runs_triton", lambda given: not gau_triton.refusal(given))
    for a, b in zip(with_gradients(case, drawn), exact, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    assert calls == [GauTile(32, 32, 64)]


def test_strided_tensors() -> None:
    """Slices of one projection, as the layer hands them over."""
    drawn = BASE.drawn(torch.float32)
    exact = mixed(BASE, drawn)
    names = ("q", "k", "v", "q_lin", "k_lin", "gate")
    wide = torch.cat([drawn[n] for n in names], -1)
    parts = wide.split([drawn[n].shape[-1] for n in names], -1)
    sliced = drawn | dict(zip(names, parts, strict=True))
    sliced["v"] = sliced["v"].transpose(0, 1).contiguous().transpose(0, 1)
    given = GauInputs.of(*(sliced[n] for n in TENSORS), **BASE.options)
    out, _ = gau_triton.forward(given, TILES[0])
    assert torch.allclose(out, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (BASE.but(chunk=None), "no chunks"),
        (BASE.but(dropout=0.5), "dropped"),
        (BASE.but(packed=True, causal=False), "both directions"),
        (BASE.but(s=129), "above 128"),
    ],
)
def test_what_has_no_kernel(case: Case, reason: str) -> None:
    drawn = case.drawn(torch.float32)
    assert reason in gau_triton.refusal(GauInputs.of(*(drawn[n] for n in TENSORS), **case.options))


def test_double_and_mixed_dtypes_have_no_kernel() -> None:
    drawn = BASE.drawn()
    given = GauInputs.of(*(drawn[n] for n in TENSORS), **BASE.options)
    assert "float64" in gau_triton.refusal(given)
    drawn = BASE.drawn(torch.float32)
    drawn["v"] = drawn["v"].half()
    given = GauInputs.of(*(drawn[n] for n in TENSORS), **BASE.options)
    assert "float16, torch.float32" in gau_triton.refusal(given)
