"""The search for budgets, and the loss that makes caches smaller."""

from __future__ import annotations

import pytest
import torch

from attn_compiler.cache.budgets import memory_loss, needed, search_budgets
from attn_compiler.errors import BadOption

F = torch.tensor(
    [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 3, 0, 0, 0], [0, 3, 2, 0, 0]]
).double()[None]


def test_tokens_that_rows_need() -> None:
    assert needed(F).tolist() == [[1, 2, 3, 3, 3]]
    assert needed(F / 4).tolist() == [[1, 2, 3, 3.25, 3.75]]
    assert needed(F / 4, tau=2.0).tolist() == [[1, 2, 3, 3.625, 4.375]]
    valid = torch.tensor([[False, True, True, True, True]])
    assert needed(F, valid).tolist() == [[0, 1, 2, 2, 2]]


def test_memory_loss_is_the_largest_need_by_tokens() -> None:
    few, all_of_them = needed(F).amax(1), needed(torch.zeros_like(F)).amax(1)
    assert float(memory_loss([few], 5)) == pytest.approx(3 / 5)
    # a layer that masks nobody needs all; one sample is not another
    assert float(memory_loss([few, all_of_them], 5)) == pytest.approx((3 / 5 + 1) / 2)
    assert float(memory_loss([torch.cat([few, all_of_them])], 5)) == pytest.approx((3 / 5 + 1) / 2)
    tokens = torch.tensor([4, 5])
    share = memory_loss([torch.tensor([2.0, 5.0])], tokens)
    assert float(share) == pytest.approx((2 / 4 + 5 / 5) / 2)


def test_memory_loss_asks_for_more_masking_where_there_is_room() -> None:
    amount = torch.rand(2, 7, 7, dtype=torch.float64).tril().requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return memory_loss([needed(x).amax(1), needed(2 * x).amax(1)], 7)

    assert torch.autograd.gradcheck(loss, [amount])
    (grad,) = torch.autograd.grad(memory_loss([needed(amount).amax(1)], 7), amount)
    rows = needed(amount).argmax(1)
    assert (grad <= 0).all() and (grad[torch.arange(2), rows] < 0).any()
    grad[torch.arange(2), rows] = 0
    assert not grad.any()


def test_the_search_lowers_what_costs_least() -> None:
    """A loss that is a sum over layers, each cheap down to what the layer needs."""
    needs, calls, seen = (3, 20, 64), [], []

    def loss(budgets: tuple[int, ...]) -> float:
        calls.append(budgets)
        return 1 + sum(max(0, n - k) / 100 for n, k in zip(needs, budgets, strict=True))

    found = search_budgets(
        loss, 3, 64, 1.0, step=4, progress=lambda budgets, value: seen.append((budgets, value))
    )
    assert found.budgets == (4, 20, 64) and found.loss == 1.0
    assert found.path == (((64, 64, 64), 1.0), *seen)
    assert len(found.path) == 1 + 15 + 11 and len(calls) <= 1 + 27 * 3
    # a little more loss: the smallest increase first, never below the least
    found = search_budgets(loss, 3, 64, 1.03, step=4, least=3)
    assert found.budgets == (3, 20, 64) or sum(found.budgets) < 4 + 20 + 64
    assert found.loss <= 1.03


def test_the_search_stops_at_the_least() -> None:
    found = search_budgets(lambda budgets: 0.0, 2, 33, 0.0, least=2)
    assert found.budgets == (2, 2)


def test_refusals() -> None:
    with pytest.raises(BadOption, match="above its target"):
        search_budgets(lambda budgets: 2.0, 2, 8, 1.0)
    for options in ({"step": 0}, {"least": 1}, {"least": 9}):
        with pytest.raises(BadOption, match="cannot search"):
            search_budgets(lambda budgets: 0.0, 2, 8, 1.0, **options)  # type: ignore[arg-type]
