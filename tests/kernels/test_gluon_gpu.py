"""The Hopper kernel on a GPU of compute capability 9.0: numbers, also of ragged lengths."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    CAUSAL,
    OFFSET,
    SCALE,
    SOFTCAP,
    WINDOW,
    Case,
    Shape,
    double,
    tensors,
    text,
    within_budget,
)

from attn_compiler.ir.score import Program
from attn_compiler.kernels import flash_gluon
from attn_compiler.kernels.attention import reference
from attn_compiler.kernels.frame import Frame, Inputs
from attn_compiler.kernels.launch import Tile

pytestmark = pytest.mark.gpu

PROGRAMS = {
    "none": Case(text()),
    "causal": Case(text(mask=CAUSAL)),
    "causal, every row sees a key": Case(text(mask=CAUSAL, empty="uniform")),
    "offset": Case(text(mask=OFFSET, empty="zero")),
    "rows without keys": Case(text(mask=OFFSET, empty="nan")),
    "window": Case(text(mask=WINDOW, empty="zero"), ints=(67,)),
    "prefix": Case(text(mask="(k <= q) | (k < n0)"), ints=(131,)),
    "no keys at all": Case(text(mask="(k <= q) & (k > q)", empty="zero")),
    "softcap": Case(text(SOFTCAP, CAUSAL)),
    "slope": Case(text("dot - 0.25 * float(abs(q - k))")),
}
SHAPES = (
    Shape(H=4, G=2, T=137, S=1021, d=64, dv=64),
    Shape(H=3, G=1, T=521, S=521, d=128, dv=128),
    Shape(H=2, G=2, T=1021, S=137, d=80, dv=120),
    Shape(H=2, G=1, T=257, S=389, d=256, dv=256),
)


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


def tiles(width: int) -> tuple[Tile, ...]:
    """One, two and three places for tiles, as far as shared memory goes."""
    if width > 128:
        return (Tile(128, 64, 4, 1), Tile(128, 64, 4, 2))
    return tuple(Tile(128, 128, 4, stages) for stages in (1, 2, 3))


def judged(case: Case, shape: Shape, dtype: torch.dtype, tile: Tile, size: float = 1.0) -> None:
    given, program = tensors(shape, dtype, size), Program.parse(case.program)
    there = Inputs.of(
        *(x.cuda() for x in given), [], case.ints, None,
        program=case.program, scale=SCALE, dropout=0.0,
    )  # fmt: skip
    assert not flash_gluon.refusal(there)
    found = flash_gluon.forward(Frame(there), tile)
    plain, exact = (
        reference(*x, [], case.ints, program, SCALE) for x in (given, [double(x) for x in given])
    )
    for name, *values in zip(("out", "lse"), (x.cpu() for x in found), plain, exact, strict=True):
        ours, rounded, right = (x.masked_fill(x == -torch.inf, 0.0) for x in values)
        assert torch.equal(values[0].isneginf(), values[2].isneginf()), name
        floor = 8 * torch.finfo(dtype).eps * float(right.nan_to_num(0.0).abs().max())
        within_budget(name, ours, rounded, right, floor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", PROGRAMS)
def test_numbers(name: str, dtype: torch.dtype) -> None:
    turn = list(PROGRAMS).index(name) + (dtype is torch.float16)
    for number, shape in enumerate(SHAPES):
        choice = tiles(shape.d)
        judged(PROGRAMS[name], shape, dtype, choice[(turn + number) % len(choice)])


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_every_number_of_tiles(stages: int) -> None:
    for keys in (1, 128, 129, 256, 384, 512, 1200):
        judged(
            PROGRAMS["none"],
            Shape(H=1, G=1, T=131, S=keys, d=64, dv=64),
            torch.bfloat16,
            Tile(128, 128, 4, stages),
        )


def test_large_scores() -> None:
    shape = Shape(H=2, G=1, T=521, S=653, d=128, dv=128)
    judged(PROGRAMS["causal"], shape, torch.bfloat16, Tile(128, 128, 4, 2), size=9.0)


def test_many_programs_give_the_same_every_time() -> None:
    shape = Shape(H=16, G=4, T=2048, S=2048, d=128, dv=128)
    case = PROGRAMS["causal"]
    given = Inputs.of(
        *(x.cuda() for x in tensors(shape, torch.bfloat16)), [], [], None,
        program=case.program, scale=SCALE, dropout=0.0,
    )  # fmt: skip
    frame, tile = Frame(given), Tile(128, 128, 4, 2)
    first = flash_gluon.forward(frame, tile)
    for _ in range(50):
        for x, y in zip(first, flash_gluon.forward(frame, tile), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_in_a_cuda_graph() -> None:
    shape = Shape(H=2, G=1, T=256, S=256, d=64, dv=64)
    given = Inputs.of(
        *(x.cuda() for x in tensors(shape, torch.bfloat16)), [], [], None,
        program=text(mask=CAUSAL), scale=SCALE, dropout=0.0,
    )  # fmt: skip
    frame, tile = Frame(given), Tile(128, 128, 4, 2)
    expected, _ = flash_gluon.forward(frame, tile)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, _ = flash_gluon.forward(frame, tile)
    found.zero_()
    graph.replay()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
