"""On a CPU: long scores should not go through memory, a narrow band should not be computed, and
what was measured on one agrees.
"""

from __future__ import annotations

import json
from dataclasses import replace

import cpu_choice
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attn_compiler.cost.cpu import Way, ranked, ways
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.problem import Problem

CPU = Hardware.named("cpu")


@pytest.mark.parametrize(
    ("problem", "density", "best"),
    [
        (Problem(1, 8, 8, 1024, 1024, 64, 64, 4), None, "sdpa"),
        (Problem(1, 8, 8, 1024, 1024, 64, 64, 4, right=0), None, "sdpa"),
        (Problem(1, 4, 4, 1024, 1024, 64, 64, 4, left=63, right=0), None, "blocked"),
        (Problem(2, 4, 4, 2048, 2048, 32, 32, 4, left=127, right=0), None, "blocked"),
        (Problem(4, 8, 8, 1, 512, 64, 64, 4), None, "sdpa"),
        (Problem(1, 4, 4, 2048, 2048, 64, 64, 4), 0.05, "gathered"),
        (Problem(1, 4, 4, 2048, 2048, 64, 64, 4), 0.9, "sdpa"),
    ],
)
def test_the_fastest_way(problem: Problem, density: float | None, best: Way) -> None:
    found = ranked(CPU, problem, density)
    assert found[0][0] == best
    assert [t.seconds for _, t in found] == sorted(t.seconds for _, t in found)


def test_what_the_ways_compute() -> None:
    free = ways(Problem(2, 3, 3, 256, 512, 16, 24, 4))
    assert set(free) == {"keep", "sdpa"}
    for phases in free.values():
        assert sum(p.flops for p in phases) == 2 * 2 * 3 * 256 * 512 * 40
    # scores are written by the product, the scale and the softmax, and read by what follows each
    assert sum(p.moved for p in free["keep"]) > 6 * 4 * 2 * 3 * 256 * 512
    causal = ways(Problem(2, 3, 3, 1024, 1024, 16, 16, 4, right=0))
    seen = {name: sum(p.exps for p in phases) for name, phases in causal.items()}
    # of four blocks of 256 rows two see one block of 512 keys, and two see both
    assert seen["sdpa"] == 12 / 16 * seen["keep"]
    window = ways(Problem(2, 3, 3, 4096, 4096, 16, 16, 4, left=99, right=0))
    flops = {name: sum(p.flops for p in phases) for name, phases in window.items()}
    assert flops["sdpa"] == flops["keep"] > 10 * flops["blocked"]
    half = ways(Problem(2, 3, 3, 1024, 1024, 16, 16, 4), 0.5)
    assert sum(p.flops for p in half["gathered"]) == sum(p.flops for p in half["sdpa"]) / 2


@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(1, 2000),
    st.sampled_from([None, 0.1, 0.7]),
)
def test_more_is_never_cheaper(
    batch: int, heads: int, rows: int, keys: int, more: int, density: float | None
) -> None:
    problem = Problem(batch, heads, heads, rows, keys, 64, 64, 4)
    before = dict(ranked(CPU, problem, density))
    for greater in (
        replace(problem, keys=keys + more),
        replace(problem, batch=batch + 1),
    ):
        for name, time in ranked(CPU, greater, density):
            # one piece more may fill a core that waited
            assert time.seconds >= before[name].seconds * (1 - 1e-9)
    faster = replace(CPU, clock=CPU.clock * 2, dram_rate=CPU.dram_rate * 2)
    for name, time in ranked(faster, problem, density):
        assert time.seconds <= before[name].seconds * (1 + 1e-9)


def test_choices_agree_with_measurements() -> None:
    """Twenty shapes, measured by `examples/benchmarks/cpu_choice.py`; its seconds are kept."""
    result = json.loads(cpu_choice.RESULTS.read_text(encoding="utf-8"))
    rows = cpu_choice.scored(result)
    assert len(rows) == len(cpu_choice.GRID) == 20
    assert [row["case"] for row in rows] == [str(case) for case in cpu_choice.GRID]
    assert all(len(s) >= 5 for row in result["rows"] for s in row["seconds"].values())
    assert cpu_choice.agreement(rows) >= 0.9, cpu_choice.table(rows)


def test_the_score_can_be_bad() -> None:
    case = {"batch": 1, "heads": 8, "kv_heads": 8, "rows": 1024, "keys": 1024, "head_dim": 64}
    rows = [{"case": case, "seconds": {"keep": [1.0, 9.0, 1.0], "sdpa": [1.06, 1.06, 0.1]}}]
    (row,) = cpu_choice.scored({"hardware": json.loads(CPU.to_json()), "rows": rows})
    assert (row["chosen"], row["best"], row["right"]) == ("sdpa", "keep", False)
    assert cpu_choice.agreement([row]) == 0.0 and "WRONG, best is keep" in cpu_choice.table([row])
