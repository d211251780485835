"""The schemas of the operators, and the checks of their arguments.

    attn_compiler::attention(q, k, v, reads, ints, seed, *, program, scale, dropout) -> (out, lse)

q [B, H, T, d], k [B, G, S, d], v [B, G, S, dv] with any strides, G divides H; query head h uses kv
head h // (H // G). `program` is the text of an `ir.score` program over the tensors `reads` and the
integers `ints`; `seed` (int64, one element) iff dropout > 0. `out` [B, H, T, dv] lies in memory as
[B, T, H, dv], so that the transpose and reshape which follow it in a model are free; `lse`
[B, H, T] is the natural logarithm of the softmax's denominator, sink included, without a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels.dropout import Drop

LIBRARY = torch.library.Library("attn_compiler", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor[] reads, SymInt[] ints, Tensor? seed, "
    "*, str program, float scale, float dropout) -> (Tensor out, Tensor lse)",
    tags=_TAGS,
)
LIBRARY.define(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor[] reads, "
    "SymInt[] ints, Tensor? seed, Tensor out, Tensor lse, bool[] needs, "
    "*, str program, float scale, float dropout) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor[] dreads)",
    tags=_TAGS,
)
attention = torch.ops.attn_compiler.attention.default
attention_backward = torch.ops.attn_compiler.attention_backward.default


def check(q: Tensor, k: Tensor, v: Tensor, drop: Drop) -> None:
    """Refuse arguments that no kernel can read.

    Raises:
        UnsupportedCall: shapes that do not belong together, or a seed without dropout, or dropout
            without a seed.
    """
    reason = _shape_problem(q, k, v)
    if not reason and (not 0 <= drop.rate <= 1 or (drop.seed is None) != (drop.rate == 0)):
        reason = "dropout lies between 0 and 1, and a seed is given exactly when it is above 0"
    if reason:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, dropout {drop.rate}"
        raise UnsupportedCall(
            "attention cannot read its arguments",
            why=(reason, f"given: {shapes}"),
            do="hand over [batch, heads, rows, features]",
        )


def _shape_problem(q: Tensor, k: Tensor, v: Tensor) -> str:
    if not q.dim() == k.dim() == v.dim() == 4:
        return "q, k and v have four dimensions: batch, heads, rows, features"
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        return "q and k share batch and features; k and v share batch, heads and rows"
    if q.shape[1] != k.shape[1] and (k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0):
        return "the number of kv heads divides the number of query heads"
    return ""
