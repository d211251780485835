"""Whatever the spelling, one record and the same numbers."""

from __future__ import annotations

from functools import cache
from typing import Any

import claims
import pytest
import spellings
from hypothesis import HealthCheck, given, settings
from spellings import CANONICAL, Choices, Facts, Spelling

from zoo.library import compiled

GROUPED = Facts(groups=2, mask="causal & padding", keys=17)
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


def _compile(facts: Facts, choices: Choices, *, training: bool = False) -> Any:
    import attn_compiler

    module = Spelling(facts, choices)
    claims.same_numbers(
        module,
        compiled(module, dynamic=False),
        facts.inputs(),
        training=training,
        exact=spellings.canonical(facts),
    )
    return attn_compiler.last_report()


@cache
def _wanted(facts: Facts) -> tuple[Any, ...]:
    return spellings.record(_compile(facts, CANONICAL))


def _agree(facts: Facts, choices: Choices, *, training: bool = False) -> None:
    report = _compile(facts, choices, training=training)
    assert not claims.refusals(report), claims.decisions(report)
    assert spellings.record(report) == _wanted(facts), claims.decisions(report)


def _name(choices: Choices) -> str:
    changed = [f"{k}={v}" for k, v in vars(choices).items() if v != getattr(CANONICAL, k)]
    return ",".join(changed) or "canonical"


@pytest.mark.parametrize("choices", sorted(set(spellings.one_at_a_time()), key=_name), ids=_name)
def test_one_word_changed(choices: Choices) -> None:
    _agree(GROUPED, choices)


@pytest.mark.parametrize("mask", spellings.MASKS)
def test_canonical_facts(mask: str) -> None:
    facts = Facts(mask=mask, groups=2)
    text, _, scale, *rest = _wanted(facts)
    assert (scale, *rest) == (round(facts.scale, 6), 6, 2, 8, True)
    assert text.startswith(mask)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(spellings.facts, spellings.choices)
def test_any_spelling(facts: Facts, choices: Choices) -> None:
    _agree(facts, choices)


@pytest.mark.slow
@settings(max_examples=600, deadline=None, suppress_health_check=QUIET)
@given(spellings.facts, spellings.choices)
def test_any_spelling_in_training(facts: Facts, choices: Choices) -> None:
    _agree(facts, choices, training=True)
