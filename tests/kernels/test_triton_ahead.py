"""The generated kernels compiled ahead of time for GPUs that are not there, with the default tiles.

No spills, matrix units and asynchronous copies in use, shared memory as predicted and within the
chip's limit. Run in a process of its own: a driver stands in for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

pytest.importorskip("triton")

import torch
from ahead import SHARED, Compiled, compile_for
from attention_cases import CASES, CAUSAL, SOFTCAP, Shape, text
from torch import Tensor

from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.limits import shared_bytes
from attn_compiler.cost.problem import TileConfig
from attn_compiler.kernels import flash_triton, flash_triton_backward, gpu_tiles
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.frame import Frame, Inputs
from attn_compiler.kernels.launch import Launch, Tile

pytestmark = pytest.mark.aot

MATRIX = {
    "sm_80": "mma.sync", "sm_89": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}  # fmt: skip
FAMILY = {
    "sm_80": "ampere", "sm_89": "ampere", "sm_90": "hopper", "sm_100": "hopper", "gfx942": "amd"
}  # fmt: skip
NAMES = {"sm_80": "a100", "sm_89": "l40s", "sm_90": "h200", "sm_100": "b200", "gfx942": "mi300x"}
DEVICE = {target: Hardware.named(name) for target, name in NAMES.items()}
LENGTH = 1024


@pytest.fixture(autouse=True)
def _folders(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("ATTN_COMPILER_CACHE", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp() / name))


def inputs(
    program: str,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    rows: int = LENGTH,
    keys: int = LENGTH,
    group: int = 1,
) -> Inputs:
    def made(length: int, heads: int) -> Tensor:
        return torch.empty(2, length, heads, width, dtype=dtype).transpose(1, 2)

    q, k, v = made(rows, 8), made(keys, 8 // group), made(keys, 8 // group)
    return Inputs.of(q, k, v, [], [], None, program=program, scale=0.125, dropout=0.0)


def picked(target: str, given: Inputs) -> Tile:
    return gpu_tiles.forward_tile(given, FAMILY[target], DEVICE[target])


def forward(given: Inputs, tile: Tile) -> Launch:
    q = given.q
    dtype = q.dtype if tile.splits == 1 else torch.float32
    out = torch.empty(tile.splits, q.shape[0], q.shape[2], *q.shape[1::2], dtype=dtype)
    lse = torch.empty(tile.splits, *q.shape[:3])
    return flash_triton.prepare(Frame(given), tile, out.transpose(2, 3), lse)


def backward(target: str, given: Inputs, into: Mapping[int, Tensor] | None = None) -> list[Launch]:
    out, results = torch.empty_like(given.q), tuple(torch.empty_like(x) for x in given.qkv)
    saved = out, torch.empty(given.q.shape[:3])
    tiles = gpu_tiles.backward_tiles(given, FAMILY[target], DEVICE[target])
    return flash_triton_backward.prepare_backward(
        Frame(given), out, saved, into or {}, tiles, (results[0], results[1], results[2])
    )


def check(target: str, launch: Launch, sixteen_bits: bool = True) -> Compiled:
    compiled = compile_for(target, launch)
    descriptors = any(type(a).__name__ == "TensorDescriptor" for a in launch.args)
    assert compiled.spilled == 0
    assert compiled.shared <= SHARED[target]
    if sixteen_bits:
        assert MATRIX[target] in compiled.text or "mma.sync" in compiled.text
    if target != "gfx942":
        assert "cp.async" in compiled.text
    if target in ("sm_90", "sm_100"):
        assert ("cp.async.bulk.tensor" in compiled.text) == descriptors
    return compiled


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("target", SHARED)
def test_forward(target: str, width: int) -> None:
    given = inputs(text(mask=CAUSAL), width)
    tile = picked(target, given)
    compiled = check(target, forward(given, tile))
    if tile.rows == 128:
        assert MATRIX[target] in compiled.text
    formula = shared_bytes(
        target, width, 2, TileConfig(tile.rows, tile.keys, tile.warps, tile.stages)
    )
    assert (formula is None) == (target == "sm_100")
    if formula is not None:
        # a descriptor's tiles are aligned, and have barriers
        assert 0 <= compiled.shared - formula <= 1088 * tile.descriptors


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("target", SHARED)
def test_backward(target: str, width: int) -> None:
    for launch in backward(target, inputs(text(mask=CAUSAL), width)):
        if "PRECISION" in launch.constants:
            check(target, launch)


@pytest.mark.parametrize("turned", [False, True])
def test_many_heads_and_features_that_lie_apart(turned: bool) -> None:
    def made() -> Tensor:
        shape = (64, 1056) if turned else (1056, 64)
        x = torch.empty(1, *shape, dtype=torch.bfloat16).expand(66000, -1, -1).unsqueeze(1)
        return x.transpose(2, 3) if turned else x

    given = replace(inputs(text(mask=CAUSAL), 64), q=made(), k=made(), v=made())
    out, lse = torch.empty_like(given.q, device="meta"), torch.empty(66000, 1, 1056, device="meta")
    tile = Tile(64, 64, 4, 2)
    launches = [flash_triton.prepare(Frame(given), tile, out[None], lse[None])]
    launches += flash_triton_backward.prepare_backward(
        Frame(given), given.q, (out, lse), {}, (tile, tile), (out, out, out)
    )
    for launch in launches:
        assert launch.grid[2] > 1 and compile_for("sm_90", launch).spilled == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_score_program_and_single_precision(target: str) -> None:
    given = inputs(text(SOFTCAP, CAUSAL), 128)
    check(target, forward(given, picked(target, given)))
    given = inputs(text(mask=CAUSAL), 64, torch.float32)
    check(target, forward(given, picked(target, given)), False)


@pytest.mark.parametrize("name", ["keys absorbed", "softcap and sink", "learned bias", "alibi"])
def test_every_part_of_the_templates_compiles(name: str) -> None:
    # what the interpreter lets pass: a variable that changes its type, a branch that defines one
    case, shape = CASES[name], Shape(H=8, G=8, T=LENGTH, S=LENGTH, d=64, dv=64)
    given = inputs(case.program, 64)
    given = replace(given, reads=case.reads(shape), ints=case.ints)
    into = {i: torch.empty_like(given.reads[i]) for i in case.grads}
    launches = [
        forward(given, picked("sm_90", given)),
        *backward("sm_90", given, into),
    ]
    for launch in launches:
        assert compile_for("sm_90", launch).spilled == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_rows_that_may_have_no_key(target: str) -> None:
    case, shape = CASES["keys absorbed"], Shape(H=8, G=8, T=LENGTH, S=LENGTH)
    drop = Drop(torch.zeros(1, dtype=torch.int64), 0.1)
    given = replace(inputs(case.program, 128), reads=case.reads(shape), drop=drop)
    check(target, forward(given, picked(target, given)))


@pytest.mark.parametrize("empty", ["any", "absorbed"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_short_query(target: str, empty: str) -> None:
    mask = "(k <= q + (S - T)) & (t0[b, k] > 0.0)"
    given = inputs(text(mask=mask, empty=empty), 128, rows=1, group=4)
    given = replace(given, reads=[torch.empty(2, LENGTH)])
    tile = picked(target, given)
    assert tile.heads == 4 and tile.splits > 1
    check(target, forward(given, tile))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_tiles_from_lists(target: str) -> None:
    given = inputs(text(mask="t0[q // 128, k // 128]", empty="zero"), 128, rows=2048, keys=2048)
    given = replace(given, reads=[torch.ones(16, 16, dtype=torch.bool)])
    tile = picked(target, given)
    for launch in (forward(given, tile), *backward(target, given)):
        if "PRECISION" in launch.constants:
            assert "full_index_ptr" in launch.kernel.arg_names
            check(target, launch)
