"""What Selective attention subtracts, by blocks of rows: a scan downwards, and its reverse.

    S[r,j] = relu(z*[r,j])  where row r sees key j, j < r, and j is not protected;  0 elsewhere
    F[i,j] = sum over r < i of S[r,j]
    dS[r,j] = sum over i > r of dF[i,j];     dz*[r,j] = dS[r,j] where S[r,j] > 0

z* are the logits of one head. A token that sees nothing but itself is protected: the first of a
sample, of a document, after left padding. Between blocks only one number for each key is carried.

Rows are numbered from 0, keys too; row i stands at the key `past + i`.
B batch, T query rows, S key rows.

Source: Selective Attention (arXiv 2410.02703).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_compiler.ir.expr import DOT
from attn_compiler.kernels.frame import Frame, widened
from attn_compiler.kernels.grid import Span
from attn_compiler.kernels.rows import pull_back, through
from attn_compiler.kernels.slope import slope

PROTECTED = -1.0


@dataclass(frozen=True, slots=True)
class Masked:
    """One block of rows.

    Attributes:
        span: the rows and keys.
        tensors: of the slots of the selecting head's expressions.
        query: scaled rows of the selecting head, [b, 1, rows, d].
        dot: their products, [b, 1, rows, keys].
        chosen: S, [b, rows, keys].
        amount: F, likewise.
        after: F of the row below the block, [b, keys].
    """

    span: Span
    tensors: list[Tensor]
    query: Tensor
    dot: Tensor
    chosen: Tensor
    amount: Tensor
    after: Tensor


class Masking:
    """F, asked for by blocks of rows from above.

    Args:
        frame: of the selecting head alone: q [B, 1, T, d], k [B, 1, S, d].
        past: how many keys came before row 0.
        carry: [B, past], what F of these keys is in row 0; below 0 where a key is protected.
        keep: remember the carry of every block, so that any of them may be asked for again.
    """

    def __init__(self, frame: Frame, past: int, carry: Tensor | None, keep: bool = False) -> None:
        given, self.frame, self._past, self._keep = frame.given, frame, past, keep
        (batch, _, self._rows, _), keys = given.q.shape, given.k.shape[2]
        self.key = given.k.to(frame.dtype)
        self._total = torch.zeros(batch, keys, dtype=frame.dtype, device=frame.device)
        self._protected = torch.zeros(batch, keys, dtype=torch.bool, device=frame.device)
        if carry is not None:
            self._total[:, :past] = carry.clamp(min=0)
            self._protected[:, :past] = carry < 0
        self._starts: dict[tuple[int, int], Tensor] = {}
        self._reached: dict[tuple[int, int], int] = {}
        self._last: Masked | None = None

    def block(self, span: Span) -> Masked:
        """The block of rows `span`; those above it have been asked for before."""
        if self._last is not None and self._last.span == span:
            return self._last
        items, place = (span.b0, span.b1), (span.b0, span.r0)
        self._skip(items, span.r0)
        first = self._reached[items] == span.r0
        if first:
            if not self._keep:
                self._starts.clear()
            self._starts[place] = self._total[span.b0 : span.b1].clone()
        found = self._masked(span, self._starts[place])
        if first:
            self._total[span.b0 : span.b1, span.lo : span.hi] = found.after
            self._reached[items] = span.r1
        self._last = found
        return found

    def state(self) -> Tensor:
        """F of the row below the last one, [B, S], and PROTECTED where nobody may mask a key."""
        for items in list(self._reached) or [(0, self._total.shape[0])]:
            self._skip(items, self._rows)
        return self._total.masked_fill(self._protected, PROTECTED)

    def protected(self, span: Span) -> Tensor:
        """Which of the keys of a block are, [b, keys], as far as the rows above tell."""
        return self._protected[span.b0 : span.b1, span.lo : span.hi]

    def _skip(self, items: tuple[int, int], row: int) -> None:
        """Rows that were not asked for see no keys at all."""
        reached = self._reached.setdefault(items, 0)
        if reached < row:
            self._protected[slice(*items), self._past + reached : self._past + row] = True
            self._reached[items] = row

    def _masked(self, span: Span, start: Tensor) -> Masked:
        frame, plan = self.frame, self.frame.plan
        query = frame.given.q[span.rows].to(frame.dtype) * frame.given.scale
        dot = query @ self.key[span.keys].transpose(-1, -2)
        tensors = widened(frame.tensors(span), frame.dtype)
        z = dot
        if plan.score != DOT:
            z = frame.value(plan.score, span, tensors, dot).to(frame.dtype).expand(dot.shape)
        chosen = torch.relu(z).squeeze(1)
        allowed = frame.mask(replace(span, masked=True), tensors)
        # key lo + c lies before row r0 + a
        diagonal = span.r0 + self._past - span.lo - 1
        if allowed is not None:
            allowed = allowed[:, 0].expand(-1, *chosen.shape[1:]).tril(diagonal)
            chosen = chosen.masked_fill_(~allowed, 0.0)
        else:
            chosen = chosen.tril_(diagonal)
        self._protect(span, allowed)
        chosen = chosen.masked_fill_(self.protected(span).unsqueeze(1), 0.0)
        batch, rows, keys = chosen.shape
        scan = chosen.new_empty(batch, rows + 1, keys)
        scan[:, 0], scan[:, 1:] = start[:, span.lo : span.hi], chosen
        scan = scan.cumsum(1)
        return Masked(span, tensors, query, dot, chosen, scan[:, :-1], scan[:, -1])

    def _protect(self, span: Span, allowed: Tensor | None) -> None:
        """Mark the tokens of these rows that see nobody before them."""
        first = self._past + span.r0
        last = max(first, min(self._past + span.r1, self._protected.shape[1]))
        if allowed is None:
            place = torch.arange(first, last, device=self._protected.device)
            alone = (place <= span.lo) | (span.lo == span.hi)
        else:
            alone = ~allowed.any(-1)[:, : last - first]
        self._protected[span.b0 : span.b1, first:last] = alone


@dataclass(frozen=True, slots=True)
class Pulled:
    """Gradients of the selecting query and key, of F in the first row [B, S], and the part of the
    gradient of what F was multiplied with that the rows' own S have.
    """

    dq: Tensor
    dk: Tensor
    above: Tensor
    gate: Tensor


Pull = Callable[[Tensor, Tensor], Pulled]


class Unmasking:
    """The gradient of F, brought to the selecting head by blocks of rows from below.

    Args:
        masking: the scan, run to its end, which remembers its carries.
        gate: what F was multiplied with, or None.
        into: where gradients of the reads go, by slot.
        dq: [B, 1, T, d], where the gradient of the selecting query goes; `dk` likewise.
    """

    def __init__(
        self,
        masking: Masking,
        gate: Tensor | None,
        into: Mapping[int, Tensor],
        dq: Tensor,
        dk: Tensor,
    ) -> None:
        self._masking, self._gate, self._into = masking, gate, into
        self._dq, self._dk = dq, dk
        given = masking.frame.given
        self.total = masking.key.new_zeros(given.q.shape[0], given.k.shape[2])
        self.dgate = masking.key.new_zeros(())

    def whole(self, grad: Tensor, amount: Tensor, pull: Pull) -> None:
        """All blocks at once, by what brings the gradient of F [B, T, S], and of F after them, to
        q, k and row 0.
        """
        if self._gate is not None:
            self.dgate += (grad * amount).sum()
            grad = grad * self._gate
        found = pull(grad, self.total)
        self._dq += found.dq
        self._dk += found.dk
        self.total = found.above

    def block(self, span: Span, grad: Tensor) -> None:
        """`grad` [b, rows, keys] is that of what was subtracted in the rows of `span`."""
        masking, plan = self._masking, self._masking.frame.plan
        found = masking.block(span)
        if self._gate is not None:
            self.dgate += (grad * found.amount).sum()
            grad = grad * self._gate
        below = self.total[span.b0 : span.b1, span.lo : span.hi]
        scan = torch.cat([below.unsqueeze(1), grad.flip(1)], 1).cumsum(1)
        ds = scan[:, :-1].flip(1).masked_fill_(found.chosen <= 0, 0.0).unsqueeze(1)
        below.copy_(scan[:, -1])
        pull_back(masking.frame, span, plan.score, ds, self._into, found.tensors, found.dot)
        if plan.score != DOT:
            inner = masking.frame.value(slope(plan.score, DOT), span, found.tensors, found.dot)
            ds = through(ds, inner)
        self._dq[span.rows] += (ds @ masking.key[span.keys]) * masking.frame.given.scale
        self._dk[span.keys] += ds.transpose(-1, -2) @ found.query
