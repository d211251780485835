"""On a CPU: long scores should not go through memory, and a narrow band should not be computed."""

from __future__ import annotations

import pytest

from attn_compiler.cost.cpu import ranked, ways
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.problem import Problem

CPU = Hardware.named("cpu")


@pytest.mark.parametrize(
    ("problem", "best"),
    [
        (Problem(1, 8, 8, 1024, 1024, 64, 64, 4), "sdpa"),
        (Problem(1, 8, 8, 1024, 1024, 64, 64, 4, right=0), "sdpa"),
        (Problem(1, 4, 4, 1024, 1024, 64, 64, 4, left=63, right=0), "blocked"),
        (Problem(2, 4, 4, 2048, 2048, 32, 32, 4, left=127, right=0), "blocked"),
        (Problem(4, 8, 8, 1, 512, 64, 64, 4), "sdpa"),
    ],
)
def test_the_fastest_way(problem: Problem, best: str) -> None:
    found = ranked(CPU, problem)
    assert found[0][0] == best
    assert [t.seconds for _, t in found] == sorted(t.seconds for _, t in found)


def test_what_the_ways_compute() -> None:
    free = ways(Problem(2, 3, 3, 256, 512, 16, 24, 4))
    assert free["keep"].flops == free["sdpa"].flops == 2 * 2 * 3 * 256 * 512 * 40
    assert free["blocked"] == free["sdpa"]
    assert free["keep"].written == 3 * 2 * 3 * 256 * 512 * 4
    causal = ways(Problem(2, 3, 3, 512, 512, 16, 16, 4, right=0))
    assert causal["sdpa"].exps == pytest.approx(causal["keep"].exps / 2, rel=0.01)
    window = ways(Problem(2, 3, 3, 4096, 4096, 16, 16, 4, left=99, right=0))
    assert window["sdpa"].flops == window["keep"].flops > 10 * window["blocked"].flops
