"""Calls of attn_compiler::selective_attention: programs, options, tensors, and how to run them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import attention_cases
import torch
from attention_cases import double, draw, text, within_budget
from torch import Tensor

from attn_compiler.ir.score import Program
from attn_compiler.kernels import selective
from attn_compiler.kernels.selective import reference, selection_of

B, H, G, T, D, DV, E = 2, 6, 2, 37, 16, 8, 5
CAUSAL, WINDOW = "(k <= q)", "(k <= q) & (k > q - n0)"
SOFTCAP = "2.0 * tanh(dot / 2.0)"


def left_padding(length: int) -> Tensor:
    return torch.arange(length) >= torch.tensor([[0], [3]])


def documents(length: int) -> Tensor:
    return torch.stack([torch.arange(length) // 5, torch.arange(length) // 3])


@dataclass(frozen=True)
class Case:
    """A call without q, k and v; tensors by the length of the sequence."""

    program: str = text(mask=CAUSAL)
    reads: Any = lambda n: []
    grads: tuple[int, ...] = ()
    ints: tuple[int, ...] = ()
    options: Any = lambda n: {}


CASES: dict[str, Case] = {
    "causal": Case(),
    "another head": Case(options=lambda n: {"head": 4}),
    "left padding": Case(
        text(mask=f"{CAUSAL} & t0[b, k]", empty="zero"), lambda n: [left_padding(n)]
    ),
    "padding, uniform": Case(
        text(mask=f"{CAUSAL} & t0[b, k]", empty="uniform"), lambda n: [left_padding(n)]
    ),
    "padding, absorbed": Case(
        text(mask=f"{CAUSAL} & t0[b, k]", empty="absorbed"), lambda n: [left_padding(n)]
    ),
    "documents": Case(
        text(mask=f"{CAUSAL} & (t0[b, q] == t0[b, k])"), lambda n: [documents(n)]
    ),
    "window": Case(text(mask=WINDOW), ints=(7,)),
    "nobody for some rows": Case(text(mask="(k <= q - 9)", empty="zero")),
    "alibi": Case(
        text("dot - t0[h] * float(q - k)", CAUSAL), lambda n: [draw(H).abs() / 4], (0,)
    ),
    "alibi selects": Case(
        text("dot + t0[h] * float(q - k)", CAUSAL), lambda n: [draw(H).abs() / 4], (0,),
        options=lambda n: {"select_from": "logits", "head": 3},
    ),
    "learned bias selects": Case(
        text("dot + t0[0, h, q, k]", CAUSAL), lambda n: [draw(1, H, n, n)], (0,),
        options=lambda n: {"select_from": "logits"},
    ),
    "temperature": Case(text("dot * exp(t0[h, 0, 0])", CAUSAL), lambda n: [draw(H, 1, 1)], (0,)),
    "softcap": Case(text(SOFTCAP, WINDOW), ints=(11,)),
    "sink": Case(text(mask=CAUSAL, sink="t0[h]"), lambda n: [draw(H)], (0,)),
    "negative index": Case(
        text("dot + t0[q - 1, k - 1]", CAUSAL), lambda n: [draw(n, n)], (0,),
        options=lambda n: {"select_from": "logits"},
    ),
    "dropout": Case(options=lambda n: {"dropout": 0.3, "seed": torch.tensor([5])}),
    "gate": Case(options=lambda n: {"gate": torch.tensor([0.6])}),
    "selector": Case(options=lambda n: {"selector": [draw(B, 1, n, E), draw(B, 1, n, E) * 2]}),
    "softcap, gate, selector": Case(
        text(SOFTCAP, CAUSAL),
        options=lambda n: {
            "gate": torch.tensor(-0.7),
            "selector": [draw(B, 1, n, E), draw(B, 1, n, E) * 2],
        },
    ),
}  # fmt: skip


def qkv(dtype: torch.dtype = torch.float64, length: int = T, width: int = D) -> list[Tensor]:
    sizes = ((length, H, width), (length, G, width), (length, G, width // 2))
    return [draw(B, *size).to(dtype).transpose(1, 2) for size in sizes]


def call(case: Case, fn: Any, given: list[Tensor], extra: dict[str, Any], reads: Any) -> Any:
    names = ("seed", "selector", "gate", "carry")
    usual = {"seed": None, "selector": [], "gate": None, "carry": None}
    options = {"dropout": 0.0, "head": 0, "select_from": "qk"} | usual | extra
    args = (*given, reads, list(case.ints), *(options.pop(n) for n in names))
    return fn(*args, program=case.program, scale=0.3, **options)


def leaves(
    case: Case, dtype: torch.dtype, length: int = T, width: int = D
) -> tuple[list[Tensor], Any]:
    """Tensors that want gradients, and a function from (operator, leaves) to its results."""
    extra, reads = case.options(length), case.reads(length)
    inputs = qkv(dtype, length, width)
    inputs += [reads[i].to(dtype) for i in case.grads]
    inputs += [x.to(dtype) for x in extra.get("selector", [])]
    inputs += [extra["gate"].to(dtype)] if "gate" in extra else []

    def run(fn: Any, given: list[Tensor]) -> Any:
        rest = iter(given[3:])
        found = [next(rest) if i in case.grads else r for i, r in enumerate(reads)]
        own = dict(extra)
        if "selector" in own:
            own["selector"] = [next(rest), next(rest)]
        if "gate" in own:
            own["gate"] = next(rest)
        return call(case, fn, given[:3], own, found)

    return [x.detach().requires_grad_() for x in inputs], run


def with_gradients(case: Case, fn: Any, dtype: torch.dtype, wide: bool = False) -> list[Tensor]:
    given, run = leaves(case, dtype)
    if wide:
        given = [double(x).detach().requires_grad_() for x in given]
    out, lse, state = run(fn, given)
    grads = torch.autograd.grad(out, given, weights(out), materialize_grads=True)
    return [out.detach(), lse.detach(), state.detach(), *grads]


def eager(*args: Any, **kwargs: Any) -> Any:
    """What a model writes down: every step in its own dtype, but F in float32."""
    selection = selection_of(*args, **kwargs)
    amount, state = selective.masking(selection)
    given = selection.reading(selection.weighed(amount))
    program = Program.parse(given.program)
    out = attention_cases.eager(*given.qkv, given.reads, given.ints, program)
    return out, torch.zeros(()), state


def weights(out: Tensor) -> Tensor:
    """The gradient of the output."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)


def judged(case: Case, ours: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """What `with_gradients` gives: near to the exact numbers, as the plain ones are."""
    for number, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        if number == 1:  # lse
            b = a
        floor = 8 * torch.finfo(a.dtype).eps * float(c.abs().nan_to_num(0, posinf=0).max())
        if number > 2 and c.numel() == 1:  # the gate's: a sum over all places, which cancels
            floor = max(floor, 2 * torch.finfo(torch.float32).eps * gate_terms(case))
        keep = c.isfinite()
        assert torch.equal(keep, a.isfinite())
        within_budget(str(number), a[keep], b[keep], c[keep], floor)


def gate_terms(case: Case) -> float:
    """The sum of the absolute values of what makes up the gate's gradient, one for each result."""
    (*given, gate), run = leaves(case, torch.float64)
    out, slope = torch.func.jvp(
        lambda x: run(reference, [*given, x])[0], (gate,), (torch.ones_like(gate),)
    )
    return float((weights(out) * slope).detach().abs().sum())
