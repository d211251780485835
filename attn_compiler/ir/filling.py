"""Telling the mask from the score: which part of the logits only says "this key may not be seen".

    where(P, x, -inf)      x + where(P, 0, finfo.min)      x + (1 - float(P)) * finfo.min      ->
    (x, P)

What a row gets that may see no key at all differs between these spellings, and so do fills that are
not large enough
to forbid anything. A fill is split off only where the rest of the program is then exactly the same
function;
otherwise it stays in the score as the arithmetic it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from attn_compiler.ir.expr import DOT, FALSE, TRUE, Call, Const, Expr, Var, call, substitute, walk
from attn_compiler.ir.mask import normalise
from attn_compiler.ir.score import Empty

# exp(x - 1e8) is zero beside any logit that a float can hold without being absorbed itself
_FORBIDDING = -1e8
_ABSORBING = -1e30

_ONE_ZERO = (Const(1.0), Const(0.0))
_ZERO_ONE = (Const(0.0), Const(1.0))
_BOOLEAN = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not", "bool"})


@dataclass(frozen=True)
class Split:
    score: Expr
    mask: Expr
    empty: Empty


@dataclass
class _Found:
    mask: list[Expr]
    fills: set[float]
    added: int = 0  # how many finite fills are added rather than set
    infinite_set: bool = False
    infinite_added: bool = False
    summed: bool = False  # a fill is added to what another fill has set

    def cast(self, lowest: float) -> None:
        """Fills below the lowest number that the softmax knows are infinite there."""
        if any(-math.inf < fill < lowest for fill in self.fills):
            self.fills = {-math.inf if fill < lowest else fill for fill in self.fills}
            self.infinite_added |= self.added > 0
            self.infinite_set |= self.added == 0


def split(
    logits: Expr,
    dtype: torch.dtype,
    bounded: Callable[[Expr], bool],
    is_bool: Callable[[Expr], bool],
    rows_in_keys: bool,
    lowest: float = -math.inf,
) -> Split:
    """Split `logits`, an expression over `dot`, into score and mask.

    Args:
        logits: what the softmax sees.
        dtype: the dtype of the logits in the model.
        bounded: is this leaf known not to hold huge negative numbers of its own?
        is_bool: is this leaf a boolean?
        rows_in_keys: is T <= S known?
        lowest: the lowest finite number of the dtype that the softmax computes in.
    """
    found = _Found([], set())
    score = _strip(logits, found, dtype, is_bool)
    found.cast(lowest)
    if not found.mask:
        return Split(logits, TRUE, "any")
    if found.infinite_added and _holds_fill(score):
        # a negative factor makes it +inf, and +inf with -inf added is NaN in the whole row
        return Split(logits, TRUE, "any")
    mask = normalise(_all(found.mask))
    if never_empty(mask, rows_in_keys) and _fills_forbid(found, score, bounded):
        return Split(score, mask, "any")
    if found.infinite_set and found.infinite_added:
        # a row dead by what was set passes no gradient, by what was added NaN: it cannot be both
        return Split(logits, TRUE, "any")
    if found.fills == {-math.inf}:
        return Split(score, mask, "nan_added" if found.infinite_added else "nan")
    if len(found.fills) == 1 and _uniform(found, score, dtype, bounded):
        return Split(score, mask, "absorbed" if found.added else "uniform")
    return Split(logits, TRUE, "any")


def spread(logits: Expr, dtype: torch.dtype) -> Expr:
    """where(P, x, -inf) * 2 as where(P, x * 2, -inf): a factor behind a mask goes before it."""
    if not isinstance(logits, Call):
        return logits
    if logits.op == "where":
        condition, yes, no = logits.args
        return call("where", condition, spread(yes, dtype), spread(no, dtype))
    if logits.op not in ("mul", "div"):
        return logits
    inner, by = logits.args
    if logits.op == "mul" and isinstance(inner, Const):
        inner, by = by, inner
    if not (isinstance(by, Const) and by.value > 0 and math.isfinite(by.value)):
        return logits
    inner = spread(inner, dtype)
    if not (isinstance(inner, Call) and inner.op == "where"):
        return logits
    factor = by.value if logits.op == "mul" else 1 / by.value
    condition, *sides = inner.args
    fills = [_scaled_fill(side, factor, dtype) for side in sides]
    if fills[0] is None and fills[1] is None:
        return logits
    yes, no = (
        spread(Call(logits.op, (side, by)), dtype) if fill is None else fill
        for side, fill in zip(sides, fills, strict=True)
    )
    return call("where", condition, yes, no)


def _scaled_fill(side: Expr, factor: float, dtype: torch.dtype) -> Const | None:
    """A fill times a number, as long as it forbids then, too."""
    if not _is_fill(side, dtype):
        return None
    assert isinstance(side, Const)
    filled = side.value * factor
    if filled > _FORBIDDING:
        return None
    return Const(filled if filled >= torch.finfo(dtype).min else -math.inf)


def _fills_forbid(found: _Found, score: Expr, bounded: Callable[[Expr], bool]) -> bool:
    return all(math.isinf(f) for f in found.fills) or all_bounded(score, bounded)


def _uniform(
    found: _Found, score: Expr, dtype: torch.dtype, bounded: Callable[[Expr], bool]
) -> bool:
    """Does a row without keys hold one and the same number everywhere?"""
    (fill,) = found.fills
    absorbing = fill <= _ABSORBING or fill == torch.finfo(dtype).min
    alike = found.added == 0 or (found.added == 1 and absorbing)
    return alike and not found.summed and all_bounded(score, bounded)


def _holds_fill(score: Expr) -> bool:
    return any(
        isinstance(node, Const) and not isinstance(node.value, bool) and node.value <= _FORBIDDING
        for node in walk(score)
    )


def all_bounded(score: Expr, bounded: Callable[[Expr], bool]) -> bool:
    if _holds_fill(score):
        return False
    for node in walk(score):
        if not isinstance(node, Call | Const | Var) and node != DOT and not bounded(node):
            return False
    return True


def never_empty(mask: Expr, rows_in_keys: bool) -> bool:
    """Does every row see the first key, the last one, or the one at its own position?

    Args:
        rows_in_keys: is T <= S known? Otherwise a row may have no key at its own position (nor,
            counted from the end, at q + S - T).
    """
    own, last = Var("q"), call("sub", Var("S"), 1)
    probes: list[Expr] = [Const(0), last]
    if rows_in_keys:
        probes += [own, call("add", own, call("sub", Var("S"), Var("T")))]
    return any(normalise(substitute(mask, {Var("k"): at})) == TRUE for at in probes)


def _all(parts: list[Expr]) -> Expr:
    result = parts[0]
    for part in parts[1:]:
        result = call("and", result, part)
    return result


# ---------------------------------------------------------------- stripping


def _strip(
    logits: Expr, found: _Found, dtype: torch.dtype, is_bool: Callable[[Expr], bool]
) -> Expr:
    """Take fills off the outside of `logits`, as long as that goes."""
    while isinstance(logits, Call):
        inner = _strip_where(logits, found, dtype) if logits.op == "where" else None
        if inner is None and logits.op in ("add", "sub"):
            inner = _strip_sum(logits, found, dtype, is_bool)
        if inner is None and logits.op == "max":
            # torch.max(scores, finfo.min): only -inf could be below
            inner = next(
                (b for a, b in (logits.args, logits.args[::-1]) if _is_floor(a, dtype)), None
            )
        if inner is None:
            break
        logits = inner
    return logits


def _is_floor(expression: Expr, dtype: torch.dtype) -> bool:
    return isinstance(expression, Const) and expression.value == torch.finfo(dtype).min


def _strip_where(logits: Call, found: _Found, dtype: torch.dtype) -> Expr | None:
    condition, yes, no = logits.args
    if _holds_dot(condition):
        return None
    for keep, inner, fill in ((condition, yes, no), (call("not", condition), no, yes)):
        if _is_fill(fill, dtype) and _holds_dot(inner):
            assert isinstance(fill, Const)
            found.mask.append(keep)
            found.fills.add(float(fill.value))
            found.infinite_set |= math.isinf(fill.value)
            found.summed |= found.added > 0 and not math.isinf(fill.value)
            return inner
    return None


def _strip_sum(
    logits: Call, found: _Found, dtype: torch.dtype, is_bool: Callable[[Expr], bool]
) -> Expr | None:
    terms = _terms(logits, 1)
    kept: list[tuple[int, Expr]] = []
    taken = False
    for sign, term in terms:
        fills: set[float] = set()
        keep = (
            None
            if _holds_dot(term)
            else _as_mask(term if sign > 0 else call("neg", term), fills, dtype, is_bool)
        )
        if keep is None and sign > 0 and not _holds_dot(term):
            keep, term = _beside_fill(term, fills, dtype)
            kept += [] if keep is None else [(sign, term)]
        # a term of -inf and finite fills at once would leave rows that are neither uniform nor NaN
        if keep is None or len(fills) != 1:
            kept.append((sign, term))
            continue
        found.mask.append(keep)
        found.fills |= fills
        found.added += not math.isinf(next(iter(fills)))
        found.infinite_added |= math.isinf(next(iter(fills)))
        taken = True
    if not taken or not kept:
        return None
    kept.sort(key=lambda pair: pair[0], reverse=True)
    result = kept[0][1] if kept[0][0] > 0 else call("neg", kept[0][1])
    for sign, term in kept[1:]:
        result = call("add" if sign > 0 else "sub", result, term)
    return result


def _terms(expression: Expr, sign: int) -> list[tuple[int, Expr]]:
    if isinstance(expression, Call) and expression.op == "add":
        return _terms(expression.args[0], sign) + _terms(expression.args[1], sign)
    if isinstance(expression, Call) and expression.op == "sub":
        return _terms(expression.args[0], sign) + _terms(expression.args[1], -sign)
    return [(sign, expression)]


def _as_mask(
    term: Expr, fills: set[float], dtype: torch.dtype, is_bool: Callable[[Expr], bool]
) -> Expr | None:
    """The predicate under which an added term is zero, if it is a fill everywhere else."""
    if isinstance(term, Const):
        if term.value == 0:
            return TRUE
        if not _is_fill(term, dtype):
            return None
        fills.add(float(term.value))
        return FALSE
    if not isinstance(term, Call):
        return None
    if term.op == "where":
        condition, yes, no = term.args
        on, off = (_as_mask(side, fills, dtype, is_bool) for side in (yes, no))
        if on is None or off is None:
            return None
        return call("or", call("and", condition, on), call("and", call("not", condition), off))
    return _product_mask(term, fills, dtype, is_bool)


def _beside_fill(term: Expr, fills: set[float], dtype: torch.dtype) -> tuple[Expr | None, Expr]:
    """where(P, bias, fill): P and the bias; otherwise None and the term as it is."""
    if isinstance(term, Call) and term.op == "where":
        condition, yes, no = term.args
        for keep, bias, fill in ((condition, yes, no), (call("not", condition), no, yes)):
            if _is_fill(fill, dtype) and isinstance(fill, Const):
                fills.clear()
                fills.add(float(fill.value))
                return keep, bias
    return None, term


def _product_mask(
    term: Call, fills: set[float], dtype: torch.dtype, is_bool: Callable[[Expr], bool]
) -> Expr | None:
    """(1 - float(P)) * fill, float(~P) * fill and their negations."""
    if term.op == "neg":
        inner = term.args[0]
        if not (isinstance(inner, Call) and inner.op == "mul" and isinstance(inner.args[1], Const)):
            return None
        term = Call("mul", (inner.args[0], Const(-inner.args[1].value)))
    if term.op != "mul":
        return None
    for factor, fill in (term.args, term.args[::-1]):
        if not (isinstance(fill, Const) and _is_fill(fill, dtype)) or math.isinf(fill.value):
            continue
        forbidden = truth_of(factor, is_bool)
        if forbidden is not None:
            fills.add(float(fill.value))
            return call("not", forbidden)
    return None


def truth_of(expression: Expr, is_bool: Callable[[Expr], bool]) -> Expr | None:
    """P, if the expression is 1 where P holds and 0 elsewhere."""
    if isinstance(expression, Call):
        if expression.op in _BOOLEAN:
            return expression
        if expression.op in ("float", "int"):
            return truth_of(expression.args[0], is_bool)
        if expression.op == "where" and expression.args[1:] in (_ONE_ZERO, _ZERO_ONE):
            condition = expression.args[0]
            return condition if expression.args[1:] == _ONE_ZERO else call("not", condition)
        if expression.op == "mul":
            left, right = (truth_of(side, is_bool) for side in expression.args)
            return None if left is None or right is None else call("and", left, right)
        if (
            expression.op == "sub"
            and isinstance(expression.args[0], Const)
            and expression.args[0].value == 1
        ):
            inner = truth_of(expression.args[1], is_bool)
            return None if inner is None else call("not", inner)
        return None
    return expression if is_bool(expression) else None


def _is_fill(expression: Expr, dtype: torch.dtype) -> bool:
    if not isinstance(expression, Const) or isinstance(expression.value, bool):
        return False
    return expression.value <= _FORBIDDING or expression.value == torch.finfo(dtype).min


def _holds_dot(expression: Expr) -> bool:
    return any(node == DOT for node in walk(expression))
