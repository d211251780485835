"""attn_compiler::el_attention against ordinary attention over keys and values that are built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import CASES, DTYPES, SCALE, B, Shape, double, draw, within_budget
from el_cases import arguments, plain
from torch import Tensor

from attn_compiler.errors import UnsupportedCall
from attn_compiler.ir.expr import parse
from attn_compiler.ir.score import Program
from attn_compiler.kernels import el, el_cpu
from attn_compiler.kernels.el import el_attention, samples

# primes; D below, above and equal to H d; one row, several; one kv head
SHAPES = ((Shape(T=1), 31), (Shape(T=3, G=6, d=7, dv=5), 101), (Shape(H=3, G=1, T=13), 48))
INF = float("inf")


def judge(name: str, s: Shape, width: int, dtype: torch.dtype, beams: int = 1) -> None:
    case, given = CASES[name], arguments(s, width, dtype, beams)
    program, reads, ints = Program.parse(case.program), case.reads(s), list(case.ints)
    kwargs = {"program": case.program, "scale": SCALE}
    out, lse = el_attention(*given, reads, ints, **kwargs)
    wide = [double(t) for t in given], [double(r) for r in reads]
    exact, exact_lse = el.reference(*wide[0], wide[1], ints, **kwargs)
    theirs = plain(given, reads, ints, program)
    eps = torch.finfo(dtype).eps
    size = float(exact.nan_to_num(0.0).abs().max())
    within_budget(name, out, theirs, exact, 8 * eps * size)
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    if dtype is torch.float64:
        assert torch.allclose(lse, exact_lse, 1e-12, 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", CASES)
def test_numbers(name: str, dtype: torch.dtype) -> None:
    turn = list(CASES).index(name) + DTYPES.index(dtype)
    judge(name, *SHAPES[turn % len(SHAPES)], dtype, beams=1 + turn % 2)


@pytest.mark.parametrize("name", CASES)
def test_many_small_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(el, "_NEAR", 1)
    monkeypatch.setattr(el, "_WIDE", 1)
    judge(name, *SHAPES[1], torch.float32)
    monkeypatch.setattr(el_cpu, "fits", lambda _: False)
    judge(name, *SHAPES[1], torch.float32)


def test_a_sum_of_scores_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain products are left for rows without keys, and for what is no sum."""

    def never(*_: Any) -> Any:
        raise AssertionError("plain products")

    monkeypatch.setattr(el, "_attend", never)
    s, width = SHAPES[0]
    given = arguments(s, width, torch.float32, beams=2)
    keep = torch.ones(B, s.S, dtype=torch.bool)
    keep[:, 0] = False
    padded = {"program": str(Program(mask=parse("t0[b, k]"), empty="uniform")), "scale": SCALE}
    el_attention(*given, [keep], [], **padded)
    with pytest.raises(AssertionError, match="plain products"):
        el_attention(*given, [torch.zeros_like(keep)], [], **padded)
    capped = str(Program(parse("tanh(dot)")))
    with pytest.raises(AssertionError, match="plain products"):
        el_attention(*given, [], [], program=capped, scale=SCALE)


