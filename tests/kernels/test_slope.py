"""Derivatives of score expressions on paper against autograd."""

from __future__ import annotations

import pytest
import torch

from attn_compiler.ir.evaluate import evaluate
from attn_compiler.ir.expr import DOT, Read, parse
from attn_compiler.ir.pointwise import OPS
from attn_compiler.kernels.slope import ZERO, slope

POSITIVE = "exp(dot) + 0.5"
EXPRESSIONS = [
    "-dot",
    "abs(dot)",
    "exp(dot)",
    "exp2(dot)",
    f"log({POSITIVE})",
    f"log2({POSITIVE})",
    f"sqrt({POSITIVE})",
    f"rsqrt({POSITIVE})",
    f"reciprocal({POSITIVE})",
    "sin(dot)",
    "cos(dot)",
    "30.0 * tanh(dot / 30.0)",
    "sigmoid(dot)",
    "relu(dot)",
    "erf(dot)",
    "floor(dot) + ceil(dot) * trunc(dot) + sign(dot)",
    "square(dot)",
    "float(dot)",
    "dot * t0[k] - dot / (t0[k] * t0[k] + 1.0)",
    f"dot % ({POSITIVE} + 1.0)",
    "min(dot, t0[k]) + max(dot * 2.0, t0[k])",
    "max(relu(dot), 0.0 * t0[k])",
    f"pow({POSITIVE}, t0[k])",
    "pow(dot, 3.0) + pow(dot, 0.0) + pow(dot, 2)",
    "where(dot > t0[k], dot * dot, exp(t0[k]))",
    "where(dot <= 0.5, dot, 1.0) * where((dot < 1.0) & ~(dot == 0.0), 2.0, t0[k])",
    "dot * 0.5 * (1.0 + erf(dot * 0.7071067811865476))",
    "t0[k] + 1.0",
    "float(int(dot)) * t0[k]",
]


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_slope_is_that_of_autograd(text: str) -> None:
    expr = parse(text)
    draw = torch.Generator().manual_seed(0)
    dot, read = (torch.randn(97, dtype=torch.float64, generator=draw) for _ in range(2))
    # kinks and ties, but no place where a function ends
    dot[:3], read[:3] = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([0.0, 2.0, -2.0])
    dot.requires_grad_(), read.requires_grad_()
    env = {"k": torch.arange(97)}
    value = evaluate(expr, env, [read], (), dot, torch.float64).expand(97)
    exact = [torch.zeros_like(dot)] * 2
    if value.requires_grad:
        exact = list(torch.autograd.grad(value.sum(), (dot, read), materialize_grads=True))
    for of, expected in zip((DOT, Read(0, (parse("k"),))), exact, strict=True):
        found = evaluate(slope(expr, of), env, [read.detach()], (), dot.detach(), torch.float64)
        assert torch.allclose(found.double().expand(97), expected, 1e-12, 1e-12), of


def test_every_operation_is_covered() -> None:
    text = " ".join(EXPRESSIONS)
    written_as_signs = {"add", "sub", "mul", "div", "mod", "neg"}
    flat = {"floordiv", "not", "and", "xor", "eq", "ne", "lt", "le", "gt", "ge", "bool"}
    assert {op for op in OPS if f"{op}(" not in text} == written_as_signs | flat


def test_other_reads_are_other_variables() -> None:
    assert slope(parse("t0[k] + t1[k]"), parse("t0[q]")) == ZERO
