"""The derivative of a score expression, as an expression.

    30.0 * tanh(dot / 30.0)   ->   (1.0 - square(tanh(dot / 30.0)))     with respect to dot

Kernels differentiate a score on paper, not by autograd: autograd is switched off where they run
(inside a compiled graph, below a dispatch mode), and a generated kernel needs the text anyway. At
kinks the choice is PyTorch's: 0 for abs and relu at 0, one half to each side where max or min meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

from attn_compiler.ir.expr import Call, Const, Expr, call, children

ZERO = Const(0.0)
ONE = Const(1.0)

_UNARY: dict[str, Callable[[Expr], Expr]] = {
    "neg": lambda x: Const(-1.0),
    "abs": lambda x: call("sign", x),
    "exp": lambda x: call("exp", x),
    "exp2": lambda x: call("mul", call("exp2", x), math.log(2)),
    "log": lambda x: call("reciprocal", x),
    "log2": lambda x: call("div", 1 / math.log(2), x),
    "sqrt": lambda x: call("mul", call("rsqrt", x), 0.5),
    "rsqrt": lambda x: call("div", call("mul", call("rsqrt", x), -0.5), x),
    "reciprocal": lambda x: call("neg", call("square", call("reciprocal", x))),
    "sin": lambda x: call("cos", x),
    "cos": lambda x: call("neg", call("sin", x)),
    "tanh": lambda x: call("sub", 1.0, call("square", call("tanh", x))),
    "sigmoid": lambda x: call("mul", call("sigmoid", x), call("sub", 1.0, call("sigmoid", x))),
    "relu": lambda x: call("where", call("gt", x, 0.0), 1.0, 0.0),
    "erf": lambda x: call(
        "mul", call("exp", call("neg", call("square", x))), 2 / math.sqrt(math.pi)
    ),
    "square": lambda x: call("mul", x, 2.0),
    "float": lambda x: ONE,
}


def _half_where_equal(first: str, x: Expr, y: Expr) -> Expr:
    return call("where", call("eq", x, y), 0.5, call("where", call(first, x, y), 1.0, 0.0))


def _power_slope(x: Expr, y: Expr) -> Expr:
    """y * x^(y-1), and 0 where y is 0, also at x = 0."""
    slope = call("mul", y, call("pow", x, call("sub", y, 1.0)))
    if isinstance(y, Const):
        return slope if y.value != 0 else ZERO
    return call("where", call("eq", y, 0.0), 0.0, slope)


def _exponent_slope(x: Expr, y: Expr) -> Expr:
    """x^y * log x, and 0 at x = 0 where the power is finite."""
    flat = call("and", call("eq", x, 0.0), call("ge", y, 0.0))
    return call("where", flat, 0.0, call("mul", call("pow", x, y), call("log", x)))


_BINARY: dict[str, tuple[Callable[[Expr, Expr], Expr], Callable[[Expr, Expr], Expr]]] = {
    "add": (lambda x, y: ONE, lambda x, y: ONE),
    "sub": (lambda x, y: ONE, lambda x, y: Const(-1.0)),
    "mul": (lambda x, y: y, lambda x, y: x),
    "div": (
        lambda x, y: call("div", 1.0, y),
        lambda x, y: call("neg", call("div", call("div", x, y), y)),
    ),
    "mod": (lambda x, y: ONE, lambda x, y: call("neg", call("floor", call("div", x, y)))),
    "min": (lambda x, y: _half_where_equal("lt", x, y), lambda x, y: _half_where_equal("lt", y, x)),
    "max": (lambda x, y: _half_where_equal("gt", x, y), lambda x, y: _half_where_equal("gt", y, x)),
    "pow": (_power_slope, _exponent_slope),
}


@lru_cache(maxsize=1024)
def slope(expr: Expr, of: Expr) -> Expr:
    """d expr / d of, where `of` is `dot` or one read; any other read is another variable."""
    if expr == of:
        return ONE
    if not isinstance(expr, Call):
        return ZERO
    if expr.op == "where":
        chosen, left, right = expr.args
        parts = slope(left, of), slope(right, of)
        return parts[0] if parts[0] == parts[1] else call("where", chosen, *parts)
    inner = [slope(arg, of) for arg in expr.args]
    # what is left out (comparisons, rounding, casts to int) is flat
    if expr.op in _UNARY:
        return _product(_UNARY[expr.op], children(expr), inner[0])
    if expr.op not in _BINARY:
        return ZERO
    left, right = (
        _product(d, children(expr), i) for d, i in zip(_BINARY[expr.op], inner, strict=True)
    )
    return right if left == ZERO else left if right == ZERO else call("add", left, right)


def _product(outer: Callable[..., Expr], args: tuple[Expr, ...], inner: Expr) -> Expr:
    """The chain rule, without building what is multiplied by zero or one."""
    if inner == ZERO:
        return ZERO
    factor = outer(*args)
    if factor == ZERO or inner == ONE:
        return factor
    return inner if factor == ONE else call("mul", factor, inner)
