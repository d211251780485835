"""Projections by experts: numbers against float64, both forms, gradients, edges, contracts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from claims import Results, gaps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels import expert_forms as forms
from attn_compiler.kernels.experts import (
    expert_merge,
    expert_merge_backward,
    expert_project,
    expert_project_backward,
    reference_merge,
    reference_project,
    samples,
)

PAIRS = {
    "project": (expert_project, reference_project),
    "merge": (expert_merge, reference_merge),
}
FORMS = ("grouped", "masked")


class Sizes(NamedTuple):
    """B T H E k D c, and whether heads share their experts."""

    batch: int = 2
    length: int = 13
    heads: int = 3
    experts: int = 5
    k: int = 2
    width: int = 11
    inner: int = 7
    shared: bool = False


def drawn(name: str, s: Sizes, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """rows, w, index and gate."""
    draw = torch.Generator().manual_seed(sum(s))
    inner = torch.randn(s.batch, s.length, s.heads, s.inner, generator=draw, dtype=torch.float64)
    wide = torch.randn(s.batch, s.length, s.width, generator=draw, dtype=torch.float64)
    rows, ends = (
        (wide, (s.width, s.inner))
        if name == "project"
        else (inner.transpose(1, 2), (s.inner, s.width))
    )
    number = s.experts * (1 if s.shared else s.heads)
    w = torch.randn(number, *ends, generator=draw, dtype=torch.float64)
    scores = torch.rand(s.batch, s.length, s.heads, s.experts, generator=draw)
    index = scores.topk(s.k, -1).indices.to(torch.int32)
    gate = torch.rand(index.shape, generator=draw, dtype=torch.float64)
    narrow = dtype if dtype is torch.float64 else torch.float32
    return [rows.to(dtype), w.to(dtype), index, gate.to(narrow)]


def choose(monkeypatch: pytest.MonkeyPatch, form: str, chunk: int = 2**22) -> None:
    monkeypatch.setattr(forms, "_sorts", lambda call, wide: form == "grouped")
    monkeypatch.setitem(forms._CHUNK, "cpu", chunk)


def by_hand(name: str, rows: Tensor, w: Tensor, index: Tensor, gate: Tensor, s: Sizes) -> Tensor:
    """One route after the other."""
    out = torch.zeros(
        (s.batch, s.heads, s.length, s.inner)
        if name == "project"
        else (s.batch, s.length, s.width),
        dtype=torch.float64,
    )
    for b in range(s.batch):
        for t in range(s.length):
            for h in range(s.heads):
                for j in range(s.k):
                    expert = int(index[b, t, h, j]) + (0 if s.shared else h * s.experts)
                    if name == "project":
                        out[b, h, t] += gate[b, t, h, j] * (rows[b, t] @ w[expert])
                    else:
                        out[b, t] += gate[b, t, h, j] * (rows[b, h, t] @ w[expert])
    return out


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [False, True])
def test_means_the_sum_over_routes(
    name: str, form: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = Sizes(shared=shared)
    choose(monkeypatch, form, chunk=97)  # several chunks, the last one ragged
    args = drawn(name, s)
    exact = by_hand(name, *args, s)
    # sums that cancel are as good as the largest
    close = {"rtol": 0.0, "atol": 1e-14 * float(exact.abs().max())}
    for function in PAIRS[name]:
        torch.testing.assert_close(function(*args, experts=s.experts), exact, **close)


@pytest.mark.parametrize(
    ("dtype", "experts", "sorted_merge", "sorted_project"),
    [
        (torch.float32, 3, False, False),
        (torch.float32, 4, True, True),
        (torch.bfloat16, 4, False, False),
        (torch.bfloat16, 8, False, True),
        (torch.float16, 17, True, True),
    ],
)
def test_sorts_where_few_are_chosen(
    dtype: torch.dtype, experts: int, sorted_merge: bool, sorted_project: bool
) -> None:
    """Of every dtype as it was measured; elsewhere than on a CPU never, nothing may wait."""
    for device in ("cpu", "meta"):
        for name in PAIRS:
            with torch.device(device):
                index = torch.zeros(7, 1, 2, dtype=torch.int32)
                a, w = torch.empty(7, 5, dtype=dtype), torch.empty(experts, 5, 5, dtype=dtype)
                call = forms.Routed(a, w, index, index.float(), experts, name == "merge")
            here = device == "cpu"
            assert forms._sorts(call, True) == (sorted_merge and here)
            assert forms._sorts(call, False) == (sorted_project and here)
            one = replace(call, index=index[:1], gate=index[:1].float())
            assert forms._sorts(one, True) == here  # one token leaves some experts out


SHAPES = {
    "ragged": Sizes(),
    "shared experts": Sizes(heads=2, experts=7, k=3, shared=True),
    "one head": Sizes(heads=1, experts=3, k=2),
    "all experts": Sizes(experts=3, k=3),
    "one expert": Sizes(experts=1, k=1),
    "more experts than routes": Sizes(1, 2, 2, 17, 1),
    "one token": Sizes(1, 1, 3, 5, 2),
    "wide heads": Sizes(width=5, inner=19),
    "no tokens": Sizes(2, 0),
    "no batch": Sizes(0, 3),
    "more experts than a byte counts": Sizes(1, 29, 3, 101, 2),
}


def run(function: Callable[..., Tensor], args: list[Tensor], experts: int) -> Results:
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in args]
    out = function(*leaves, experts=experts)
    weights = torch.linspace(-1, 1, max(out.numel(), 1), dtype=torch.float64)[: out.numel()]
    (out.double() * weights.view(out.shape)).sum().backward()
    found = {str(i): x.grad for i, x in enumerate(leaves) if x.grad is not None}
    return Results([out.detach()], found)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_and_gradients(
    name: str, form: str, dtype: torch.dtype, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, form, chunk=97)
    s = SHAPES[shape]
    operator, reference = PAIRS[name]
    args = drawn(name, s, dtype)
    ours, theirs = run(operator, args, s.experts), run(reference, args, s.experts)
    exact = run(reference, [x.double() if x.is_floating_point() else x for x in args], s.experts)
    assert ours.gradients.keys() == {"0", "1", "3"}
    bad = [g for g in gaps(ours, theirs, exact) if not g.ok]
    assert not bad, "\n".join(map(str, bad))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("form", FORMS)
def test_empty_experts_and_crowded_ones(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, form)
    s = Sizes(k=1)
    rows, w, index, gate = drawn(name, s)
    index = torch.full_like(index, 3)
    ours = run(PAIRS[name][0], [rows, w, index, gate], s.experts)
    exact = run(PAIRS[name][1], [rows, w, index, gate], s.experts)
    for a, b in zip(
        [*ours.outputs, *ours.gradients.values()],
        [*exact.outputs, *exact.gradients.values()],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    unused = [e for e in range(s.heads * s.experts) if e % s.experts != 3]
    assert not ours.gradients["1"][unused].any()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, form)
    s = Sizes(2, 3, 2, 3, 2, 5, 3)
    rows, w, index, gate = drawn(name, s)
    leaves = [x.requires_grad_() for x in (rows, w, gate)]

    def function(rows: Tensor, w: Tensor, gate: Tensor) -> Tensor:
        out: Tensor = PAIRS[name][0](rows, w, index, gate, experts=s.experts)
        return out

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (3,), (0, 3), (1, 3), (0, 1)])
@pytest.mark.parametrize("form", FORMS)
def test_only_the_gradients_that_are_needed(
    name: str, wanted: tuple[int, ...], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, form)
    s = Sizes()
    args = drawn(name, s)
    full = run(PAIRS[name][1], args, s.experts)
    leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(args[:2])]
    gate = args[3].clone().requires_grad_(3 in wanted)
    out = PAIRS[name][0](*leaves, args[2], gate, experts=s.experts)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    (out * weights).sum().backward()
    for i, leaf in zip((0, 1, 3), (*leaves, gate), strict=True):
        assert (leaf.grad is not None) == (i in wanted)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, full.gradients[str(i)], rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_routes_any_form(data: Any) -> None:
    """Also an expert that a token takes twice."""
    s = Sizes(*(data.draw(st.integers(1, 6)) for _ in range(7)), data.draw(st.booleans()))
    name = data.draw(st.sampled_from(sorted(PAIRS)))
    rows, w, _, gate = drawn(name, s._replace(k=min(s.k, s.experts)))
    flat = data.draw(
        st.lists(st.integers(0, s.experts - 1), min_size=gate.numel(), max_size=gate.numel())
    )
    index = torch.tensor(flat, dtype=torch.int64).view(gate.shape)
    merge = name == "merge"
    a = (rows.transpose(1, 2) if merge else rows).reshape(-1, rows.shape[-1])
    call = forms.Routed(a, w, index.flatten(0, 1), gate.flatten(0, 1), s.experts, merge)
    exact = PAIRS[name][1](rows, w, index, gate, experts=s.experts)
    exact = (exact if merge else exact.transpose(1, 2)).reshape(call.rows, -1)
    for found in (forms._grouped(call), forms._masked(call)):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- contract


def test_opcheck() -> None:
    for operator, args, kwargs in samples():
        torch.library.opcheck(operator, args, kwargs)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("form", FORMS)
def test_layout_is_that_of_the_fake(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, form)
    s = Sizes()
    args = drawn(name, s, torch.float32)
    backward = expert_project_backward if name == "project" else expert_merge_backward
    out = PAIRS[name][0](*args, experts=s.experts)
    grads = backward(out, *args, out, [True, True, False, True], experts=s.experts)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in args]
        fake_out = PAIRS[name][0](*fakes, experts=s.experts)
        needs = [True, True, False, True]
        fake_grads = backward(fake_out, *fakes, fake_out, needs, experts=s.experts)
    for real, fake in zip((out, *grads), (fake_out, *fake_grads), strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
    if name == "project":
        assert out.transpose(1, 2).is_contiguous()


class Largest(TorchDispatchMode):
    """The most elements that any operation gave out."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("form", FORMS)
