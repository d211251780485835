"""attn_compiler::gau_attention: its kernel against the reference, derivatives, contract."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from gau_cases import TENSORS, Case, mixed, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels import gau_cpu
from attn_compiler.kernels.gau import gau_attention, gau_attention_backward, reference, samples
from attn_compiler.kernels.gau_schema import GauInputs

MODES = ("rowcount", "valid", "chunk", "seqlen", "fixed(5)")


def cases() -> st.SearchStrategy[Case]:
    flag = st.booleans()
    return st.builds(
        Case,
        batch=st.sampled_from((1, 3)),
        length=st.sampled_from((1, 3, 4, 5, 15, 23)),
        chunk=st.sampled_from((None, 1, 4, 7, 50)),
        causal=flag,
        scale_mode=st.sampled_from(MODES),
        inside=flag,
        dropout=st.sampled_from((0.0, 0.3, 1.0)),
        gated=flag,
        biased=flag,
        padded=flag,
        packed=flag,
    ).filter(lambda case: case.chunk is not None or case.scale_mode != "chunk")


@settings(max_examples=150)
@given(cases())
def test_the_kernel_computes_the_reference(case: Case) -> None:
    given = case.drawn()
    found, exact = (with_gradients(case, given, f) for f in (gau_attention, reference))
    for a, b in zip(found, exact, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_squares_of_long_sequences_add_up(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(length=29, chunk=None, causal=causal, padded=True, packed=True, dropout=0.2)
    exact = with_gradients(case, case.drawn(), reference)
    monkeypatch.setattr(gau_cpu, "_ROWS", 4)
    monkeypatch.setattr(gau_cpu, "_KEYS", 7)
    for a, b in zip(with_gradients(case, case.drawn()), exact, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


KINDS = [
    Case(),
    Case(chunk=None),
    Case(causal=False, padded=True),
    Case(chunk=None, causal=False, inside=True, scale_mode="seqlen"),
    Case(causal=False, packed=True, padded=True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", KINDS)
def test_narrow_numbers_are_as_good_as_the_reference(case: Case, dtype: torch.dtype) -> None:
    case = case.but(length=61, s=13, e=17, chunk=case.chunk and 11)
    given = case.drawn(dtype)
    wide = {
        n: x.double() if x is not None and x.is_floating_point() else x for n, x in given.items()
    }
    exact = with_gradients(case, wide, reference)
    ours, plain = (with_gradients(case, given, f) for f in (gau_attention, reference))
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.dtype == dtype
        error, allowed = (a.double() - c).norm(), (b.double() - c).norm()
        # sums in another order: half an ulp of the result more, and twice the reference's error
        assert error <= 2 * allowed + torch.finfo(dtype).eps / 2 * c.norm()


def test_half_precision_does_not_underflow() -> None:
    """(S / T)^2 of scores around 0.05 is 0 in half precision at this length; ours is not."""
    length = 4096
    case = Case(
        batch=1, length=length, s=8, e=3, chunk=None, scale=1 / 8, scale_mode="seqlen",
        inside=True, gated=False, biased=False,
    )  # fmt: skip
    given = case.drawn()
    given |= {n: given[n] * 0.1 for n in ("q", "k")}
    given["v"] = given["v"].abs() * 1e4
    half = {n: None if x is None else x.half() for n, x in given.items()}
    scores = (half["q"] @ half["k"].mT).float() / 8
    assert ((scores / length).half().square() == 0).all()
    exact = mixed(case, {n: None if x is None else x.double() for n, x in half.items()})
    assert (exact > 0).double().mean() > 0.9
    found = mixed(case.but(), half).double()
    # what is left is the rounding of the result
    assert ((found - exact).abs() <= 2.0**-11 * exact + 2.0**-24).all()


# ---------------------------------------------------------------- derivatives


@pytest.mark.parametrize("case", [*KINDS, Case(dropout=0.3)])
def test_gradcheck(case: Case) -> None:
    case = case.but(length=7, s=3, e=2, chunk=case.chunk and 3)
    given = case.drawn()
    names = [n for n, x in given.items() if x is not None and x.is_floating_point()]
    leaves = [given[n].requires_grad_() for n in names]

    def function(*tensors: Tensor) -> Tensor:
        return mixed(case, given | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, leaves)


def test_other_derivatives_take_the_reference() -> None:
    case = Case(length=5, chunk=2)
    given = case.drawn()

    def function(q: Tensor) -> Tensor:
        return mixed(case, given | {"q": q}).square().sum()

    def plain(q: Tensor) -> Tensor:
        return mixed(case, given | {"q": q}, reference).square().sum()

    hessians = torch.func.hessian(function)(given["q"]), torch.func.hessian(plain)(given["q"])
    assert torch.allclose(*hessians, rtol=1e-12, atol=1e-12)
    assert hessians[0].abs().max() > 0
    stacked = torch.stack((given["q"], -given["q"]))
    rows = torch.vmap(function)(stacked)
    assert torch.allclose(rows, torch.stack([plain(q) for q in stacked]), rtol=1e-12)


def test_the_gate_alone_multiplies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    given = case.drawn()
    given["gate"].requires_grad_()
    out = mixed(case, given)
    monkeypatch.setattr(gau_cpu, "_gradients", None)
    grad = torch.autograd.grad(out.sum(), given["gate"])[0]
    plain = mixed(case.but(gated=False), given | {"gate": None})
    assert torch.allclose(grad, plain, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- linear in the length


class _Counted(TorchDispatchMode):
    """Operations of all products, and elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm_):
            left, right = args[-2:]
            self.flops += 2 * left.numel() * right.shape[2]
        else:
            assert func.overloadpacket not in (torch.ops.aten.mm, torch.ops.aten.addmm)
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return result


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_operations_and_memory_are_linear_in_chunks(causal: bool, packed: bool) -> None:
    chunk, s, e, flops = 16, 5, 17, []
    for tokens in (8 * chunk, 16 * chunk):
        case = Case(1, tokens, s, e, chunk, causal, padded=True, packed=packed)
        given = GauInputs.of(*case.drawn(torch.float32).values(), **case.options)
        with _Counted() as counted:
            _, kept = gau_cpu.forward(given)
            gau_cpu.backward(given, torch.ones_like(kept), kept, [True] * 7)
        assert counted.largest == tokens * e
        flops.append(counted.flops)
    assert flops[1] == 2 * flops[0]


