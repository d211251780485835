"""The generated kernels of gated attention in Triton's interpreter, forward and backward.

Run in a process of its own, with TRITON_INTERPRET=1 from the start. float32 and float16 only: the
interpreter computes with the raw bits of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from gau_cases import TENSORS, Case, mixed, with_gradients
from torch import Tensor

from attn_compiler.kernels import gau, gau_cpu, gau_triton, gau_triton_backward
from attn_compiler.kernels.gau import gau_attention, gau_attention_backward, reference
from attn_compiler.kernels.gau_schema import GauInputs
from attn_compiler.kernels.gau_triton import GauTile

pytestmark = pytest.mark.interpret

# chunks that are no multiple of a tile, shorter ones at the end, widths that are no power of two
BASE = Case(length=43, s=13, e=37, chunk=20)
CASES = [
    BASE,
    BASE.but(causal=False),
    BASE.but(gated=False, biased=False, chunk=99),
    BASE.but(padded=True, chunk=16),
    BASE.but(padded=True, causal=False, scale_mode="valid"),
    BASE.but(packed=True, batch=3),
    BASE.but(packed=True, padded=True, scale_mode="fixed(9)", chunk=7, dropout=0.3, length=23),
    BASE.but(inside=True, scale_mode="seqlen"),
    BASE.but(inside=True, padded=True, length=20, chunk=17),
    BASE.but(batch=1, inside=True, scale_mode="chunk", gated=False, causal=False),
    BASE.but(chunk=None),
    BASE.but(chunk=None, causal=False, packed=True, padded=True, inside=True),
    BASE.but(chunk=None, dropout=0.4, padded=True, batch=1),
    BASE.but(dropout=1.0, causal=False, length=20),
]
TILES = (
    GauTile(16, 16, 16, 16, 16), GauTile(32, 32, 32, 32, 32), GauTile(16, 32, 64, 16, 32),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("ATTN_COMPILER_CACHE", str(tmp_path_factory.getbasetemp()))


def inputs(case: Case, drawn: dict[str, Any]) -> GauInputs:
    return GauInputs.of(*(drawn[n] for n in TENSORS), **case.options)


def double(drawn: dict[str, Any]) -> dict[str, Any]:
    return {
        n: x.double() if x is not None and x.is_floating_point() else x for n, x in drawn.items()
    }


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Makes the operator run the kernels with a tile; the list says which passes it ran."""

    def run(tile: GauTile | None = None) -> list[str]:
        calls: list[str] = []
        for name, home in (("forward", gau_triton), ("backward", gau_triton_backward)):
            plain = getattr(home, name)

            def heard(
                given: GauInputs, own: GauTile, *rest: Any, name: str = name, plain: Any = plain
            ) -> Any:
                calls.append(name)
                return plain(given, tile or own, *rest)

            monkeypatch.setattr(home, name, heard)
        monkeypatch.setattr(gau.gpu, "family", lambda device: "")
        monkeypatch.setattr(gau, "runs_triton", lambda given: not gau_triton.refusal(given))
        return calls

    return run