def test_no_scratch_of_routes_times_width(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, form, chunk=2**14)
    s = Sizes(1, 509, 4, 8, 4, width=64, inner=8)
    args = drawn(name, s, torch.float32)
    rows, w, index, gate = args
    merge = name == "merge"
    a = (rows.transpose(1, 2) if merge else rows).reshape(-1, rows.shape[-1])
    call = forms.Routed(a, w, index.flatten(0, 1), gate.flatten(0, 1), s.experts, merge)
    with Largest() as seen:
        out = forms.forward(call)
        forms.backward(call, out, (True, True, True))
    routes = s.length * s.heads * s.k
    # the rows of a result, or of one expert
    assert seen.elements <= max(s.length * s.width, routes * s.inner) < routes * s.width // 4


BAD: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "gates of another shape": lambda a: [*a[:3], a[3][..., :1]],
    "weights of other features": lambda a: [a[0], a[1][:, 1:], *a[2:]],
    "an expert too many": lambda a: [a[0], torch.cat([a[1], a[1][:1]]), *a[2:]],
    "rows of another length": lambda a: [a[0][..., 1:, :], *a[1:]],
    "floating routes": lambda a: [*a[:2], a[2].float(), a[3]],
    "weights of another dtype": lambda a: [a[0], a[1].float(), *a[2:]],
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("case", BAD)
def test_refuses_what_does_not_belong_together(name: str, case: str) -> None:
    args = BAD[case](drawn(name, Sizes()))
    for function in PAIRS[name]:
        with pytest.raises(UnsupportedCall, match="cannot read its arguments"):
            function(*args, experts=5)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("wrong", [-1, 5])
