"""The GPU benchmark without a GPU: its list, its budget, its table, its fit, and its code, tiny."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gpu_speed
import gpu_table
import pytest
import torch
from gpu_cases import BUDGETS, Case, cases, next_case, shrunk
from gpu_process import Task, gather
from gpu_rules import RULES, Sizes
from gpu_summaries import largest
from gpu_timing import DeviceLost, Machine, NotHere, Way, differences, measure
from gpu_ways import TILED

ROOT = Path(__file__).parents[2]
CPU = Machine.of("cpu")

# ---------------------------------------------------------------- list and budget


def test_every_case_has_a_name_of_its_own_and_a_place_in_the_table() -> None:
    names = Counter(case.name for case in cases())
    assert max(names.values()) == 1
    assert {case.section for case in cases()} == set(gpu_table.SECTIONS)
    assert {case.rule for case in cases()} == set(RULES)
    for dim in (64, 128, 256):
        for rule in ("full", "causal"):
            lengths = {
                c.sizes.T
                for c in cases()
                if (c.section, c.rule, c.sizes.d) == ("forward", rule, dim)
            }
            assert lengths == {4096, 8192}


def test_decoding_reads_more_than_any_cache_holds() -> None:
    for case in cases():
        if case.section == "decode":
            s = case.sizes
            assert 2 * 2 * s.B * s.G * s.S * s.d >= 2**28 and s.H > s.G


def test_selective_cases_are_those_that_a_bound_is_given_for() -> None:
    for case in cases():
        s, size = case.sizes, 2
        if case.section in ("selective", "selective training"):
            assert s.H >= 8 and s.T >= 2048 and case.rule == "causal"
        if case.section == "selective decode":
            for part in BUDGETS.values():
                assert 2 * size * s.B * s.G * (s.S // part) * s.d >= 2**26


def test_the_budget_holds_what_matters_most() -> None:
    early = [case for case in cases() if case.importance <= 2]
    assert sum(case.guess for case in early) <= 1.05 * gpu_speed.BUDGET
    # for these there is `--only`
    later = ("tiles", "selective", "gau")
    sections = {section for section in gpu_table.SECTIONS if not section.startswith(later)}
    assert {case.section for case in early} == sections


def test_the_most_important_case_that_fits_comes_next() -> None:
    first, second, third = (
        replace(cases()[n], importance=i, guess=g)
        for n, (i, g) in enumerate([(2, 5.0), (1, 30.0), (2, 5.0)])
    )
    left = [first, second, third]
    assert next_case(left, 31.0) is second
    assert next_case(left, 29.0) is first  # of equals the earlier
    assert next_case([third, second], 6.0) is third
    assert next_case(left, 4.9) is None
    assert next_case([], 100.0) is None


def test_the_largest_batch_is_found_from_small_ones() -> None:
    asked: list[int] = []

    def peak(batch: int) -> int:
        """1000 bytes and 10 for each sample; beyond 300 samples something else needs 12."""
        asked.append(batch)
        return max(1000 + 10 * batch, 12 * batch)

    assert largest(peak, 4000) == 296 and asked == [16, 32, 296]
    # 12 * 896 is too much, and the next try is not
    assert largest(peak, 10000) == 832 and asked[-2:] == [896, 832]
    with pytest.raises(NotHere, match="no batch"):
        largest(peak, 1050)


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize("name", RULES)
def test_the_share_is_that_of_the_mask(name: str) -> None:
    s, rule = Sizes(3, 2, 2, 256, 256, 8), RULES[name]
    reads = rule.reads(s, 0.5)
    mask = rule.flex_mask(s, reads)
    places = [torch.arange(n) for n in (s.B, s.H, s.T, s.S)]
    grid = torch.meshgrid(*places, indexing="ij")
    seen = torch.ones(s.B, s.H, s.T, s.S) if mask is None else mask(*grid).float()
    # causal counts as half, by convention
    assert rule.share(s, reads) == pytest.approx(float(seen.mean()), abs=0.51 / s.T)
    if rule.band is not None:
        left, right = rule.band(s)
        q, k = grid[2], grid[3]
        banded = (k >= q - left if left is not None else k >= 0) & (
            k <= q + right if right is not None else k >= 0
        )
        assert torch.equal(banded, seen.expand_as(banded).bool())


def test_a_map_keeps_the_same_number_in_each_row_of_blocks() -> None:
    (kept,) = RULES["blocks"].reads(Sizes(1, 3, 3, 8192, 8192, 8), 0.3)
    assert kept.shape == (3, 64, 64) and (kept.sum(-1) == 19).all()
    assert not torch.equal(kept[0], kept[1])


# ---------------------------------------------------------------- timing


def test_what_fails_costs_no_other() -> None:
    def bad() -> Way:
        raise NotHere("not on this machine")

    def worse() -> torch.Tensor:
        raise ValueError("some\nlines")

    told: list[str] = []
    x = torch.randn(7)
    made = {
        "one": lambda: Way(lambda: (x, x), {"tile": 3}),
        "two": bad,
        "three": lambda: Way(worse),
        "four": lambda: Way(lambda: 1.5 * x),
        "five": lambda: Way(lambda: x.nan_to_num() * torch.nan),
        "six": lambda: Way(lambda: x[:3], compared=False),
    }
    found = measure(CPU, made, 3, CPU.seconds, told.append)
    assert found["two"] == {"error": "not on this machine"}
    assert found["three"] == {"error": "ValueError: some lines"}
    assert len(found["one"]["seconds"]) == len(found["four"]["seconds"]) == 3
    assert found["one"]["tile"] == 3 and found["one"]["differences"] == [0.0, 0.0]
    assert found["four"]["differences"] == [pytest.approx(0.5)]
    assert gpu_table.wrong(found["five"]) and not gpu_table.wrong(found["one"])
    assert "differences" not in found["six"]
    assert told[:6] == list(made)
    # the order turns around
    assert told[6:14] == ["one", "four", "five", "six", "six", "five", "four", "one"]


def test_a_way_that_fails_later_is_left_out() -> None:
    calls = iter(range(100))

    def tired() -> None:
        if next(calls) == 2:
            raise RuntimeError("no more")

    found = measure(CPU, {"a": lambda: Way(tired)}, 5, CPU.seconds, lambda way: None)
    assert found == {"a": {"error": "RuntimeError: no more"}}


def test_a_device_that_answers_nothing_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Machine) -> None:
        raise RuntimeError("an illegal address")

    monkeypatch.setattr(Machine, "wait", broken)
    with pytest.raises(DeviceLost, match="an illegal address"):
        measure(CPU, {"a": lambda: Way(lambda: None)}, 1, CPU.seconds, lambda way: None)


def test_differences_are_relative() -> None:
    x = torch.tensor([3.0, 4.0])
    assert differences((x + torch.tensor([0.0, 0.5]), x), (x,)) == [pytest.approx(0.1)]
    assert differences((torch.ones(2),), (torch.zeros(2),)) == [pytest.approx(2**0.5)]


# ---------------------------------------------------------------- a process that may be lost

_CHILD = """
import json, sys, time, os
told = json.loads(sys.argv[1])
with open(told["notes"], "a") as notes:
    def tell(**line):
        notes.write(json.dumps(line) + chr(10)); notes.flush()
    for name in told["names"]:
        tell(case=name)
        if name == "unmakeable":
            os._exit(9)
        ways = {}
        for way in ("x", "hangs", "dies"):
            tell(case=name, way=way)
            lost = told["lost"].get(name, {}).get(way)
            if lost is None and way == "dies" and name in ("a", "b"):
                tell(lost="an illegal address")
                os._exit(3)
            if lost is None and way == "hangs" and name == "a":
                notes.write('{"cut o'); notes.flush()
                time.sleep(60)
            ways[way] = lost or "fine"
        tell(row={"name": name, "ways": ways})
