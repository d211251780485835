"""What a phase prints where there is no terminal, and what it draws where there is one."""

from __future__ import annotations

import sys

import pytest

from attn_compiler.train.progress import bar


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_ten_lines_of_a_known_number(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("layers", 37, 30) as advance:
        for _ in range(7):
            advance(0.25)
    assert lines(capsys) == [f"layers {n}/37  loss 0.25" for n in (33, 36, 37)]


def test_fewer_and_fewer_lines_of_an_unknown_number(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("calibration", None) as advance:
        for _ in range(11):
            advance()
    assert lines(capsys) == [f"calibration {n}" for n in (1, 2, 4, 8)]


def test_nothing_if_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("calibration", 3, shown=False) as advance:
        advance()
    assert lines(capsys) == []


@pytest.mark.parametrize("steps", [3, None])
def test_a_terminal_gets_a_bar(
    steps: int | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with bar("layers", steps) as advance:
        for _ in range(3):
            advance(0.5)
    drawn = "".join(lines(capsys))
    assert "layers" in drawn and "3/" in drawn and "loss 0.5" in drawn
