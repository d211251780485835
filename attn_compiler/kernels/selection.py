"""The arguments of attn_compiler::selective_attention as one record (see `selective`).

Selection(given, selector, gate, carry, head, select_from)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.frame import Frame, Inputs, accumulator
from attn_compiler.kernels.masking import Masking
from attn_compiler.kernels.selecting import lower, selecting, subtracting


@dataclass(frozen=True, slots=True)
class Selection:
    """The arguments of attn_compiler::selective_attention (see `selective`)."""

    given: Inputs
    selector: Sequence[Tensor]
    gate: Tensor | None
    carry: Tensor | None
    head: int
    select_from: str

    @property
    def past(self) -> int:
        """Keys before row 0."""
        return 0 if self.carry is None else self.carry.shape[1]

    @property
    def key_head(self) -> int:
        """The kv head of the selecting head."""
        return self.head // (self.given.q.shape[1] // self.given.k.shape[1])

    @property
    def alone(self) -> Inputs:
        """The selecting head as an attention of its own."""
        given, heads = self.given, self.given.q.shape[1]
        if self.selector:
            q, k = self.selector
        else:
            q = given.q[:, self.head : self.head + 1]
            k = given.k[:, self.key_head : self.key_head + 1]
        if accumulator(q, k) != given.dtype:  # its arithmetic is that of the attention
            q, k = q.to(given.dtype), k.to(given.dtype)
        program = selecting(given.program, self.head, heads, self.select_from)
        return replace(given, q=q, k=k, v=k, drop=Drop(None, 0.0), program=program)

    def masking(self, keep: bool = False) -> Masking:
        return Masking(Frame(self.alone), self.past, self.carry, keep)

    def bands(self, each: int) -> list[tuple[int, int]]:
        """First row and the one after the last of bands of so many rows."""
        rows = self.given.q.shape[2]
        return [(start, min(start + each, rows)) for start in range(0, rows, each)]

    def band(self, start: int, end: int, state: Tensor | None) -> Selection:
        """Some rows as a call of its own, after those that ended with `state`."""
        given, rows = self.given, self.given.q.shape[2]
        if end - start == rows:
            return self
        mine = slice(None), slice(None), slice(start, end)
        ints = [*given.ints, start, rows]
        program, drop = (
            lower(given.program, len(given.ints)),
            replace(given.drop, part=(start, rows)),
        )
        part = replace(given, q=given.q[mine], program=program, ints=ints, drop=drop)
        carry = self.carry if state is None else state[:, : self.past + start]
        selector = [x[mine] for x in self.selector[:1]] + list(self.selector[1:])
        return replace(self, given=part, selector=selector, carry=carry)

    def reading(self, amount: Tensor) -> Inputs:
        """The attention with F, or what stands for it, as one more tensor."""
        given = self.given
        program = subtracting(given.program, len(given.reads))
        return replace(given, reads=[*given.reads, amount], program=program)

    def weighed(self, amount: Tensor) -> Tensor:
        return amount if self.gate is None else amount * self.gate.to(amount.dtype)


@dataclass(frozen=True, slots=True)
class Gradients:
    """Of one call, in the dtype of its arithmetic; `reads` by slot, `carry` for all keys."""

    q: Tensor
    k: Tensor
    v: Tensor
    reads: dict[int, Tensor]
    selector: list[Tensor]
    gate: Tensor
    carry: Tensor
