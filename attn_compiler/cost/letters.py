"""The letters of every cost formula, and what a formula counts.

    B batch · T query rows · S key rows · H query heads · G kv heads · d head dim · e value dim
    D width of the model · L layers · K beams · n bytes of an element
    E experts · k active experts · C chunk · rho share of blocks that are kept · M rows of a tile

Cost(flops=4 * B * H * T * S * d)   --numbers(B=1, H=8, ...)-->   what a machine has to do
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import sympy

B, T, S, H, G, d, e, D, L, K, n, E, k, C, M = sympy.symbols(
    "B T S H G d e D L K n E k C M", positive=True, integer=True
)
# of a tile, where nobody says
ROWS_OF_A_TILE = 64
rho = sympy.Symbol("rho", positive=True)

Number = Any  # a sympy expression, or a number: sympy has no types


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call costs: formulas in the letters above, or numbers.

    Attributes:
        flops: operations of matrix products, a multiplication and an addition counted as two.
        exps: exponentials, and whatever else the special-function unit computes.
        other: further floating-point operations on scores.
        read, written: bytes that have to cross the memory's bus, each tensor once.
        launches: kernels.
        saved: bytes kept for the backward.
        cache: bytes kept from one decoding step to the next.
        near: bytes from the last cache to the processors, of kernels of attention in tiles of M x M
            scores; products with weights are a library's, and not in it.
    """

    flops: Number = 0
    exps: Number = 0
    other: Number = 0
    read: Number = 0
    written: Number = 0
    launches: Number = 0
    saved: Number = 0
    cache: Number = 0
    near: Number = 0

    def __add__(self, more: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(more, f.name) for f in fields(self)))

    def beyond(self, part: Cost) -> Cost:
        """Numbers without those of a part, nowhere less than 0."""
        return Cost(
            *(max(0.0, getattr(self, f.name) - getattr(part, f.name)) for f in fields(self))
        )

    def times(self, factor: Number) -> Cost:
        return Cost(*(getattr(self, f.name) * factor for f in fields(self)))

    def simplified(self) -> Cost:
        return Cost(*(sympy.factor(getattr(self, f.name)) for f in fields(self)))

    def texts(self) -> dict[str, str]:
        """The formulas that are not 0, simplified: "flops" -> "4*B*H*S*T*d"."""
        return dict(_texts(self))

    def numbers(self, **sizes: float) -> Cost:
        """The same with a number for every letter; M need not be given.

        Raises:
            KeyError: a letter of a formula has no number.
        """
        known = {"M": ROWS_OF_A_TILE, **sizes}
        return Cost(*(float(f(known)) for f in _compiled(self)))


@lru_cache(maxsize=256)
def _compiled(cost: Cost) -> tuple[Any, ...]:
    return tuple(_function(getattr(cost, f.name)) for f in fields(cost))


def _function(formula: Number) -> Any:
    formula = sympy.sympify(formula)
    names = sorted(str(s) for s in formula.free_symbols)
    compiled = sympy.lambdify(names, formula, "math")
    return lambda sizes: compiled(*(sizes[name] for name in names))


@lru_cache(maxsize=256)
def _texts(cost: Cost) -> tuple[tuple[str, str], ...]:
    found = cost.simplified()
    named = [(f.name, getattr(found, f.name)) for f in fields(found)]
    return tuple((name, str(formula)) for name, formula in named if formula != 0)
