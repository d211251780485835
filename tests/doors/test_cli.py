"""The command line: what each command prints, its exit status, and its errors in one paragraph."""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import attn_compiler as ac
from attn_compiler import cli, given, terminal
from attn_compiler.cost import at_hand
from attn_compiler.cost.calibration import Calibration
from attn_compiler.cost.hardware import Hardware

FILE = Path(__file__).parent / "given.py"
SIZES = "batch=2,query=4096,heads=16,head_dim=128"
Run = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def _line(text: str) -> int:
    """The number of the line of FILE that holds a text."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


# ---------------------------------------------------------------- explain


def test_explain_shows_sites_and_near_misses(capsys: Run) -> None:
    assert cli.main(["explain", f"{FILE}:make"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 attention sites, 2 rewritten; 1 look-alike left alone\n")
    assert "rewritten  0 ... 1 (2 alike)  given.py:" in printed
    assert "7 heads of 4" in printed
    assert "s = 0.5 · q·kᵀ" in printed
    assert "causal: key k is seen by row q where k ≤ q" in printed
    assert "attention.weights_changed" in printed
    gate = "weights = weights * (2 * weights).sigmoid()"
    assert f"mul at given.py:{_line(gate)}:" in printed and gate in " ".join(printed.split())
    assert max(map(len, printed.splitlines())) <= 100


def test_explain_says_what_a_device_would_take(capsys: Run) -> None:
    assert cli.main(["explain", f"{FILE}:make", "--hardware", "h200"]) == 0
    printed = capsys.readouterr().out
    assert "runs on   triton" in printed and "us predicted, bounded by" in printed


def test_explain_as_json_is_the_report(capsys: Run) -> None:
    assert cli.main(["explain", f"{FILE}:make", "--json", "--to", "1=Flash"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [site["decision"]["accepted"] for site in found["sites"]] == [False, True]
    assert found["sites"][0]["decision"]["reasons"][0]["code"] == "config.not_selected"
    (missed,) = found["missed"]
    assert missed["line"] == "weights = (x @ x.mT).softmax(-1)"
    assert missed["operation"].startswith("mul at given.py:")


def test_json_stands_alone(capsys: Run) -> None:
    assert cli.main(["explain", f"{FILE}:prints", "--json"]) == 0
    printed, beside = capsys.readouterr()
    assert len(json.loads(printed)["sites"]) == 1
    assert beside.startswith("loading weights\n") and "called" in beside


def test_json_has_no_numbers_that_json_lacks(capsys: Run) -> None:
    cli._put(argparse.Namespace(out=sys.stdout), json.dumps({"a": float("nan"), "b": [1.5]}))
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5]}


def test_explain_writes_a_page(capsys: Run, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert cli.main(["explain", f"{FILE}:make", "--html", str(page)]) == 0
    assert capsys.readouterr().out.endswith(f"\nwritten to {page}\n")
    assert "attention.weights_changed" in page.read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written(capsys: Run, tmp_path: Path) -> None:
    page = tmp_path / "absent" / "report.html"
    assert cli.main(["explain", f"{FILE}:make", "--html", str(page)]) == 1
    assert str(page) in "".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("function", "line", "said"),
    [
        ("broken", "y: Tensor = self.last(self.first(x))", "also without a compiler"),
        ("broken", "y: Tensor = self.last(self.first(x))", "in last, a Linear"),
        ("untraceable", "offset = int(", "torch.compile cannot trace it"),
        ("fails", "raise FileNotFoundError", "no weights here"),
        ("leaves", "raise SystemExit", "usage: given.py NAME"),
        ("exits", "sys.exit(3)", "also without a compiler"),
    ],
)
def test_a_model_that_fails(function: str, line: str, said: str, capsys: Run) -> None:
    assert cli.main(["explain", f"{FILE}:{function}"]) == 1
    printed, error = capsys.readouterr()
    words = " ".join(error.split())
    assert printed == "" and said in words and "To do:" in words
    assert f"given.py:{_line(line)}" in words and line in words
    assert "Traceback" not in error and len(error.splitlines()) < 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"import torch\ndef make(:\n    pass\n", "wrong.py:2 (def make(:; SyntaxError:"),
        (b"make = 1\0", "give a file of Python"),
        (b"import no_such_module\n", "wrong.py:1 (import no_such_module;"),
    ],
)
def test_a_file_that_cannot_be_run(text: bytes, said: str, tmp_path: Path, capsys: Run) -> None:
    (tmp_path / "wrong.py").write_bytes(text)
    assert cli.main(["explain", f"{tmp_path}/wrong.py:make"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert said in error and "importlib" not in error and "Traceback" not in error


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_model_that_the_tracer_does_not_take_at_all(capsys: Run) -> None:
    assert cli.main(["explain", f"{FILE}:scripted"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "torch.compile cannot trace it (" in error and "that line" not in error


def test_explain_shows_where_the_tracer_let_go(capsys: Run) -> None:
    assert cli.main(["explain", f"{FILE}:cut"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    line = "torch._dynamo.graph_break()"
    assert printed.count(f"not traced given.py:{_line(line)} line {line}") == 1
    branch = "if x.sum() > 0:"
    assert f"not traced given.py:{_line(branch)} line {branch}" in printed
    assert "a branch depends on the value of a tensor" in printed
    skipped = "def again(self, x: Tensor) -> Tensor:"
    assert f"not traced given.py:{_line(skipped)} line {skipped}" in printed
    assert "in a loop, so that nothing of again is traced" in printed
    assert cli.main(["explain", f"{FILE}:make", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["breaks"] == []


def test_explain_of_a_model_that_is_kept_from_the_tracer(capsys: Run) -> None:
    assert cli.main(["explain", f"{FILE}:kept_out"]) == 0
    printed = capsys.readouterr().out
    assert "not traced  the model\n" in printed and "torch.compiler.disable" in printed
    assert cli.main(["explain", f"{FILE}:kept_out", "--json"]) == 0
    (cut,) = json.loads(capsys.readouterr().out)["breaks"]
    assert cut["location"] == ""


def test_a_traceback_only_with_debug(capsys: Run) -> None:
    assert cli.main(["explain", f"{FILE}:fails", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("given.py", "is not FILE:FUNCTION"),
        ("absent.py:make", "there is no file absent.py"),
        (f"{FILE}:mak", "did you mean make?"),
        (f"{FILE}:number", "returns a value of type int"),
        (f"{FILE}:needs", "cannot be called without arguments"),
        (f"{FILE}:a_class", "return a model, Attention(...)"),
        (f"{FILE}:bare_args", "returns args as a Tensor"),
        (f"{FILE}:listed_kwargs", "returns kwargs as a list"),
        (f"{FILE}:too_few", "give args and kwargs of one call: (x)"),
    ],
)
def test_what_is_badly_asked(asked: str, said: str, capsys: Run) -> None:
    assert cli.main(["explain", asked]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "more", [["--hardware", "h2oo"], ["--to", "Flush"], ["--to", "no.*=Flash"]]
)
def test_a_wrong_option(more: list[str], capsys: Run) -> None:
    assert cli.main(["explain", f"{FILE}:make", *more, "--json"]) == 2
    printed, error = capsys.readouterr()
    assert json.loads(printed)["error"]["do"] and error


@pytest.mark.parametrize("argv", [[], ["explain"], ["plan", "Flash"], ["no-such-command"]])
def test_argparse_says_the_rest(argv: list[str], capsys: Run) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["explain", "plan", "calibrate", "bench", "doctor"])
def test_help_has_examples(command: str, capsys: Run) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert f"  attn-compiler {command}" in capsys.readouterr().out


# ---------------------------------------------------------------- words for values


def test_specs_in_words() -> None:
    assert given.spec("fastest") == "fastest"
    assert given.spec("Flash") == ac.Flash()
    assert given.spec("SPION(alpha=0.9, mode='F')") == ac.SPION(alpha=0.9, mode="F")
    wanted = {"a.*": ac.ELAttention(), "*": ac.Flash()}
    assert given.target(["a.*=ELAttention", "Flash()"]) == wanted


@pytest.mark.parametrize(
    "words",
    ["", "Flash(", "__import__('os')", "SPION(0.9)", "SPION(alfa=1)", "Flash().x", "print()"],
)
def test_words_that_are_no_spec(words: str) -> None:
    with pytest.raises(ac.BadOption):
        given.spec(words)


def test_shapes_in_words() -> None:
    assert given.shape(SIZES) == ac.Shape(2, 4096, 4096, 16, 128)
    found = given.shape("batch=1,query=1,key=99,heads=4,head_dim=8,causal=false,layers=3")
    assert found == ac.Shape(1, 1, 99, 4, 8, causal=False, layers=3)


@pytest.mark.parametrize("words", ["batch=1", SIZES + ",keys=3", SIZES + ",beams=x", "batch"])
def test_words_that_are_no_shape(words: str) -> None:
    with pytest.raises(ac.BadOption):
        given.shape(words)


# ---------------------------------------------------------------- plan, bench, doctor


def test_plan(capsys: Run) -> None:
    assert cli.main(["plan", "fastest", "--shape", SIZES, "--hardware", "h200"]) == 0
    expected = ac.plan("fastest", ac.Shape(2, 4096, 4096, 16, 128), hardware="h200")
    assert capsys.readouterr().out == f"{expected}\n"


def test_plan_as_json(capsys: Run) -> None:
    arguments = ["--shape", f"{SIZES},width=2048", "--hardware", "l4", "--dtype", "float16"]
    assert cli.main(["plan", "SwitchHead", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["hardware"] == "l4" and found["seconds"] > 0 and isinstance(found["keep"], bool)
    assert found["spec"].startswith("SwitchHead(heads=")


def test_plan_of_a_model(capsys: Run) -> None:
    asked = ["plan", "fastest", "--model", f"{FILE}:make", "--hardware", "h200"]
    assert cli.main(asked) == 0
    printed = capsys.readouterr().out
    head, table = printed.splitlines()[:2]
    assert "given.py:" in head and head[0] == "0" and table.startswith("Flash() on h200: ")
    assert cli.main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["sites"]
    assert found and all(each["plan"]["seconds"] > 0 for each in found)
    assert cli.main([*asked, "--dtype", "float16"]) == 2
    assert "leave --dtype out" in capsys.readouterr().err


def test_calibrate_as_json(capsys: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fitted, and the time that takes, is tested elsewhere."""

    def fitted(hardware: str | None) -> Hardware:
        print("round 1")
        return Hardware.named(hardware or "cpu")

    monkeypatch.setattr("attn_compiler.calibrating.calibrate", fitted)
    assert cli.main(["calibrate", "--hardware", "h200", "--json"]) == 0
    printed, beside = capsys.readouterr()
    assert Hardware.from_json(printed) == Hardware.named("h200") and beside == "round 1\n"


