"""The Hopper kernel compiled ahead of time for a GPU that is not there.

No spills, matrix units of a warp group, copies by tile, registers that move between the groups, and
shared memory as predicted. Run in a process of its own: a driver stands in for the device.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
from ahead import SHARED, Compiled, compile_for
from attention_cases import CAUSAL, OFFSET, SOFTCAP, WINDOW, text

from attn_compiler.kernels import flash_gluon
from attn_compiler.kernels.frame import Frame, Inputs, empty_heads
from attn_compiler.kernels.launch import Tile

pytestmark = pytest.mark.aot

MARKS = ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg", "mbarrier.try_wait")
LENGTH = 1024


@pytest.fixture(autouse=True)
def _folders(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("ATTN_COMPILER_CACHE", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp() / name))


def inputs(
    program: str, width: int, dtype: torch.dtype = torch.bfloat16, ints: tuple[int, ...] = ()
) -> Inputs:
    q, k, v = (torch.empty(2, LENGTH, n, width, dtype=dtype).transpose(1, 2) for n in (8, 2, 2))
    return Inputs.of(q, k, v, [], ints, None, program=program, scale=0.125, dropout=0.0)


def compiled(given: Inputs, tile: Tile) -> Compiled:
    assert not flash_gluon.refusal(given)
    out = empty_heads(given.q, given.q.shape)
    lse = empty_heads(given.q, given.q.shape[:3], torch.float32)
    return compile_for("sm_90", flash_gluon.prepare(Frame(given), tile, out, lse))


def check(found: Compiled, tile: Tile, width: int) -> None:
    assert found.spilled == 0
    for mark in MARKS:
        assert mark in found.text, mark
    # two groups of four warps, and the four of the one that fetches
    assert ".reqntid 384" in found.text
    # q, and a place for k and for v per stage, in 16 bits
    tiles = 2 * width * (tile.rows + 2 * tile.stages * tile.keys)
    # two pairs of barriers and four per stage; what the partitions are given
    assert tiles < found.shared <= tiles + 1024
    assert found.shared <= SHARED["sm_90"]


@pytest.mark.parametrize(
    ("width", "tile"),
    [
        (64, Tile(128, 128, 4, 2)),
        (128, Tile(128, 128, 4, 2)),
        (256, Tile(128, 64, 4, 2)),
    ],
    ids=str,
)
def test_causal(width: int, tile: Tile) -> None:
    check(compiled(inputs(text(mask=CAUSAL), width), tile), tile, width)


def test_three_stages_and_no_mask_in_half_precision() -> None:
    tile = Tile(128, 128, 4, 3)
    check(compiled(inputs(text(), 128, torch.float16), tile), tile, 128)


def test_a_score_program() -> None:
    tile = Tile(128, 128, 4, 2)
    given = inputs(text(SOFTCAP, WINDOW, empty="nan"), 128, ints=(300,))
    check(compiled(given, tile), tile, 128)


def test_a_head_dim_between_two_tiles() -> None:
    tile = Tile(128, 128, 4, 2)
    check(compiled(inputs(text(mask=OFFSET, empty="zero"), 80), tile), tile, 128)
