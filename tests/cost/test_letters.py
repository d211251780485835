"""Formulas add up, and evaluate without sympy's slow substitution."""

import pytest

from attn_compiler.cost.letters import Cost, S, T, d


def test_a_formula_becomes_numbers() -> None:
    cost = Cost(flops=4 * T * S * d, exps=T * S) + Cost(flops=2 * T).times(3)
    found = cost.numbers(T=3, S=5, d=7)
    assert (found.flops, found.exps, found.read) == (4 * 3 * 5 * 7 + 18, 15, 0)
    assert str(cost.simplified().flops) == "2*T*(2*S*d + 3)"


def test_a_letter_without_a_number_is_an_error() -> None:
    with pytest.raises(KeyError, match="S"):
        Cost(flops=T * S).numbers(T=3)
