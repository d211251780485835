"""Selective attention: budgets of the paper's claim, and the costs of its two passes."""

from __future__ import annotations

import math

import pytest
import sympy

from attn_compiler.cost.letters import B, Cost, G, H, K, S, T, d, e
from attn_compiler.planning import plan
from attn_compiler.variants.base import Shape
from attn_compiler.variants.flash import Flash
from attn_compiler.variants.flash import cost as flash_cost
from attn_compiler.variants.selective import (
    Selective,
    break_even_length,
    cost,
    extra_operations,
    mean_budget,
    memory_ratio,
    state_share,
)

SQUARE = {S: T, e: d, G: H}


def same(one: object, other: object) -> bool:
    return bool(sympy.expand(one - other) == 0)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("length", "ratio", "budget"), [(512, 16, 32), (1024, 25, 40.96), (2048, 47, 43.57)]
)
def test_mean_budgets_of_the_claim(length: int, ratio: int, budget: float) -> None:
    assert round(mean_budget(length, ratio), 2) == budget


def test_memory_ratio_is_of_means_of_layers() -> None:
    budgets = [17, 31, 43, 37]
    assert sum(budgets) / 4 == 32
    assert memory_ratio(512, budgets) == 16
    sizes = {"B": 1, "K": 1, "T": 1, "H": 12, "G": 12, "d": 64, "e": 64, "n": 2}
    kept = sum(cost(Selective(), "decode").numbers(**sizes, S=k).cache for k in budgets)
    whole = 4 * flash_cost(Flash(), "decode").numbers(**sizes, S=512).cache
    assert math.isclose(whole / kept, 16 / (1 + state_share(768)))


@pytest.mark.parametrize("group", [1, 2, 4])
def test_operations_of_a_sequence(group: int) -> None:
    flops = cost(Selective(), "prefill", group=group).flops.subs(SQUARE)
    standard = 2 * B * H * T**2 * d
    scan = B * T**2 * 64 * H / group
    half = sympy.Rational(1, 2)
    assert same(flops, standard * (1 + half / H + half / group) + scan)
    ratio = ((flops - scan) / standard - 1).subs(H, 12)
    assert math.isclose(float(ratio), extra_operations(12, group))


def test_a_tensor_of_f_saves_operations_and_costs_bytes() -> None:
    again, kept = (cost(Selective(), "prefill", materialise=x) for x in (False, True))
    standard = 2 * B * H * T**2 * d
    assert same(kept.flops.subs(SQUARE), standard * (1 + sympy.Rational(1, 2) / H))
    assert extra_operations(12, materialise=True) == 1 / 24
    plain = flash_cost(Flash(), "prefill", causal=True)
    assert same((kept.written - plain.written).subs(SQUARE), 4 * B * T**2 / 2)
    assert same((again.written - plain.written).subs(SQUARE), 4 * B * T**2 / (2 * 64))


def test_a_plan_for_a_gpu_has_f_as_a_tensor() -> None:
    """Attention's kernels read it there, each head for itself."""
    shape = Shape(2, 1024, 1024, 8, 64)
    found = plan(Selective(), shape, hardware="h200")
    sizes = {"B": 2, "T": 1024, "S": 1024, "H": 8, "G": 8, "d": 64, "e": 64, "n": 2}
    kept = cost(Selective(), "prefill", materialise=True).numbers(**sizes)
    again = cost(Selective(), "prefill").numbers(**sizes)
    assert found.flops == kept.flops < again.flops
    assert found.bytes == kept.read + kept.written > 4 * 8 * 2 * 1024**2 / 2
    assert plan(Selective(), shape, hardware="cpu").flops == again.flops


def test_the_backward_brings_f_s_gradient_to_one_head() -> None:
    forward = cost(Selective(), "prefill", materialise=True)
    both = cost(Selective(), "training", materialise=True)
    standard = 2 * B * H * T**2 * d
    backward = (both.flops - forward.flops).subs(SQUARE)
    assert same(backward, sympy.Rational(7, 2) * standard + 3 * B * T**2 * d)
    plain = flash_cost(Flash(), "training", causal=True)
    # F and its gradient, float32, half of the pairs each
    assert same((both.written - plain.written).subs(SQUARE), 2 * 4 * B * T**2 / 2)
    assert same((both.saved - plain.saved).subs(SQUARE), 4 * B * T**2 / 2)


def test_bytes_of_a_step() -> None:
    assert round(100 * state_share(768), 2) == 0.26
    sizes = {"B": 1, "K": 1, "T": 1, "H": 12, "G": 12, "d": 64, "e": 64, "n": 2}
    step = cost(Selective(), "decode")
    assert round(step.numbers(**sizes, S=43).cache / 1e3) == 132
    assert round(flash_cost(Flash(), "decode").numbers(**sizes, S=2048).cache / 1e6, 1) == 6.3
    assert same(step.flops.subs(e, d), 4 * B * K * H * d * S * T)


def test_a_budget_pays_from_the_break_even_length_on() -> None:
    sizes = {"B": 3, "K": 1, "T": 1, "H": 7, "G": 7, "d": 13, "e": 13, "n": 2}
    length = break_even_length(43, 7 * 13)
    kept = cost(Selective(), "decode").numbers(**sizes, S=43).read
    whole: Cost = flash_cost(Flash(), "decode").numbers(**sizes, S=length)
    assert math.isclose(kept, whole.read)


def test_a_dedicated_head_is_one_more_head() -> None:
    sizes = {"B": 2, "T": 11, "S": 11, "d": 5, "e": 5, "n": 2}
    more = cost(Selective(start="dedicated_head"), "training").numbers(**sizes, H=3, G=3)
    assert more == cost(Selective(), "training").numbers(**sizes, H=4, G=4)
    assert cost(Selective(start="gate"), "training") == cost(Selective(), "training")
