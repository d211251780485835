"""The Hopper kernel compiled ahead of time for a GPU that is not there.

No spills, matrix units of a warp group, copies by tile, registers that move between the groups, and
shared memory as predicted. Run in a process of its own: a driver stands in for the device.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")

import torch
from ahead import SHARED, Compiled, compile_for
from attention_cases import CAUSAL, OFFSET, SOFTCAP, WINDOW, text

from attn_compiler.kernels import flash_gluon
from attn_compiler.kernels.frame import Frame, Inputs, empty_heads
from attn_compiler.kernels.launch import Launch, Tile

pytestmark = pytest.mark.aot

MARKS = ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg", "mbarrier.try_wait")
LENGTH = 1024


@pytest.fixture(autouse=True)
def _folders(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("ATTN_COMPILER_CACHE", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp() / name))


def inputs(
    program: str,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    ints: tuple[int, ...] = (),
    sizes: tuple[int, int, int, int] = (2, LENGTH, 8, 2),
) -> Inputs:
    batch, length, *heads = sizes
    q, k, v = (
        torch.empty(batch, length, n, width, dtype=dtype).transpose(1, 2)
        for n in (heads[0], heads[1], heads[1])
    )
    return Inputs.of(q, k, v, [], ints, None, program=program, scale=0.125, dropout=0.0)


def launched(given: Inputs, tile: Tile) -> Launch:
    assert not flash_gluon.refusal(given)
    out = empty_heads(given.q, given.q.shape)
    lse = empty_heads(given.q, given.q.shape[:3], torch.float32)
    return flash_gluon.prepare(Frame(given), tile, out, lse)


def compiled(given: Inputs, tile: Tile) -> Compiled:
    return compile_for("sm_90", launched(given, tile))


def overlaps(launch: Launch) -> list[int]:
    """Exponentials between the start of a product with weights in registers and the wait for it.

    Fails where an instruction between them writes to these registers.
    """
    kernel = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants)
    busy: set[int] = set()
    found, exponentials = [], 0
    for line in kernel.asm["sass"].splitlines():
        name, _, rest = re.sub(r"^\S+\t(@!?U?P\d+ )?", "", line).partition(" ")
        operands = [x.strip(" ;") for x in rest.split(",")]
        exponentials += name.startswith("MUFU.EX2")
        if name.startswith("HGMMA"):
            if re.fullmatch(r"R\d+", operands[1]):
                first = int(operands[1][1:])
                busy |= set(range(first, first + 4))
                exponentials = 0
        elif name.startswith("WARPGROUP.DEPBAR") and operands[-1] == "0x0":
            if busy:
                found.append(exponentials)
            busy.clear()
        elif _writes(name, operands[0]) & busy:
            raise AssertionError(f"the matrix unit still reads what this overwrites: {line}")
    return found


def _writes(name: str, operand: str) -> set[int]:
    """The registers whose values an instruction changes."""
    if name.startswith(("ST", "RED", "BAR", "BRA", "SYNCS", "WARPGROUP")):
        return set()
    found = re.fullmatch(r"R(\d+)(\.\w+)*", operand)
    if found is None:
        return set()
    first = int(found[1])
    return {first, first + 1} if ".64" in name or "WIDE" in name else {first}


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
    launch = launched(inputs(text(mask=CAUSAL), width), tile)
    check(compile_for("sm_90", launch), tile, width)
    # in the loops over cut and over full tiles every thread does its share, 64 x keys / 128
    assert sum(count >= tile.keys // 2 for count in overlaps(launch)) >= 2


def test_sizes_of_one() -> None:
    # what Triton takes for constants
    tile = Tile(128, 128, 4, 1)
    given = inputs(text(mask=WINDOW, empty="zero"), 64, ints=(1,), sizes=(1, 1, 1, 1))
    check(compiled(given, tile), tile, 64)


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