def test_refuses_an_expert_that_is_not_there(name: str, wrong: int) -> None:
    rows, w, index, gate = drawn(name, Sizes())
    index[1, 3, 0, 1] = wrong
    with pytest.raises(UnsupportedCall, match="leads to no expert"):
        PAIRS[name][0](rows, w, index, gate, experts=5)


@pytest.mark.parametrize("name", PAIRS)
def test_transforms_and_vmap(name: str) -> None:
    s = Sizes(2, 3, 2, 3, 2, 3, 2)
    rows, w, index, gate = drawn(name, s)
    operator, reference = PAIRS[name]

    def loss(function: Callable[..., Tensor], w: Tensor) -> Tensor:
        return function(rows, w, index, gate, experts=s.experts).square().sum()

    ours = torch.func.hessian(lambda w: loss(operator, w * w))(w[:, :1, :1].expand_as(w) * 0.1)
    exact = torch.func.hessian(lambda w: loss(reference, w * w))(w[:, :1, :1].expand_as(w) * 0.1)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
    several = torch.stack([w, 2 * w, -w])
    found = torch.vmap(lambda w: operator(rows, w, index, gate, experts=s.experts))(several)
    once = operator(rows, w, index, gate, experts=s.experts)
    torch.testing.assert_close(found, torch.stack([once, 2 * once, -once]), rtol=1e-13, atol=0)
    with pytest.raises(UnsupportedCall, match="first derivatives only"):
        leaf = w.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(operator, leaf), leaf, create_graph=True)
        first.sum().backward()


@pytest.mark.parametrize("name", PAIRS)
def test_bf16_under_autocast_stays_as_given(name: str) -> None:
    s = Sizes()
    args = drawn(name, s, torch.float32)
    plain = PAIRS[name][0](*args, experts=s.experts)
    with torch.autocast("cpu", torch.bfloat16):
        inside = PAIRS[name][0](*args, experts=s.experts)
    assert torch.equal(plain, inside)
