"""The scores of the cost model from measured seconds of a GPU, without one."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import gpu_fit
import gpu_score
import pytest

from attn_compiler.cost.calibration import Calibration
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.limits import living
from attn_compiler.cost.peers import peers
from attn_compiler.cost.problem import Problem
from attn_compiler.cost.roofline import predict
from attn_compiler.cost.search import choose
from attn_compiler.kernels.calibrate_gpu import launched

RESULTS = Path(gpu_score.__file__).parent / "results"


TRUTH = Calibration(hidden=0.4, clock=0.8, dram=0.8, l2=0.6, launch=5e-6, prologue=5000.0)
DEVICE = Hardware.named("h200")


def row(section: str, width: int, rows: int, keys: int, tiles: int, batch: int) -> dict[str, Any]:
    """Seconds that the model itself made with other constants."""
    problem = Problem(batch, 16, 16, rows, keys, width, width, right=0 if rows == keys else None)
    ways: dict[str, Any] = {}
    for i, (tile, _) in enumerate(choose(DEVICE, problem)[:tiles]):
        lives = living(DEVICE, problem, "forward", tile)
        seconds = predict(DEVICE, problem, "forward", tile, lives, TRUTH).seconds
        ways[f"tile {i}" if i else "triton"] = {
            "template": "forward", "tile": asdict(launched(tile)), "seconds": [seconds],
        }  # fmt: skip
    if rows == keys:
        # as fast as it is thought to be
        ways["flash"] = {"seconds": [peers(DEVICE, problem)["flash"].seconds]}
    name = f"{section} {width} {keys}"
    return {"name": name, "section": section, "problem": asdict(problem), "ways": ways}


def result() -> dict[str, Any]:
    """Constants can be fitted to eleven calls, and are judged by twenty-four others."""
    rows = [row("forward", d, n, n, 1, 4) for d, n in product((64, 128, 256), (64, 1024, 8192))]
    rows += [row("decode", 128, 1, n, 4, 16) for n in (1024, 8192)]
    lengths = (380, 1000, 1500, 2000, 3000, 4000, 5000, 6000)
    rows += [row("tiles", d, n, n, 99, 2) for d, n in product((64, 128, 256), lengths)]
    return {
        "gpu": "NVIDIA H200", "arch": "sm_90", "processors": 132, "memory": 141 * 10**9,
        "rows": rows,
    }  # fmt: skip


def test_a_result_is_scored_without_a_gpu() -> None:
    """What is fitted to some calls predicts others well; seconds without sense are not."""
    given = result()
    known, judged = gpu_score.parts(given)
    assert (len(known["rows"]), len(judged["rows"])) == (11, gpu_score.CALLS)
    hardware = gpu_score.fitted(known)
    found = gpu_score.score(hardware, "forward", gpu_fit.measurements(judged)["forward"])
    assert found is not None and found.calls == 24 and found.tiles > 24 * 10
    assert found.first > 0.97 and found.worst > 0.9 and found.among > 0.99 and found.off < 0.1
    assert found.rank > 0.9
    text = gpu_score.report(given)
    assert "forward: 24 calls" in text and "queries: no call with several tiles" in text
    assert "implementation: 24 of 24 right" in text
    wrong = gpu_fit.measurements(judged)["forward"]
    shuffled = [replace(m, seconds=1.0 / m.seconds) for m in wrong]
    bad = gpu_score.score(hardware, "forward", shuffled)
    assert bad is not None and bad.rank < 0 and bad.first < 0.95 and bad.off > 0.9
    assert gpu_score.report({"gpu": "cpu", "rows": []}).startswith("not measured on a GPU")


def test_what_a_result_does_not_reach_is_said() -> None:
    given = result()
    more = [f"fewer than 24 calls with all tiles of {t}" for t in ("queries", "keys_and_values")]
    assert gpu_score.missed(given) == more
    few = {**given, "rows": given["rows"][:-1]}
    assert gpu_score.missed(few) == ["fewer than 24 calls with all tiles of forward", *more]
    for one in given["rows"][-12:]:
        ours = [way for name, way in one["ways"].items() if name != "flash"]
        for way, seconds in zip(ours, [w["seconds"] for w in reversed(ours)], strict=True):
            way["seconds"] = seconds
    given["rows"][-1]["ways"]["tile 1"] = {"error": "RuntimeError: out of resources"}
    given["rows"][-2]["ways"]["tile 2"]["spills"] = 4
    found = gpu_score.missed(given)
    assert found[:2] == [
        "tiles 256 5000, tile 2: spills registers",
        "tiles 256 6000, tile 1: RuntimeError: out of resources",
    ]
    said = [text.partition(":")[0] for text in found[2:] if text not in more]
    names = ("picks", "worst pick", "best of the first picks", "rank", "accuracy")
    assert said == [*(f"{name}, forward" for name in names), "implementations, all"]


def test_few_measurements_are_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as `calibrate` may take."""
    taken: list[int] = []
    fit = gpu_score.fit
    monkeypatch.setattr(gpu_score, "fit", lambda *a: (taken.append(len(a[2])), fit(*a))[1])
    gpu_score.fitted({**result(), "rows": [row("forward", 64, n, n, 9, 1) for n in (64, 512, 999)]})
    assert taken == [20]


def test_the_implementation_is_scored() -> None:
    problem = asdict(Problem(2, 16, 16, 4096, 4096, 128, 128, right=0))
    ways = {"cudnn": {"seconds": [1.0]}, "triton": {"seconds": [2.0]}}
    other = {"cudnn": {"seconds": [1.0]}, "flash": {"seconds": [0.5]}}
    rows = [{"section": "forward", "problem": problem, "ways": w} for w in (ways, other)]
    rows.append({"section": "forward", "problem": None, "ways": ways})
    assert gpu_score.implementations(Hardware.named("h200"), {"rows": rows}) == (1, 2)


def test_committed_results_keep_what_they_promise() -> None:
    """Once there are results of a GPU; one that ran out of time before its tiles promises none."""
    for path in sorted(RESULTS.glob("*.json")):
        given = json.loads(path.read_text(encoding="utf-8"))
        found = gpu_score.missed(given) if "arch" in given else []
        assert not [text for text in found if not text.startswith("fewer")], path.name
