"""Masks whose text would grow with every step of the program that makes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import attn_compiler as ac
from attn_compiler.ir.expr import DOT, Call, Const, call, parse, weight

SIDE, WINDOW, SHIFT, HEADS, D = 12, 4, 2, 2, 5


def regions() -> Tensor:
    """Numbers of the nine regions of a shifted map, in windows: [windows, tokens]."""
    drawn, number = torch.zeros(SIDE, SIDE), 0
    parts = (slice(0, -WINDOW), slice(-WINDOW, -SHIFT), slice(-SHIFT, None))
    for rows in parts:
        for columns in parts:
            drawn[rows, columns] = number
            number += 1
    cut = drawn.view(SIDE // WINDOW, WINDOW, SIDE // WINDOW, WINDOW).transpose(1, 2)
    return cut.reshape(-1, WINDOW**2)


def by_regions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = regions()
    apart = found[:, None, :] - found[:, :, None]
    mask = apart.masked_fill(apart != 0, -100.0).masked_fill(apart == 0, 0.0)
    return (q @ k.mT + mask[:, None]).softmax(-1) @ v


def by_doubling(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each step uses the last twice: 2^20 nodes as a text."""
    index = torch.arange(WINDOW**2)
    apart = (index[:, None] - index).float()
    for step in range(20):
        apart = torch.where(apart > step, apart - 1.5, apart * 0.5)
    return (q @ k.mT + apart).softmax(-1) @ v


@pytest.mark.parametrize("attend", [by_regions, by_doubling])
def test_a_mask_of_many_steps_stays_short(attend: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    args = [torch.randn((SIDE // WINDOW) ** 2, HEADS, WINDOW**2, D) for _ in range(3)]
    options = {"then": "eager"}
    found = torch.compile(attend, backend="attn_compiler", options=options)(*args)
    (site,) = ac.last_report().sites
    assert site.decision.accepted
    assert len(f"{site.score} {site.mask}") < 20_000
    exact = attend(*(x.double() for x in args))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_rectangle_keeps_the_old_value_once() -> None:
    old = parse("where(q < 3, 1.0, 2.0)")
    written = call("where", parse("q >= 5"), call("where", parse("k >= 7"), Const(3.0), old), old)
    assert written == parse("where((q >= 5) & (k >= 7), 3.0, where(q < 3, 1.0, 2.0))")
    assert call("where", parse("q >= 5"), old, old) is old
    # the values differ where only one of both conditions holds
    apart = call("where", parse("q >= 5"), call("where", parse("k >= 7"), Const(3.0), DOT), old)
    assert str(apart).count("where") == 3


def test_weight_counts_what_is_shared_as_often_as_it_is_used() -> None:
    tree = parse("q + 1")
    for _ in range(40):
        tree = Call("mul", (tree, tree))
    assert weight(tree, {}) == 2**40 * 3 + 2**40 - 1
