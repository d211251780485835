"""Generated sources: readable, cached by content, rebuilt when damaged, safe among processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
from attention_cases import CASES, Shape

from attn_compiler.kernels.frame import Inputs
from attn_compiler.kernels.launch import Tile, structure_of
from attn_compiler.kernels.template import cache_folder, render, write
from attn_compiler.kernels.triton_source import Structure, backward_source, forward_source


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTN_COMPILER_CACHE", str(tmp_path))


def test_equal_sources_share_a_file() -> None:
    first, second, other = (write("kernel", text) for text in ("x = 1\n", "x = 1\n", "x = 2\n"))
    assert first == second != other and first.parent == cache_folder()
    assert first.read_text() == "x = 1\n"


@pytest.mark.parametrize("damage", [b"", b"x = 3\n", b"\xff\xfe"])
def test_a_damaged_file_is_written_again(damage: bytes) -> None:
    path = write("kernel", "x = 1\n")
    path.write_bytes(damage)
    assert write("kernel", "x = 1\n") == path and path.read_text() == "x = 1\n"


def test_nothing_is_left_of_a_write_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write("kernel", "x = 1\n")
    assert not list(cache_folder().iterdir())


def test_many_processes_write_the_same_file() -> None:
    code = "from attn_compiler.kernels.template import load; print(load('k', 'x = 5\\n').x)"
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [p.communicate()[0].strip() for p in running] == ["5"] * 3
    assert [p.suffix for p in cache_folder().glob("k_*")] == [".py"]


def test_a_name_that_is_missing_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        render("forward")


@pytest.mark.parametrize("name", CASES)
def test_every_program_gives_python(name: str) -> None:
    import torch
    from attention_cases import SCALE, tensors

    from attn_compiler.kernels.frame import Frame

    case, shape = CASES[name], Shape()
    given = Inputs.of(
        *tensors(shape, torch.float32), case.reads(shape), case.ints, None,
        program=case.program, scale=SCALE, dropout=0.0,
    )  # fmt: skip
    frame = Frame(given)
    for visits in ("all", "table", "lists", "whole lists"):
        for tile in (Tile(), Tile(heads=3)):
            structure = structure_of(frame, tile, visits, tuple(case.grads))
            for source in (forward_source(structure), backward_source(structure)):
                compile(source, name, "exec")
                assert "{{" not in source and "{%" not in source
                assert case.program in source


def test_a_mask_by_structure_is_not_computed_in_full_tiles() -> None:
    program = "score: dot; mask: (k <= q) & t0[b, k]; empty: zero"
    source = forward_source(Structure(program, ("bool",), (2,), 0, False, "table", False))
    full, cut = source.split("for j in range(full_lo, full_hi):")[1].split("before = full_lo - lo")
    assert "k <= q" not in full and "k <= q" in cut
    assert "t0" in full and "t0" in cut