@pytest.mark.slow
def test_bench(capsys: Run) -> None:
    assert cli.main(["bench", f"{FILE}:make", "--rounds", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rewritten"] == found["sites"] == 2 and found["rounds"] == 3
    assert found["difference"] < 1e-5
    for way in ("stock", "attn_compiler"):
        times = found["seconds"][way]
        assert 0 < times["least"] <= times["median"] <= times["most"]
        assert found["peak"][way] > 0


def test_bench_of_a_model_that_fails(capsys: Run) -> None:
    assert cli.main(["bench", f"{FILE}:broken"]) == 1
    assert "also without a compiler" in " ".join(capsys.readouterr().err.split())


def test_doctor(capsys: Run) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["torch"]["text"] == torch.__version__
    assert checks["operators"]["state"] == checks["CPU"]["state"] == "ok"


def test_doctor_shows_what_was_fitted(
    capsys: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ATTN_COMPILER_CACHE", str(tmp_path))
    row = at_hand.plain(torch.device("cpu"))
    constants = Calibration(hidden=0.43, clock=0.77, dram=0.8, l2=0.6, launch=5e-6, prologue=99.0)
    at_hand.keep(replace(row, constants=(("sdpa", constants),)), torch.device("cpu"))
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which comes first")
    cli.main(["doctor"])
    printed = capsys.readouterr().out
    assert "the cost model was fitted to this CPU" in printed
    (line,) = (line for line in printed.splitlines() if "fit of sdpa" in line)
    said = "hidden 0.43, clock 0.77, dram 0.8, l2 0.6, launch 5e-06, prologue 99"
    assert line.endswith(said)


def test_doctor_says_what_is_missing(
    capsys: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("ATTN_COMPILER_CACHE", str(blocked))
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "missing  our cache" in printed and "ATTN_COMPILER_CACHE" in printed


def test_as_a_module_in_a_fresh_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "attn_compiler", "plan", "Flash", "--shape", SIZES]
    done = subprocess.run(
        [*command, "--hardware", "h200"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0 and done.stdout.startswith("Flash() on h200: "), done.stderr


# ---------------------------------------------------------------- the terminal


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_rich_says_what_plain_text_says(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "140")
    found = given.load(f"{FILE}:make")
    report = ac.explain(found.model, found.args)
    drawn, plain = _Terminal(), io.StringIO()
    terminal.show(report, drawn)
    terminal.show(report, plain)
    assert plain.getvalue() == terminal.text(report) + "\n"
    assert "\x1b[" in drawn.getvalue() and "\x1b[" not in plain.getvalue()
    seen = re.sub(r"\x1b\[[0-9;]*m", "", drawn.getvalue())
    assert max(map(len, seen.splitlines())) <= 100
    assert not set(plain.getvalue().split()) - set(seen.split())


def test_a_narrow_width() -> None:
    found = given.load(f"{FILE}:make")
    text = terminal.text(ac.explain(found.model, found.args), width=60)
    assert max(map(len, text.splitlines())) <= 60
