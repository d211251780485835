"""A cache of fixed size for Selective attention: one step, and a whole prompt.

    slot        keys [G, d], values [G, dv], F (float32) and position (int32) of one token
    step        the new token takes the slot of the one most masked; attend; add relu(z*) to F
    prompt      all rows at once, each seeing what steps would have left it; then the slots

Nothing in a step depends on values on the host, and no tensor changes its shape or its place in
memory. The order of slots means nothing: positions stand beside them, and rotation has happened.

B batch, H query heads, G kv heads, K slots, d and dv head dims.

Source: Selective Attention (arXiv 2410.02703).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_compiler.ir.expr import DOT
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.eviction import kept, selective_deaths, victim
from attn_compiler.kernels.frame import Frame, Inputs
from attn_compiler.kernels.library import attention
from attn_compiler.kernels.masking import PROTECTED
from attn_compiler.kernels.selecting import in_slots, pruned, selecting
from attn_compiler.kernels.selective import selective_attention


@dataclass(frozen=True, slots=True)
class Rule:
    """What an attention computes, see `selective`; `reads` speak of positions, not of slots.

    Attributes:
        square: was the program written for as many rows as keys? Then its `q` is a position.
            Otherwise `q` counts the rows of one call.
    """

    program: str
    scale: float
    reads: Sequence[Tensor] = ()
    ints: Sequence[int] = ()
    head: int = 0
    select_from: str = "qk"
    gate: Tensor | None = None
    square: bool = False

    def weighed(self, amount: Tensor) -> Tensor:
        """What is subtracted."""
        amount = amount.clamp(min=0)
        return amount if self.gate is None else amount * self.gate.to(amount.dtype)


@dataclass(frozen=True, slots=True)
class Token:
    """Queries, keys and values of the rows of one call.

    Attributes:
        q, k, v: [B, H, T, d], [B, G, T, d], [B, G, T, dv].
        selector: () where a head of q selects; q* and k* [B, 1, T, e] where others do; a third
            tensor [B, 1, T, f] are values of the selecting head, whose own output is then computed.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    selector: tuple[Tensor, ...] = ()

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """What a slot keeps of a token."""
        return self.k, self.v, *self.selector[1:]

    def row(self, index: int) -> Token:
        q, k, v, *selector = (
            x[:, :, index : index + 1] for x in (self.q, self.k, self.v, *self.selector)
        )
        return Token(q, k, v, tuple(selector))


@dataclass(frozen=True, slots=True)
class Slots:
    """The cache of one layer.

    Attributes:
        stored: keys and values [B, G, K, n], then those of a selecting head of its own.
        amount: F [B, K], float32; -1 where the token is protected.
        positions: [B, K], int32; -1 where the slot is free.
    """

    stored: tuple[Tensor, ...]
    amount: Tensor
    positions: Tensor

    @staticmethod
    def empty(token: Token, budget: int) -> Slots:
        batch, like = token.k.shape[0], token.k
        stored = tuple(x.new_zeros((*x.shape[:2], budget, x.shape[3])) for x in token.stored)
        amount = like.new_zeros(
            (batch, budget), dtype=torch.promote_types(like.dtype, torch.float32)
        )
        return Slots(stored, amount, like.new_full((batch, budget), -1, dtype=torch.int32))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.stored, self.amount, self.positions)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)


def step(
    slots: Slots, rule: Rule, token: Token, past: int, row: int = 0, rows: int = 1
) -> tuple[Tensor, ...]:
    """One token for each sample: writes to `slots`, returns what attends.

    Args:
        slots: of the layer.
        rule: of the attention.
        token: T = 1.
        past: tokens before the call that this token belongs to.
        row: which of the `rows` of its call it is.

    Returns:
        out [B, H, 1, dv], and that of a selecting head with values of its own.
    """
    seen, total = past + row, past + rows
    ints = [*rule.ints, *((seen, total, total) if rule.square else (row, rows, total))]
    write(slots, token, seen)
    outs = tuple(attend(slots, rule, ints, *x) for x in _queries(slots, token))
    masks(slots, rule, ints, token, seen)
    return outs


def write(slots: Slots, token: Token, seen: int) -> None:
    """Put a token into a slot: a free one, or that of the token most masked."""
    slot = victim(slots.amount, slots.positions)
    for old, new in zip(slots.stored, token.stored, strict=True):
        index = slot[:, :, None, None].expand(-1, new.shape[1], -1, new.shape[3])
        old.scatter_(2, index, new.to(old.dtype))
    slots.amount.scatter_(1, slot, 0.0)
    slots.positions.scatter_(1, slot, seen)


