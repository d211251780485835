"""attn_compiler::attention against its reference in float64, on every path and in every dtype.

Numbers are judged by float64: our error may be four times what plain eager code commits in the same
dtype, plus a few units in the last place of the result.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from attn_compiler.errors import UnsupportedCall
from attn_compiler.ir.expr import TRUE, evaluate
from attn_compiler.ir.score import Program
from attn_compiler.kernels import attention as composite
from attn_compiler.kernels import flash_cpu, rows
from attn_compiler.kernels.attention import reference
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.frame import Inputs
from attn_compiler.kernels.library import attention, attention_backward, op_samples

INF = float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
B = 2


@dataclass(frozen=True)
class Shape:
    H: int = 6
    G: int = 2
    T: int = 37
    S: int = 53
    d: int = 16
    dv: int = 16


# primes, T below and above S, one row, one kv head, every kind of dv
SHAPES = (
    Shape(),
    Shape(T=53, S=37, G=6),
    Shape(T=1, S=41, G=3),
    Shape(H=3, G=1, T=67, S=67, dv=8),
    Shape(H=5, G=5, T=29, S=83, d=8, dv=24),
)


def padding(s: Shape) -> Tensor:
    """Left padding in one sequence, right padding in the other."""
    keep = torch.ones(B, s.S, dtype=torch.bool)
    keep[0, : s.S // 3], keep[1, -5:] = False, False
    return keep


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def text(score: str = "dot", mask: str = "True", sink: str = "", empty: str = "any") -> str:
    return str(
        Program.parse(f"score: {score}; mask: {mask}{sink and '; sink: ' + sink}; empty: {empty}")
    )


CAUSAL, OFFSET, WINDOW = "(k <= q)", "(k <= q + (S - T))", "(k <= q) & (k > q - n0)"
SOFTCAP = "2.0 * tanh(dot / 2.0)"


@dataclass(frozen=True)
class Case:
    """A program, how to make its reads, which of them want gradients."""

    program: str
    reads: Any = lambda s: []
    grads: tuple[int, ...] = ()
    ints: tuple[int, ...] = ()


CASES: dict[str, Case] = {
    "none": Case(text()),
    "causal": Case(text(mask=CAUSAL)),
    "offset": Case(text(mask=OFFSET)),
    "window": Case(text(mask=WINDOW), ints=(7,)),
    "no keys at all": Case(text(mask="(k <= q) & (k > q)", empty="uniform")),
    "padding": Case(text(mask="t0[b, k]", empty="zero"), lambda s: [padding(s)]),
    "tensor mask": Case(
        text(mask="t0[b, 0, q, k]", empty="zero"), lambda s: [draw(B, 1, s.T, s.S) > -0.5]
    ),
    "long mask": Case(
        text(mask=f"t0[b, q + n0, k] & {CAUSAL}", empty="zero"),
        lambda s: [draw(B, s.T + 9, s.S + 4) > -0.5],
        ints=(3,),
    ),
    "documents": Case(
        text(mask=f"(t0[b, q] == t0[b, k]) & {CAUSAL}", empty="uniform"),
        lambda s: [torch.arange(max(s.T, s.S)).div(9, rounding_mode="floor").expand(B, -1)],
    ),
    "bias": Case(text("dot + t0[0, h, q, k]"), lambda s: [draw(1, s.H, s.T, s.S)]),
    "bias of half precision": Case(
        text("dot + t0[b, 0, 0, k]", CAUSAL), lambda s: [draw(B, 1, 1, s.S).bfloat16()]
    ),
    "bias with -inf": Case(
        text("dot + t0[b, h, q, k]", empty="zero"),
        lambda s: [draw(B, s.H, s.T, s.S).masked_fill(~padding(s)[:, None, None], -INF)],
    ),
    "learned bias": Case(
        text("t0[0, h, q, k] + dot", CAUSAL), lambda s: [draw(1, s.H, s.T, s.S)], (0,)
    ),
    "relative bias": Case(
        text("dot + t0[h, min(max(k - q, -8), 8) + 8]"), lambda s: [draw(s.H, 17)], (0,)
    ),
    "alibi": Case(text("dot - t0[h] * float(q - k)", CAUSAL), lambda s: [draw(s.H).abs()], (0,)),
    "temperature": Case(
        text("dot * exp(t0[h, 0, 0])", "t1[b, k]", empty="zero"),
        lambda s: [draw(s.H, 1, 1), padding(s)],
        (0,),
    ),
    "softcap": Case(text(SOFTCAP, WINDOW), ints=(11,)),
    "score without dot": Case(text("t0[q, k]", CAUSAL), lambda s: [draw(s.T, s.S)], (0,)),
    "sink": Case(
        text(mask=f"{WINDOW} & t0[b, k]", sink="t1[h]"),
        lambda s: [padding(s), draw(s.H)],
        (1,),
        (5,),
    ),
    "softcap and sink": Case(
        text(SOFTCAP, "t0[b, k]", "t1[h]"), lambda s: [padding(s), draw(s.H)], (1,)
    ),
    "negative index": Case(text("dot + t0[q - 1, k - 1]"), lambda s: [draw(s.T, s.S)], (0,)),
    "sum": Case(
        text("dot + t0[b, 0, 0, k] - t1[h, q, 0]"),
        lambda s: [draw(B, 1, 1, s.S), draw(s.H, s.T, 1)],
    ),
}
for policy in ("nan", "zero", "uniform"):
    for name, case in (
        ("causal & padding", Case(text(mask=f"{CAUSAL} & t0[b, k]"), lambda s: [padding(s)])),
        (
            "window & padding",
            Case(text(mask=f"{WINDOW} & t0[b, k]"), lambda s: [padding(s)], ints=(4,)),
        ),
        (
            "softcap & padding",
            Case(text(SOFTCAP, f"{WINDOW} & t0[b, k]"), lambda s: [padding(s)], ints=(4,)),
        ),
    ):
        CASES[f"{name}, {policy}"] = replace(case, program=case.program.replace("any", policy))


# ---------------------------------------------------------------- judging


def tensors(s: Shape, dtype: torch.dtype, size: float = 1.0) -> list[Tensor]:
    """q, k, v in the layout of a model: heads beside features."""
    shapes = ((s.T, s.H, s.d), (s.S, s.G, s.d), (s.S, s.G, s.dv))
    return [(draw(B, *x) * size).to(dtype).transpose(1, 2) for x in shapes]


def eager(
    q: Tensor, k: Tensor, v: Tensor, reads: Sequence[Tensor], ints: Sequence[int], program: Program
) -> Tensor:
    """What a model writes down: every step in the dtype of the inputs."""
    shape = (*q.shape[:3], k.shape[2])
    env: dict[str, Any] = dict(zip("BHTS", shape, strict=True))
    for i, (n, size) in enumerate(zip("bhqk", shape, strict=True)):
        env[n] = torch.arange(size).view((-1,) + (1,) * (3 - i))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = evaluate(program.score, env, reads, ints, q @ k.transpose(-1, -2) * SCALE, q.dtype)
    s = s.to(q.dtype).expand(shape)
    if program.mask != TRUE:
        s = torch.where(evaluate(program.mask, env, reads, ints).bool(), s, -INF)
    if program.sink is not None:
        sink = evaluate(program.sink, env, reads, ints, None, q.dtype).to(q.dtype)
        s = torch.cat([s, sink.expand(*shape[:3], 1)], -1)
    dead = (s == -INF).all(-1, keepdim=True)
    p = torch.softmax(s if program.empty == "nan" else s.masked_fill(dead, 0.0), -1)
    p = p[..., : shape[3]]
    return (p if program.empty in ("nan", "uniform") else p.masked_fill(dead, 0.0)) @ v


SCALE = 0.3


def run(
    fn: Any, given: Sequence[Tensor], reads: Sequence[Tensor], wanted: Sequence[int]
) -> list[Tensor]:
    """out and the gradients of q, k, v and the wanted reads."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format) for x in given]
    table = [r.detach().clone() if i in wanted else r for i, r in enumerate(reads)]
    inputs = [x.requires_grad_() for x in [*leaves, *(table[i] for i in wanted)]]
    out = fn(*leaves, table)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, weight, materialize_grads=True)]


