"""Nothing that is not attention is rewritten: same outputs, same gradients, no accepted site."""

from __future__ import annotations

import claims
import pytest
import torch
from torch import Tensor

import attn_compiler as ac
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


def test_what_is_not_read_through_has_a_name() -> None:
    """Infinite scores become numbers here, and numbers that are none zero."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nan_to_num(q @ k.mT).softmax(-1) @ v

    q, k, v = (torch.randn(2, 3, n, 5) for n in (7, 11, 11))
    (missed,) = ac.explain(attend, (q, k, v)).missed
    assert missed.code == "attention.scores_hidden" and "`nan_to_num`" in missed.text


def test_a_view_that_cuts_no_axis_has_a_name() -> None:
    """Scores without those of the first token, cut into rows of a picture (MViTv2)."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = q @ k.mT
        picture = scores[:, 1:, 1:].reshape(2, 2, 3, 2, 3) + bias
        scores[:, 1:, 1:] = picture.reshape(2, 6, 6)
        return scores.softmax(-1) @ v

    q, k, v = (torch.randn(2, 7, 5) for _ in range(3))
    (missed,) = ac.explain(attend, (q, k, v, torch.randn(2, 3, 2, 3))).missed
    assert missed.code == "attention.scores_hidden" and "view`" in missed.text


def test_a_mask_written_row_by_row_is_read_as_it_is() -> None:
    """A formula of fifty writes is none; the tensor that they make is at hand."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.full((50, 50), float("-inf"))
        for row in range(50):
            mask[row, max(0, row - 3) : row + 1] = 0.0
        return (q @ k.mT + mask).softmax(-1) @ v

    q, k, v = (torch.randn(2, 50, 5) for _ in range(3))
    (found,) = ac.explain(attend, (q, k, v)).sites
    assert found.decision.accepted and str(found.score).startswith("dot + ")
    claims.same_numbers(attend, compiled(attend, dynamic=False), (q, k, v))
