"""The table of compiled tiles and the formulas against the compiler that is installed.

A sample, for `tests/compiling.py` asks it about every tile. Run in a process of its own: a driver
stands in for the device.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

pytest.importorskip("triton")

import torch
import triton
from attention_cases import CAUSAL, SOFTCAP, text
from compiling import LENGTH, facts_of, launch

from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.limits import compiled_tiles, facts, shared_bytes
from attn_compiler.cost.problem import Problem, Template, TileConfig
from attn_compiler.cost.search import choose
from attn_compiler.kernels.launch import Tile

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(triton.__version__ != "3.7.1", reason="the table is another Triton's"),
]
DEVICES = {"sm_80": "a100", "sm_89": "rtx4090", "sm_90": "h200", "sm_120": "rtx5090"}
PROBLEM = Problem(4, 32, 32, 4096, 4096, 128, 128, right=0)


@pytest.fixture(autouse=True)
def _folders(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("ATTN_COMPILER_CACHE", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp() / name))


def launched(tile: TileConfig) -> Tile:
    return Tile(tile.block_m, tile.block_n, tile.warps, tile.stages)


@pytest.mark.parametrize(
    ("arch", "template"),
    [
        ("sm_80", "forward"),
        ("sm_80", "queries"),
        ("sm_90", "forward"),
        ("sm_90", "keys_and_values"),
    ],
)
def test_the_table_is_what_the_compiler_says(arch: str, template: Template) -> None:
    width = {"forward": 64, "queries": 128, "keys_and_values": 64}[template]
    tile = random.Random(arch + template).choice(compiled_tiles(arch, template, width, 2))
    known = facts(Hardware.named(DEVICES[arch]), template, width, 2, tile)
    shared, registers, spilled = facts_of(arch, launch(template, width, 2, launched(tile)))
    assert known is not None
    assert (known.shared, known.registers, known.spilled) == (shared, registers, spilled > 0)


@pytest.mark.parametrize(
    ("arch", "template"),
    [("sm_89", "forward"), ("sm_120", "forward"), ("sm_89", "keys_and_values")],
)
def test_what_is_chosen_fits_where_the_code_of_another_runs(arch: str, template: Template) -> None:
    hardware = Hardware.named(DEVICES[arch])
    tile, _ = choose(hardware, PROBLEM, template)[0]
    known = facts(hardware, template, 128, 2, tile)
    shared, _, spilled = facts_of(arch, launch(template, 128, 2, launched(tile)))
    assert known is not None and spilled == 0
    assert shared == known.shared <= hardware.shared_block


@pytest.mark.parametrize(
    ("arch", "name"),
    [("sm_80", "bias"), ("sm_80", "softcap"), ("sm_90", "tensor mask"), ("sm_90", "padding")],
)
def test_what_is_chosen_fits_with_a_score_program(arch: str, name: str) -> None:
    program, reads, each = {
        "bias": (text("dot + t0[0, h, q, k]", CAUSAL), [torch.empty(1, 8, LENGTH, LENGTH)], 4),
        "tensor mask": (
            text(mask="t0[b, 0, q, k]", empty="zero"),
            [torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)],
            1,
        ),
        "softcap": (text(SOFTCAP, CAUSAL), [], 0),
        "padding": (
            text(mask="t0[b, k]", empty="zero"), [torch.ones(2, LENGTH, dtype=torch.bool)], 0
        ),
    }[name]  # fmt: skip
    hardware = Hardware.named(DEVICES[arch])
    tile, _ = choose(hardware, replace(PROBLEM, extra=True, score_bytes=each), "forward")[0]
    found = launch("forward", 128, 2, launched(tile), program, reads)
    shared, _, spilled = facts_of(arch, found)
    assert spilled == 0 and shared <= hardware.shared_block


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx950"])
def test_shared_memory_of_amd(arch: str) -> None:
    tile = TileConfig(64, 32, 4, 3)
    shared, _, _ = facts_of(arch, launch("forward", 64, 2, launched(tile)))
    assert shared == shared_bytes(arch, 64, 2, tile)