def judged(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """About as near to float64 as the plain kernel, whose sums have another order."""
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        error, allowed = (a.double() - c).norm(), (b.double() - c).norm()
        assert error <= 2 * allowed + torch.finfo(a.dtype).eps * c.norm()


# float16 multiplies in another way what may leave its range
HALF = (0, 1, 3, 6, 11)


@pytest.mark.parametrize(
    ("turn", "dtype"),
    [(n, torch.float32) for n in range(len(CASES))] + [(n, torch.float16) for n in HALF],
)
def test_numbers(turn: int, dtype: torch.dtype, generated: Callable[..., list[str]]) -> None:
    case = CASES[turn]
    drawn = case.drawn(dtype)
    plain, exact = with_gradients(case, drawn), with_gradients(case, double(drawn), reference)
    calls = generated(TILES[turn % len(TILES)])
    judged(with_gradients(case, drawn), plain, exact)
    assert calls == ["forward", "backward"]


def test_mixed_is_kept_for_the_backward() -> None:
    drawn = BASE.drawn(torch.float32)
    ours = gau_triton.forward(inputs(BASE, drawn), TILES[1])
    exact = gau_cpu.forward(inputs(BASE, double(drawn)))
    for a, b in zip(ours, exact, strict=True):
        assert a.is_contiguous() and torch.allclose(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_tiles_of_calls(dtype: torch.dtype, generated: Callable[..., list[str]]) -> None:
    drawn = BASE.drawn(dtype)
    plain, exact = with_gradients(BASE, drawn), with_gradients(BASE, double(drawn), reference)
    generated()
    judged(with_gradients(BASE, drawn), plain, exact)


def test_strided_tensors(generated: Callable[..., list[str]]) -> None:
    """Slices of one projection, as the layer hands them over; and a gradient of another order."""
    drawn = BASE.drawn(torch.float32)
    exact = mixed(BASE, drawn)
    names = ("q", "k", "v", "q_lin", "k_lin", "gate")
    wide = torch.cat([drawn[n] for n in names], -1)
    parts = wide.split([drawn[n].shape[-1] for n in names], -1)
    sliced = drawn | dict(zip(names, parts, strict=True))
    sliced["v"] = sliced["v"].transpose(0, 1).contiguous().transpose(0, 1)
    grad = torch.randn(43, 37, 2).permute(2, 0, 1)
    needs = [True] * 7

    def both(tensors: dict[str, Any]) -> list[Tensor]:
        args = [tensors[n] for n in TENSORS]
        found = gau_attention(*args, **BASE.options)
        return [
            found[0],
            *gau_attention_backward(grad, *args, *found, needs, **BASE.options),
        ]

    expected = both(drawn)
    generated(TILES[1])
    for a, b in zip(both(sliced), expected, strict=True):
        assert a.is_contiguous() and torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    assert torch.allclose(expected[0], exact)


@pytest.mark.parametrize(
    "needed", [("q",), ("k_lin",), ("v",), ("gate",), ("bias",), ("q_lin", "v")]
)
def test_what_is_asked_for_alone(
    needed: tuple[str, ...], generated: Callable[..., list[str]]
) -> None:
    case = BASE.but(length=20)
    drawn = case.drawn(torch.float32)
    args, names = [drawn[n] for n in TENSORS], [n for n in TENSORS if drawn[n] is not None]
    kept = gau_attention(*args, **case.options)
    needs = [name in needed for name in names]
    expected = gau_attention_backward(kept[0], *args, *kept, needs, **case.options)
    generated(TILES[1])
    found = gau_attention_backward(kept[0], *args, *kept, needs, **case.options)
    assert len(found) == len(expected) == len(needed)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [16, None])
def test_small_scores_over_many_tokens_in_float16(
    chunk: int | None, generated: Callable[..., list[str]]
) -> None:
    """(S / T)^2 with scores of 0.05 over 8192 tokens is 0 in float16, and so is any weight."""
    case = BASE.but(chunk=chunk, inside=True, scale_mode="fixed(8192)", biased=False, length=40)
    drawn = case.drawn(torch.float16)
    for name in ("q", "k"):
        drawn[name] = drawn[name] * 0.2
    # what is left of it has to lie within float16
    drawn["v"], drawn["gate"] = drawn["v"] * 2**10, drawn["gate"] * 2**10
    for name in ("q_lin", "k_lin"):
        drawn[name] = None if drawn[name] is None else drawn[name] * 0
    weights = (drawn["q"] @ drawn["k"].mT * case.scale / 8192).relu().square()
    assert not weights.any()
    exact = with_gradients(case, double(drawn), reference)
    generated(TILES[1])
    for a, b in zip(with_gradients(case, drawn), exact, strict=True):
        # what lies below the smallest normal number is as far as float16 goes
        assert float((a.double() - b).norm()) <= 2e-3 * float(b.norm()) + 6e-8 * b.numel() ** 0.5


def test_what_is_no_number_stays_none(generated: Callable[..., list[str]]) -> None:
    drawn = BASE.drawn(torch.float32)
    drawn["q"][0, 5] = float("nan")
    expected = mixed(BASE, drawn).isnan()
    generated(TILES[1])
    assert torch.equal(mixed(BASE, drawn).isnan(), expected) and bool(expected.any())


def test_two_runs_agree_to_the_bit(generated: Callable[..., list[str]]) -> None:
    case = BASE.but(length=20)
    drawn = case.drawn(torch.float32)
    generated(TILES[1])
    one, other = (with_gradients(case, drawn) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (BASE.but(packed=True, causal=False), "both directions"),
        (BASE.but(s=129), "above 128"),
        (BASE.but(batch=65536, length=1, s=1, e=1), "65535 sequences"),
    ],
)
def test_what_has_no_kernel(case: Case, reason: str) -> None:
    drawn = case.drawn(torch.float32)
    assert reason in gau_triton.refusal(GauInputs.of(*(drawn[n] for n in TENSORS), **case.options))


def test_double_and_mixed_dtypes_have_no_kernel() -> None:
    assert "float64" in gau_triton.refusal(inputs(BASE, BASE.drawn()))
    drawn = BASE.drawn(torch.float32)
    drawn["v"] = drawn["v"].half()
    assert "float16, torch.float32" in gau_triton.refusal(inputs(BASE, drawn))


def test_vectors_of_a_length_are_made_once(
    monkeypatch: pytest.MonkeyPatch, generated: Callable[..., list[str]]
) -> None:
    """A call has no launches beside those of its kernels."""
    case = BASE.but(length=21, inside=True, batch=1)
    drawn = case.drawn(torch.float32)
    exact = with_gradients(case, drawn)
    generated(TILES[1])
    with_gradients(case, drawn)
    monkeypatch.setattr(gau_triton, "Reach", None)
    for a, b in zip(with_gradients(case, drawn), exact, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
