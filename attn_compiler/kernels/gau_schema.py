"""The schema of gated attention over one head, its arguments, and what it means.

    attn_compiler::gau_attention(q, k, v, q_lin, k_lin, gate, bias, valid, documents, seed,
                                 *, chunk, causal, scale, scale_mode, inside, dropout)
                                 -> (out, mixed)

    A = relu(scale q k^T + b)^2 / n       b_ij = bias[j - i + R - 1],  n keys that the row counts
    mixed = A v                           out = gate * mixed

q, k [B, T, s], v and gate [B, T, e], bias [2 R - 1], valid [B, T] bool, documents [B, T] int;
`seed` (int64, one element) iff dropout > 0. With `inside`, n divides the scores and not their
squares. With a chunk C, A stays inside a chunk and the rest of the sequence is linear attention by
q_lin and k_lin [B, T, s], over the chunks before if causal, else over all tokens, also its own:

    mixed = A v + (q_lin k_lin^T / m) v

`mixed` is empty without a gate. A document is a run of equal numbers; a row that is not valid is 0.

Source: Transformer Quality in Linear Time (arXiv 2202.10447). Published programs disagree about n
and m; `scale_mode` names their rules:

    rowcount    n keys that the row sees by A              m keys that it sees linearly
    valid       n tokens of its document, in its chunk     m tokens of its document
    chunk       n = C                                      m = C if causal, else T
    seqlen      n = T                                      m = T
    fixed(x)    n = x                                      m = x

Only valid tokens count, in the first two rules. With "valid" or "seqlen" what a causal layer said
about the past changes as a sequence grows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.frame import accumulator
from attn_compiler.kernels.schema import LIBRARY

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? q_lin, Tensor? k_lin, Tensor? gate, Tensor? bias, "
    "Tensor? valid, Tensor? documents, Tensor? seed"
)
_OPTIONS = "*, SymInt? chunk, bool causal, float scale, str scale_mode, bool inside, float dropout"
LIBRARY.define(
    f"gau_attention({_TENSORS}, {_OPTIONS}) -> (Tensor out, Tensor mixed)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    f"gau_attention_backward(Tensor grad_out, {_TENSORS}, Tensor out, Tensor mixed, "
    f"bool[] needs, {_OPTIONS}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
gau_attention = torch.ops.attn_compiler.gau_attention.default
gau_attention_backward = torch.ops.attn_compiler.gau_attention_backward.default

# what has a gradient, in the order of the arguments
GRADIENTS = ("q", "k", "v", "q_lin", "k_lin", "gate", "bias")
_MODES = re.compile(r"rowcount|valid|chunk|seqlen|fixed\(([1-9]\d*)\)")


@dataclass(frozen=True, slots=True)
class GauInputs:
    """The arguments of attn_compiler::gau_attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_lin: Tensor | None
    k_lin: Tensor | None
    gate: Tensor | None
    bias: Tensor | None
    valid: Tensor | None
    documents: Tensor | None
    drop: Drop
    chunk: int | None
    causal: bool
    scale: float
    scale_mode: str
    inside: bool

    @staticmethod
    def of(*tensors: Any, dropout: float, **options: Any) -> GauInputs:
        """From the arguments as the schema orders them."""
        q, k, v, q_lin, k_lin, gate, bias, valid, documents, seed = tensors
        found = (q, k, v, q_lin, k_lin, gate, bias, valid, documents)
        return GauInputs(*found, drop=Drop(seed, dropout), **options)

    def wanted(self, needs: Sequence[bool]) -> list[str]:
        """Names of the gradients that `needs` marks, which has an entry for each tensor."""
        there = (name for name in GRADIENTS if getattr(self, name) is not None)
        return [name for name, need in zip(there, needs, strict=False) if need]

    @property
    def dtype(self) -> torch.dtype:
        """Of scores, sums and states: at least float32."""
        return accumulator(self.q, self.k, self.v)

    @property
    def size(self) -> tuple[int, int, int, int]:
        """B, T, s, e."""
        batch, length, width = self.q.shape
        return batch, length, width, self.v.shape[2]

    @property
    def span(self) -> int:
        """Tokens that a square of A has at most."""
        length = self.size[1]
        return length if self.chunk is None else min(self.chunk, length)

    @property
    def fixed(self) -> int | None:
        """The number in "fixed(number)"."""
        return fixed_number(self.scale_mode)


def fixed_number(mode: str) -> int | None:
    """512 of "fixed(512)", None of the other modes.

    Raises:
        UnsupportedCall: there is no such mode.
    """
    found = _MODES.fullmatch(mode)
    if found is None:
        raise UnsupportedCall(
            f"there is no scale mode {mode!r}",
            do='give "rowcount", "valid", "chunk", "seqlen" or "fixed(512)" with a number',
        )
    return None if found[1] is None else int(found[1])


def check_gau(given: GauInputs) -> None:
    """Refuse arguments that no kernel can read.

    Raises:
        UnsupportedCall: shapes that do not belong together, linear queries without a chunk, a bias
            for other distances, an unknown scale mode, or a seed without dropout.
    """
    fixed_number(given.scale_mode)
    problem = _shape_problem(given) or _option_problem(given)
    if problem:
        shapes = ", ".join(
            f"{name} {tuple(x.shape)}"
            for name in ("q", "k", "v", "q_lin", "k_lin", "gate", "bias", "valid", "documents")
            if (x := getattr(given, name)) is not None
        )
        raise UnsupportedCall(
            "gau_attention cannot read its arguments",
            why=(problem, f"given: {shapes}, chunk {given.chunk}, dropout {given.drop.rate}"),
            do="hand over [batch, tokens, features] of one sequence",
        )


def _shape_problem(given: GauInputs) -> str:
    if not given.q.dim() == given.k.dim() == given.v.dim() == 3:
        return "q, k and v have three dimensions: batch, tokens, features"
    if given.q.shape != given.k.shape or given.v.shape[:2] != given.q.shape[:2]:
        return "q and k have one shape and share batch and tokens with v"
    for x in (given.q_lin, given.k_lin):
        if x is not None and x.shape != given.q.shape:
            return "q_lin and k_lin have the shape of q"
    if given.gate is not None and given.gate.shape != given.v.shape:
        return "the gate has the shape of v"
    for x in (given.valid, given.documents):
        if x is not None and x.shape != given.q.shape[:2]:
            return "valid and documents have one entry for each token"
    return ""


def _option_problem(given: GauInputs) -> str:
    linear = (given.q_lin is not None, given.k_lin is not None)
    if linear != (given.chunk is not None,) * 2 or (given.chunk is not None and given.chunk < 1):
        return "q_lin and k_lin are given exactly with a chunk of one token or more"
    if given.scale_mode == "chunk" and given.chunk is None:
        return 'without chunks the scale mode is not "chunk"'
    if given.valid is not None and given.valid.dtype is not torch.bool:
        return "valid is True where a token counts"
    if given.bias is not None and not _reaches(given.bias, given.span):
        return f"the bias has 2 R - 1 entries, with R at least {given.span}, and one dimension"
    drop = given.drop
    if not 0 <= drop.rate <= 1 or (drop.seed is None) != (drop.rate == 0):
        return "dropout lies between 0 and 1, and a seed is given exactly when it is above 0"
    return ""


def _reaches(bias: Tensor, span: int) -> bool:
    return bias.dim() == 1 and bias.shape[0] % 2 == 1 and bias.shape[0] >= 2 * span - 1
