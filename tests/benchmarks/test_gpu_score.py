"""The scores of the cost model from measured seconds of a GPU, without one."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import gpu_fit
import gpu_score

from attn_compiler.cost.calibration import Calibration
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.limits import living
from attn_compiler.cost.problem import Problem
from attn_compiler.cost.roofline import predict
from attn_compiler.cost.search import choose
from attn_compiler.kernels.calibrate_gpu import launched

RESULTS = Path(gpu_score.__file__).parent / "results"


def test_a_result_is_scored_without_a_gpu() -> None:
    """Seconds that the model itself made with other constants: fitted on one half, the other half
    is predicted well; seconds without sense are not.
    """
    truth = Calibration(hidden=0.4, clock=0.8, dram=0.8, l2=0.6, launch=5e-6, prologue=5000.0)
    device = Hardware.named("h200")
    rows = []
    for width, length in product((64, 128), (777, 1500, 3000, 6000)):
        problem = Problem(2, 16, 16, length, length, width, width, right=0)
        ways: dict[str, Any] = {"cudnn": {"seconds": [9.0]}}
        for i, (tile, _) in enumerate(choose(device, problem)[:8]):
            lives = living(device, problem, "forward", tile)
            seconds = predict(device, problem, "forward", tile, lives, truth).seconds
            ways[f"tile {i}" if i else "triton"] = {
                "template": "forward", "tile": asdict(launched(tile)), "seconds": [seconds],
            }  # fmt: skip
        rows.append({"section": "forward", "problem": asdict(problem), "ways": ways})
    given = {
        "gpu": "NVIDIA H200", "arch": "sm_90", "processors": 132, "memory": 141 * 10**9,
        "rows": rows,
    }  # fmt: skip
    known, judged = gpu_score.halves(given)
    assert len(known["rows"]) == len(judged["rows"]) == 4
    hardware = gpu_score.fitted(known)
    found = gpu_score.score(hardware, "forward", gpu_fit.measurements(judged)["forward"])
    assert found is not None and (found.calls, found.tiles) == (4, 32)
    assert found.first > 0.97 and found.worst > 0.9 and found.among > 0.99 and found.off < 0.1
    assert found.rank > 0.9
    text = gpu_score.report(given)
    assert "forward: 4 calls, 32 tiles" in text and "queries: no call with several tiles" in text
    shuffled = [replace(m, seconds=1.0 / m.seconds) for m in gpu_fit.measurements(given)["forward"]]
    bad = gpu_score.score(hardware, "forward", shuffled)
    assert bad is not None and bad.rank < 0 and bad.first < 0.95 and bad.off > 0.9
    assert gpu_score.report({"gpu": "cpu", "rows": []}).startswith("not measured on a GPU")


def test_the_implementation_is_scored() -> None:
    problem = asdict(Problem(2, 16, 16, 4096, 4096, 128, 128, right=0))
    ways = {"cudnn": {"seconds": [1.0]}, "triton": {"seconds": [2.0]}}
    other = {"cudnn": {"seconds": [1.0]}, "flash": {"seconds": [0.5]}}
    rows = [{"section": "forward", "problem": problem, "ways": w} for w in (ways, other)]
    rows.append({"section": "forward", "problem": None, "ways": ways})
    assert gpu_score.implementations(Hardware.named("h200"), {"rows": rows}) == (1, 2)


def test_committed_results_keep_what_they_promise() -> None:
    """Once there are results of a GPU: picks of 95 % and more, as the cost model is meant to do."""
    for path in sorted(RESULTS.glob("*.json")):
        given = json.loads(path.read_text(encoding="utf-8"))
        if "arch" not in given:
            continue
        known, judged = gpu_score.halves(given)
        found = gpu_score.score(
            gpu_score.fitted(known), "forward", gpu_fit.measurements(judged)["forward"]
        )
        assert found is None or (found.first >= 0.95 and found.worst >= 0.8), path.name
