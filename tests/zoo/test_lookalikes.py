"""Nothing that is not attention is rewritten: same outputs, same gradients, no accepted site."""

from __future__ import annotations

import claims
import pytest

from zoo.library import compiled
from zoo.lookalikes import LOOKALIKES, MAY_BE_REWRITTEN, Lookalike


@pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize("row", LOOKALIKES, ids=str)
def test_is_left_alone(row: Lookalike, training: bool) -> None:
    import attn_compiler

    module = row.module().train(training)
    claims.same_numbers(module, compiled(module, dynamic=False), row.arguments(), training=training)
    report = attn_compiler.last_report()
    if row.name not in MAY_BE_REWRITTEN:
        assert not claims.accepted(report), f"{row.why}:\n{claims.decisions(report)}"
    # whatever is reported as missed carries a code, a sentence and a place
    for miss in report.missed:
        assert miss.code and miss.text and miss.location, (miss.code, miss.text, miss.location)