"""


def _start(task: Task) -> subprocess.Popen[bytes]:
    told = {**asdict(task), "notes": str(task.notes)}
    return subprocess.Popen([sys.executable, "-c", _CHILD, json.dumps(told)])


def test_what_kills_or_hangs_is_reported_and_the_rest_is_measured(tmp_path: Path) -> None:
    names = ["first", "a", "unmakeable", "b", "last"]
    ways = dict.fromkeys(names, ("x", "hangs", "dies"))
    found = gather(_start, names, ways, tmp_path, budget=60.0, patience=1.5)
    assert set(found.rows) == set(names)
    assert found.rows["first"]["ways"] == dict.fromkeys(("x", "hangs", "dies"), "fine")
    assert found.rows["a"]["ways"]["x"] == "fine"
    assert found.rows["a"]["ways"]["hangs"].startswith("no answer for ")
    assert found.rows["a"]["ways"]["dies"] == "an illegal address"
    assert found.rows["unmakeable"]["error"] == "its process ended with code 9"
    # lost twice: not tried again
    assert found.rows["last"]["ways"]["dies"].startswith("not tried, it was lost 2 times")
    assert found.rows["last"]["ways"]["hangs"] == "fine"


def test_the_end_of_the_budget_ends_the_process(tmp_path: Path) -> None:
    found = gather(_start, ["a"], {"a": ("x", "hangs", "dies")}, tmp_path, budget=0.5, patience=1.0)
    assert found.rows == {} and set(found.lost) <= {"a"}


# ---------------------------------------------------------------- the command


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_speed.main([]) == 1
    assert "needs a GPU, and there is none" in capsys.readouterr().out


def test_cases_without_time_are_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--device", "cpu", "--budget", "0.001", "--only", "decode", "--out", str(tmp_path)]
    assert gpu_speed.main(given) == 0
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert len(found["dropped"]) == 2 and found["rows"] == []
    assert capsys.readouterr().out.count("dropped, out of time: decode") == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_sections_are_measured_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(given: Any) -> dict[str, Any]:
        rows = [{"name": c.name, "section": c.section, "error": f"{given.rounds}"}
                for c in cases() if c.section in given.only[:1]]  # fmt: skip
        about = gpu_speed._described("cpu") | {"method": "", "rounds": 1, "seconds": 2.0}
        dropped = [c.name for c in cases() if c.section in given.only[1:]]
        return about | {"lost": {}, "rows": rows, "dropped": dropped}

    monkeypatch.setattr(gpu_speed, "measured", measured)
    file = tmp_path / "cpu.json"

    def run(*only: str, rounds: int = 1) -> dict[str, Any]:
        command = ["--device", "cpu", "--out", str(tmp_path), "--rounds", str(rounds), "--only"]
        assert gpu_speed.main([*command, *only]) == 0
        return dict(json.loads(file.read_text()))

    run("decode", "ceilings", "launch")
    found = run("launch", rounds=2)
    assert [row["section"] for row in found["rows"]] == ["decode"] * 2 + ["launch"] * 2
    assert len(found["dropped"]) == 1 and found["seconds"] == 4.0
    assert [row["error"] for row in found["rows"]] == ["1", "1", "2", "2"]
    file.write_text(json.dumps(found | {"torch": "another"}))
    assert [row["section"] for row in run("launch")["rows"]] == ["launch"] * 2


def _kinds() -> dict[str, Case]:
    """The first case of each kind; tiles of a step of generation are one of their own."""
    found: dict[str, Case] = {}
    for case in cases():
        step = " step" if case.section == "tiles" and case.sizes.T == 1 else ""
        found.setdefault(f"{case.section} {case.rule}{step}", case)
    return found


KINDS = _kinds()
# what needs no generated kernel
PLAIN = [kind for kind in KINDS if kind.split()[0] in ("ceilings", "launch")]


def worked(case: Case, notes: Path) -> dict[str, Any]:
    task = Task([case.name], {}, 1e6, notes)
    assert gpu_speed.work_through(task, CPU, rounds=1) == 0
    lines = [json.loads(line) for line in notes.read_text().splitlines()]
    assert lines[0] == {"case": case.name} and lines[-1]["row"]["name"] == case.name
    row = lines[-1]["row"]
    assert "error" not in row, row
    assert set(row["ways"]) == set(case.ways)
    assert gpu_table.table([{"rows": [row]}])
    return dict(row["ways"])


def test_a_case_that_cannot_be_made_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*args: Any) -> None:
        raise ValueError("too large")

    monkeypatch.setattr(gpu_speed, "run", run)
    task = Task([cases()[0].name], {}, 1e6, tmp_path / "notes")
    assert gpu_speed.work_through(task, CPU, rounds=1) == 0
    last = json.loads(task.notes.read_text().splitlines()[-1])
    assert last["row"]["error"] == "ValueError: too large"


def test_a_lost_device_ends_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: Any) -> None:
        raise DeviceLost("an illegal address")

    monkeypatch.setattr(gpu_speed, "run", run)
    task = Task([case.name for case in cases()], {}, 1e6, tmp_path / "notes")
    assert gpu_speed.work_through(task, CPU, rounds=1) == 3
    lines = [json.loads(line) for line in task.notes.read_text().splitlines()]
    assert lines == [{"case": cases()[0].name}, {"lost": "an illegal address"}]


@pytest.mark.parametrize("kind", PLAIN)
def test_sections_without_generated_kernels(kind: str, tmp_path: Path) -> None:
    for way, found in worked(KINDS[kind], tmp_path / "notes").items():
        assert found.get("seconds") or found["error"] == "needs a GPU", way


@pytest.mark.interpret
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in PLAIN])
def test_sections_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_compiler.kernels import blocks

    monkeypatch.setattr(blocks, "_LEAST", 2**16)  # lists for tiny maps of blocks too
    monkeypatch.setenv("ATTN_COMPILER_CACHE", str(tmp_path))
    case = KINDS[kind]
    if case.section == "decode":
        case = replace(case, ways=case.ways[:3] + case.ways[-3:])
    if case.section in TILED:
        chosen = ("triton", "queries", "tile 0", "queries 0", "keys_and_values 0", "flash")
        case = replace(case, ways=tuple(way for way in case.ways if way in chosen))
    monkeypatch.setattr(gpu_speed, "cases", lambda: [case])
    for way, found in worked(case, tmp_path / "notes").items():
        if way in ("cudnn", "gluon", "el kernel") or (way == "flex" and "backward" in case.section):
            assert found["error"], way
        elif case.section == "numerics":
            assert len(found["errors"]) == 4 and max(found["errors"].values()) < 1e-5, way
        else:
            assert found.get("seconds"), (way, found)
            # float32: all of them compute the same
            assert max(found.get("differences", [0.0])) < 1e-5, way


def test_a_tiny_case_keeps_what_it_is_about() -> None:
    for case in cases():
        tiny = shrunk(case)
        assert (tiny.section, tiny.rule, tiny.ways) == (case.section, case.rule, case.ways)
        s = tiny.sizes
        assert s.B * s.H * s.T * s.S <= 2**18
        assert (s.H > s.G) == (case.sizes.H > case.sizes.G)
