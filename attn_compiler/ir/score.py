"""The program of one attention: what is computed between q.k^T and the product with v.

    dot  = scale * q.k^T
    s    = where(mask, score(dot), -inf)
    p    = softmax over k of s            (with `sink`, one more column that carries no value)
    out  = dropout(p) . v

`empty` says what a row gets whose mask allows no key, because the spellings differ there:

    nan        all scores were set to -inf, which cuts their gradients
    nan_added  -inf was added, and the gradients are NaN as well
    zero       a boolean mask of scaled_dot_product_attention
    uniform    all scores were set to one finite number: all keys count alike, also forbidden ones
    absorbed   finfo.min was added: the same values, but the scores still have gradients
    any        no such row exists
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from attn_compiler.ir.expr import DOT, TRUE, Call, Const, Expr, parse, walk

Empty = Literal["nan", "nan_added", "zero", "uniform", "absorbed", "any"]
_POLICIES = ("nan", "nan_added", "zero", "uniform", "absorbed", "any")


@dataclass(frozen=True, slots=True)
class Program:
    """Score, mask and sink of one attention, with a one-line text that operators carry.

    Attributes:
        score: expression over `dot` and the indices.
        mask: boolean expression over the indices; true where a key may be seen.
        sink: logit of the extra column (over b, h, q), or None.
        empty: what a row without any allowed key gets.
    """

    score: Expr = DOT
    mask: Expr = TRUE
    sink: Expr | None = None
    empty: Empty = "any"

    def __str__(self) -> str:
        sink = f"; sink: {self.sink}" if self.sink is not None else ""
        return f"score: {self.score}; mask: {self.mask}{sink}; empty: {self.empty}"

    @staticmethod
    def parse(text: str) -> Program:
        """Read what `str()` wrote.

        Raises:
            ValueError: `text` is not a program.
        """
        return _parse(text)


def gain(score: Expr) -> float:
    """What a score multiplies `dot` by where it is small: 0.5 of (dot + t0[q, k]) * 0.5, and 1 of
    5 * tanh(dot / 5).
    """
    if score == DOT or not isinstance(score, Call):
        return 1.0
    inner = next((arg for arg in score.args if DOT in walk(arg)), None)
    if inner is None:
        return 1.0
    found = gain(inner)
    other = next((a for a in score.args if a is not inner), None)
    if score.op in ("mul", "div") and isinstance(other, Const) and other.value:
        return found * other.value if score.op == "mul" else found / other.value
    return found


@lru_cache(maxsize=1024)
def _parse(text: str) -> Program:
    fields = dict(part.split(": ", 1) for part in text.split("; ") if ": " in part)
    empty = fields.get("empty", "any")
    if not {"score", "mask"} <= fields.keys() or empty not in _POLICIES:
        raise ValueError(f"not an attention program: {text!r}")
    sink = parse(fields["sink"]) if "sink" in fields else None
    return Program(parse(fields["score"]), parse(fields["mask"]), sink, empty)  # type: ignore[arg-type]
