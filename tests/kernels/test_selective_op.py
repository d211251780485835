"""attn_compiler::selective_attention: the worked case, invariants, kernels and their reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import draw, text
from selective_cases import (
    CASES,
    CAUSAL,
    DV,
    B,
    Case,
    D,
    E,
    G,
    H,
    T,
    call,
    eager,
    judged,
    leaves,
    left_padding,
    qkv,
    with_gradients,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels import rows, selective, selective_paths
from attn_compiler.kernels.library import attention
from attn_compiler.kernels.selecting import lower as selecting_rows
from attn_compiler.kernels.selecting import selecting, subtracting, unbiased
from attn_compiler.kernels.selective import reference, selection_of, selective_attention

# ---------------------------------------------------------------- kernels against the reference


@pytest.fixture(params=["as it is", "small blocks", "F as a tensor", "F by bands"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Blocks of 16 rows for a few batch items, or no blocks at all."""
    if request.param == "small blocks":
        monkeypatch.setattr(rows, "_CPU_BUDGET", 2**8)
        monkeypatch.setattr(selective_paths.flash, "_BIAS_BUDGET", 2**8)
    if request.param == "F by bands":  # of 16 rows
        monkeypatch.setattr(selective_paths.subtracting, "_USUAL", 16)
    if request.param.startswith("F "):
        monkeypatch.setattr(selective_paths, "_blocked", lambda *_: None)
        monkeypatch.setattr(selective_paths, "_BUDGET", 2**8)
    return str(request.param)


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_reference(name: str, way: str) -> None:
    case = CASES[name]
    ours = with_gradients(case, selective_attention, torch.float64)
    exact = with_gradients(case, reference, torch.float64)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["causal", "documents", "alibi selects", "softcap, gate, selector"]
)
def test_numbers_in_other_types(name: str, dtype: torch.dtype, way: str) -> None:
    """F is float32 in each of them: what bfloat16 loses is what it loses without F."""
    case = CASES[name]
    ours = with_gradients(case, selective_attention, dtype)
    plain = with_gradients(case, eager, dtype)
    exact = with_gradients(case, reference, dtype, wide=True)
    judged(case, ours, plain, exact)


@pytest.mark.parametrize(
    "name", ["causal", "documents", "alibi selects", "softcap", "gate", "selector", "dropout"]
)
def test_gradcheck_through_f(name: str) -> None:
    given, run = leaves(CASES[name], torch.float64, 5, 2)
    assert torch.autograd.gradcheck(lambda *x: run(selective_attention, list(x))[0], given)
    # F is there, and something flows through it: without it another gradient
    (dk,) = torch.autograd.grad(run(selective_attention, given)[0].square().sum(), given[1:2])
    out, _ = attention(
        *given[:3], list(CASES[name].reads(5)), list(CASES[name].ints), None,
        program=CASES[name].program, scale=0.3, dropout=0.0,
    )  # fmt: skip
    (plain,) = torch.autograd.grad(out.square().sum(), given[1:2])
    assert not torch.allclose(dk, plain)


