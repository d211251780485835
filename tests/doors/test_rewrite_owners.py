"""Who owns an attention, and whether it computes the same."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import claims
import torch
from doors.cached import Counted
from torch import Tensor, nn

import attn_compiler as ac

WIDTH, HEADS = 12, 3


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class Apart(nn.Module):
    """Nothing of the attention stands in the forward itself."""

    def __init__(self) -> None:
        super().__init__()
        self.sides = nn.Linear(WIDTH, 3 * WIDTH)
        self.dots, self.softmax, self.mix = Product(), nn.Softmax(dim=-1), Product()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.sides(x).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, 1)
        return self.mix(self.softmax(self.dots(q, k.mT)), v).transpose(1, 2).flatten(2)


def _operators(model: nn.Module, *args: Any) -> int:
    with torch.no_grad(), Counted() as counted:
        model(*args)
    return counted.found["attention"]


def test_softmax_and_products_may_be_modules() -> None:
    x = torch.randn(2, 7, WIDTH)
    model = nn.Sequential(Apart(), Apart()).eval()
    new = ac.rewrite(model, (x,), to=ac.Flash())
    report = ac.last_report()
    assert report.rewritten == len(report.sites) == _operators(new, x) == 2, str(report)
    torch.testing.assert_close(new(x), model(x))


class Differences(Apart):
    """What nearly all keys have in common is taken off."""

    def forward(self, x: Tensor) -> Tensor:
        attended = super().forward(x * 1e-3)
        return 1e3 * (attended - attended.mean(1, keepdim=True))


def test_what_cancels_out_is_verified_in_float64_too() -> None:
    for dtype in (torch.float32, torch.float64):
        model, x = Differences().eval().to(dtype), torch.randn(2, 7, WIDTH, dtype=dtype)
        new = ac.rewrite(model, (x,), to=ac.Flash())
        assert _operators(new, x) == 1, str(ac.last_report())


def defaults(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An argument that is not given is the module's."""

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        kwargs["causal"] = kwargs.get("causal", self.causal)
        return forward(self, *args, **kwargs)

    return wrapper


class Wrapped(Apart):
    """What the wrapper sees is how the caller has called."""

    causal = True

    @defaults
    def forward(self, x: Tensor, padding: Tensor | None = None, causal: bool = False) -> Tensor:
        q, k, v = self.sides(x).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, 1)
        scores, ones = q @ k.mT, torch.ones(2 * x.shape[1:2], dtype=torch.bool)
        if causal:
            scores = scores.masked_fill(ones.triu(1), -1e9)
        if padding is not None:
            scores = scores.masked_fill(~padding[:, None, None], -1e9)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_a_wrapper_around_a_forward_sees_how_it_is_called() -> None:
    model, x = Wrapped().eval(), torch.randn(2, 7, WIDTH)
    padding = torch.ones(2, 7, dtype=torch.bool)
    new = ac.rewrite(model, (x,), {"padding": padding})
    (site,) = ac.last_report().sites
    assert site.decision.accepted and site.mask == "causal & padding(padding)"
    for kwargs in ({}, {"padding": padding}, {"causal": False}):
        claims.same_numbers(model, new, (x,), kwargs)
        assert _operators(functools.partial(new, **kwargs), x) == 1
