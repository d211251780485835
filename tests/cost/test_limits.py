"""What fits, against NVIDIA's own formula for residents and against what the compiler said."""

from __future__ import annotations

import itertools
import json
from importlib.resources import files
from pathlib import Path
from statistics import mean

import pytest

from attn_compiler.cost.hardware import Hardware, known
from attn_compiler.cost.limits import (
    THREADS_OF_A_BLOCK,
    compiled_tiles,
    facts,
    registers_of,
    resident,
    shared_bytes,
)
from attn_compiler.cost.problem import TEMPLATES, Problem, TileConfig, padded
from attn_compiler.cost.tile import legal

DATA = json.loads((Path(__file__).parent / "data" / "occupancy.json").read_text())
WIDTHS = (64, 128, 256)
OF_ARCH = {row.arch: row for row in map(Hardware.named, known())}


@pytest.mark.parametrize("arch", DATA["blocks"])
def test_residents_are_those_of_nvidias_header(arch: str) -> None:
    row = OF_ARCH[arch]
    cases = itertools.product(DATA["threads"], DATA["registers"], DATA["shared"])
    expected = map(int, DATA["blocks"][arch].split())
    wrong = [
        (case, blocks)
        for case, blocks in zip(cases, expected, strict=True)
        if resident(row, case[0] // 32, case[1], case[2]) != blocks
    ]
    assert not wrong, f"{len(wrong)} differ, first {wrong[0]}"


@pytest.mark.parametrize(
    ("registers", "waves"), [(24, 8), (64, 8), (65, 7), (128, 4), (129, 3), (256, 2), (512, 1)]
)
def test_waves_of_amd(registers: int, waves: int) -> None:
    """min(8, 512 / registers rounded up to 8) waves on each of four SIMDs."""
    row = Hardware.named("mi300x")
    assert resident(row, 4, registers, 0) == waves
    assert resident(row, 8, registers, 0) == waves // 2
    assert resident(row, 4, 24, 33000) == 1 and resident(row, 4, 24, 65537) == 0
    assert resident(row, 17, 24, 0) == 0, "a work-group has at most 1024 threads"


def test_a_cpu_runs_no_programs() -> None:
    assert resident(Hardware.named("cpu"), 4, 64, 0) == 0
    assert THREADS_OF_A_BLOCK // 32 == 32 and resident(Hardware.named("h200"), 33, 16, 0) == 0


def tiles(*templates: str) -> list[tuple[str, str, int, TileConfig]]:
    """Everything with 16-bit numbers that the compiler was asked about."""
    return [
        (arch, template, width, tile)
        for arch in ("sm_80", "sm_90")
        for template in TEMPLATES
        if template in templates
        for width in WIDTHS
        for tile in compiled_tiles(arch, template, width, 2)
    ]


def test_the_formula_of_shared_memory_is_the_compilers() -> None:
    known, wrong = 0, []
    for arch, _, width, tile in tiles("forward"):
        said = facts(OF_ARCH[arch], "forward", width, 2, tile)
        found = shared_bytes(arch, width, 2, tile)
        assert said is not None and said.compiled
        known += found is not None
        if found not in (None, said.shared):
            wrong.append((arch, width, tile, said.shared, found))
    assert not wrong and known > 100


def test_the_estimate_of_registers() -> None:
    assert registers_of("gfx942", 64, 2, TileConfig(64, 64, 4, 2)) is None
    for arch in ("sm_80", "sm_90"):
        errors, refused, missed = [], [], []
        for tile, width in ((t, w) for a, _, w, t in tiles("forward") if a == arch):
            said = facts(OF_ARCH[arch], "forward", width, 2, tile)
            found = registers_of(arch, width, 2, tile)
            assert said is not None and found is not None
            if not said.spilled:
                errors.append(abs(said.registers - found[0]))
            if tile.block_m >= 64:
                refused.append(found[1] and not said.spilled)
                missed.append(said.spilled and not found[1])
        assert mean(errors) <= 17
        assert mean(refused) < 0.25 and mean(missed) < 0.03


def test_a_tile_that_spills_as_it_is_launched_is_never_legal() -> None:
    """Rows "tma" are compiled with descriptors: without them this one spills nothing."""
    tile = TileConfig(64, 128, 8, 3)
    said = facts(OF_ARCH["sm_90"], "queries", 128, 2, tile)
    assert said is not None and said.spilled
    table = json.loads((files("attn_compiler.cost") / "compiled.json").read_text())["3.7.1"]
    plain = {tuple(row[:4]): row for row in table["sm_90"]["queries 128 2"]}
    assert plain[64, 128, 8, 3][6] == 0
    for name, rows in table["sm_90"].items():
        if name.endswith(" tma"):
            known = {tuple(row[:4]) for row in table["sm_90"][name.removesuffix(" tma")]}
            assert {tuple(row[:4]) for row in rows} <= known
            assert all(row[4] <= OF_ARCH["sm_90"].shared_block for row in rows)


@pytest.mark.parametrize("arch", [arch for arch in OF_ARCH if arch != "cpu"])
def test_whatever_is_legal_was_compiled_and_does_not_spill(arch: str) -> None:
    """Every tile that the search can return, over kinds of calls, against the raw table."""
    row = OF_ARCH[arch]
    table = json.loads((files("attn_compiler.cost") / "compiled.json").read_text())["3.7.1"]
    asked = {"sm_86": "sm_80", "sm_89": "sm_80", "sm_120": "sm_80"}.get(arch, arch)
    compiled = {
        key: {tuple(r[:4]): r[4:] for r in rows} for key, rows in table.get(asked, {}).items()
    }
    found = 0
    for template, width, size, rows, extra in itertools.product(
        TEMPLATES, (40, 128, 192), (2, 4), (1, 333), (False, True)
    ):
        problem = Problem(2, 8, 2, rows, 4096, width, width, size, extra=extra)
        key = f"{template} {max(64, padded(width))} {size}"
        for tile, lives in legal(row, problem, template):
            taken = compiled[key][tile.block_m, tile.block_n, tile.warps, tile.stages]
            assert taken[2] == 0 and taken[0] <= row.shared_block and lives >= 1
            found += 1
    assert bool(found) == bool(compiled)


def test_what_is_not_known_is_not_guessed() -> None:
    tile = TileConfig(128, 48, 4, 3)
    assert shared_bytes("sm_100", 64, 2, tile) is None
    assert shared_bytes("sm_90", 64, 4, tile) is None
    assert shared_bytes("gfx942", 64, 2, TileConfig(64, 64, 4, 4)) is None
    assert facts(OF_ARCH["sm_90"], "queries", 64, 2, tile) is None
    assert facts(OF_ARCH["sm_70"], "forward", 64, 2, tile) is None
    assert facts(OF_ARCH["sm_90"], "forward", 64, 2, TileConfig(32, 48, 4, 3)) is None
    found = facts(OF_ARCH["sm_90"], "forward", 64, 2, tile)
    assert found is not None and not found.compiled
    assert found.shared == 128 * 64 * 2 + 2 * 3 * 48 * 64 * 2
