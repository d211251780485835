"""What LinearAttention costs: nothing grows faster than the length, a step does not grow at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch

import attn_compiler as ac
from attn_compiler.cost.letters import B, C, G, H, S, T, d, e
from attn_compiler.kernels.feature_maps import FeatureMaps
from attn_compiler.variants.linear_attention import LinearAttention, cost

SHAPE = ac.Shape(1, 4096, 4096, 8, 64, width=512)


def test_operations_are_those_of_the_products() -> None:
    """The features, the window with the tile's own keys, and two products with the state."""
    found = cost(LinearAttention(window=64), "prefill").flops
    products = 2 * (H + G) * d**2 + 2 * H * (C + 64) * (d + e) + 2 * H * 64 * (2 * d + e)
    products += 2 * (H + G) * 2 * d * e
    assert sympy.expand(found - B * T * products) == 0


@pytest.mark.parametrize("work", ["prefill", "training"])
def test_time_is_linear_in_the_length(work: str) -> None:
    sizes = {"B": 2, "H": 8, "G": 4, "d": 16, "e": 16, "n": 2, "C": 64, "S": 1}
    one, two = (cost(LinearAttention(), work).numbers(**sizes, T=n) for n in (2**12, 2**13))  # type: ignore[arg-type]
    for name in ("flops", "exps", "written"):
        assert getattr(two, name) / getattr(one, name) == pytest.approx(2, rel=1e-2)


def test_a_step_does_not_know_the_length() -> None:
    found = cost(LinearAttention(), "decode")
    formulas = [sympy.sympify(getattr(found, name)) for name in found.__slots__]
    assert all(S not in formula.free_symbols for formula in formulas)


def test_keep_it_is_an_answer() -> None:
    short, long = (replace(SHAPE, query=n, key=n) for n in (256, 2**16))
    spec = LinearAttention()
    for hardware, dtype in (("cpu", torch.float32), ("h200", torch.bfloat16)):
        assert ac.plan(spec, short, hardware=hardware, dtype=dtype).keep
        found = ac.plan(spec, long, hardware=hardware, dtype=dtype)
        assert not found.keep and found.crossing.startswith("pays from about")


def test_parameters_that_the_report_counts() -> None:
    maps = FeatureMaps(6, 2, 5)
    assert sum(p.numel() for p in maps.parameters()) == (6 + 2) * 5**2 + 6
