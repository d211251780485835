"""How Selective attention runs: block by block, or with F as a tensor.

    blocked         F of a block of rows exists while the block runs: extra memory O(T * block)
    materialised    F [B, T, S] is a tensor that attention's own kernels read, and differentiate;
                    where it is too large, of bands of rows one after the other, each with the
                    sums that the band before it ended with

A CPU runs blocked. Other devices have kernels for whole calls and read F; so does a program whose
reads are no slices of their tensors.

Source: the two passes are those of Selective Attention (arXiv 2410.02703) cut into tiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from attn_compiler.kernels import attention as composite
from attn_compiler.kernels import devices, masking_triton, rows
from attn_compiler.kernels import flash_cpu as flash
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.frame import Frame, Inputs, accumulator, empty_heads, empty_lse
from attn_compiler.kernels.grid import Grid, Span, spans
from attn_compiler.kernels.masking import Masking, Unmasking
from attn_compiler.kernels.plan import Slice
from attn_compiler.kernels.selecting import lower, selecting, subtracting
from attn_compiler.kernels.selective_tiles import left_out

# elements of a block of the selecting head alone
_BUDGET = 2**20
_ROWS = 256
# bytes of F as a tensor; its gradient has as many. A band has whole tiles of rows
_LARGEST, _TILE = 2**29, 128


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

    def bands(self) -> list[tuple[int, int]]:
        """Rows that run at a time where F is a tensor; dropout draws for all of them."""
        given = self.given
        rows, wide = given.q.shape[2], 4 * given.q.shape[0] * given.k.shape[2]
        each = max(_TILE, _LARGEST // wide // _TILE * _TILE)
        each = rows if given.drop.rate else each
        return [(start, min(start + each, rows)) for start in range(0, rows, each)]

    def band(self, start: int, end: int, state: Tensor | None) -> Selection:
        """Some rows as a call of its own, after those that ended with `state`."""
        given = self.given
        if end - start == given.q.shape[2]:
            return self
        mine = slice(None), slice(None), slice(start, end)
        ints = [*given.ints, start, given.q.shape[2]]
        part = replace(given, q=given.q[mine], program=lower(given.program, len(given.ints)))
        carry = self.carry if state is None else state[:, : self.past + start]
        selector = [x[mine] for x in self.selector[:1]] + list(self.selector[1:])
        return replace(self, given=replace(part, ints=ints), selector=selector, carry=carry)

    def reading(self, amount: Tensor) -> Inputs:
        """The attention with F, or what stands for it, as one more tensor."""
        given = self.given
        program = subtracting(given.program, len(given.reads))
        return replace(given, reads=[*given.reads, amount], program=program)

    def weighed(self, amount: Tensor) -> Tensor:
        return amount if self.gate is None else amount * self.gate.to(amount.dtype)


class _Subtracted(Frame):
    """An attention whose last read is F: made when a block asks, never as a whole."""

    random_access = False

    def __init__(self, selection: Selection, masking: Masking) -> None:
        given = selection.given
        shape = (given.q.shape[0], given.q.shape[2], given.k.shape[2])
        nothing = given.q.new_zeros((), dtype=given.dtype).expand(shape)
        super().__init__(selection.reading(nothing))
        self._selection, self._masking, self._slot = selection, masking, len(given.reads)
        self.gradient = nothing

    @property
    def sliced(self) -> bool:
        """Are all reads slices? Otherwise F would be gathered from."""
        return any(piece.slot == self._slot for piece in self.plan.slices)

    def view(self, piece: Slice, tensor: Tensor, span: Span) -> Tensor:
        if piece.slot != self._slot:
            return super().view(piece, tensor, span)
        if tensor is self.reads[self._slot]:
            return self._selection.weighed(self._masking.block(span).amount).unsqueeze(1)
        # where a gradient is added up: that of one block
        shape = (span.b1 - span.b0, 1, span.r1 - span.r0, span.hi - span.lo)
        self.gradient = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return self.gradient


def forward(selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and the state, see `selective`."""
    given, masking = selection.given, selection.masking()
    if any(x.numel() == 0 for x in given.qkv):
        return *composite.forward(given), masking.state()
    frame = _blocked(selection, masking)
    if frame is None:
        return _banded(selection)
    if flash.fits(frame):
        out, lse = flash.forward(frame)
    else:
        shape = (*given.q.shape[:3], given.v.shape[-1])
        out, lse = empty_heads(given.v, shape), empty_lse(given.q, given.dtype)
        rows.forward(frame, out, lse)
    return out, lse, masking.state()