@pytest.mark.parametrize("causal", [True, False])
def test_operations_of_both_passes(causal: bool) -> None:
    tokens, chunk, s, e = 2 * 64, 16, 5, 11
    case = Case(2, 64, s, e, chunk, causal)
    given = GauInputs.of(*case.drawn(torch.float32).values(), **case.options)
    with _Counted() as forward:
        _, kept = gau_cpu.forward(given)
    assert forward.flops == 2 * tokens * chunk * (s + e) + 4 * tokens * s * e
    with _Counted() as backward:
        gau_cpu.backward(given, torch.ones_like(kept), kept, [True] * 7)
    assert backward.flops == 2 * tokens * chunk * (3 * s + 2 * e) + 10 * tokens * s * e


# ---------------------------------------------------------------- contract


@pytest.mark.parametrize("index", range(16))
def test_opcheck(index: int) -> None:
    found = list(samples())
    assert len(found) == 16
    torch.library.opcheck(*found[index])


def test_results_look_as_promised() -> None:
    for case, dtype in itertools.product(KINDS, (torch.float32, torch.bfloat16)):
        case = case.but(gated=case.causal)
        given = case.drawn(dtype)
        args = [given[n] for n in TENSORS]
        needs = [x.is_floating_point() for x in args if x is not None]
        real = gau_attention(*args, **case.options)
        real = (*real, *gau_attention_backward(real[0], *args, *real, needs, **case.options))
        with FakeTensorMode() as mode:
            fakes = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, args)
            promised = gau_attention(*fakes, **case.options)
            grads = gau_attention_backward(promised[0], *fakes, *promised, needs, **case.options)
        for a, b in zip(real, (*promised, *grads), strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_gradients_lie_as_promised_whatever_the_order_of_the_incoming_one() -> None:
    given = Case().drawn()
    args, needs = [given[n] for n in TENSORS], [True] * 7
    found = gau_attention(*args, **Case().options)
    grad = found[0].transpose(0, 1).contiguous().transpose(0, 1)
    grads = gau_attention_backward(grad, *args, *found, needs, **Case().options)
    assert all(x.is_contiguous() for x in grads)


@pytest.mark.parametrize("sizes", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_nothing_in_nothing_out(sizes: tuple[int, int, int]) -> None:
    batch, length, e = sizes
    case = Case(batch=batch, length=length, e=e, packed=True)
    found = with_gradients(case, case.drawn())
    assert found[0].shape == sizes and not any(x.any() for x in found)


def test_compiled_by_inductor() -> None:
    case = Case(padded=True)
    given = case.drawn(torch.float32)
    compiled = torch.compile(lambda given: mixed(case, given), fullgraph=True)
    assert torch.equal(compiled(given), mixed(case, given))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"q": torch.zeros(2, 5)}, {}, "three dimensions"),
        ({"k": torch.zeros(2, 22, 5)}, {}, "one shape"),
        ({"q_lin": torch.zeros(2, 23, 4)}, {}, "shape of q"),
        ({"q_lin": None}, {}, "exactly with a chunk"),
        ({}, {"chunk": None}, "exactly with a chunk"),
        ({}, {"chunk": 0}, "exactly with a chunk"),
        ({"gate": torch.zeros(2, 23, 5)}, {}, "the gate"),
        ({"bias": torch.zeros(5)}, {}, "R at least 4"),
        ({"bias": torch.zeros(8)}, {}, "R at least 4"),
        ({"valid": torch.ones(2, 23)}, {}, "True where"),
        ({"documents": torch.zeros(23)}, {}, "one entry"),
        ({}, {"dropout": 0.5}, "seed"),
        ({}, {"scale_mode": "fixed(0)"}, "no scale mode"),
        ({"q_lin": None, "k_lin": None}, {"chunk": None, "scale_mode": "chunk"}, "without chunks"),
    ],
)
def test_refusals(changes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    case = Case()
    given = case.drawn(torch.float32) | changes
    with pytest.raises(UnsupportedCall, match=message):
        gau_attention(*(given[n] for n in TENSORS), **(case.options | options))
