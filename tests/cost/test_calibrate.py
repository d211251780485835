"""`calibrate` with a clock that knows the truth: the constants come back, and are kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attn_compiler as ac
from attn_compiler import calibrating
from attn_compiler.cost.calibration import Calibration
from attn_compiler.cost.hardware import Hardware, resolve
from attn_compiler.cost.limits import living
from attn_compiler.cost.problem import Problem, Template, TileConfig
from attn_compiler.cost.roofline import predict
from attn_compiler.kernels import calibrate_gpu, cpu_ways

H200 = Hardware.named("h200")


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTN_COMPILER_CACHE", str(tmp_path))


def test_what_is_not_here_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ac.BadOption, match="no h200 here to calibrate"):
        ac.calibrate("h200")
    with pytest.raises(ac.BadOption, match="unknown hardware"):
        ac.calibrate("abacus")


def test_a_cpu_of_which_every_call_takes_a_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed: the sizes make the model, and the clock is fixed."""
    for name in ("cores", "steps"):
        real = getattr(cpu_ways, name)

        def named(*args: Any, real: Callable[..., Any] = real) -> dict[str, Callable[[], None]]:
            return dict.fromkeys(real(*args), lambda: None)

        monkeypatch.setattr(cpu_ways, name, named)
    monkeypatch.setattr(calibrating, "clock", lambda device: lambda call: 1e-3)
    began = time.process_time()
    found = ac.calibrate("cpu")
    assert time.process_time() - began < 60
    assert found == resolve(None, "cpu") and found.mark == "measured"
    ways = dict(found.constants)
    assert set(ways) == {"keep", "sdpa", "blocked", "gathered", "layer", "states"}
    # 2 * 768^3 operations in a millisecond
    rate = found.flops32 * found.clock * found.processors * found.sustained
    assert rate == pytest.approx(2 * 768**3 / 1e-3)
    assert found.dram_rate == pytest.approx(8 * 2**25 / 1e-3)


@pytest.mark.parametrize("template", ["forward", "queries"])
def test_the_constants_of_a_gpu_come_back(template: Template) -> None:
    truth = Calibration(hidden=0.5, clock=0.8, dram=0.8, l2=0.6, launch=6e-6, prologue=5000.0)
    taken: list[float] = []

    def run(problem: Problem, name: Template, tile: TileConfig) -> Callable[[], None]:
        lives = living(H200, problem, name, tile)
        seconds = predict(H200, problem, name, tile, lives, truth).seconds
        return lambda: taken.append(seconds)

    def clock(call: Callable[[], Any]) -> float:
        call()
        return taken[-1]

    found = list(calibrate_gpu.measured(H200, template, clock, run))
    assert 8 <= len(found) <= 20
    fitted = calibrate_gpu.fit(H200, template, found)
    assert fitted.clock * (1 + fitted.hidden) == pytest.approx(1.2, rel=0.15)
    held_out = Problem(3, 24, 24, 3000, 3000, 128, 128)
    tile = TileConfig(128, 64, 8, 2) if template == "forward" else found[0].tile
    for row, near in ((replace(H200, constants=((template, fitted),)), 0.06), (H200, 10)):
        guess = predict(row, held_out, template, tile, 1).seconds
        assert guess == pytest.approx(
            predict(H200, held_out, template, tile, 1, truth).seconds, rel=near
        )


def test_a_kernel_that_fails_costs_only_itself(caplog: pytest.LogCaptureFixture) -> None:
    def run(problem: Problem, name: Template, tile: TileConfig) -> Callable[[], None]:
        if problem.head_dim == 64:
            raise RuntimeError("out of memory")
        return lambda: None

    found = list(calibrate_gpu.measured(H200, "forward", lambda call: 1e-3, run))
    assert found and all(m.problem.head_dim != 64 for m in found)
    assert "out of memory" in caplog.text


def test_the_ways_compute_the_same() -> None:
    window = Problem(2, 6, 3, 97, 97, 16, 16, 4, left=10, right=0)
    for problem, density in (
        (replace(window, left=None), None), (window, None),
        (replace(window, rows=1, right=None, left=None), None),
        (Problem(1, 3, 3, 320, 320, 16, 16, 4), 0.2),
    ):  # fmt: skip
        ways = cpu_ways.cores(problem, density, 32)
        results = [way() for way in ways.values()]
        assert len(results) >= 2
        for result in results:
            torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)
    for beams in (1, 3):
        layer, states = (way() for way in cpu_ways.steps(2, beams, 37, 5, 8).values())
        torch.testing.assert_close(layer, states, rtol=1e-4, atol=1e-5)