def _banded(selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
    outs, totals = [], []
    state: Tensor | None = None
    for start, end in selection.bands():
        part = selection.band(start, end, state)
        read, _, state = _reading(part, part.masking(), scan_of(part))
        out, lse = devices.kernels_for(read).forward(read)
        outs.append(out)
        totals.append(lse)
    assert state is not None
    if len(outs) == 1:
        return outs[0], totals[0], state
    given = selection.given
    out = empty_heads(given.v, (*given.q.shape[:3], given.v.shape[-1]))
    lse = empty_lse(given.q, given.dtype)
    return torch.cat(outs, 2, out=out), torch.cat(totals, 2, out=lse), state


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


def backward(
    selection: Selection, grad: Tensor, saved: tuple[Tensor, Tensor], reads: Sequence[int]
) -> Gradients:
    """All gradients, those of the reads with the numbers `reads` only; `saved` is out and lse."""
    given = selection.given
    masking = selection.masking(keep=True)
    into = {i: _zeros(given.reads[i], given.dtype) for i in reads}
    if any(x.numel() == 0 for x in given.qkv):
        dq, dk, dv = (_zeros(x, given.dtype) for x in given.qkv)
        unmasking, selector = unmasking_of(selection, masking, into, (dq, dk))
        return Gradients(dq, dk, dv, into, selector, unmasking.dgate, unmasking.total)
    frame = _blocked(selection, masking)
    steps = _whole_steps if frame is None else _blocked_steps
    return steps(selection, masking, grad, saved, into)


def _blocked_steps(
    selection: Selection,
    masking: Masking,
    grad: Tensor,
    saved: tuple[Tensor, Tensor],
    into: dict[int, Tensor],
) -> Gradients:
    given, frame = selection.given, _Subtracted(selection, masking)
    order = list(rows.blocks(frame))
    for span in order:
        masking.block(span)
    dq, dk, dv = (empty_heads(x, x.shape, given.dtype).zero_() for x in given.qkv)
    unmasking, selector = unmasking_of(selection, masking, into, (dq, dk))
    slots = into | {len(given.reads): torch.empty(0)}  # see `_Subtracted.view`
    steps = rows.backward_steps(frame, grad, saved[0], slots, (dq, dk, dv), reversed(order))
    for span in steps:
        unmasking.block(span, frame.gradient.squeeze(1))
    return Gradients(dq, dk, dv, into, selector, unmasking.dgate, unmasking.total)


def _whole_steps(
    selection: Selection,
    masking: Masking,
    grad: Tensor,
    saved: tuple[Tensor, Tensor],
    into: dict[int, Tensor],
) -> Gradients:
    """Bands of rows from below; before the last one can run, those above tell where it starts."""
    order = selection.bands()
    states: list[Tensor | None] = [None]
    for start, end in order[:-1]:
        part = selection.band(start, end, states[-1])
        states.append(_reading(part, part.masking(), scan_of(part))[2])
    found: list[Gradients] = []
    for (start, end), state in zip(reversed(order), reversed(states), strict=True):
        part, mine = selection.band(start, end, state), (slice(None),) * 2 + (slice(start, end),)
        three = grad[mine], saved[0][mine], saved[1][mine]
        found.append(_band_steps(part, three, list(into), found[-1].carry if found else None))
    return _joined(found[::-1])


def _band_steps(
    selection: Selection,
    three: tuple[Tensor, Tensor, Tensor],
    wanted: list[int],
    below: Tensor | None,
) -> Gradients:
    """`three` is the gradient of out, out and lse, `below` that of F after these rows."""
    given, scan, (grad, *saved) = selection.given, scan_of(selection), three
    if scan is not None and not masking_triton.differentiates(scan.alone, wanted):
        scan = None
    masking = selection.masking(keep=True)
    read, amount, _ = _reading(selection, masking, scan)
    needs = [i in wanted for i in range(len(given.reads))] + [True]
    needs += [False] * (len(read.reads) - len(needs))
    out, lse = saved
    dq, dk, dv, found = devices.kernels_for(read).backward(read, grad, (out, lse), needs)
    *own, damount = found
    into = {i: x.to(given.dtype) for i, x in zip(wanted, own, strict=True)}
    dq, dk = (x.to(given.dtype) for x in (dq, dk))
    unmasking, selector = unmasking_of(selection, masking, into, (dq, dk))
    if below is not None:
        unmasking.total = below
    if scan is not None:
        unmasking.whole(damount, amount, scan.pull)
    else:
        for span in reversed(list(_spans(masking))):
            part = damount[span.b0 : span.b1, span.r0 : span.r1, span.lo : span.hi]
            unmasking.block(span, part)
    return Gradients(dq, dk, dv, into, selector, unmasking.dgate, unmasking.total)


def _joined(bands: Sequence[Gradients]) -> Gradients:
    """Of bands of rows, from above."""
    first = bands[0]
    if len(bands) == 1:
        return first

    def total(parts: Iterable[Tensor]) -> Tensor:
        return reduce(torch.add, parts)

    return Gradients(
        torch.cat([x.q for x in bands], 2),
        total(x.k for x in bands),
        total(x.v for x in bands),
        {i: total(x.reads[i] for x in bands) for i in first.reads},
        [torch.cat([x.selector[0] for x in bands], 2), total(x.selector[1] for x in bands)]
        if first.selector
        else [],
        total(x.gate for x in bands),
        first.carry,
    )


def scan_of(selection: Selection) -> masking_triton.Scan | None:
    """Generated kernels that compute F, where the device has some."""
    if selection.given.q.device.type not in devices.IMPLEMENTATIONS:
        return None
    alone = selection.alone
    if not masking_triton.runs(alone):
        return None
    return masking_triton.Scan.of(alone, selection.past, selection.carry)


def unmasking_of(
    selection: Selection,
    masking: Masking,
    into: dict[int, Tensor],
    gradients: tuple[Tensor, Tensor],
) -> tuple[Unmasking, list[Tensor]]:
    """Where it adds: to gradients of the selector's own tensors, or to a head of q and of k."""
    if selection.selector:
        dq, dk = own = [_zeros(x, selection.given.dtype) for x in selection.selector]
    else:
        own, head, group = [], selection.head, selection.key_head
        dq, dk = gradients[0][:, head : head + 1], gradients[1][:, group : group + 1]
    gate = None if selection.gate is None else selection.gate.to(selection.given.dtype)
    return Unmasking(masking, gate, into, dq, dk), own


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(like.shape, dtype=dtype, device=like.device)


def _blocked(selection: Selection, masking: Masking) -> _Subtracted | None:
    """None where F has to be a tensor."""
    if selection.given.q.device.type in devices.IMPLEMENTATIONS:
        return None
    frame = _Subtracted(selection, masking)
    return frame if frame.sliced else None


def _reading(
    selection: Selection, masking: Masking, scan: masking_triton.Scan | None
) -> tuple[Inputs, Tensor, Tensor]:
    """The attention with F as a tensor [B, T, S], F itself, 0 at keys that no row of a block may
    see, and the state.
    """
    given = selection.given
    if scan is not None:
        amount, state = scan.amounts()
        read = selection.reading(selection.weighed(amount))
        return left_out(read, given, amount, selection.past, selection.gate), amount, state
    shape = (given.q.shape[0], given.q.shape[2], given.k.shape[2])
    amount = torch.zeros(shape, dtype=given.dtype, device=given.q.device)
    for span in _spans(masking):
        amount[:, span.r0 : span.r1, span.lo : span.hi] = masking.block(span).amount
    return selection.reading(selection.weighed(amount)), amount, masking.state()


def _spans(masking: Masking) -> Iterator[Span]:
    grid: Grid = masking.frame.grid
    yield from spans(grid, grid.B, _BUDGET, _ROWS)
