"""How many tokens Selective attention still needs, at most, in any row: what a memory loss lowers.

    attn_compiler::selective_need(q, k, reads, ints, selector, *, program, scale, head, select_from,
        tau) -> (need, row, amount)

    need[b] = max over i of M[b,i],     M[b,i] = sum over k of 1 - min(F[b,i,k], tau) / tau

over the keys that row i may see. Arguments as in `selective`, where F is defined. `row` [B] is the
first row that needs most, `amount` [B, S] is F of it, 0 at keys that it does not see. Only `need`
has a gradient: that of one row of F, so nothing of T x S numbers is ever kept.

Source: Selective Attention (arXiv 2410.02703) adds such a loss; its constants are the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attn_compiler.errors import UnsupportedCall
from attn_compiler.ir.evaluate import evaluate
from attn_compiler.ir.score import Program
from attn_compiler.kernels import devices
from attn_compiler.kernels.derivatives import derive
from attn_compiler.kernels.frame import accumulator, empty_heads, in_heads_layout
from attn_compiler.kernels.grid import Span, spans
from attn_compiler.kernels.masking import Masked, Masking
from attn_compiler.kernels.schema import LIBRARY
from attn_compiler.kernels.selection import Selection
from attn_compiler.kernels.selective import masking, selection_of
from attn_compiler.kernels.selective_paths import unmasking_of

_BUDGET = 2**20
_ROWS = 256
_ARGUMENTS = "Tensor q, Tensor k, Tensor[] reads, SymInt[] ints, Tensor[] selector"
_OPTIONS = "*, str program, float scale, int head, str select_from, float tau"
_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(
    f"selective_need({_ARGUMENTS}, {_OPTIONS}) -> (Tensor need, Tensor row, Tensor amount)",
    tags=_TAGS,
)
LIBRARY.define(
    f"selective_need_backward(Tensor grad_need, {_ARGUMENTS}, Tensor need, Tensor row, "
    f"Tensor amount, bool[] needs, {_OPTIONS}) -> Tensor[]",
    tags=_TAGS,
)
selective_need = torch.ops.attn_compiler.selective_need.default
selective_need_backward = torch.ops.attn_compiler.selective_need_backward.default


def _selection(q: Tensor, k: Tensor, *rest: Any, tau: float, **options: Any) -> Selection:
    if tau <= 0:
        raise UnsupportedCall(
            "selective_need cannot count", why=(f"tau is {tau}",), do="give a tau above 0"
        )
    reads, ints, selector = rest
    args = (q, k, k, reads, ints, None, selector, None, None)
    return selection_of(*args, dropout=0.0, **options)


def reference(*args: Any, tau: float, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operator in plain PyTorch, differentiable; same arguments and results."""
    selection = _selection(*args, tau=tau, **options)
    with devices.full_precision(args[0].device.type):
        amount, _ = masking(selection)
        batch, length, keys = amount.shape
        alone = selection.alone
        env: dict[str, Any] = {"B": batch, "T": length, "S": keys}
        for i, (name, size) in enumerate((("b", batch), ("q", length), ("k", keys))):
            env[name] = torch.arange(size, device=amount.device).view((-1,) + (1,) * (3, 1, 0)[i])
        mask = evaluate(Program.parse(alone.program).mask, env, alone.reads, alone.ints)
        allowed = mask.to(amount.device).bool().expand(batch, 1, length, keys).squeeze(1)
        alive = torch.where(allowed, 1 - amount.clamp(max=tau) / tau, 0.0)
        needs = alive.sum(-1)
        need, row = needs.max(1)
    at = row.view(-1, 1, 1).expand(-1, 1, keys)
    return need, row, torch.where(allowed, amount, 0.0).gather(1, at).squeeze(1)


