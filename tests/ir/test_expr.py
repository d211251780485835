"""The expression language: one text per tree, Python's meaning, exact integers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_compiler.ir.evaluate import evaluate
from attn_compiler.ir.expr import (
    DOT,
    FALSE,
    TRUE,
    Call,
    Const,
    Expr,
    Int,
    Read,
    Var,
    call,
    depends,
    parse,
    slots,
    substitute,
    walk,
)
from attn_compiler.ir.score import gain

_ONE = ["not", "neg", "abs", "exp", "log2", "tanh", "floor", "sign", "int", "float", "bool"]
_TWO = ["add", "sub", "mul", "div", "floordiv", "mod", "and", "or", "xor", "min", "max", "pow"]
_TWO += ["eq", "ne", "lt", "le", "gt", "ge"]

numbers = st.one_of(
    st.booleans(),
    st.integers(-(10**6), 10**6),
    st.floats(allow_nan=True, allow_infinity=True),
)
leaves: st.SearchStrategy[Expr] = st.one_of(
    numbers.map(Const),
    st.sampled_from([Var(n) for n in "bhqkBHTS"]),
    st.integers(0, 3).map(Int),
    st.just(DOT),
)


def _grow(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    # a negated constant is written, and read, as a negative constant
    term = inner.filter(lambda e: not isinstance(e, Const))
    return st.one_of(
        st.builds(Call, st.sampled_from(_ONE), st.tuples(term)),
        st.builds(Call, st.sampled_from(_TWO), st.tuples(inner, inner)),
        st.builds(Call, st.just("where"), st.tuples(inner, inner, inner)),
        st.builds(Read, st.integers(0, 12), st.lists(inner, max_size=4).map(tuple)),
    )


trees = st.recursive(leaves, _grow, max_leaves=12)


@settings(max_examples=150, deadline=None)
@given(trees)
def test_text_is_read_back_as_the_same_tree(expr: Expr) -> None:
    assert parse(str(expr)) == expr


@pytest.mark.parametrize(
    "text",
    [
        "where((k <= q) & t0[b, k], 30.0 * tanh(dot / 30.0), -inf)",
        "q - (k - 1)",
        "q - k - 1",
        "q // (k * 2) * 3",
        "-q + k",
        "-(q + k)",
        "~(k <= q) | (k == 0)",
        "k <= q | T",
        "(k <= q) == (q <= k)",
        "(q & k) + 1",
        "q & k + 1",
        "(q | k) ^ b & h",
        "q ^ k & b | h",
        "k * (-3)",
        "-3 * k",
        "q - -3",
        "~(-3)",
        "-(-q)",
        "t0[()]",
        "t12[b, min(q, k) - n1, T // 2]",
        "pow(2.0, -8.0 * (h + 1) / H) * (k - q)",
    ],
)
def test_text_has_no_parentheses_but_the_needed(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    ("spelling", "text"),
    [
        ("((q) + (k))", "q + k"),
        ("(q*k)+1", "q * k + 1"),
        ("+q", "q"),
        ("-(3)", "-3"),
        ("not q", "~q"),
        ("t0[b]", "t0[b]"),
    ],
)
def test_spellings_that_python_allows(spelling: str, text: str) -> None:
    assert str(parse(spelling)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "q +",
        "x",
        "q.k",
        "0 < k < 5",
        "nope(q)",
        "where(k)",
        "exp(q, k)",
        "max(q)",
        "u0[b]",
        "t[b]",
        "n",
        "'q'",
        "q ** 2",
        "lambda: 1",
        "__import__('os')",
        "exp(q).real",
    ],
)
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a score expression"):
        parse(text)


def test_constants_of_different_kinds_differ() -> None:
    assert len({Const(1), Const(1.0), TRUE, Const(0), FALSE, Const(0.0), Const(-0.0)}) == 7
    assert Const(math.nan) == Const(math.nan)


_PYTHON: dict[str, Callable[[int, int], int | bool]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "min": min,
    "max": max,
    "and": lambda a, b: bool(a) and bool(b),
    "or": lambda a, b: bool(a) or bool(b),
    "xor": lambda a, b: bool(a) != bool(b),
}


def _by_hand(expr: Expr, env: dict[str, int]) -> int | bool:
    if isinstance(expr, Const):
        return int(expr.value) if not isinstance(expr.value, bool) else expr.value
    if isinstance(expr, Var):
        return env[expr.name]
    assert isinstance(expr, Call)
    if expr.op == "where":
        return _by_hand(expr.args[1 if _by_hand(expr.args[0], env) else 2], env)
    values = [_by_hand(a, env) for a in expr.args]
    if len(values) == 2:
        return _PYTHON[expr.op](*values)
    return {"not": operator.not_, "neg": operator.neg, "abs": abs, "int": int, "bool": bool}[
        expr.op
    ](values[0])


_small = st.one_of(st.sampled_from([Var(n) for n in "qkTS"]), st.integers(-9, 9).map(Const))
_nonzero = st.sampled_from([-7, -3, -1, 1, 2, 5]).map(Const)


def _grow_integers(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    arithmetic = ["add", "sub", "mul", "min", "max"]
    compared = st.builds(
        Call, st.sampled_from(["eq", "ne", "lt", "le", "gt", "ge"]), st.tuples(inner, inner)
    )
    logic = st.builds(Call, st.sampled_from(["and", "or", "xor"]), st.tuples(compared, compared))
    truth = st.one_of(compared, logic, compared.map(lambda c: Call("not", (c,))))
    return st.one_of(
        st.builds(Call, st.sampled_from(arithmetic), st.tuples(inner, inner)),
        st.builds(Call, st.sampled_from(["floordiv", "mod"]), st.tuples(inner, _nonzero)),
        st.builds(Call, st.sampled_from(["neg", "abs", "int"]), st.tuples(inner)),
        st.builds(Call, st.just("where"), st.tuples(truth, inner, inner)),
        truth.map(lambda c: Call("int", (c,))),
    )


@settings(max_examples=150, deadline=None)
@given(st.recursive(_small, _grow_integers, max_leaves=8))
def test_integers_are_python_integers(expr: Expr) -> None:
    t, s = 3, 5
    env = {"q": torch.arange(t).view(t, 1), "k": torch.arange(s), "T": t, "S": s}
    found = evaluate(expr, env).expand(t, s).tolist()
    expected = [
        [_by_hand(expr, {"q": q, "k": k, "T": t, "S": s}) for k in range(s)] for q in range(t)
    ]
    assert found == expected


@settings(max_examples=100, deadline=None)
@given(st.recursive(_small, _grow_integers, max_leaves=8), st.integers(0, 4), st.integers(0, 4))
def test_folding_and_substituting_keep_the_value(expr: Expr, q: int, k: int) -> None:
    known = {Var("q"): Const(q), Var("k"): Const(k), Var("T"): Const(5), Var("S"): Const(6)}
    found = substitute(expr, known)
    assert isinstance(found, Const)
    assert found.value == _by_hand(expr, {"q": q, "k": k, "T": 5, "S": 6})


def test_reads_gather_and_broadcast() -> None:
    torch.manual_seed(0)
    bias, table = torch.randn(2, 3, 4, 5), torch.randn(9)
    env = {
        "b": torch.arange(2).view(2, 1, 1, 1),
        "h": torch.arange(3).view(3, 1, 1),
        "q": torch.arange(4).view(4, 1),
        "k": torch.arange(5),
    }
    found = evaluate(parse("t0[b, h, q, k] + t1[k - q + n0]"), env, (bias, table), (3,))
    for b, h, q, k in ((0, 0, 0, 0), (1, 2, 3, 4), (0, 1, 2, 4)):
        assert found[b, h, q, k] == bias[b, h, q, k] + table[k - q + 3]
    assert evaluate(parse("t0[()]"), {}, (torch.tensor(2.5),)) == 2.5


@pytest.mark.parametrize("text", ["q / 3", "sin(q)", "1 / 3 * q", "exp2(q) / 7", "sqrt(q + 1)"])
def test_integers_become_numbers_of_the_asked_precision(text: str) -> None:
    q = torch.arange(5)
    wide = q.double()
    expected = {
        "q / 3": wide / 3,
        "sin(q)": wide.sin(),
        "1 / 3 * q": wide / 3,
        "exp2(q) / 7": wide.exp2() / 7,
        "sqrt(q + 1)": (wide + 1).sqrt(),
    }[text]
    found = evaluate(parse(text), {"q": q}, dtype=torch.float64)
    assert found.dtype is torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)
    assert evaluate(parse(text), {"q": q}).dtype is torch.float32


def test_folding_is_done_in_double_precision() -> None:
    assert call("div", 1, 3) == Const(1 / 3)
    assert call("exp2", 1) == Const(2.0)
    assert call("floordiv", -7, 2) == Const(-4)
    assert call("and", True, False) == FALSE
    assert isinstance(call("floordiv", 1, 0), Call)


def test_gradients_reach_the_product_and_the_tensors() -> None:
    dot = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    env = {"q": torch.arange(3).view(3, 1), "k": torch.arange(4)}

    def score(dot: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        text = "where(k <= q, 30.0 * tanh((dot + t0[k]) / 30.0), -1.0)"
        return evaluate(parse(text), env, (bias,), dot=dot, dtype=torch.float64)

    assert torch.autograd.gradcheck(score, (dot, bias))


def test_questions_about_a_tree() -> None:
    expr = parse("where(k <= q, t3[b, k] + t1[q], dot)")
    assert slots(expr) == [1, 3]
    assert depends(expr, "b")
    assert not depends(expr, "h", "T")
    shared = Call("add", (expr, expr))
    assert len([n for n in walk(shared) if n is expr]) == 1
    with pytest.raises(KeyError):
        call("nope", 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dot", 1.0),
        ("(dot + t0[q, k]) * 0.5", 0.5),
        ("t0[q, k] + dot / 4.0", 0.25),
        ("where(k <= q, 3.0 * dot, -inf)", 3.0),
        ("5.0 * tanh(dot / 5.0)", 1.0),
    ],
)
def test_what_a_score_multiplies_the_products_by(text: str, expected: float) -> None:
    assert gain(parse(text)) == expected
