"""attn_compiler::selective_need: how many tokens the neediest row needs, without building F."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import draw, text
from selective_cases import CASES, CAUSAL, B, qkv
from torch import Tensor

from attn_compiler.cache.budgets import needed
from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels import selective_need as module
from attn_compiler.kernels.selective import masking, selection_of
from attn_compiler.kernels.selective_need import reference, selective_need

NAMES = [
    "causal",
    "another head",
    "left padding",
    "documents",
    "window",
    "alibi selects",
    "selector",
]


def arguments(name: str, length: int, width: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    case = CASES[name]
    extra = case.options(length)
    q, k, _ = qkv(torch.float64, length, width)
    selector = [x.double() for x in extra.get("selector", [])]
    reads = [x.double() if x.is_floating_point() else x for x in case.reads(length)]
    options = {"head": extra.get("head", 0), "select_from": extra.get("select_from", "qk")}
    options |= {"program": case.program, "scale": 0.3, "tau": 1.0}
    return (q, k, reads, list(case.ints), selector), options


@pytest.mark.parametrize("tau", [0.5, 3.0])
@pytest.mark.parametrize("budget", [2**20, 2**8])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_reference(
    name: str, budget: int, tau: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUDGET", budget)
    found = []
    for fn in (selective_need, reference):
        (q, k, reads, ints, selector), options = arguments(name, 37, 8)
        leaves = [x.requires_grad_() for x in (q, k, *selector)]
        results = fn(q, k, reads, ints, selector, **options | {"tau": tau})
        weight = torch.tensor([1.0, -0.5]).double()
        grads = torch.autograd.grad(results[0], leaves, weight, materialize_grads=True)
        found.append([*(x.detach() for x in results), *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_it_is_what_f_says() -> None:
    (q, k, *rest), options = arguments("causal", 37, 8)
    need, row, amount = selective_need(q, k, *rest, **options)
    del options["tau"]
    selection = selection_of(q, k, k, [], [], None, [], None, None, dropout=0.0, **options)
    whole = masking(selection)[0]
    expected = needed(whole)
    torch.testing.assert_close(need, expected.amax(1), rtol=0, atol=1e-12)
    assert torch.equal(row, expected.argmax(1))
    torch.testing.assert_close(amount, whole[torch.arange(B), row], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["causal", "alibi selects", "selector"])
def test_gradcheck(name: str) -> None:
    (q, k, reads, ints, selector), options = arguments(name, 7, 2)
    floating = [x for x in reads if x.is_floating_point()]
    leaves = [x.detach().requires_grad_() for x in (q, k, *selector, *floating)]

    def fn(q: Tensor, k: Tensor, *rest: Tensor) -> Tensor:
        own, read = list(rest[: len(selector)]), list(rest[len(selector) :])
        return selective_need(q, k, read, ints, own, **options)[0]

    assert torch.autograd.gradcheck(fn, leaves)


def test_opcheck() -> None:
    (q, k, reads, ints, selector), options = arguments("selector", 7, 2)
    leaves = [x.detach().requires_grad_() for x in (q, k, *selector)]
    args = (*leaves[:2], reads, ints, leaves[2:])
    torch.library.opcheck(selective_need, args, options)
    plain = (q.detach(), k.detach(), reads, ints, selector)
    results = selective_need(*plain, **options)
    backward = (torch.ones(B).double(), *plain, *results, [True, True])
    torch.library.opcheck(module.selective_need_backward, backward, options)


def test_a_tau_of_nothing_is_refused() -> None:
    q = draw(1, 1, 3, 4)
    with pytest.raises(UnsupportedCall, match="tau is 0"):
        selective_need(
            q,
            q,
            [],
            [],
            [],
            program=text(mask=CAUSAL),
            scale=1.0,
            head=0,
            select_from="qk",
            tau=0.0,
        )
