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
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from attn_compiler.cost import subtracting
from attn_compiler.kernels import attention as composite
from attn_compiler.kernels import (
    devices,
    gpu,
    masking_triton,
    rows,
    selective_inside,
    selective_tiles,
)
from attn_compiler.kernels import flash_cpu as flash
from attn_compiler.kernels.frame import Frame, Inputs, empty_heads, empty_lse
from attn_compiler.kernels.gpu_tiles import problem_of
from attn_compiler.kernels.grid import Grid, Span, spans
from attn_compiler.kernels.masking import Masking, Unmasking
from attn_compiler.kernels.plan import Slice
from attn_compiler.kernels.selection import Gradients, Selection

# elements of a block of the selecting head alone
_BUDGET = 2**20
_ROWS = 256


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
        scan, form = _form(selection, "forward", ())
        if scan is not None and form.kind == "inside":
            return selective_inside.forward(selection, scan)
        return _banded(selection, form.rows)
    if flash.fits(frame):
        out, lse = flash.forward(frame)
    else:
        shape = (*given.q.shape[:3], given.v.shape[-1])
        out, lse = empty_heads(given.v, shape), empty_lse(given.q, given.dtype)
        rows.forward(frame, out, lse)
    return out, lse, masking.state()


def _banded(selection: Selection, each: int) -> tuple[Tensor, Tensor, Tensor]:
    outs, totals = [], []
    state: Tensor | None = None
    for start, end in selection.bands(each):
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
    if frame is not None:
        return _blocked_steps(frame, selection, masking, grad, saved, into)
    scan, form = _form(selection, "backward", reads)
    if scan is not None and form.kind == "inside":
        return selective_inside.backward(selection, scan, grad, saved, into, form.rows)
    return _whole_steps(selection, form.rows, grad, saved, into)


def _blocked_steps(
    frame: _Subtracted,
    selection: Selection,
    masking: Masking,
    grad: Tensor,
    saved: tuple[Tensor, Tensor],
    into: dict[int, Tensor],
) -> Gradients:
    given = selection.given
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
    each: int,
    grad: Tensor,
    saved: tuple[Tensor, Tensor],
    into: dict[int, Tensor],
) -> Gradients:
    """Bands of rows from below; before the last one can run, those above tell where it starts."""
    order = selection.bands(each)
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


def form_of(
    selection: Selection, work: Literal["forward", "backward"], inside: bool
) -> subtracting.Form:
    """Where F lives in a call on a device that has no way by blocks.

    Args:
        inside: whether there are kernels that make it inside.
    """
    given = selection.given
    row = gpu.hardware(given.q.device)
    if row is None or row.kind == "cpu":
        return subtracting.unknown(given.q.shape[2], inside=inside)
    problem, width = problem_of(given).bucketed(), selection.alone.q.shape[3]
    return subtracting.choose(row, problem, width, backward=work == "backward", inside=inside)


def _form(
    selection: Selection, work: Literal["forward", "backward"], reads: Sequence[int]
) -> tuple[masking_triton.Scan | None, subtracting.Form]:
    scan = scan_of(selection)
    inside = scan is not None and selective_inside.possible(selection, scan)
    if inside and scan is not None:
        inside = masking_triton.differentiates(scan.alone, reads)
    return scan, form_of(selection, work, inside)


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
        first = amount[:, :: selective_tiles.SIDE]
        read = selective_tiles.left_out(read, given, first, selection.past, selection.gate)
        return read, amount, state
    shape = (given.q.shape[0], given.q.shape[2], given.k.shape[2])
    amount = torch.zeros(shape, dtype=given.dtype, device=given.q.device)
    for span in _spans(masking):
        amount[:, span.r0 : span.r1, span.lo : span.hi] = masking.block(span).amount
    return selection.reading(selection.weighed(amount)), amount, masking.state()


def _spans(masking: Masking) -> Iterator[Span]:
    grid: Grid = masking.frame.grid
    yield from spans(grid, grid.B, _BUDGET, _ROWS)
