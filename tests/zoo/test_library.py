"""Every library family: numbers, gradients, decisions, and one compilation for all lengths.

The default run walks a covering subset; `-m "slow or not slow"` the whole grid and Inductor.
"""

from __future__ import annotations

import pytest

from zoo.families import FAMILIES
from zoo.library import Case, Outcome, check, cover, expect_decisions, grid

COVER = sorted(cover())
INDUCTOR = {"bert": False, "gpt2": True, "llama": False, "gemma2": True, "t5": False, "vit": True}
QUICK = ("bert", "gemma2")


def _check(case: Case, then: str = "eager") -> Outcome:
    return check(
        case.family,
        case.attn,
        padding=case.padding,
        training=case.training,
        dynamic=case.dynamic,
        then=then,
    )


def _judge(case: Case, outcome: Outcome) -> None:
    expect_decisions(case.family, outcome.report)
    assert outcome.recompiled == 0, f"{outcome.recompiled} graphs for another length"
    whole = not (FAMILIES[case.family].stock and case.training)
    assert outcome.graphs == 1 or not whole, (
        f"{outcome.graphs} graphs: a break that stock does not have"
    )


@pytest.mark.parametrize("case", COVER, ids=str)
def test_covering_subset(case: Case) -> None:
    _judge(case, _check(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(set(grid()) - set(COVER)), ids=str)
def test_rest_of_the_grid(case: Case) -> None:
    _judge(case, _check(case))


def _inductor_cases() -> list[object]:
    cases = []
    for name, training in INDUCTOR.items():
        case = Case(name, "eager", FAMILIES[name].masks, training, False)
        cases.append(
            pytest.param(case, id=str(case), marks=() if name in QUICK else pytest.mark.slow)
        )
    return cases


@pytest.mark.parametrize("case", _inductor_cases())
def test_through_inductor(case: Case) -> None:
    _judge(case, _check(case, then="inductor"))


def test_all_pairs_of_options_are_covered() -> None:
    flags = {(c.attn == "sdpa", c.padding, c.training, c.dynamic) for c in COVER}
    for i in range(4):
        for j in range(i):
            assert len({(f[i], f[j]) for f in flags}) == 4, (i, j)


def test_every_family_is_covered() -> None:
    assert {c.family for c in COVER} == set(FAMILIES)