def test_the_reference_is_attention_over_keys_and_values() -> None:
    s, width = SHAPES[1]
    q, x, w_k, b_k, w_v, b_v = arguments(s, width, torch.float64, beams=2)
    out, lse = el.reference(q, x, w_k, b_k, w_v, b_v, [], [], program=str(Program()), scale=SCALE)
    for b in range(B):
        for h in range(s.H):
            g = h // (s.H // s.G)
            k, v = x[b // 2] @ w_k[g].T + b_k[g], x[b // 2] @ w_v[g].T + b_v[g]
            scores = SCALE * q[b, h] @ k.T
            assert torch.allclose(out[b, h], scores.softmax(-1) @ v, 1e-12, 1e-12)
            assert torch.allclose(lse[b, h], scores.logsumexp(-1), 1e-12, 1e-12)


def test_the_worked_case() -> None:
    """One head of two features; the key's bias moves all scores by the same 1.767767."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)[None]
    w_k = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)[None]
    w_v = torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=torch.float64)[None]
    b_k, b_v = (torch.tensor([b], dtype=torch.float64) for b in ([3.0, -1.0], [0.1, 0.2]))
    q = torch.tensor([1.5, 2.0], dtype=torch.float64).view(1, 1, 1, 2)
    found = [
        el_attention(q, x, w_k, bias, w_v, b_v, [], [], program=str(Program()), scale=0.5**0.5)
        for bias in (b_k, None)
    ]
    for out, _ in found:
        wanted = torch.tensor([2.789997, 1.016832], dtype=torch.float64)
        assert torch.allclose(out.flatten(), wanted, 0, 1e-6)
    assert abs(float(found[0][1] - found[1][1]) - 1.767767) < 1e-6


def test_beams_are_runs_of_their_own() -> None:
    s, width = SHAPES[1]
    q, x, *rest = arguments(s, width, torch.float64, beams=2)
    kwargs = {"program": CASES["causal"].program, "scale": SCALE}
    both, _ = el_attention(q, x, *rest, [], [], **kwargs)
    for b in range(2):
        one, _ = el_attention(q[b : b + 1], x, *rest, [], [], **kwargs)
        assert torch.allclose(both[b : b + 1], one, 1e-13, 1e-13)


@pytest.mark.parametrize("size", [50.0, 200.0])
def test_what_the_keys_do_not_see_of_x_costs_no_digits(size: float) -> None:
    """A large part of x in the null space of W_k: an expanded query in bfloat16 would not cancel
    it.
    """
    dtype, s, width = torch.bfloat16, Shape(T=1, G=6), 193
    q, x, w_k, b_k, w_v, b_v = arguments(s, width, torch.float64)
    hidden = torch.linalg.svd(w_k.bfloat16().double().flatten(0, 1)).Vh[-1]
    x = x + size * draw(B, s.S, 1).double() * hidden
    given = [t.to(dtype) for t in (q, x, w_k, b_k, w_v, b_v)]
    kwargs = {"program": str(Program()), "scale": SCALE}
    out, _ = el_attention(*given, [], [], **kwargs)
    exact, _ = el.reference(*(t.double() for t in given), [], [], **kwargs)
    theirs = plain(given, [], [], Program())
    error, other = ((t.double() - exact).square().mean().sqrt() for t in (out, theirs))
    assert error <= 1.2 * other


@pytest.mark.parametrize("name", ["causal", "learned bias", "softcap and sink", "padding"])
def test_gradcheck(name: str) -> None:
    case, s = CASES[name], Shape(H=2, G=1, T=2, S=5, d=2, dv=3)
    reads, ints = [double(r) for r in case.reads(s)], list(case.ints)
    kwargs = {"program": case.program, "scale": SCALE}

    def fn(*tensors: Tensor) -> Tensor:
        table = list(reads)
        for i, t in zip(case.grads, tensors[6:], strict=True):
            table[i] = t
        return el_attention(*tensors[:6], table, ints, **kwargs)[0]

    leaves = [*arguments(s, 5, torch.float64, beams=2), *(reads[i] for i in case.grads)]
    assert torch.autograd.gradcheck(fn, [t.detach().requires_grad_() for t in leaves])


def test_opcheck() -> None:
    for operator, args, kwargs in samples():
        torch.library.opcheck(operator, args, kwargs)


def test_a_second_derivative_is_refused() -> None:
    given = [t.requires_grad_() for t in arguments(*SHAPES[0], torch.float64)]
    out, _ = el_attention(*given, [], [], program=str(Program()), scale=SCALE)
    (dx,) = torch.autograd.grad(out.sum(), given[1], create_graph=True)
    with pytest.raises(UnsupportedCall, match="el_attention_backward"):
        dx.sum().backward()


def test_nothing_as_wide_as_keys_is_built() -> None:
    """The largest tensor that any operation gives is the block of scores, or x itself."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            sizes = [
                t.untyped_storage().nbytes() for t in tree_leaves(result) if torch.is_tensor(t)
            ]
            largest = max(largest, *sizes, 0)
            return result

    s, width = Shape(H=8, G=8, T=1, S=997, d=16, dv=16), 64
    given = arguments(s, width, torch.float32)
    with Watch():
        el.forward(*given, [], [], program=str(Program()), scale=SCALE)
    assert largest <= given[1].numel() * 4 < B * s.S * s.H * s.d * 4


@pytest.mark.parametrize(
    ("position", "shape"), [(0, (3, 6, 1, 16)), (1, (1, 53, 30)), (2, (4, 16, 31)), (3, (2, 15))]
)
def test_shapes_that_do_not_belong_together(position: int, shape: tuple[int, ...]) -> None:
    given = arguments(*SHAPES[0], torch.float32)
    given[position] = torch.zeros(shape)
    with pytest.raises(UnsupportedCall, match="el_attention cannot read"):
        el_attention(*given, [], [], program=str(Program()), scale=SCALE)


def test_no_keys_at_all() -> None:
    q, x, *rest = arguments(*SHAPES[0], torch.float32)
    out, lse = el_attention(q, x[:, :0], *rest, [], [], program=str(Program()), scale=SCALE)
    assert (out == 0).all() and (lse == -INF).all()


def test_the_backward_follows_the_reference() -> None:
    s, width = SHAPES[1]
    given = [t.requires_grad_() for t in arguments(s, width, torch.float64, beams=2)]
    kwargs = {"program": CASES["causal & padding, zero"].program, "scale": SCALE}
    reads = CASES["causal & padding, zero"].reads(s)
    grads = []
    for fn in (el_attention, el.reference):
        out = fn(*given, reads, [], **kwargs)[0]
        grads.append(torch.autograd.grad(out, given, draw(*out.shape).double()))
    for ours, exact in zip(*grads, strict=True):
        assert torch.allclose(ours, exact, 1e-11, 1e-12)
