"""Library models under the compiler: `check` compiles one, compares numbers and gradients.

outcome = check("llama", "eager", padding=True, training=False, dynamic=True)
outcome.gaps       errors against float64, all within budget (else AssertionError)
outcome.report     what the compiler says it did
outcome.recompiled graphs made by a second call with another batch and length
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import claims
import torch
from torch import nn

from zoo.families import FAMILIES
from zoo.family import Family
from zoo.inputs import BATCH, LENGTH

BACKEND = "attn_compiler"


@dataclass(frozen=True, order=True)
class Case:
    """One cell of the grid."""

    family: str
    attn: str
    padding: bool
    training: bool
    dynamic: bool

    def __str__(self) -> str:
        words = [self.family, self.attn, "train" if self.training else "infer"]
        words += ["dynamic" if self.dynamic else "static", "padding" if self.padding else "full"]
        return "-".join(words)


@dataclass
class Outcome:
    """What came of one case."""

    gaps: list[claims.Gap]
    report: Any
    graphs: int
    recompiled: int


def grid() -> Iterator[Case]:
    """Every family under every combination of options that it takes."""
    flags = (False, True)
    for name, family in FAMILIES.items():
        for attn, padding, training, dynamic in product(
            family.attns, flags if family.masks else (False,), flags, flags
        ):
            yield Case(name, attn, padding, training, dynamic)


def cover() -> Iterator[Case]:
    """Every family once, walking through an orthogonal array: all pairs of options occur."""
    array = [
        (0, 0, 0, 0),
        (1, 1, 1, 0),
        (0, 1, 0, 1),
        (1, 0, 1, 1),
        (0, 0, 1, 0),
        (1, 1, 0, 1),
        (0, 1, 1, 1),
        (1, 0, 0, 0),
    ]
    for i, (name, family) in enumerate(FAMILIES.items()):
        attn, padding, training, dynamic = array[i % len(array)]
        chosen = family.attns[attn % len(family.attns)]
        yield Case(name, chosen, bool(padding) and family.masks, bool(training), bool(dynamic))


def compiled(
    model: nn.Module, *, dynamic: bool, then: str = "eager", backend: str = BACKEND
) -> Any:
    """`model` compiled afresh; every earlier compilation is forgotten."""
    torch._dynamo.reset()
    if backend == BACKEND:
        # a no-op where the package is installed and its entry point is known
        importlib.import_module("attn_compiler.backend").register()
    options = {"options": {"then": then}} if backend == BACKEND else {}
    return torch.compile(model, backend=backend, dynamic=dynamic, **options)


def unique_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def graph_breaks() -> dict[str, int]:
    return dict(torch._dynamo.utils.counters["graph_break"])


def check(
    name: str,
    attn: str,
    *,
    padding: bool,
    training: bool,
    dynamic: bool,
    then: str = "eager",
    backend: str = BACKEND,
) -> Outcome:
    """Compile, run, compare.

    Raises:
        AssertionError: an output or a gradient is beyond the float64 budget.
    """
    family = FAMILIES[name]
    model = family.build(attn).train(training)
    fast = compiled(model, dynamic=dynamic, then=then, backend=backend)
    torch._dynamo.utils.counters.clear()
    gaps = claims.same_numbers(
        model, fast, (), family.inputs(BATCH, LENGTH, padding, 0), training=training
    )
    graphs = unique_graphs()
    if dynamic:
        gaps += claims.same_numbers(model, fast, (), _longer(family, padding), training=training)
    return Outcome(gaps, _report(backend), graphs, unique_graphs() - graphs)


def _longer(family: Family, padding: bool) -> dict[str, Any]:
    return family.inputs(BATCH + 2, LENGTH + 4 if family.lengths else LENGTH, padding, 1)


def _report(backend: str) -> Any:
    if backend != BACKEND:
        return None
    import attn_compiler

    return attn_compiler.last_report()


def expect_decisions(name: str, report: Any) -> None:
    """Every attention of the family was rewritten, or refused for a reason that the table accepts.

    Raises:
        AssertionError: too few or too many sites, or a reason that nobody has accepted.
    """
    family = FAMILIES[name]
    unexplained = sorted(set(claims.refusals(report)) - family.refused.keys())
    assert not unexplained, f"refused for {unexplained}:\n{claims.decisions(report)}"
    found = len(report.sites)
    assert found == family.sites, (
        f"{found} sites instead of {family.sites}:\n{claims.decisions(report)}"
    )
    assert claims.accepted(report) >= family.sites - family.kept, claims.decisions(report)
