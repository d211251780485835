"""Formulas add up, and evaluate without sympy's slow substitution."""

import pytest

from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.letters import Cost, S, T, d
from attn_compiler.cost.problem import TEMPLATES, Problem, TileConfig
from attn_compiler.cost.work import work
from attn_compiler.variants.costs.parts import Core


def test_a_formula_becomes_numbers() -> None:
    cost = Cost(flops=4 * T * S * d, exps=T * S) + Cost(flops=2 * T).times(3)
    found = cost.numbers(T=3, S=5, d=7)
    assert (found.flops, found.exps, found.read) == (4 * 3 * 5 * 7 + 18, 15, 0)
    assert str(cost.simplified().flops) == "2*T*(2*S*d + 3)"


def test_a_letter_without_a_number_is_an_error() -> None:
    with pytest.raises(KeyError, match="S"):
        Cost(flops=T * S).numbers(T=3)


def test_simplified_forms_as_text() -> None:
    found = Cost(flops=2 * T * S * d + 2 * T * S * d, exps=T * S - S * T, launches=1)
    assert found.texts() == {"flops": "4*S*T*d", "launches": "1"}


def test_bytes_from_the_last_cache_are_those_of_the_kernels() -> None:
    """Without a mask, of lengths that tiles divide: the formula in letters, and what the time of
    each kernel is made of.
    """
    problem, tile = Problem(3, 10, 5, 448, 640, 40, 56), TileConfig(64, 64, 4, 2)
    sizes = {"B": 3, "H": 10, "G": 5, "T": 448, "S": 640, "d": 40, "e": 56, "n": 2}
    near = {t: work(Hardware.named("h200"), problem, t, tile).l2 for t in TEMPLATES}
    assert Core().forward().numbers(**sizes).near == near["forward"]
    rows = 3 * 10 * 448
    sums_of_rows = 2 * rows * 56 * 2 + 4 * rows
    both = near["queries"] + near["keys_and_values"] + sums_of_rows
    assert Core().backward().numbers(**sizes).near == both
    assert Core().forward().numbers(**sizes, M=128).near < near["forward"]
