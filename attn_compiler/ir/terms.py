"""The conjuncts of a mask by name.

k <= q + S - T         ->  Causal(S - T)   "causal(S - T)"
k >= q - 127           ->  Window(128)     "window(128)"             (beside a Causal)
t0[b, k] != 0          ->  Padding(0)      "padding(attention_mask)"
t1[b, k] == t1[b, q]   ->  Documents(1)    "documents(ids)"
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attn_compiler.ir.expr import SIZES, Call, Const, Expr, Read, Var, depends, walk
from attn_compiler.ir.linear import Integers, Linear
from attn_compiler.ir.predicate import (
    Bound,
    Fact,
    Junction,
    Predicate,
    conjunction,
    conjuncts,
    disjuncts,
    to_expr,
)


@dataclass(frozen=True, slots=True)
class Term:
    """One conjunct; `expr` is its truth, normalised."""

    expr: Expr


@dataclass(frozen=True, slots=True)
class Causal(Term):
    """k <= q + offset"""

    offset: Expr


@dataclass(frozen=True, slots=True)
class Window(Term):
    """q + offset - k < width: that many keys back, itself included; beside a Causal(offset)."""

    width: Expr
    offset: Expr


@dataclass(frozen=True, slots=True)
class Local(Term):
    """|q + offset - k| <= width"""

    width: Expr
    offset: Expr


@dataclass(frozen=True, slots=True)
class Chunked(Term):
    """k // size == (q + offset) // size"""

    size: int
    offset: Expr


@dataclass(frozen=True, slots=True)
class Prefix(Term):
    """k < length"""

    length: Expr


@dataclass(frozen=True, slots=True)
class Padding(Term):
    """A condition on one element of a tensor, found by batch and key."""

    slot: int
    condition: str


@dataclass(frozen=True, slots=True)
class Documents(Term):
    """The same element (of two tensors: equal elements) at the row and at the key."""

    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tensor(Term):
    """A condition on one element of a tensor, found by row and key."""

    slot: int
    condition: str


@dataclass(frozen=True, slots=True)
class Either(Term):
    """At least one option, each the conjunction of its terms."""

    options: tuple[tuple[Term, ...], ...]


@dataclass(frozen=True, slots=True)
class Other(Term):
    """Whatever has no name."""


_RANK = (Causal, Window, Local, Chunked, Prefix, Either, Padding, Documents, Tensor, Other)


def name_terms(parts: Sequence[Predicate]) -> tuple[Term, ...]:
    named, left = _diagonals(parts)
    shift = _shift(named)
    terms = [*named, *(_name(p, shift) for p in left)]
    return tuple(sorted(terms, key=lambda t: _RANK.index(type(t))))


def _shift(terms: Sequence[Term]) -> Expr:
    offsets = [t.offset for t in terms if isinstance(t, Causal)]
    return offsets[0] if len(offsets) == 1 else Const(0)


def _diagonals(parts: Sequence[Predicate]) -> tuple[list[Term], list[Predicate]]:
    """Bounds on k - q; a lower beside one upper bound is a window, or both are a local band."""
    found = {p: limit for p in parts if (limit := _diagonal(p)) is not None}
    upper = [p for p in found if isinstance(p, Bound) and p.rel == "le"]
    lower = [p for p in found if p not in upper]
    named: list[Term] = [Causal(to_expr(p), found[p].expr()) for p in upper]
    band = _band(upper[0], lower[0], found) if len(upper) == len(lower) == 1 else None
    if isinstance(band, Local):
        named = [band]
    elif band is not None:
        named.append(band)
    used = (*upper, *lower) if band is not None else upper
    return named, [p for p in parts if p not in used]


def _diagonal(p: Predicate) -> Linear | None:
    """The limit in `k <= q + limit` or `k >= q + limit`, made of sizes and integers."""
    if not isinstance(p, Bound) or p.rel not in ("le", "ge"):
        return None
    terms = dict(p.part)
    if terms.pop(Var("k"), 0) != 1 or terms.pop(Var("q"), 0) != -1 or not all(map(_is_free, terms)):
        return None
    return Linear({a: -c for a, c in terms.items()}, p.value)


