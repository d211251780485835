"""The kernels of EL-attention compiled ahead of time: no spills, matrix units, shared memory within
the chip's limit. Run in a process of its own: a driver stands in for the device.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
from ahead import SHARED, compile_for
from attention_cases import SCALE, Shape, draw, text

from attn_compiler.kernels import el_triton
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.frame import Frame, Inputs

pytestmark = pytest.mark.aot

TARGETS = ("sm_80", "sm_90", "sm_100")
# 16 heads of 64, 4 beams
DECODE = Shape(H=16, G=16, T=1, S=1024, d=64, dv=64)
# T5: a table of biases by head and distance; ALiBi: a slope for each head
T5 = (text("dot + t0[0, h, q, k]"), [(1, DECODE.H, 1, DECODE.S)])
ALIBI = (text("dot + t0[h] * float(k)", "t1[b, k] > 0.0"), [(DECODE.H,), (8, DECODE.S)])
# as its eager attention is masked
ABSORBED = (
    text("dot + t0[0, h, q, k]", "t1[b, k] > 0.0", empty="absorbed"),
    [*T5[1], (8, DECODE.S)],
)
PLAIN: tuple[str, list[tuple[int, ...]]] = (text(), [])


@pytest.fixture(autouse=True)
def _folders(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("ATTN_COMPILER_CACHE", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp() / name))


def call(width: int, dtype: torch.dtype, program: tuple[str, list[tuple[int, ...]]]) -> Inputs:
    q = draw(8, 16, 1, 64).to(dtype)
    x = draw(2, 1, DECODE.S, width).to(dtype)
    return Inputs(q, x, x, [draw(*s) for s in program[1]], [], Drop(None, 0.0), program[0], SCALE)


CASES = [
    *((width, torch.bfloat16, PLAIN) for width in (512, 768, 1024, 1600, 2048, 4096)),
    (1024, torch.float16, T5),
    (1024, torch.bfloat16, ALIBI),
    (1024, torch.bfloat16, ABSORBED),
    (1024, torch.float32, PLAIN),
    (4096, torch.float32, T5),
]


@pytest.mark.parametrize(("width", "dtype", "program"), CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_kernels(
    target: str, width: int, dtype: torch.dtype, program: tuple[str, list[tuple[int, ...]]]
) -> None:
    given = call(width, dtype, program)
    assert not el_triton.refusal(given)
    tile = el_triton.tile(given, 132, target)
    queries = torch.empty(*given.q.shape[:3], width)
    parts = el_triton.empty_parts(queries, tile.splits)
    launch = el_triton.prepare(Frame(given), tile, (queries, None), parts)
    compiled = compile_for(target, launch)
    assert compiled.spilled == 0
    assert compiled.shared <= SHARED[target]
    if dtype is not torch.float32:
        assert "mma" in compiled.text
    joined = compile_for(
        target, el_triton.joined(Frame(given), parts, el_triton.empty_parts(queries, 1)[:3])
    )
    assert joined.spilled == 0