def double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def judge(case: Case, given: list[Tensor], reads: list[Tensor], largest: float = 0.0) -> None:
    """`largest`: absolute value of scores whose rounding alone, in a stored lse, counts."""
    program, ints, dtype = Program.parse(case.program), list(case.ints), given[0].dtype

    def ours(q: Tensor, k: Tensor, v: Tensor, reads: list[Tensor]) -> Tensor:
        out, _ = attention(
            q, k, v, reads, ints, None, program=case.program, scale=SCALE, dropout=0.0
        )
        return out

    found = run(ours, given, reads, case.grads)
    plain = run(lambda q, k, v, r: eager(q, k, v, r, ints, program), given, reads, case.grads)
    exact = run(
        lambda q, k, v, r: reference(q, k, v, r, ints, program, SCALE)[0],
        [double(x) for x in given],
        [double(x) for x in reads],
        case.grads,
    )
    # a gradient may cancel to nothing, so the last places are those of the largest result
    scale = max(float(x.nan_to_num(0.0).abs().max()) for x in exact)
    for name, *values in zip(("out", "dq", "dk", "dv", "dread"), found, plain, exact, strict=False):
        within_budget(name, *values, (8 + largest) * torch.finfo(dtype).eps * scale)


def within_budget(name: str, ours: Tensor, plain: Tensor, exact: Tensor, floor: float) -> None:
    assert torch.equal(ours.isnan(), exact.isnan()), f"{name}: other NaNs"
    a, b, c = (x.double().nan_to_num(0.0) for x in (ours, plain, exact))
    budget = 4 * float((b - c).abs().max()) + floor
    worst = float((a - c).abs().max())
    assert worst <= budget, f"{name}: {worst:.2e} off, {budget:.2e} allowed"


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", CASES)
def test_numbers_and_gradients(name: str, dtype: torch.dtype) -> None:
    case, turn = CASES[name], list(CASES).index(name) + DTYPES.index(dtype)
    shape = SHAPES[turn % len(SHAPES)]
    judge(case, tensors(shape, dtype), case.reads(shape))


