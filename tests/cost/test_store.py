"""What was measured is found again, until the model changes; damaged files are ignored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attn_compiler.cost import at_hand, store
from attn_compiler.cost.calibration import Calibration
from attn_compiler.cost.hardware import Hardware, resolve
from attn_compiler.cost.problem import Problem
from attn_compiler.cost.search import choose
from attn_compiler.errors import BadOption

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTN_COMPILER_CACHE", str(tmp_path))


def test_what_was_fitted_answers_for_the_device_at_hand() -> None:
    plain = resolve(None, "cpu")
    fitted = replace(plain, constants=(("sdpa", Calibration(clock=0.77)),), mark="measured")
    at_hand.keep(fitted, CPU)
    assert resolve(None, "cpu") == fitted != plain
    assert resolve(None, "cpu").constants_of("sdpa").clock == 0.77
    assert resolve("cpu") == Hardware.named("cpu")  # a name is the table's row


def test_another_model_or_device_is_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    path = store.place("hardware", "a device")
    assert path == store.place("hardware", "a device") != store.place("hardware", "another")
    monkeypatch.setattr(store, "version", lambda: "changed")
    assert store.place("hardware", "a device") != path


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"\xff\xfe", b"[1]", b'{"hardware": 3}', b'{"hardware": {"name": "cpu"}}']
)
def test_a_damaged_file_is_ignored_with_a_line(
    damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    plain = resolve(None, "cpu")
    at_hand.keep(replace(plain, mark="measured"), CPU)
    store.place("hardware", at_hand.name_of(CPU)).write_bytes(damage)
    assert resolve(None, "cpu") == plain
    assert "is ignored" in caplog.text


def test_constants_are_part_of_the_json() -> None:
    fitted = replace(Hardware.named("h200"), constants=(("forward", Calibration(hidden=0.3)),))
    assert Hardware.from_json(fitted.to_json()) == fitted
    found = json.loads(fitted.to_json())
    found["constants"]["forward"]["hidden"] = 7
    with pytest.raises(BadOption, match="hidden of forward is 7"):
        Hardware.from_json(json.dumps(found))
    found["constants"]["forward"] = {"hidden": 0.3}
    with pytest.raises(BadOption, match="constants of forward"):
        Hardware.from_json(json.dumps(found))


def test_predictions_use_the_constants_of_the_hardware() -> None:
    row, problem = Hardware.named("h200"), Problem(4, 32, 32, 4096, 4096, 128, 128)
    slow = replace(row, constants=(("forward", Calibration(clock=0.5)),))
    assert choose(slow, problem)[0][1].seconds > 1.5 * choose(row, problem)[0][1].seconds
    assert choose(slow, problem, "queries") == choose(row, problem, "queries")