def _is_free(atom: Expr) -> bool:
    """Made of sizes and run-time integers."""
    return not has_reads(atom) and not depends(atom, "b", "h", "q", "k")


def _band(
    high: Predicate, low: Predicate, found: Mapping[Predicate, Linear]
) -> Window | Local | None:
    gap, middle = found[high].plus(found[low], -1), found[high].plus(found[low])
    if any(depends(a, *SIZES) for a in gap.terms):
        return None
    # a band whose middle is no plain diagonal (q, q + S - T, q + n0) is a causal mask with a window
    plain = middle.const == 0 and (not gap.terms or all(depends(a, *SIZES) for a in middle.terms))
    if plain and _even(gap) and _even(middle) and (gap.terms or gap.const > 0):
        return Local(to_expr(conjunction((low, high))), _half(gap).expr(), _half(middle).expr())
    return Window(to_expr(low), gap.plus(Linear({}, 1)).expr(), found[high].expr())


def _even(value: Linear) -> bool:
    return not any(c % 2 for c in (value.const, *value.terms.values()))


def _half(value: Linear) -> Linear:
    return Linear({a: c // 2 for a, c in value.terms.items()}, value.const // 2)


def _name(p: Predicate, shift: Expr) -> Term:
    if isinstance(p, Junction):
        options = sorted(
            (name_terms(conjuncts(o)) for o in disjuncts(p)), key=lambda o: _RANK.index(type(o[0]))
        )
        return Either(to_expr(p), tuple(options)) if options else Other(to_expr(p))
    return _prefix(p) or _chunked(p) or _documents(p) or _element(p) or Other(to_expr(p))


def _prefix(p: Bound | Fact) -> Prefix | None:
    expr = to_expr(p)
    if (
        not isinstance(expr, Call)
        or expr.args[0] != Var("k")
        or depends(expr.args[1], "h", "q", "k")
    ):
        return None
    if expr.op == "lt":  # of a tensor that may hold fractions
        return Prefix(expr, expr.args[1])
    if not isinstance(p, Bound) or p.rel != "le":
        return None
    length = Linear({a: -c for a, c in p.part[1:]}, p.value + 1)
    return Prefix(expr, length.expr())


def _chunked(p: Bound | Fact) -> Chunked | None:
    """k // c - (q + offset) // c == whole chunks of offset"""
    if not isinstance(p, Bound) or p.rel != "eq" or not p.part:
        return None
    key = p.part[0][0]
    rows = [
        a
        for a, c in p.part
        if c == -1 and isinstance(a, Call) and a.op == "floordiv" and depends(a, "q")
    ]
    if not (
        isinstance(key, Call)
        and key.op == "floordiv"
        and key.args[0] == Var("k")
        and len(rows) == 1
    ):
        return None
    row, size = rows[0], key.args[1]
    assert isinstance(row, Call)
    inner = Integers().linear(row.args[0])
    if (
        row.args[1] != size
        or not isinstance(size, Const)
        or inner is None
        or inner.terms.get(Var("q")) != 1
    ):
        return None
    whole = Linear({a: -c for a, c in p.part if a not in (key, row)}, p.value)
    offset = inner.plus(Linear({Var("q"): -1})).plus(whole, int(size.value))
    return (
        Chunked(to_expr(p), int(size.value), offset.expr())
        if all(map(_is_free, offset.terms))
        else None
    )


def _documents(p: Bound | Fact) -> Documents | None:
    sides: list[Expr] = []
    if isinstance(p, Fact) and p.holds and isinstance(p.expr, Call) and p.expr.op == "eq":
        sides = list(p.expr.args)
    elif (
        isinstance(p, Bound)
        and p.rel == "eq"
        and p.value == 0
        and [c for _, c in p.part] == [1, -1]
    ):
        sides = [a for a, _ in p.part]
    reads = [s for s in sides if isinstance(s, Read)]
    by_key = [r for r in reads if depends(r, "k") and not depends(r, "q", "h")]
    by_row = [r for r in reads if depends(r, "q") and not depends(r, "k", "h")]
    if len(by_key) != 1 or len(by_row) != 1:
        return None
    slots = (by_row[0].slot, by_key[0].slot)
    return Documents(to_expr(p), slots if slots[0] != slots[1] else slots[:1])


def _element(p: Bound | Fact) -> Padding | Tensor | None:
    """A condition on one read and nothing else."""
    expr = to_expr(p)
    reads = [n for n in walk(expr) if isinstance(n, Read)]
    if len(reads) != 1 or not depends(reads[0], "k") or not _is_condition(expr, reads[0]):
        return None
    condition = _CONDITIONS.get(str(expr).replace(str(reads[0]), "t", 1)) or str(expr).replace(
        str(reads[0]), "{}", 1
    )
    if depends(reads[0], "q"):
        return Tensor(expr, reads[0].slot, condition)
    return None if depends(reads[0], "h") else Padding(expr, reads[0].slot, condition)


# attention masks hold 0 and 1: the two ways to ask for "kept" get one name, `expr` has the truth
_CONDITIONS = {
    "t": "{}",
    "~t": "~{}",
    "t != 0": "{}",
    "t == 0": "~{}",
    "t == 1": "{}",
    "t != 1": "~{}",
}


def _is_condition(expr: Expr, read: Read) -> bool:
    return expr == read or (
        isinstance(expr, Call)
        and all(a == read or isinstance(a, Const) or _is_condition(a, read) for a in expr.args)
    )


def has_reads(expr: Expr) -> bool:
    return any(isinstance(n, Read) for n in walk(expr))


# ---------------------------------------------------------------- text


def terms_text(terms: Sequence[Term], names: Sequence[str]) -> str:
    """`causal & padding(attention_mask)`; "none" where there is no term."""
    return _join([_term_text(t, names, _shift(terms)) for t in terms], "&") or "none"


def _join(texts: Sequence[str], sign: str) -> str:
    if len(texts) < 2:
        return "".join(texts)
    return f" {sign} ".join(f"({t})" if _is_compound(t) else t for t in texts)


def _is_compound(text: str) -> bool:
    """More than a name, a call or a read at the outermost level."""
    depth = 0
    for char in text:
        depth += (char in "([") - (char in ")]")
        if char == " " and not depth:
            return True
    return False


def _term_text(term: Term, names: Sequence[str], shift: Expr) -> str:
    if isinstance(term, Either):
        options = ([_term_text(t, names, _shift(o)) for t in o] for o in term.options)
        return _join([_join(o, "&") for o in options], "|")
    arguments = _arguments(term, names, shift)
    if arguments is None:
        return _with_names(str(term.expr), names)
    name = type(term).__name__.lower()
    return f"{name}({', '.join(arguments)})" if arguments else name


def _arguments(term: Term, names: Sequence[str], shift: Expr) -> list[str] | None:
    if isinstance(term, Causal):
        return _offset_text(term.offset, Const(0))
    if isinstance(term, Window):
        return [str(term.width)]
    if isinstance(term, Local):
        return [str(term.width), *_offset_text(term.offset, Const(0))]
    if isinstance(term, Chunked):
        return [str(term.size), *_offset_text(term.offset, shift)]
    if isinstance(term, Prefix):
        return [_with_names(str(term.length), names)]
    if isinstance(term, Padding | Tensor):
        return [term.condition.format(_slot_name(term.slot, names))]
    return [_slot_name(s, names) for s in term.slots] if isinstance(term, Documents) else None


def _offset_text(offset: Expr, usual: Expr) -> list[str]:
    if offset == usual:
        return []
    return [f"{offset.value:+d}" if isinstance(offset, Const) and offset.value else str(offset)]


def _slot_name(slot: int, names: Sequence[str]) -> str:
    return names[slot] if slot < len(names) and names[slot] else f"t{slot}"


def _with_names(text: str, names: Sequence[str]) -> str:
    return re.sub(r"\bt(\d+)\[", lambda m: _slot_name(int(m[1]), names) + "[", text)