@pytest.mark.parametrize("name", CASES)
def test_many_small_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_CPU_BUDGET", 2**8)
    monkeypatch.setattr(flash_cpu, "_BIAS_BUDGET", 2**8)
    monkeypatch.setattr(flash_cpu, "_SKIP_ROWS", 16)
    case, shape = CASES[name], SHAPES[list(CASES).index(name) % len(SHAPES)]
    judge(case, tensors(shape, torch.float32), case.reads(shape))


@pytest.mark.parametrize(
    "name", ["causal", "window", "softcap", "causal & padding, uniform", "sink"]
)
def test_every_row_block_path_without_the_flash_kernel(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_cpu, "fits", lambda frame: False)
    for dtype, shape in zip(DTYPES, SHAPES, strict=False):
        judge(CASES[name], tensors(shape, dtype), CASES[name].reads(shape))


@pytest.mark.parametrize("name", ["none", "causal", "softcap", "learned bias", "sink"])
def test_large_scores(name: str) -> None:
    case, s = CASES[name], Shape()
    for size in (5.0, 100.0):
        q, k, v = tensors(s, torch.float32, size)
        dot = q @ k.repeat_interleave(s.H // s.G, 1).transpose(-1, -2) * SCALE
        judge(case, [q, k, v], case.reads(s), float(dot.abs().max()))


@pytest.mark.parametrize("name", ["causal", "softcap", "causal & padding, uniform"])
def test_any_strides(name: str) -> None:
    case, s = CASES[name], Shape()
    q = draw(B, s.H, s.d, s.T).transpose(-1, -2)
    k = draw(1, s.G, s.S, s.d).expand(B, -1, -1, -1)
    v = draw(B, s.G, s.S + 3, 2 * s.dv)[:, :, 3:, ::2]
    judge(case, [q, k, v], case.reads(s))


def test_mixed_dtypes() -> None:
    q, k, v = tensors(Shape(), torch.float32)
    for program in (text(mask=CAUSAL), text(SOFTCAP, CAUSAL)):
        kwargs = {"program": program, "scale": SCALE, "dropout": 0.0}
        out, lse = attention(q, k, v.bfloat16(), [], [], None, **kwargs)
        exact, _ = reference(q, k, v.bfloat16().float(), [], [], program, SCALE)
        assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
        assert (out - exact).abs().max() <= exact.abs().max() * 2**-8


def test_lse_is_that_of_the_reference() -> None:
    for name, case in CASES.items():
        reads = [double(r) for r in case.reads(Shape())]
        q, k, v = tensors(Shape(), torch.float64)
        kwargs = {"program": case.program, "scale": SCALE, "dropout": 0.0}
        _, lse = attention(q, k, v, reads, list(case.ints), None, **kwargs)
        _, exact = reference(q, k, v, reads, case.ints, case.program, SCALE)
        assert torch.allclose(lse, exact, 1e-12, 1e-12), name


@pytest.mark.parametrize(
    "name", ["causal", "learned bias", "softcap and sink", "sink", "relative bias"]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(name: str, dropout: float) -> None:
    case, s = CASES[name], Shape(H=2, G=1, T=3, S=5, d=2, dv=3)
    reads = [double(r) for r in case.reads(s)]
    seed = torch.tensor([7]) if dropout else None

    def fn(q: Tensor, k: Tensor, v: Tensor, *learned: Tensor) -> Tensor:
        table = list(reads)
        for i, x in zip(case.grads, learned, strict=True):
            table[i] = x
        kwargs = {"program": case.program, "scale": SCALE, "dropout": dropout}
        return attention(q, k, v, table, list(case.ints), seed, **kwargs)[0]

    leaves = [*tensors(s, torch.float64), *(reads[i] for i in case.grads)]
    assert torch.autograd.gradcheck(fn, [x.detach().requires_grad_() for x in leaves])


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


class Largest(TorchDispatchMode):
    """The most elements that any operation gave out."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // 4)
        return result


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
    samples = list(op_samples())
    assert len(samples) == 24
    torch.library.opcheck(*samples[index])


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
