"""The contract of attn_compiler::attention: dropout, memory, layout, opcheck, refusals, imports."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from attention_cases import (
    CASES,
    CAUSAL,
    SCALE,
    SOFTCAP,
    B,
    Largest,
    Shape,
    double,
    run,
    tensors,
    text,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels import attention as composite
from attn_compiler.kernels import rows
from attn_compiler.kernels.attention import reference
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.frame import Inputs
from attn_compiler.kernels.library import attention, attention_backward, samples

# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", ["causal", "softcap", "causal & padding, uniform", "sink"])
def test_dropout_is_a_function_of_the_seed(
    name: str, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, s, seed = CASES[name], Shape(), torch.tensor([-3])
    reads, given = case.reads(s), tensors(s, torch.float64)
    kwargs = {"program": case.program, "scale": SCALE, "dropout": rate}

    def ours(q: Tensor, k: Tensor, v: Tensor, reads: list[Tensor]) -> Tensor:
        return attention(q, k, v, reads, list(case.ints), seed, **kwargs)[0]

    drop = Drop(seed, rate)
    dropped = drop.dropped((s.H, s.T), (0, B), (0, s.T), (0, s.S))
    assert dropped is not None
    factor = (~dropped).double() * drop.gain
    exact = run(
        lambda q, k, v, r: reference(q, k, v, r, case.ints, case.program, SCALE, factor)[0],
        given,
        [double(r) for r in reads],
        case.grads,
    )
    found = run(ours, given, [double(r) for r in reads], case.grads)
    monkeypatch.setattr(rows, "_CPU_BUDGET", 2**8)
    cut = run(ours, given, [double(r) for r in reads], case.grads)
    for a, b, c in zip(found, cut, exact, strict=True):
        assert torch.allclose(a, c, 1e-12, 1e-12)
        assert torch.allclose(b, c, 1e-12, 1e-12)
    assert rate == 1 or not torch.equal(
        found[0], attention(*given, reads, list(case.ints), seed + 1, **kwargs)[0]
    )


def test_dropout_is_independent_and_of_the_right_rate() -> None:
    n = 512
    masks = [Drop(torch.tensor([s]), 0.2).dropped((2, n), (0, 1), (0, n), (0, n)) for s in range(2)]
    bits = torch.stack([m.double() for m in masks if m is not None]).flatten(0, 2)
    sigma = (0.2 * 0.8 / (n * n)) ** 0.5
    assert (bits.mean((1, 2)) - 0.2).abs().max() < 4 * sigma
    # along rows, along columns, between heads and between seeds
    centred = bits - 0.2
    pairs = [(centred[:, 1:], centred[:, :-1]), (centred[..., 1:], centred[..., :-1])]
    pairs += [(centred[i], centred[j]) for i, j in itertools.combinations(range(4), 2)]
    for a, b in pairs:
        assert abs((a * b).mean()) < 5 * 0.16 / (a.numel() ** 0.5)
    sums = (bits.sum(1) - 0.2 * n).square().mean() / (n * 0.16)
    assert 0.9 < sums < 1.1


# ---------------------------------------------------------------- memory and layout


@pytest.mark.parametrize(
    "name", ["causal", "offset", "window", "softcap", "sink", "alibi", "dropout"]
)
def test_memory_is_linear(name: str) -> None:
    case = CASES.get(name, CASES["causal"])
    s = Shape(H=4, G=2, T=2048, S=2048, d=8, dv=8)
    drop = Drop(torch.tensor([1]), 0.1) if name == "dropout" else Drop(None, 0.0)
    reads = case.reads(s)
    given = Inputs(*tensors(s, torch.float32), reads, case.ints, drop, case.program, SCALE)
    with Largest() as seen:
        out, lse = composite.forward(given)
        composite.backward(
            given, torch.ones_like(out), (out, lse), [i in case.grads for i in range(len(reads))]
        )
    assert seen.elements <= 2**21 < B * s.H * s.T * s.S // 8


@pytest.mark.parametrize(
    "sizes",
    [
        (2, 4, 2, 5, 7),
        (1, 4, 4, 1, 1),
        (0, 4, 2, 5, 7),
        (2, 1, 1, 5, 7),
        (2, 4, 2, 0, 7),
        (2, 4, 2, 5, 0),
        (1, 1, 1, 1, 7),
    ],
)
@pytest.mark.parametrize("score", ["dot", SOFTCAP])
def test_layout_is_that_of_the_fake(sizes: tuple[int, ...], score: str) -> None:
    batch, heads, groups, length, keys = sizes
    for width, dtype in ((8, torch.float32), (6, torch.bfloat16)):
        shapes = ((heads, length, 8), (groups, keys, 8), (groups, keys, width))
        given = [torch.randn(batch, *x).to(dtype).requires_grad_() for x in shapes]
        kwargs = {"program": text(score, CAUSAL, empty="uniform"), "scale": 1.0, "dropout": 0.0}
        out, lse = attention(*given, [], [], None, **kwargs)
        grads = torch.autograd.grad(out, given, torch.ones_like(out))
        with FakeTensorMode() as mode:
            fakes = tree_map(mode.from_tensor, [*given, out, lse])
            args = (*fakes[:3], [], [], None)
            promised = attention(*args, **kwargs)
            promised += attention_backward(fakes[3], *args, *fakes[3:], [], **kwargs)[:3]
        for real, fake in zip((out, lse, *grads), promised, strict=True):
            assert (real.shape, real.stride(), real.dtype) == (
                fake.shape,
                fake.stride(),
                fake.dtype,
            )
        assert out.transpose(1, 2).is_contiguous()
        assert keys or not out.any()


@pytest.mark.parametrize("index", range(24))
def test_opcheck(index: int) -> None:
    found = list(samples())
    assert len(found) == 24
    torch.library.opcheck(*found[index])


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(q=a["q"][0]), "four dimensions"),
        (lambda a: a.update(v=a["v"][:, :, 1:]), "k and v share"),
        (lambda a: a.update(q=a["q"][:, :5]), "divides the number of query heads"),
        (lambda a: a.update(dropout=0.1), "seed"),
        (lambda a: a.update(seed=torch.tensor([1])), "seed"),
    ],
)
def test_arguments_that_nobody_can_read_are_refused(change: Any, message: str) -> None:
    q, k, v = tensors(Shape(), torch.float32)
    args: dict[str, Any] = {"q": q, "k": k, "v": v, "reads": [], "ints": [], "seed": None}
    args |= {"program": text(), "scale": 1.0, "dropout": 0.0}
    change(args)
    with pytest.raises(UnsupportedCall, match=message):
        attention(**args)


def test_import_is_light() -> None:
    code = (
        "import sys, attn_compiler.kernels.library as l; "
        "assert not {'triton', 'networkx', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
