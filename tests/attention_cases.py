"""Programs of attn_compiler::attention, their inputs, and the judge of its numbers.

Numbers are judged by float64: our error may be four times what plain eager code commits in the same
dtype, plus a few units in the last place of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attn_compiler.ir.evaluate import evaluate
from attn_compiler.ir.expr import TRUE
from attn_compiler.ir.score import Program
from attn_compiler.kernels.attention import reference
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.library import attention

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
    "keys absorbed": Case(
        text(mask=f"{CAUSAL} & t0[b, k]", empty="absorbed"), lambda s: [padding(s)]
    ),
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
    # a row of nothing but finfo.min counts all keys alike, in its gradients too
    "bias with finfo.min": Case(
        text("dot + where(t0[b, k], 0.0, -3.4028234663852886e+38)", empty="zero"),
        lambda s: [padding(s) & (torch.arange(B) > 0)[:, None]],
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reads: Sequence[Tensor],
    ints: Sequence[int],
    program: Program,
    factor: Tensor | None = None,
) -> Tensor:
    """What a model writes down: every step in the dtype of the inputs; `factor` drops."""
    shape = (*q.shape[:3], k.shape[2])
    env: dict[str, Any] = dict(zip("BHTS", shape, strict=True))
    for i, (n, size) in enumerate(zip("bhqk", shape, strict=True)):
        env[n] = torch.arange(size).view((-1,) + (1,) * (3 - i))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = evaluate(program.score, env, reads, ints, q @ k.transpose(-1, -2) * SCALE, q.dtype)
    s = plain = s.to(q.dtype).expand(shape)
    if program.mask != TRUE:
        s = torch.where(evaluate(program.mask, env, reads, ints).bool(), s, -INF)
    if program.sink is not None:
        sink = evaluate(program.sink, env, reads, ints, None, q.dtype).to(q.dtype)
        s = torch.cat([s, sink.expand(*shape[:3], 1)], -1)
    dead = (s == -INF).all(-1, keepdim=True)
    if program.empty == "absorbed":  # the derivative of adding finfo.min is one
        s = torch.where(dead, plain - plain.detach(), s)
    elif program.empty != "nan":
        s = s.masked_fill(dead, 0.0)
    p = torch.softmax(s, -1)[..., : shape[3]]
    if program.empty not in ("nan", "uniform", "absorbed"):
        p = p.masked_fill(dead, 0.0)
    return (p if factor is None else p * factor.to(p.dtype)) @ v


SCALE = 0.3


def run(
    fn: Any, given: Sequence[Tensor], reads: Sequence[Tensor], wanted: Sequence[int]
) -> list[Tensor]:
    """out and the gradients of q, k, v and the wanted reads."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format) for x in given]
    table = [r.detach().clone() if i in wanted else r for i, r in enumerate(reads)]
    inputs = [x.requires_grad_() for x in [*leaves, *(table[i] for i in wanted)]]
    out = fn(*leaves, table)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, weight, materialize_grads=True)]


def double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def judge(
    case: Case,
    given: list[Tensor],
    reads: list[Tensor],
    largest: float = 0.0,
    device: str = "cpu",
    rate: float = 0.0,
) -> None:
    """The operator on a device against the CPU.

    `largest` is the absolute value of scores whose rounding alone, in a stored lse, counts; `rate`
    the probability to drop.
    """
    program, ints, dtype = Program.parse(case.program), list(case.ints), given[0].dtype
    drop, factor = Drop(torch.tensor([17]) if rate else None, rate), None
    (batch, heads, rows, _), keys = given[0].shape, given[1].shape[2]
    dropped = drop.dropped((heads, rows), (0, batch), (0, rows), (0, keys))
    if dropped is not None:
        factor = (~dropped).double() * drop.gain

    def ours(q: Tensor, k: Tensor, v: Tensor, reads: list[Tensor]) -> Tensor:
        out, _ = attention(
            q, k, v, reads, ints, drop.seed if drop.seed is None else drop.seed.to(device),
            program=case.program, scale=SCALE, dropout=rate,
        )  # fmt: skip
        return out

    there = [[x.to(device) for x in tensors] for tensors in (given, reads)]
    found = [x.cpu() for x in run(ours, *there, case.grads)]
    plain = run(
        lambda q, k, v, r: eager(q, k, v, r, ints, program, factor), given, reads, case.grads
    )
    exact = run(
        lambda q, k, v, r: reference(q, k, v, r, ints, program, SCALE, factor)[0],
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


# ---------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """The most elements that any operation gave out."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // 4)
        return result
