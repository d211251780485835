"""The generated kernels of EL-attention in Triton's interpreter.

Run in a process of its own, with TRITON_INTERPRET=1 from the start. float32 and float16 only: the
interpreter computes with the raw bits of bfloat16.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from attention_cases import CASES, SCALE, Shape, double, text, within_budget
from el_cases import arguments, plain

from attn_compiler.ir.score import Program
from attn_compiler.kernels import el, el_triton
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.el_triton import WideTile
from attn_compiler.kernels.frame import Inputs

pytestmark = pytest.mark.interpret

# one slice, a last one that is cut, several programs for one result, splits that find no key
TILES = (
    WideTile(16, 16, 32, 1),
    WideTile(16, 16, 16, 3, splits=3),
    WideTile(16, 32, 32, 2, splits=5),
)
SHAPES = (
    (Shape(T=1, S=41, G=3), 31),
    (Shape(T=3, G=6, S=23, d=7, dv=5), 101),
    (Shape(H=3, G=1, T=5), 48),
)
SHOWN = list(CASES)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("ATTN_COMPILER_CACHE", str(tmp_path_factory.getbasetemp()))


def through(tile: WideTile, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let the operator run the kernel with this tile; the calls that it gets."""
    calls: list[Any] = []

    def chosen(given: Inputs) -> WideTile:
        calls.append(given)
        return tile

    monkeypatch.setattr(el, "generates", lambda given: not el_triton.refusal(given))
    monkeypatch.setattr(el, "_tile", chosen)
    return calls


@pytest.mark.parametrize("name", SHOWN)
def test_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = SHOWN.index(name)
    dtype = (torch.float32, torch.float16)[turn // 2 % 2]
    tile, (s, width) = TILES[turn % 3], SHAPES[(turn // 3 + turn) % 3]
    calls = through(tile, monkeypatch)
    case, given = CASES[name], arguments(s, width, dtype, beams=1 + turn % 2)
    reads, kwargs = case.reads(s), {"program": case.program, "scale": SCALE}
    out, lse = el.forward(*given, reads, list(case.ints), **kwargs)
    assert len(calls) == 1
    wide = [double(t) for t in given], [double(r) for r in reads]
    exact, exact_lse = el.reference(*wide[0], wide[1], list(case.ints), **kwargs)
    theirs = plain(given, reads, case.ints, Program.parse(case.program))
    size = float(exact.nan_to_num(0.0).abs().max())
    within_budget(name, out, theirs, exact, 8 * torch.finfo(dtype).eps * size)
    found = torch.isfinite(exact_lse)
    assert torch.equal(torch.isfinite(lse), found)
    assert torch.allclose(lse[found].double(), exact_lse[found], 4e-3, 4e-3)


@pytest.mark.parametrize("tile", TILES)
def test_what_the_keys_do_not_see_of_x(tile: WideTile, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large part of x in the null space of W_k; queries beyond the range of float16."""
    through(tile, monkeypatch)
    s, width = Shape(T=1, G=6), 193
    q, x, w_k, b_k, w_v, b_v = arguments(s, width, torch.float64)
    hidden = torch.linalg.svd(w_k.half().double().flatten(0, 1)).Vh[-1]
    seen = torch.randn(x.shape[:2], generator=torch.Generator().manual_seed(1)).double()
    x = x + 50 * seen[..., None] * hidden
    given = [t.half() for t in (q, x, w_k, b_k, w_v, b_v)]
    kwargs = {"program": text(), "scale": SCALE}
    out, _ = el.forward(*given, [], [], **kwargs)
    exact, _ = el.reference(*(t.double() for t in given), [], [], **kwargs)
    theirs = plain(given, [], [], Program())
    error, other = ((t.double() - exact).square().mean().sqrt() for t in (out, theirs))
    assert error <= 1.2 * other
    given[0], given[2] = given[0] * 2**9, given[2] * 2**9
    large, _ = el.forward(*given, [], [], program=text(), scale=SCALE * 2.0**-18)
    exact, _ = el.reference(
        *(t.double() for t in given), [], [], program=text(), scale=SCALE * 2.0**-18
    )
    assert torch.isfinite(large).all()
    assert (large.double() - exact).abs().max() <= 2 * (out.double() - exact).abs().max()


def call(s: Shape, width: int, program: str = text(), dtype: torch.dtype = torch.float16) -> Inputs:
    q, x, *_ = arguments(s, width, dtype)
    return Inputs(q, x[:, None], x[:, None], [], [], Drop(None, 0.0), program, SCALE)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (call(Shape(), 4099), "above 4096"),
        (call(Shape(T=53), 31), "above 256"),
        (call(Shape(T=1), 31, dtype=torch.float64), "float64"),
        (call(Shape(T=1), 31, text("pow(dot, 2.0)")), "no Triton for pow"),
    ],
)
def test_what_has_no_kernel(given: Inputs, reason: str) -> None:
    assert reason in el_triton.refusal(given)


def test_no_kernel_on_another_device() -> None:
    assert not el.generates(call(Shape(T=1), 31))


@pytest.mark.parametrize("width", [512, 768, 1024, 1600, 2048, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_tile_covers_the_width_and_shares_the_keys(width: int, dtype: torch.dtype) -> None:
    given = call(Shape(T=1, S=997), width, dtype=dtype)
    found = el_triton.tile(given, 132)
    assert found.splits > 1 and found.slice * found.held <= max(512, width)
    assert el_triton.tile(given, 1).splits == 1
