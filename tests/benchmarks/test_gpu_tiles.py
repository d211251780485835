"""Every tile of the cost model on shapes of their own: which there are, and how they compile."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gpu_compile
import gpu_speed
import pytest
import torch
from gpu_cases import cases, kinds, shrunk
from gpu_process import Task
from gpu_timing import Machine, NotHere, Way
from gpu_ways import TILED, Call, makers, others, picked

from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.problem import TEMPLATES, Problem
from attn_compiler.cost.search import choose

CPU = Machine.of("cpu")


@pytest.mark.parametrize("section", ["tiles", "tiles backward"])
def test_every_tile_is_measured_for_shapes_that_nothing_is_fitted_to(section: str) -> None:
    judged = [case for case in cases() if case.section == section]
    others = {case.sizes for case in cases() if case.section in ("forward", "backward", "decode")}
    assert len({case.sizes for case in judged} - others) == len(judged)
    assert len([case for case in judged if {"cudnn", "flash"} <= set(case.ways)]) == 24
    hardware = Hardware.named("h200")
    for case in judged:
        s, (left, right) = case.sizes, case.plan.band(case.sizes)  # type: ignore[misc]
        problem = Problem(s.B, s.H, s.G, s.T, s.S, s.d, s.d, left=left, right=right)
        templates = TEMPLATES[1:] if case.section == "tiles backward" else TEMPLATES[:1]
        for template in templates:
            known = len(choose(hardware, problem, template))
            kind = "tile" if template == "forward" else template
            numbered = [way for way in case.ways if way.startswith(f"{kind} ")]
            # a busy device has no use for parts of the keys
            assert 4 <= known <= len(numbered) + 1, case.name
    # few kernels serve them
    assert len(kinds(judged)) == (5 if section == "tiles" else 4)


def test_ways_are_those_tiles_that_there_are() -> None:
    (case,) = (shrunk(c) for c in cases() if c.section == "tiles" and c.sizes.S == 12016
               and c.sizes.d == 64)  # fmt: skip
    call = Call.of(case, CPU)
    found = others(call)
    made = makers(call)
    assert len(found) >= 3 and len({picked(call), *found}) == len(found) + 1
    assert set(made) == {"triton", "cudnn", "flash"} | {f"tile {n}" for n in range(len(found))}
    (case,) = (shrunk(c) for c in cases() if c.section == "tiles backward"
               and c.sizes.S == 12016 and c.sizes.d == 64)  # fmt: skip
    ways = ["triton", "queries", "keys_and_values", "cudnn", "flash"]
    for kind in ("queries", "keys_and_values"):
        found = others(Call.of(case, CPU), kind)
        assert found
        ways += [f"{kind} {n}" for n in range(len(found))]
    assert sorted(makers(Call.of(case, CPU))) == sorted(ways)
    blocks = next(shrunk(c) for c in cases() if c.section == "blocks")
    assert others(Call.of(blocks, CPU)) == []


def test_what_compiles_ahead_is_shared_and_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every way of ours is called by one of the processes; one that fails costs no other."""
    called: list[tuple[str, str]] = []

    def made(call: Call) -> dict[str, Any]:
        def one(name: str) -> Way:
            if name == "tile 3":
                raise NotHere("too large")
            return Way(lambda: called.append((call.case.name, name)))

        return {name: partial(one, name) for name in call.case.ways}

    monkeypatch.setattr(gpu_compile, "makers", made)
    few = [replace(case, ways=("triton", *(f"tile {n}" for n in range(6)), "cudnn"))
           for case in cases() if case.section in ("tiles", "decode")]  # fmt: skip
    monkeypatch.setattr(gpu_speed, "cases", lambda: few)
    for number in range(3):
        assert gpu_speed.main(["--device", "cpu", "--compile", "tiles", f"{number}", "3"]) == 0
    assert len(called) == len(set(called)) == 5 * 6
    assert capsys.readouterr().out.count("tile 3: too large") == 5
    began = time.monotonic()
    waits = [sys.executable, "-c", "import time; time.sleep(60)"]
    gpu_compile.together([waits, [sys.executable, "-c", ""]], 1.0)
    assert time.monotonic() - began < 20
    of = gpu_compile.PROCESSES
    commands = gpu_speed._compilers("tiles")
    assert [c[-4:] for c in commands] == [
        ["--compile", "tiles", f"{n}", f"{of}"] for n in range(of)
    ]


def test_kernels_are_compiled_before_the_first_tiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    events: list[str] = []
    few = [c for c in cases() if c.section == "ceilings" or c.sizes.S in (1040, 3088)]
    monkeypatch.setattr(gpu_speed, "cases", lambda: few)
    monkeypatch.setattr(gpu_speed, "run", lambda case, *rest: events.append(case.section) or {})
    monkeypatch.setattr(gpu_compile, "together", lambda commands, s: events.append("compile"))
    task = Task([case.name for case in few], {}, 1e6, tmp_path / "notes")
    # nothing runs on it
    gpu = replace(CPU, device=torch.device("cuda"))
    assert gpu_speed.work_through(task, gpu, rounds=1) == 0
    forward, backward = (events.count(section) for section in TILED)
    assert forward > backward > 4
    assert events == [
        "ceilings", "compile", *["tiles"] * forward, "compile", *["tiles backward"] * backward
    ]  # fmt: skip