def _forward(*args: Any, tau: float, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    selection = _selection(*args, tau=tau, **options)
    with devices.full_precision(args[0].device.type):
        scan = selection.masking()
        batch, keys = scan.frame.grid.B, scan.frame.grid.S
        need, row = scan.key.new_zeros(batch), scan.key.new_zeros(batch, dtype=torch.int64)
        amount = scan.key.new_zeros(batch, keys)
        for span in _spans(scan):
            found = scan.block(span)
            seen = _seen(scan, found)
            most, at = (seen * (1 - found.amount.clamp(max=tau) / tau)).sum(-1).max(1)
            index = at.view(-1, 1, 1).expand(-1, 1, span.hi - span.lo)
            own = (seen * found.amount).gather(1, index).squeeze(1)
            own = torch.nn.functional.pad(own, (span.lo, keys - span.hi))
            better = most > need
            need, row = torch.where(better, most, need), torch.where(better, at + span.r0, row)
            amount = torch.where(better.unsqueeze(1), own, amount)
    return need, row, amount


def _backward(grad_need: Tensor, *args: Any, tau: float, **options: Any) -> list[Tensor]:
    *own, _, row, amount, needs = args
    selection = _selection(*own, tau=tau, **options)
    given, wanted = selection.given, iter(needs)
    with devices.full_precision(grad_need.device.type):
        into = {
            i: torch.zeros(read.shape, dtype=given.dtype, device=read.device)
            for i, read in enumerate(given.reads)
            if next(wanted)
        }
        dq, dk = (empty_heads(x, x.shape, given.dtype).zero_() for x in (given.q, given.k))
        scan = selection.masking(keep=True)
        order = list(_spans(scan))
        for span in order:
            scan.block(span)
        unmasking, selector = unmasking_of(selection, scan, into, (dq, dk))
        line = torch.where(amount < tau, -grad_need.to(given.dtype).unsqueeze(1) / tau, 0.0)
        for span in reversed(order):
            seen = _seen(scan, scan.block(span))
            here = torch.arange(span.r0, span.r1, device=row.device) == row.unsqueeze(1)
            grad = line[:, None, span.lo : span.hi] * (here.unsqueeze(2) & seen)
            unmasking.block(span, grad)
        found = [in_heads_layout(g, x.dtype) for g, x in ((dq, given.q), (dk, given.k))]
        found += [grad.to(given.reads[i].dtype) for i, grad in into.items()]
        for grad, x in zip(selector, selection.selector, strict=True):
            if next(wanted):
                found.append(grad.to(x.dtype))
    return found


def _seen(scan: Masking, found: Masked) -> Tensor:
    """Which keys the rows of a block may see, [B, rows, keys]."""
    allowed = scan.frame.mask(replace(found.span, masked=True), found.tensors)
    if allowed is None:
        return torch.ones_like(found.chosen, dtype=torch.bool)
    return allowed[:, 0].expand_as(found.chosen)


def _spans(scan: Masking) -> Sequence[Span]:
    grid = scan.frame.grid
    return spans(grid, grid.B, _BUDGET, _ROWS)


LIBRARY.impl("selective_need", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("selective_need_backward", _backward, "CompositeExplicitAutograd")
derive(
    selective_need,
    selective_need_backward,
    reference=reference,
    always=2,
    kernels=(_forward, _backward),
)


@torch.library.register_fake("attn_compiler::selective_need", lib=LIBRARY)
def _fake(q: Tensor, k: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype, batch = accumulator(q, k), q.shape[0]
    need = q.new_empty((batch,), dtype=dtype)
    return need, need.to(torch.int64), q.new_empty((batch, k.shape[2]), dtype=dtype)


@torch.library.register_fake("attn_compiler::selective_need_backward", lib=LIBRARY)
def _fake_backward(grad_need: Tensor, *args: Any, **_: Any) -> list[Tensor]:
    q, k, reads, _ints, selector, *_rest, needs = args
    rest = zip((*reads, *selector), needs, strict=True)
    wanted = [x.new_empty(x.shape) for x, need in rest if need]
    return [*(empty_heads(x, x.shape) for x in (q, k)), *wanted]


# ---------------------------------------------------------------- samples


def samples() -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(operator, args, kwargs) for both operators, small, on the CPU."""
    draw = torch.Generator().manual_seed(2)

    def heads(number: int, width: int) -> Tensor:
        found = torch.randn(2, 7, number, width, generator=draw).transpose(1, 2)
        return found.requires_grad_()

    options: dict[str, Any] = {"program": "score: dot; mask: (k <= q); empty: any", "scale": 0.5}
    options |= {"tau": 1.0, "head": 1, "select_from": "qk"}
    for number in (0, 2):
        selector = [heads(1, 3) for _ in range(number)]
        q, k = heads(4, 8), heads(2, 8)
        yield selective_need, (q, k, [], [], selector), options
        plain: tuple[Any, ...] = (q.detach(), k.detach(), [], [], [x.detach() for x in selector])
        with torch.no_grad():
            results = selective_need(*plain, **options)
        args = (torch.ones_like(results[0]), *plain, *results, [True] * number)
        yield selective_need_backward, args, options
