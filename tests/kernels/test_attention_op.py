"""attn_compiler::attention against its reference in float64, on every path and in every dtype."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    CASES,
    CAUSAL,
    DTYPES,
    SCALE,
    SHAPES,
    SOFTCAP,
    B,
    Shape,
    double,
    draw,
    judge,
    tensors,
    text,
)
from torch import Tensor

from attn_compiler.kernels import flash_cpu, rows
from attn_compiler.kernels.attention import reference
from attn_compiler.kernels.grid import LEAST_ROWS, Grid, spans
from attn_compiler.kernels.library import attention

# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", CASES)
def test_numbers_and_gradients(name: str, dtype: torch.dtype) -> None:
    case, turn = CASES[name], list(CASES).index(name) + DTYPES.index(dtype)
    shape = SHAPES[turn % len(SHAPES)]
    judge(case, tensors(shape, dtype), case.reads(shape))


@pytest.mark.parametrize("name", CASES)
def test_many_small_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_CPU_BUDGET", 2**8)
    monkeypatch.setattr(flash_cpu, "_BIAS_BUDGET", 2**8)
    monkeypatch.setattr(flash_cpu, "_SKIP_ROWS", 16)
    case, shape = CASES[name], SHAPES[list(CASES).index(name) % len(SHAPES)]
    judge(case, tensors(shape, torch.float32), case.reads(shape))


@pytest.mark.parametrize("mask", ["True", CAUSAL, "(k <= q) & (k > q - n0)"])
def test_blocks_of_rows_stay_within_their_budget(mask: str) -> None:
    """Also the first ones of a causal mask, whose first rows see next to nothing."""
    pairs, budget = 6, 2**16
    grid = Grid(text(mask=mask), 1, 6, 1201, 1201, (300,))
    found = spans(grid, pairs, budget, 512)
    assert [s.r0 for s in found] + [1201] == [0] + [s.r1 for s in found]
    for s in found:
        rows = s.r1 - s.r0
        assert rows <= LEAST_ROWS or pairs * rows * (s.hi - s.lo) <= budget
    assert max(s.r1 - s.r0 for s in found) > LEAST_ROWS or mask == "True"


@pytest.mark.parametrize(
    "name", ["causal", "window", "softcap", "causal & padding, uniform", "sink"]
)
def test_every_row_block_path_without_the_flash_kernel(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_cpu, "fits", lambda frame: False)
    for dtype, shape in zip(DTYPES, SHAPES, strict=False):
        judge(CASES[name], tensors(shape, dtype), CASES[name].reads(shape))


@pytest.mark.parametrize("name", ["none", "causal", "softcap", "learned bias", "sink"])
def test_large_scores(name: str) -> None:
    case, s = CASES[name], Shape()
    for size in (5.0, 100.0):
        q, k, v = tensors(s, torch.float32, size)
        dot = q @ k.repeat_interleave(s.H // s.G, 1).transpose(-1, -2) * SCALE
        judge(case, [q, k, v], case.reads(s), float(dot.abs().max()))


@pytest.mark.parametrize("name", ["causal", "softcap", "causal & padding, uniform"])
def test_any_strides(name: str) -> None:
    case, s = CASES[name], Shape()
    q = draw(B, s.H, s.d, s.T).transpose(-1, -2)
    k = draw(1, s.G, s.S, s.d).expand(B, -1, -1, -1)
    v = draw(B, s.G, s.S + 3, 2 * s.dv)[:, :, 3:, ::2]
    judge(case, [q, k, v], case.reads(s))


def test_mixed_dtypes() -> None:
    q, k, v = tensors(Shape(), torch.float32)
    for program in (text(mask=CAUSAL), text(SOFTCAP, CAUSAL)):
        kwargs = {"program": program, "scale": SCALE, "dropout": 0.0}
        out, lse = attention(q, k, v.bfloat16(), [], [], None, **kwargs)
        exact, _ = reference(q, k, v.bfloat16().float(), [], [], program, SCALE)
        assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
        assert (out - exact).abs().max() <= exact.abs().max() * 2**-8


def test_lse_is_that_of_the_reference() -> None:
    for name, case in CASES.items():
        reads = [double(r) for r in case.reads(Shape())]
        q, k, v = tensors(Shape(), torch.float64)
        kwargs = {"program": case.program, "scale": SCALE, "dropout": 0.0}
        _, lse = attention(q, k, v, reads, list(case.ints), None, **kwargs)
        _, exact = reference(q, k, v, reads, case.ints, case.program, SCALE)
        assert torch.allclose(lse, exact, 1e-12, 1e-12), name


@pytest.mark.parametrize(
    "name", ["causal", "learned bias", "softcap and sink", "sink", "relative bias"]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(name: str, dropout: float) -> None:
    case, s = CASES[name], Shape(H=2, G=1, T=3, S=5, d=2, dv=3)
    reads = [double(r) for r in case.reads(s)]
    seed = torch.tensor([7]) if dropout else None

    def fn(q: Tensor, k: Tensor, v: Tensor, *learned: Tensor) -> Tensor:
        table = list(reads)
        for i, x in zip(case.grads, learned, strict=True):
            table[i] = x
        kwargs = {"program": case.program, "scale": SCALE, "dropout": dropout}
        return attention(q, k, v, table, list(case.ints), seed, **kwargs)[0]

    leaves = [*tensors(s, torch.float64), *(reads[i] for i in case.grads)]
    assert torch.autograd.gradcheck(fn, [x.detach().requires_grad_() for x in leaves])


@pytest.mark.parametrize("scale", [-0.75, 0.0])
@pytest.mark.parametrize("mask", ["True", "k <= q"])
def test_a_scale_that_is_not_positive(scale: float, mask: str) -> None:
    """PyTorch's flash kernel gives NaN here beside is_causal."""
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    program = f"score: dot; mask: {mask}; empty: any"
    out, _ = torch.ops.attn_compiler.attention(
        q, k, v, [], [], None, program=program, scale=scale, dropout=0.0
    )
    torch.testing.assert_close(out, reference(q, k, v, [], [], program, scale)[0])
