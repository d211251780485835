"""Generation with a gated attention unit: a state of the same size however long the past is.

    row i:   mixed = A_i v of the open chunk + q_lin M / m;     chunk full:  M += k_lin^T v

Any number of tokens may be read at once, so the prompt takes the same way as each token after it.
Without chunks all keys and values are kept, in rows that are set aside beforehand. Not
differentiable. Source: derived from `gau_schema`, of which this is the causal form row by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels.frame import accumulator
from attn_compiler.kernels.gau_cpu import toeplitz
from attn_compiler.kernels.gau_layer import (
    GauForm,
    GauParameters,
    leave,
    projected,
    queries_and_keys,
    relative,
    scale_of,
)
from attn_compiler.kernels.gau_schema import fixed_number


@dataclass(frozen=True, slots=True)
class GauState:
    """What a unit keeps of the tokens it has read. The tensors are written in place: a state that
    was handed to `gau_step` is used up.

    Attributes:
        memory: [B, s, e] of all closed chunks, float32 or wider; of no elements without chunks.
        k, k_lin, v: [B, C, ...] of the open chunk; k_lin has no elements without chunks.
        valid: [B, C] which of them count.
        seen: [B] valid tokens of closed chunks.
        length: tokens read, padding included.
    """

    memory: Tensor
    k: Tensor
    k_lin: Tensor
    v: Tensor
    valid: Tensor
    seen: Tensor
    length: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (getattr(self, f.name) for f in fields(self) if f.name != "length")
        return sum(x.nbytes for x in tensors)

    @property
    def filled(self) -> int:
        """Rows of the open chunk that are taken."""
        return self.length % self.k.shape[1] if self.memory.numel() else self.length


def empty_state(
    batch: int, weights: GauParameters, form: GauForm, *, capacity: int | None = None
) -> GauState:
    """The state before the first token.

    Args:
        capacity: tokens that may be read in all; where there are no chunks, and only there.

    Raises:
        UnsupportedCall: the form is not causal, or a step cannot know its divisor; capacity does
            not go with the form.
    """
    fixed_number(form.scale_mode)
    why = ""
    if not form.causal:
        why = "a token sees those after it"
    elif form.scale_mode in ("valid", "seqlen"):
        why = f"the scale mode {form.scale_mode!r} divides by a length that is not known yet"
    elif (capacity is None) == (form.chunk is None):
        why = "a number of tokens is set aside exactly where there are no chunks"
    if why:
        raise UnsupportedCall(
            "this unit cannot generate token by token",
            why=(why,),
            do='give a causal form with scale_mode "rowcount", "chunk" or "fixed(n)"',
        )
    _, expanded, s = weights.sizes
    rows, like = form.chunk or capacity or 0, weights.w_o
    chunked = 0 if form.chunk is None else 1
    return GauState(
        memory=like.new_zeros((batch * chunked, s, expanded), dtype=accumulator(like)),
        k=like.new_zeros((batch, rows, s)),
        k_lin=like.new_zeros((batch * chunked, rows, s)),
        v=like.new_zeros((batch, rows, expanded)),
        valid=torch.zeros((batch, rows), dtype=torch.bool, device=like.device),
        seen=torch.zeros(batch, dtype=torch.int64, device=like.device),
    )


@torch.no_grad()
def gau_step(
    x: Tensor,
    weights: GauParameters,
    form: GauForm,
    state: GauState,
    *,
    valid: Tensor | None = None,
) -> tuple[Tensor, GauState]:
    """A unit on the next tokens x [B, n, D], n from 1: the rows that `gau_layer` has for them.

    Args:
        valid: [B, n] bool, False for padding.

    Raises:
        UnsupportedCall: there is no room for these tokens; gamma has too few rows.
    """
    gate, tokens = _tokens(x, weights, form, state, valid)
    table = relative(weights, form, state.length + x.shape[1])
    mixed = []
    for part in _parts(state, x.shape[1]):
        reader = _Reader(state, form, scale_of(weights, form), table)
        rows, state = reader.read(tokens.part(part))
        mixed.append(rows)
    out = (torch.cat(mixed, 1) * gate).to(tokens.v.dtype)
    return leave(out, weights), state


@torch.no_grad()
def gau_keep(
    x: Tensor,
    weights: GauParameters,
    form: GauForm,
    state: GauState,
    *,
    valid: Tensor | None = None,
) -> GauState:
    """The state after tokens whose rows somebody has already; arguments as in `gau_step`."""
    _, tokens = _tokens(x, weights, form, state, valid)
    for part in _parts(state, x.shape[1]):
        state = _closed(state, _written(state, tokens.part(part)))
    return state


@dataclass(frozen=True, slots=True)
class _Tokens:
    """[B, n, ...] of tokens that are read; no linear queries and keys without chunks."""

    v: Tensor
    counts: Tensor
    q: Tensor
    k: Tensor
    q_lin: Tensor | None = None
    k_lin: Tensor | None = None

    def part(self, rows: slice) -> _Tokens:
        found = (getattr(self, f.name) for f in fields(self))
        return _Tokens(*(None if x is None else x[:, rows] for x in found))  # type: ignore[arg-type]


def _tokens(
    x: Tensor, weights: GauParameters, form: GauForm, state: GauState, valid: Tensor | None
) -> tuple[Tensor, _Tokens]:
    """The gate, and what else a unit makes of its input."""
    if form.chunk is None and state.length + x.shape[1] > state.k.shape[1]:
        raise UnsupportedCall(
            f"the state has room for {state.k.shape[1]} tokens",
            why=(f"read: {state.length}, new: {x.shape[1]}",),
            do="make a state of a larger capacity",
        )
    gate, v, z = projected(x, weights)
    counts = torch.ones_like(x[..., 0], dtype=torch.bool) if valid is None else valid
    return gate, _Tokens(v, counts, *queries_and_keys(z, weights, form, state.length))


def _parts(state: GauState, length: int) -> Iterator[slice]:
    """Tokens that the open chunk has room for, and those of the chunks after it."""
    first, room = 0, state.k.shape[1] - state.filled
    while first < length:
        yield slice(first, min(first + room, length))
        first, room = first + room, state.k.shape[1]


def _written(state: GauState, tokens: _Tokens) -> slice:
    """The rows of the open chunk that hold the tokens now."""
    rows = slice(state.filled, state.filled + tokens.v.shape[1])
    for kept, new in (
        (state.v, tokens.v),
        (state.k, tokens.k),
        (state.valid, tokens.counts),
        (state.k_lin, tokens.k_lin),
    ):
        if new is not None:
            kept[:, rows] = new
    return rows


def _closed(state: GauState, rows: slice) -> GauState:
    """With so many more tokens; a full chunk is added to the sum."""
    seen = state.seen
    if state.memory.numel() and rows.stop == state.k.shape[1]:
        keys = state.k_lin.to(state.memory.dtype) * state.valid[..., None]
        state.memory.baddbmm_(keys.mT, state.v.to(keys.dtype))
        seen = seen + state.valid.sum(1)
    return replace(state, seen=seen, length=state.length + rows.stop - rows.start)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads tokens that fit in the open chunk."""

    state: GauState
    form: GauForm
    scale: float
    table: Tensor | None

    def read(self, tokens: _Tokens) -> tuple[Tensor, GauState]:
        """`mixed` of the tokens, and the state after them."""
        state, dtype = self.state, accumulator(tokens.q, tokens.v)
        rows = _written(state, tokens)
        mixed = self._weights(tokens.q.to(dtype), rows) @ state.v[:, : rows.stop].to(dtype)
        if tokens.q_lin is not None:
            factors = self._divided(state.seen)[:, None, None]
            mixed += (tokens.q_lin.to(dtype) * factors) @ state.memory
        mixed *= tokens.counts[..., None]
        return mixed, _closed(state, rows)

    def _weights(self, q: Tensor, rows: slice) -> Tensor:
        """A of these rows, [B, rows, keys of the open chunk]."""
        keys = slice(0, rows.stop)
        valid = self.state.valid[:, keys]
        by = self._divided(valid.cumsum(1)[:, rows])[..., None]
        scores = q * self.scale @ self.state.k[:, keys].to(q.dtype).mT
        if self.form.inside:
            scores, by = scores * by, torch.ones_like(by)
        if self.table is not None:
            scores += toeplitz(self.table.to(q.dtype), rows, keys)
        hinge = scores.relu_().tril_(rows.start).mul_(valid[:, None])
        return hinge.square_().mul_(by)

    def _divided(self, seen: Tensor) -> Tensor:
        """1 over what the scale mode counts, 0 over no tokens."""
        form, dtype = self.form, accumulator(self.state.v)
        by = form.chunk if form.scale_mode == "chunk" else fixed_number(form.scale_mode)
        if by is not None:
            return torch.full(seen.shape, 1 / by, dtype=dtype, device=seen.device)
        return torch.where(seen > 0, 1 / seen.clamp(min=1).to(dtype), 0.0)
