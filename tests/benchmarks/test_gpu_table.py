"""From results of the GPU benchmark to its table, and to the constants of the cost model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gpu_fit
import gpu_speed
import gpu_table
import pytest
from gpu_cases import Case, cases
from gpu_timing import Machine

from attn_compiler.cost.calibration import Calibration
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.problem import Problem, TileConfig
from attn_compiler.cost.roofline import predict

ROOT = Path(__file__).parents[2]
CPU = Machine.of("cpu")

H200 = Hardware.named("h200")
TRUE = Calibration(hidden=0.35, clock=0.9, dram=0.85, l2=0.6, launch=4e-6, prologue=4000.0)


def result() -> dict[str, Any]:
    """A result as it would be if the cost model were right."""
    rows = [_row(case) for case in cases() if case.section != "tiles"]
    return {
        "gpu": "NVIDIA H200", "driver": "1.2", "torch": "3.4", "triton": "5.6",
        "dtype": "bfloat16", "rounds": 3, "method": "Drawn.", "dropped": ["tiles of some kind"],
        "arch": "sm_90", "processors": 132, "memory": 150e9, "rows": rows,
    }  # fmt: skip


def _row(case: Case) -> dict[str, Any]:
    s, tile = case.sizes, {"rows": 128, "keys": 64, "warps": 8, "stages": 3}
    tile |= {"heads": 1, "splits": 1}
    causal = case.rule == "causal"
    problem = Problem(s.B, s.H, s.G, s.T, s.S, s.d, s.d, right=0 if causal else None)
    config = TileConfig(128, 64, 8, 3)
    seconds = 1e-3
    if case.section == "forward":
        seconds = predict(H200, problem, "forward", config, 1, TRUE).seconds
    ways: dict[str, Any] = {
        way: {"seconds": [t * (1.0 + n) for t in (seconds, 1.1 * seconds, 0.9 * seconds)]}
        for n, way in enumerate(case.ways)
    }
    for way in {"chunk kernel", "pair"} & set(ways):
        ways[way] |= {"flops": 4e12, "memory": 3 * 2**20}
    row = {
        "name": case.name, "section": case.section, "rule": case.rule, "share": 0.5,
        "sizes": asdict(s), "flops": 1e12, "bytes": 2e9, "peak": 4e15, "ways": ways,
    }  # fmt: skip
    if case.section == "forward":
        row["problem"] = asdict(problem)
        # takes so many registers that one program lives on a processor
        ways["triton"] |= {"tile": tile, "template": "forward", "registers": 200, "shared": 1000}
        ways["cudnn"] = {"error": "RuntimeError: no backend"}
        ways["flash"]["differences"] = [float("nan")]
    if case.section == "ceilings":
        for found in ways.values():
            found |= {"bytes": 4e9, "flops": 1e12}
    if case.section == "summaries":
        for found, batch in zip(ways.values(), (64, 16, 16), strict=True):
            found["batch"] = batch
    if case.section == "numerics":
        for n, found in enumerate(ways.values()):
            found["errors"] = {"out": 1e-3 / (n + 1), "dq": 2e-3}
    return row


def _lines(text: str, begin: str) -> list[list[str]]:
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(f"| {begin}")]
    assert rows, begin
    return rows


def test_without_a_result_nothing_is_measured() -> None:
    lines = gpu_table.table([]).splitlines()
    assert len(lines) == 2 + len(gpu_table.SECTIONS)
    assert all(line.split(" | ")[1] == "not measured" for line in lines[2:])


def test_the_page_holds_the_table_of_no_result() -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    files = (ROOT / "examples" / "benchmarks" / "results").glob("*.json")
    if not any("gpu" in json.loads(path.read_text(encoding="utf-8")) for path in files):
        assert gpu_table.table([]) in text


def test_results_of_cpus_do_not_come_into_the_table(tmp_path: Path) -> None:
    page, other = tmp_path / "page.md", tmp_path / "cpu_choice.json"
    page.write_text(f"{gpu_table.BEGIN}\n{gpu_table.END}\n", encoding="utf-8")
    other.write_text('{"threads": 2, "rows": []}', encoding="utf-8")
    mine = tmp_path / "NVIDIA-H200.json"
    mine.write_text(json.dumps(result()), encoding="utf-8")
    assert gpu_speed.main(["--page", str(page), "--table", str(other), str(mine)]) == 0
    assert page.read_text(encoding="utf-8").split("\n", 1)[1].startswith("NVIDIA H200")


def test_the_table_of_a_result() -> None:
    text = gpu_table.table([result()])
    assert text.startswith("NVIDIA H200 (driver 1.2, torch 3.4, triton 5.6), bfloat16, 3 rounds. ")
    assert len(_lines(text, "forward, ")) == len(_lines(text, "backward, ")) == 12
    assert _lines(text, "the cost model's tile")[0][1] == "not measured"
    assert "- not measured, out of time: tiles of some kind" in text
    what, ours, others = _lines(text, "variants, softcap")[0]
    assert what == "| variants, softcap, B 2, 16 heads, d 128, T = 8192"
    assert ours == "Triton 1000 (909 to 1111) TFLOP/s"
    number = "500 (455 to 556) TFLOP/s, Triton is 2.00 (2.00 to 2.00)x"
    assert others == f"FlexAttention: {number} |"
    _, _, others = _lines(text, "forward, causal, B 2, 16 heads, d 128")[0]
    assert "cuDNN: failed" in others and "flash (SDPA): wrong numbers" in others
    assert f"- {cases()[1].name}, cuDNN: RuntimeError: no backend" in text
    _, ours, others = _lines(text, "decode, full, B 16")[0]
    # the fastest ceiling is the first of them
    assert ours == "Triton: 2000 (1818 to 2222) GB/s, 50% of reading"
    assert "splits 1: 1000 (909 to 1111) GB/s, 25% of reading" in others
    _, _, others = _lines(text, "numerics, causal, B 1, 8 heads, d 128")[0]
    assert "cuDNN out 3.3e-04, dq 2.0e-03; Triton at most 3.00x" in others
    _, ours, others = _lines(text, "selective, causal, B 8")[0]
    assert ours == "selective: 1.00 (0.90 to 1.10) ms, takes 0.50 (0.50 to 0.50)x as long"
    assert others.startswith("our own dense kernel: 2.00 (1.80 to 2.20) ms; masks much: 3.00")
    _, ours, others = _lines(text, "EL-attention")[0]
    assert ours.endswith("1000 (909 to 1111) TFLOP/s, 25% of tensor peak")
    _, ours, others = _lines(text, "summaries")[0]
    assert ours == "el: 64000.0 (58181.8 to 71111.1) samples/s, batch 64"
    assert "dynamic: 8000.0 (7272.7 to 8888.9) samples/s, batch 16, el makes 8.00" in others
    _, ours, others = _lines(text, "gau, causal, B 4, 8 heads, d 128, T = 8192")[0]
    assert ours == "1.000 (0.900 to 1.100) ms, chunk kernel 1333 (1212 to 1481) TFLOP/s"
    plain = "PyTorch's operators: 2.000 (1.800 to 2.200) ms, gau is 2.00 (2.00 to 2.00)x as fast; "
    triton = "Triton: 4.000 (3.600 to 4.400) ms, gau is 4.00 (4.00 to 4.00)x as fast, chunk kernel "
    assert others.startswith(f"{plain}{triton}5.33 (5.33 to 5.33)x the TFLOP/s; cuDNN: 5.000")
    _, ours, others = _lines(text, "gau backward, causal, B 4, 8 heads, d 128, T = 8192")[0]
    assert ours == "1.000 (0.900 to 1.100) ms, gau 1000 (909 to 1111) TFLOP/s"
    triton = "Triton: 3.000 (2.700 to 3.300) ms, gau is 3.00 (3.00 to 3.00)x as fast, gau 3.00"
    assert triton in others
    _, ours, others = _lines(text, "gau block, causal, B 8")[0]
    assert ours == "pair: 1.000 (0.900 to 1.100) ms, 3 MiB"
    assert others.startswith("our own attention: 2.000 (1.800 to 2.200) ms, pair is 2.00 (")
    _, ours, _ = _lines(text, "launch, softcap")[0]
    assert ours.startswith("ours, no grad: 1000.0 (900.0 to 1100.0) µs")
    assert _lines(text, "blocks of 128, 50% kept")


def test_a_picked_tile_beside_the_fastest() -> None:
    case = next(case for case in cases() if case.section == "tiles")
    tile = {"rows": 128, "keys": 64, "warps": 8, "stages": 3, "heads": 1, "splits": 1}
    ways = {
        "triton": {"seconds": [2e-3], "tile": tile},
        "tile 0": {"seconds": [1e-3], "tile": tile | {"keys": 32, "splits": 4}},
        "tile 1": {"seconds": [4e-3], "tile": tile | {"keys": 16}},
        "tile 2": {"error": "RuntimeError: out of resources"},
        "flash": {"seconds": [8e-3]},
    }  # fmt: skip
    row = _row(replace(case, ways=())) | {"ways": ways}
    ((what, ours, theirs),) = _lines(gpu_table.table([{"rows": [row]}]), "tiles")
    assert what == "| tiles, causal, B 1, 8 heads on 2, d 128, T = 1040"
    assert ours == "128x64x8x3: 500 (500 to 500) TFLOP/s"
    assert theirs == (
        "128x32x8x3x4: 1000 (1000 to 1000) TFLOP/s is the fastest of 3, the picked one reaches 50%;"
        " flash (SDPA): 125 (125 to 125) TFLOP/s |"
    )
    row["ways"] = {
        "triton": {"seconds": [1.0]},
        "queries": {"seconds": [2e-5], "tile": tile},
        "queries 0": {"seconds": [1e-5], "tile": tile | {"keys": 32}},
        "keys_and_values": {"error": "no"},
        "keys_and_values 0": {"seconds": [1e-5], "tile": tile},
    }
    ((_, ours, theirs),) = _lines(gpu_table.table([{"rows": [row]}]), "tiles")
    assert ours == "dq alone, 128x64x8x3: 20 (20 to 20) µs; dk and dv alone, ?x?x?x?: failed"
    assert theirs == (
        "dq alone, 128x32x8x3: 10 (10 to 10) µs is the fastest of 2, the picked one reaches 50%; "
        "dk and dv alone, 128x64x8x3: 10 (10 to 10) µs is the fastest of 1, the picked one reaches "
        "nothing |"
    )
    row["ways"] = {"triton": {"error": "no"}}
    assert _lines(gpu_table.table([{"rows": [row]}]), "tiles")[0][1:] == ["?x?x?x?: failed", "- |"]


def test_budgets_are_compared_by_the_byte() -> None:
    row = _row(next(case for case in cases() if case.section == "selective decode"))
    for (name, way), part, late in zip(
        row["ways"].items(), (1, 2, 4, 1), (1, 1, 1.5, 3), strict=True
    ):
        row["ways"][name] = {**way, "seconds": [1e-3 / part * late], "bytes": 2e9 / part}
    what, ours, others = _lines(gpu_table.table([{"rows": [row]}]), "selective decode")[0]
    assert what.endswith("32 heads on 8, d 128, budgets to 1024")
    assert ours == "budget: 2000 (2000 to 2000) GB/s"
    each = ("half of it", 1.0), ("a quarter", 1.5), ("whole step", 3.0)
    for text, (name, times) in zip(others.split("; "), each, strict=True):
        assert text.startswith(name)
        assert f"a byte takes {times:.2f} ({times:.2f} to {times:.2f})x as long" in text


def test_a_case_that_could_not_be_made_is_said() -> None:
    only = {"rows": [{"name": "decode of all", "section": "decode", "error": "too large"}]}
    text = gpu_table.table([only])
    assert "- decode of all: too large" in text
    assert _lines(text, "decode")[0][1] == "not measured"


def test_the_table_goes_between_the_markers(tmp_path: Path) -> None:
    page, file = tmp_path / "page.md", tmp_path / "gpu.json"
    page.write_text(f"before\n{gpu_table.BEGIN}\nold\n{gpu_table.END}\nafter\n", encoding="utf-8")
    file.write_text(json.dumps(result()))
    for _ in range(2):
        assert gpu_speed.main(["--table", str(file), "--page", str(page)]) == 0
        text = page.read_text(encoding="utf-8")
        assert text.startswith(f"before\n{gpu_table.BEGIN}\nNVIDIA H200 (")
        assert text.endswith(f"\n{gpu_table.END}\nafter\n") and "old" not in text
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="wants the markers"):
        gpu_table.write(page, [])


def test_constants_are_fitted_from_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    given = result()
    found = gpu_fit.measurements(given)
    assert len(found["forward"]) == 12 and not found["queries"]
    assert {m.resident for m in found["forward"]} == {1}
    text = gpu_fit.report(given)
    first, constants, *_ = text.splitlines()
    before, after = (float(x) for x in first.replace(",", "").split() if x[:2] in ("1.", "2."))
    assert first.startswith("forward: 12 measurements") and after < 1.02 < before
    assert "clock=0.9" in constants or "clock=0.8" in constants
    assert "queries: 0 measurements, nothing to fit" in text


def test_what_the_model_cannot_learn_from_is_left_out() -> None:
    given = result()
    for row, change in zip(
        [row for row in given["rows"] if row["section"] == "forward"],
        ({"spills": 8}, {"seconds": []}, {"differences": [0.5]}, {"template": "forward_hopper"}),
        strict=False,
    ):
        row["ways"]["triton"] |= change
    assert len(gpu_fit.measurements(given)["forward"]) == 8
    last = [row for row in given["rows"] if row["section"] == "forward"][-1]
    last["problem"]["extra"] = True
    assert len(gpu_fit.measurements(given)["forward"]) == 7
    assert gpu_fit.report({"gpu": "cpu", "rows": []}) == "not measured on a GPU: nothing to fit"