def masks(slots: Slots, rule: Rule, ints: Sequence[int], token: Token, seen: int) -> None:
    """What the newest token masks: F of each slot but its own, and whether it stands alone."""
    heads = token.q.shape[1]
    if token.selector:
        q, k = token.selector[0], slots.stored[2]
    else:
        group = rule.head // (heads // token.k.shape[1])
        q, k = token.q[:, rule.head : rule.head + 1], slots.stored[0][:, group : group + 1]
    program = selecting(rule.program, rule.head, heads, rule.select_from)
    program = in_slots(program, len(rule.reads), len(rule.ints), False)
    reads = [*rule.reads, slots.positions]
    frame = Frame(Inputs(q, k, k, reads, ints, Drop(None, 0.0), program, rule.scale))
    span = frame.grid.whole()
    tensors = frame.tensors(span)
    dot = (q.to(frame.dtype) * rule.scale) @ k.to(frame.dtype).transpose(-1, -2)
    z = dot
    if frame.plan.score != DOT:
        z = frame.value(frame.plan.score, span, tensors, dot).expand(dot.shape)
    allowed = frame.mask(span, tensors)
    assert allowed is not None  # the slots that hold something
    own = slots.positions == seen
    seen_by_it = allowed.expand(dot.shape)[:, 0, 0] & ~own
    chosen = torch.where(seen_by_it & (slots.amount >= 0), torch.relu(z[:, 0, 0]), 0.0)
    slots.amount.add_(chosen)
    alone = own & ~seen_by_it.any(1, keepdim=True)
    slots.amount.masked_fill_(alone, PROTECTED)


def prompt(rule: Rule, token: Token, budget: int) -> tuple[Slots, tuple[Tensor, ...]]:
    """All rows of a prompt, exactly as steps would have gone.

    Returns:
        The slots, and what `step` returns, for all rows.
    """
    death, state, outs = rows_with_deaths(rule, token, budget)
    slots = Slots.empty(token, budget)
    positions = kept(death, budget)
    index = positions.clamp(min=0)
    for old, new in zip(slots.stored, token.stored, strict=True):
        place = index[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
        old.copy_(new.gather(2, place))
    slots.amount.copy_(state.gather(1, index).masked_fill(positions < 0, 0.0))
    slots.positions.copy_(positions)
    return slots, outs


def rows_with_deaths(
    rule: Rule, token: Token, budget: int
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """All rows of a sequence, each seeing what a cache of `budget` tokens would have left it.

    Returns:
        The row that evicts each key (see `eviction`), F after the last row, and what `step`
        returns, for all rows.
    """
    q, k, v = token.q, token.k, token.v
    selector = list(token.selector[:2])
    reads, ints = list(rule.reads), list(rule.ints)
    death = selective_deaths(
        q, k, reads, ints, selector, program=rule.program, scale=rule.scale, head=rule.head,
        select_from=rule.select_from, budget=budget,
    )  # fmt: skip
    options = {
        "program": pruned(rule.program, len(rule.reads)),
        "scale": rule.scale,
        "dropout": 0.0,
        "select_from": rule.select_from,
    }
    rest = ([*reads, death], ints, None)
    out, _, state = selective_attention(
        q, k, v, *rest, selector, rule.gate, None, head=rule.head, **options
    )
    outs: tuple[Tensor, ...] = (out,)
    if len(token.selector) == 3:
        own = selective_attention(
            *token.selector, *rest, selector, rule.gate, None, head=0, **options
        )
        outs = (out, own[0])
    return death, state, outs


def _queries(slots: Slots, token: Token) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Query, keys and values of the attention, and of a selecting head with values of its own."""
    found = [(token.q, slots.stored[0], slots.stored[1])]
    if len(token.selector) == 3:
        found.append((token.selector[0], slots.stored[2], slots.stored[3]))
    return found


def attend(
    slots: Slots, rule: Rule, ints: Sequence[int], q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """One row over the slots, keys and values k and v; nothing is written. `ints` are those of the
    rule, then the row, the rows and the positions that it speaks of.
    """
    program = in_slots(rule.program, len(rule.reads), len(rule.ints), True)
    reads = [*rule.reads, slots.positions, rule.weighed(slots.amount)]
    out: Tensor = attention(
        q, k, v, reads, list(ints), None, program=program, scale=rule.scale, dropout=0.0
    )[0]
    return out
