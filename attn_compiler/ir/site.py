"""The record of one attention: what selection, report and rewriting read, and nobody changes."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from attn_compiler.ir.mask import Causal, Mask
from attn_compiler.ir.score import Program


class Kind(enum.Enum):
    """Do queries and keys come from the same sequence?"""

    SELF = "self"
    CROSS = "cross"

    def __str__(self) -> str:
        return str(self.value)


class Phase(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Reason:
    """Why something was not done: a stable code, a sentence, and the user's source line; `inside`
    is the path, below the owner, of a module that hides what was sought.
    """

    code: str
    text: str
    location: str = ""
    inside: str = ""

    def __str__(self) -> str:
        return f"{self.code}: {self.text}" + (f" ({self.location})" if self.location else "")


@dataclass(frozen=True)
class Projection:
    """A linear map that makes q, k or v: names of its weight and bias, and the name of what it
    reads.
    """

    weight: str
    bias: str | None
    source: str


@dataclass(frozen=True)
class Decision:
    """What was chosen for a site.

    Attributes:
        accepted: was it rewritten?
        variant: the chosen variant, "" if none.
        reasons: why not, all of them.
        tile: block sizes, where a kernel has them.
        predicted_seconds: by the cost model, None where it does not speak.
        limit: what bounds them: "tensor", "special", "dram", "launch", ...
        work: operations of matrix products, and bytes that have to cross memory's bus.
        fidelity: "exact", "calibrated" or "retrained".
        tensors: what its module gets, under their final names.
        call: the sizes of the example and the device in the cost model's words (`kernels.shown.
            Call`), where a device was named.
        taken: what leaves the model: paths below the owner of modules and parameters.
        spec: what was asked for, with numbers for every "auto"; None where nothing was open.
        cached: heads and width of what a cache holds instead of keys and values; None where it
            holds these.
        origin: what is known of the weights that leave, where new ones are started from them.
        causal: do rows see nothing behind them? For calls of one row, which do not show it; None
            where nobody asks.
    """

    accepted: bool
    variant: str = ""
    reasons: tuple[Reason, ...] = ()
    tile: Any = None
    predicted_seconds: float | None = None
    limit: str = ""
    work: tuple[float, float] = (0.0, 0.0)
    fidelity: str = "exact"
    tensors: tuple[Any, ...] = ()
    call: Any = None
    taken: tuple[str, ...] = ()
    spec: Any = None
    cached: tuple[int, int] | None = None
    origin: Any = None
    causal: bool | None = None

    def __str__(self) -> str:
        return self.variant if self.accepted else "kept: " + "; ".join(map(str, self.reasons))


@dataclass(frozen=True)
class AttentionSite:
    """One attention of the user's model.

    Attributes:
        path: qualified name of the module that calls it, "" at the root.
        owner: class name of the lowest module that holds it.
        location: "file.py:88" of the user's code.
        length: query rows of the example, where they are as many as keys.
        kind: self or cross attention.
        phases: prefill, decode.
        query_heads, kv_heads: None where they are symbolic.
        head_dim, value_dim: features of queries and keys, and of values.
        mask: the recovered predicate.
        score: the score program over `dot`, "dot" if there is none.
        program: score, mask, sink and empty rows together.
        scale: what q.k is multiplied by; None if only known when it runs.
        softmax_dtype: dtype the weights are normalised in.
        dropout: probability.
        projections: of q, k and v, where they could be found.
        facts: further findings by name ("rotary", "cache", "spelling"), as JSON can hold them: a
            text, or an object with a "text".
        obstacles: why a cache cannot hold what keys and values are made of in their place; None
            where nobody has asked.
        remaining: the program without relative positions that the layer makes of its own queries
            or keys; None where there are none, or nobody has asked.
        line: the text at `location`.
        width: channels of the one tensor that linear maps make queries, keys and values of, None
            where there is no such tensor.
        cached: do keys and values come from a cache that may be replaced?
        decision: what was chosen.
    """

    path: str
    owner: str
    location: str
    kind: Kind
    phases: tuple[Phase, ...]
    query_heads: int | None
    kv_heads: int | None
    head_dim: int | None
    value_dim: int | None
    mask: Mask
    score: str
    program: Program
    scale: float | None
    softmax_dtype: str
    dropout: float
    decision: Decision
    projections: dict[str, Projection] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    length: int | None = None
    obstacles: tuple[Reason, ...] | None = None
    remaining: Program | None = None
    line: str = ""
    width: int | None = None
    cached: bool = False

    @property
    def crosses(self) -> bool:
        """Are the keys those of another sequence, and does no mask put both in one order?"""
        causal = any(isinstance(term, Causal) for term in self.mask.terms)
        return self.kind is Kind.CROSS and not causal


@dataclass(frozen=True)
class Missed:
    """Something that looked like attention and was left alone.

    Attributes:
        location: "file.py:88" of its softmax.
        code, text: why.
        path: of the module.
        line: the text at `location`.
        operation: the first operation that did not fit, with its place and line: "mul at
            file.py:90: w = w * gate"; "" where the reason is none of a single operation.
    """

    location: str
    code: str
    text: str
    path: str = ""
    line: str = ""
    operation: str = ""


@dataclass(frozen=True)
class Break:
    """Where the tracer let go of a model, so that no attention is seen whole across it.

    Attributes:
        location: "file.py:88", "" if nothing of the model was traced.
        text: why, as the tracer says it.
        line: the text at `location`.
    """

    location: str
    text: str
    line: str = ""


def told(fact: Any) -> str:
    """A fact in words: itself, or what it says of itself."""
    return str(fact.get("text", "") if isinstance(fact, dict) else fact or "")


def heads_of(site: AttentionSite) -> str:
    """8 heads over 2 kv heads of 64."""
    if site.query_heads is site.kv_heads is site.head_dim is None:
        return "heads that are known when it runs"
    found = f"{site.query_heads or '?'} {many('head', site.query_heads)}"
    if site.kv_heads != site.query_heads:
        found += f" over {site.kv_heads or '?'} kv {many('head', site.kv_heads)}"
    return f"{found} of {site.head_dim or '?'}"


def many(word: str, count: int | None) -> str:
    """The word for so many of it."""
    return word if count == 1 else f"{word}s"
