"""Masks as predicates (first version: signatures are final, analysis is coarse)."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from attn_compiler.ir.expr import FALSE, TRUE, Call, Expr, Read, depends, parse, walk


class Tile(enum.Enum):
    SKIP = "skip"
    PARTIAL = "partial"
    FULL = "full"


def normalise(expr: Expr, kinds: Sequence[str] = ()) -> Expr:
    return expr


@dataclass(frozen=True)
class Term:
    expr: Expr


@dataclass(frozen=True)
class Causal(Term):
    """k <= q + offset"""

    offset: Expr


@dataclass(frozen=True)
class Other(Term):
    """anything else"""


@dataclass(frozen=True, eq=False)
class Mask:
    expr: Expr
    names: tuple[str, ...]
    terms: tuple[Term, ...]

    def key_range(self, rows: tuple[int, int], sizes: Mapping[str, int], ints: Sequence[int] = ()) -> tuple[int, int]:
        return 0, sizes["S"]

    def tile(
        self, rows: tuple[int, int], cols: tuple[int, int], sizes: Mapping[str, int], ints: Sequence[int] = ()
    ) -> Tile:
        return Tile.PARTIAL

    def without(self, *terms: Term) -> Mask:
        return _mask([t for t in self.terms if t not in terms], self.names)

    def causal_offset(self) -> Expr | None:
        found = [t.offset for t in self.terms if isinstance(t, Causal)]
        return found[0] if len(found) == 1 else None

    def padding(self) -> list[Expr]:
        return [t.expr for t in self.terms if _reads(t.expr) and not depends(t.expr, "q", "h")]

    @property
    def rest(self) -> Expr:
        pads = self.padding()
        return _all([t.expr for t in self.terms if not isinstance(t, Causal) and t.expr not in pads])

    def split(self) -> tuple[Expr, Expr, Expr]:
        """(structural: q, k, sizes and ints only; key_only: no q; other), TRUE where there is none."""
        groups: tuple[list[Expr], list[Expr], list[Expr]] = ([], [], [])
        for term in self.terms:
            plain = not _reads(term.expr) and not depends(term.expr, "b", "h")
            groups[0 if plain else 2 if depends(term.expr, "q") else 1].append(term.expr)
        return _all(groups[0]), _all(groups[1]), _all(groups[2])


def classify(expr: Expr, names: Sequence[str] = (), kinds: Sequence[str] = ()) -> Mask:
    """names[i]: display name of slot i; kinds[i]: "bool", "int" or "float" of slot i where known ("" = unknown)."""
    causal = parse("k <= q")
    terms = [Causal(c, parse("0")) if c == causal else Other(c) for c in _conjuncts(expr) if c != TRUE]
    return _mask(terms, tuple(names))


def _mask(terms: Sequence[Term], names: tuple[str, ...]) -> Mask:
    return Mask(_all([t.expr for t in terms]), names, tuple(terms))


def _conjuncts(expr: Expr) -> Iterator[Expr]:
    if isinstance(expr, Call) and expr.op == "and":
        for arg in expr.args:
            yield from _conjuncts(arg)
    else:
        yield expr


def _all(parts: Sequence[Expr]) -> Expr:
    if FALSE in parts:
        return FALSE
    result: Expr = TRUE
    for part in parts:
        result = part if result == TRUE else Call("and", (result, part))
    return result


def _reads(expr: Expr) -> bool:
    return any(isinstance(n, Read) for n in walk(expr))