def test_a_carry_has_a_gradient() -> None:
    carry = torch.tensor([[-1.0, 0.5, 0.25], [-1.0, 2.0, 0.125]], dtype=torch.float64)
    q, k, v = (x[:, :, 3:] if i == 0 else x for i, x in enumerate(qkv(length=7)))
    case = Case(text(mask="(k <= q + (S - T))"))

    def run(fn: Any, carry: Tensor) -> Tensor:
        return call(case, fn, [q, k, v], {"carry": carry}, [])[0]

    found = []
    for fn in (selective_attention, reference):
        leaf = carry.clone().requires_grad_()
        found.append(torch.autograd.grad(run(fn, leaf).square().sum(), leaf)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
    assert not found[0][:, 0].any() and found[0][:, 1:].all()


def test_tiles_that_a_map_leaves_out() -> None:
    """Where ordinary attention gathers tiles, F is not there to be gathered."""
    length = 320
    near = torch.eye(length // 32, dtype=torch.bool).logical_or(torch.arange(length // 32) == 0)
    case = Case(text(mask=f"{CAUSAL} & t0[q // 32, k // 32]"))
    given = qkv(torch.float64, length)
    ours = call(case, selective_attention, given, {}, [near])
    exact = call(case, reference, given, {}, [near])
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


# ---------------------------------------------------------------- the worked case and invariants


def logits_as_keys(z: Tensor) -> list[Tensor]:
    """q, k of one head whose products are the logits z [T, T], and values that are one-hot."""
    return [torch.eye(len(z)).double()[None, None], z.T[None, None], torch.eye(len(z)).double()[None, None]]  # noqa: E501  # fmt: skip


def test_worked_case() -> None:
    z = torch.zeros(5, 5, dtype=torch.float64)
    rows_of_z = [[1], [2, 1], [1, 3, 0.5], [0.5, -1, 2, 1], [1.5, 1, 0.25, 0.5, 2]]
    for i, row in enumerate(rows_of_z):
        z[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    q, k, v = logits_as_keys(z)
    options = {"program": text(mask=CAUSAL), "scale": 1.0, "dropout": 0.0}
    options |= {"head": 0, "select_from": "qk"}
    args = (q, k, v, [], [], None, [], None, None)
    amount, state = selective.masking(selection_of(*args, **options))
    expected = [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 3, 0, 0, 0], [0, 3, 2, 0, 0]]
    assert amount[0].tolist() == expected
    assert state[0].tolist() == [-1, 4, 2.25, 0.5, 0]
    for fn in (selective_attention, reference):
        p, _, after = fn(*args, **options)
        assert after[0].tolist() == [-1, 4, 2.25, 0.5, 0]
        row3 = torch.tensor([0.140026, 0.001556, 0.627554, 0.230864], dtype=torch.float64)
        row4 = torch.tensor([0.324089, 0.009787, 0.012566, 0.119226, 0.534332]).double()
        torch.testing.assert_close(p[0, 0, 3, :4], row3, rtol=0, atol=5e-7)
        torch.testing.assert_close(p[0, 0, 4], row4, rtol=0, atol=5e-7)
        plain = attention(q, k, v, [], [], None, program=text(mask=CAUSAL), scale=1.0, dropout=0.0)
        torch.testing.assert_close(p[0, 0, :3], plain[0][0, 0, :3], rtol=0, atol=1e-15)


def selected(case: Case, given: list[Tensor], **extra: Any) -> list[Tensor]:
    found = call(case, selective_attention, given, case.options(T) | extra, case.reads(T))
    return list(found)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_three_tokens_are_never_masked(length: int) -> None:
    given = qkv(torch.float32, length)
    out, *_ = selected(CASES["causal"], given)
    plain, _ = attention(*given, [], [], None, program=text(mask=CAUSAL), scale=0.3, dropout=0.0)
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-6)


def test_starts_are_exact() -> None:
    """A gate of 0, a dedicated key of zeros, logits below zero: ordinary attention, bit for bit."""
    given = qkv(torch.float32)
    zero = [draw(B, 1, T, E), torch.zeros(B, 1, T, E)]
    case, biased = CASES["causal"], subtracting(text(mask=CAUSAL), 0)
    nothing = torch.zeros(B, T, T)
    plain, _ = attention(*given, [nothing], [], None, program=biased, scale=0.3, dropout=0.0)
    negative = [-draw(B, 1, T, E).abs(), draw(B, 1, T, E).abs()]
    for extra in ({"gate": torch.zeros(1)}, {"selector": zero}, {"selector": negative}):
        assert torch.equal(selected(case, given, **extra)[0], plain), extra


def test_equals_attention_with_f_as_a_mask() -> None:
    given = qkv()
    options = {"program": text(mask=CAUSAL), "scale": 0.3, "dropout": 0.0}
    args = (*given, [], [], None, [], None, None)
    amount, _ = selective.masking(selection_of(*args, **options, head=0, select_from="qk"))
    mask = -amount[:, None] + torch.full((T, T), -torch.inf, dtype=torch.float64).triu(1)
    k, v = (x.repeat_interleave(H // G, 1) for x in given[1:])
    exact = torch.nn.functional.scaled_dot_product_attention(
        given[0], k, v, attn_mask=mask, scale=0.3
    )
    torch.testing.assert_close(selected(CASES["causal"], given)[0], exact, rtol=0, atol=1e-13)


def test_f_is_what_it_should_be() -> None:
    """0 for the first token, for itself and for the one before; it never decreases; it depends on
    the selecting head alone."""
    given = qkv()

    def amount(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        args = (q, k, v, [], [], None, [], None, None)
        options = {"program": text(mask=CAUSAL), "scale": 0.3, "dropout": 0.0}
        selection = selection_of(*args, **options, head=1, select_from="qk")
        return selective.masking(selection)[0]

    found = amount(*given)
    assert not found[:, :, 0].any()
    assert not found.diagonal(0, 1, 2).any() and not found.diagonal(-1, 1, 2).any()
    assert (found.diff(dim=1) >= 0).all() and found[:, -1, 1:-9].all()
    q, k, v = (x.clone() for x in given)
    q[:, [0, 2, 3, 4, 5]], k[:, 1], v[:] = 0, 0, 0
    assert torch.equal(found, amount(q, k, v))


@pytest.mark.parametrize("name", ["causal", "documents", "softcap", "selector"])
def test_causality(name: str) -> None:
    case, place = CASES[name], 23
    given, extra = qkv(), case.options(T)
    before = call(case, selective_attention, given, extra, case.reads(T))[0]
    for x in (*given, *extra.get("selector", [])):
        x[:, :, place:] = 7 * x[:, :, place:].flip(-1)
    after = call(case, selective_attention, given, extra, case.reads(T))[0]
    torch.testing.assert_close(before[:, :, :place], after[:, :, :place], rtol=0, atol=1e-14)
    assert not torch.allclose(before[:, :, place:], after[:, :, place:])


def test_batch_items_do_not_know_each_other() -> None:
    given = qkv(torch.float64)
    out, _, state = selected(CASES["causal"], given)
    flipped = selected(CASES["causal"], [x.flip(0) for x in given])
    torch.testing.assert_close(flipped[0], out.flip(0), rtol=0, atol=1e-14)
    torch.testing.assert_close(flipped[2], state.flip(0), rtol=0, atol=1e-14)


def test_left_padding_changes_nothing() -> None:
    given = qkv()
    out, _, state = selected(CASES["left padding"], given)
    short = [x[1:, :, 3:] for x in given]
    alone, _, own = selected(CASES["causal"], short)
    torch.testing.assert_close(out[1:, :, 3:], alone, rtol=0, atol=1e-13)
    torch.testing.assert_close(state[1:, 3:], own, rtol=0, atol=1e-13)
    assert own[0, 0] == -1 and (own[0, 1:] >= 0).all()


def test_documents_do_not_know_each_other() -> None:
    given = qkv()
    out, _, state = selected(CASES["documents"], given)
    for first in range(0, T, 5):
        part = [x[:1, :, first : first + 5] for x in given]
        alone, _, own = selected(CASES["causal"], part)
        torch.testing.assert_close(out[:1, :, first : first + 5], alone, rtol=0, atol=1e-13)
        torch.testing.assert_close(state[:1, first : first + 5], own, rtol=0, atol=1e-13)


LOOPS = [name for name in CASES if name not in ("dropout", "negative index")]


@pytest.mark.parametrize(("name", "step"), [(n, (1, 3, 11)[i % 3]) for i, n in enumerate(LOOPS)])
def test_a_decode_loop_equals_the_full_pass(name: str, step: int) -> None:
    """Whatever the option: rows after rows, with the keys so far and what they carried."""
    case = CASES[name]
    given, extra, reads = qkv(), case.options(T), case.reads(T)
    out, lse, state = call(case, selective_attention, given, extra, reads)
    late = replace(case, program=selecting_rows(case.program, len(case.ints)))
    carry, parts = torch.zeros(B, 0, dtype=torch.float64), []
    for first in range(0, T, step):
        last = min(first + step, T)
        part = [given[0][:, :, first:last], *(x[:, :, :last] for x in given[1:])]
        own = dict(extra) | {"carry": carry}
        if "selector" in own:
            q, k = own["selector"]
            own["selector"] = [q[:, :, first:last], k[:, :, :last]]
        rows = replace(late, ints=(*case.ints, first, T))
        *found, carry = call(rows, selective_attention, part, own, reads)
        parts.append(found)
    seen = rows_with_keys(name, T)
    for a, b in zip(zip(*parts, strict=True), (out, lse), strict=True):
        torch.testing.assert_close(torch.cat(a, 2)[seen], b[seen], rtol=0, atol=1e-12)
    torch.testing.assert_close(carry, state, rtol=0, atol=1e-12)


def rows_with_keys(name: str, length: int) -> Tensor:
    """[B, H, T]; rows without a key get the mean of all values, and a loop has not seen them."""
    dead = "uniform" in name or "absorbed" in name
    alive = left_padding(length) if dead else torch.ones(B, length, dtype=torch.bool)
    return alive[:, None].expand(B, H, length)


# ---------------------------------------------------------------- programs


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("dot", "dot"),
        ("dot + t0[h, q, k]", "dot"),
        ("t0[k] - dot", "-dot"),
        ("dot - t0[h] * float(q - k) + t1[q, k]", "dot"),
        ("5.0 * tanh((dot + t0[k]) / 5.0) + t1[q, k]", "5.0 * tanh(dot / 5.0)"),
        ("dot * exp(t0[h]) + 1.0", "dot * exp(t0[h])"),
        ("t0[q, k]", "0.0"),
    ],
)
def test_what_selects_has_no_bias(score: str, expected: str) -> None:
    assert str(unbiased(selective.Program.parse(text(score)).score)) == expected


def test_heads_become_numbers() -> None:
    program = text("dot * t0[h] - float(h) / float(H)", "t1[h, q, k] & (k <= q)")
    found = selecting(program, 2, 8, "logits")
    assert found == text("dot * t0[2] - 0.25", "t1[2, q, k] & (k <= q)")


# ---------------------------------------------------------------- contract


@pytest.mark.parametrize("index", range(12))
def test_opcheck(index: int) -> None:
    found = list(selective.samples())
    assert len(found) == 12
    torch.library.opcheck(*found[index])


class Largest(TorchDispatchMode):
    """The most elements that any operation gave out."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("name", ["causal", "softcap", "gate"])
def test_memory_is_linear(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selective_paths.flash, "_BIAS_BUDGET", 2**16)
    monkeypatch.setattr(rows, "_CPU_BUDGET", 2**14)
    case, length = CASES[name], 1201
    given = qkv(torch.float32, length)
    names = (*given, [], list(case.ints), None, [], case.options(length).get("gate"), None)
    options = {"program": case.program, "scale": 0.3, "dropout": 0.0}
    selection = selection_of(*names, **options, head=0, select_from="qk")
    with Largest() as seen:
        out, lse, _ = selective_paths.forward(selection)
        selective_paths.backward(selection, torch.ones_like(out), (out, lse), [])
    assert seen.elements <= 2**18 < length * length // 4


@pytest.mark.parametrize("name", ["causal", "softcap, gate, selector", "alibi selects"])
def test_transforms_run_the_reference(name: str) -> None:
    """Forward mode, second order by torch.func, and vmap."""
    given, run = leaves(CASES[name], torch.float64, 5, 4)
    plain = [x.detach() for x in given]
    tangents = [draw(*x.shape, 1)[..., 0].to(x) for x in plain]

    def ours(*x: Tensor) -> Tensor:
        return run(selective_attention, list(x))[0].square().sum()

    def exact(*x: Tensor) -> Tensor:
        return run(reference, list(x))[0].square().sum()

    for a, b in zip(
        torch.func.jvp(ours, tuple(plain), tuple(tangents)),
        torch.func.jvp(exact, tuple(plain), tuple(tangents)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    second = [
        torch.func.grad(lambda *x, f=f: torch.func.grad(f)(*x).square().sum())
        for f in (ours, exact)
    ]
    torch.testing.assert_close(*(f(*plain) for f in second), rtol=1e-10, atol=1e-12)
    batch = [torch.stack([x, 2 * x]) for x in plain]
    twice = torch.vmap(lambda *x: run(selective_attention, list(x))[0])(*batch)
    for i in range(2):
        one = run(selective_attention, [x[i] for x in batch])[0]
        torch.testing.assert_close(twice[i], one, rtol=0, atol=1e-14)
    with pytest.raises(UnsupportedCall, match="first derivatives only"):
        (first,) = torch.autograd.grad(ours(*given), given[0], create_graph=True)
        torch.autograd.grad(first.sum(), given[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": 6}, "head is the number"),
        ({"select_from": "probabilities"}, "qk or logits"),
        ({"gate": torch.zeros(2)}, "one number"),
        ({"carry": torch.zeros(B, T + 1)}, "carry is"),
        ({"selector": [torch.zeros(B, 1, T, 3)]}, "selector is"),
        ({"selector": [torch.zeros(B, 1, T, 3), torch.zeros(B, 1, T, 4)]}, "selector is"),
        ({"dropout": 0.5}, "seed"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedCall, match=message):
        selected(CASES["causal"], qkv(), **change)


@pytest.mark.parametrize("sizes", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
def test_empty_axes(sizes: tuple[int, int, int]) -> None:
    batch, length, keys = sizes
    q = torch.randn(batch, H, length, D, requires_grad=True)
    k, v = (torch.randn(batch, G, keys, n, requires_grad=True) for n in (D, DV))
    out, lse, state = selected(CASES["causal"], [q, k, v])
    assert (out.shape, lse.shape) == ((batch, H, length, DV), (batch, H, length))
    assert state.shape == (batch, keys) and not out.any()
    for grad, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert grad.shape == x.shape and not grad.any()
