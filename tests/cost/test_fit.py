"""Constants that made the measurements are found again, from sixteen of them."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from attn_compiler.cost.calibration import Calibration
from attn_compiler.cost.fit import Measurement, fit
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.problem import Problem, TileConfig
from attn_compiler.cost.roofline import predict
from attn_compiler.errors import BadOption

H200 = Hardware.named("h200")
TRUE = Calibration(hidden=0.45, clock=0.87, dram=0.81, l2=0.55, launch=5.5e-6, prologue=6100.0)
LONG = TileConfig(128, 64, 8, 3)
SMALL = TileConfig(64, 64, 4, 2)
SHORT = TileConfig(16, 64, 4, 4, heads=4)


def cases() -> list[tuple[Problem, TileConfig, int]]:
    found: list[tuple[Problem, TileConfig, int]] = []
    for width in (64, 128, 256):
        for keys in (1024, 8192):
            found.append((Problem(2, 32, 32, keys, keys, width, width), LONG, 1))
    found += [(Problem(2, 32, 32, 4096, 4096, d, d), SMALL, 2) for d in (64, 128)]
    found += [(Problem(64, 32, 8, 1, keys, 128, 128), SHORT, 2) for keys in (4096, 16384)]
    found += [(Problem(1, 32, 8, 1, keys, 128, 128), replace(SHORT, splits=s), 2)
              for keys, s in ((8192, 8), (65536, 16))]  # fmt: skip
    found += [(Problem(1, 2, 2, n, n, 64, 64), SMALL, 2) for n in (16, 64, 512)]
    found.append((Problem(8, 32, 32, 128, 128, 128, 128), SMALL, 2))
    return found


def measured(noise: float) -> list[Measurement]:
    rng = random.Random(5)
    return [
        Measurement(p, tile, n, predict(H200, p, "forward", tile, n, TRUE).seconds
                    * math.exp(rng.gauss(0.0, noise)))
        for p, tile, n in cases()
    ]  # fmt: skip


def test_known_constants_are_found() -> None:
    found = fit(H200, "forward", measured(0.0))
    assert found.hidden == pytest.approx(TRUE.hidden, abs=0.05)
    assert found.clock == pytest.approx(TRUE.clock, rel=0.03)
    assert found.dram == pytest.approx(TRUE.dram, rel=0.02)
    assert found.launch == pytest.approx(TRUE.launch, rel=0.1)
    assert found.prologue == pytest.approx(TRUE.prologue, rel=0.25)


def test_noisy_measurements_predict_what_was_not_measured() -> None:
    found = fit(H200, "forward", measured(0.03))
    before, after = [], []
    for width, keys in ((64, 3000), (128, 20000), (80, 700)):
        problem = Problem(3, 24, 8, keys, keys, width, width, right=0)
        expected = predict(H200, problem, "forward", LONG, 1, TRUE).seconds
        for errors, constants in ((before, None), (after, found)):
            guess = predict(H200, problem, "forward", LONG, 1, constants).seconds
            errors.append(abs(math.log(guess / expected)))
    assert max(after) < 0.06 and sum(after) < sum(before) / 2


def test_what_no_measurement_shows_keeps_its_default() -> None:
    only = [m for m in measured(0.0) if m.problem.rows == 1 and m.problem.batch == 64]
    assert fit(H200, "forward", only).hidden == Calibration().hidden


def test_wrong_measurements_are_refused() -> None:
    with pytest.raises(BadOption, match="no measurements"):
        fit(H200, "forward", [])
    one = measured(0.0)[0]
    with pytest.raises(BadOption, match="not positive"):
        fit(H200, "forward", [replace(one, seconds=0.0)])
