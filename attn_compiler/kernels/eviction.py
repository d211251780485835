"""Which tokens a cache drops when it keeps only so many: those most masked by others.

    with token i there are more than K:  evict argmax of F[i,j] over the kept j, j < i

before token i attends; of equals the one that came first. A protected token counts as -1, so it
goes only when nothing else is left, and token i itself never goes. What was evicted never returns.
F of a kept token does not depend on what else its own layer evicts.

    attn_compiler::selective_deaths(q, k, reads, ints, selector, *, program, scale, head,
        select_from, budget) -> death

death [B, S] int64 is the row that evicts each key when all rows come one after the other: S for a
key that is never evicted, 0 for one that is never cached because its own row may not see it
(padding). Pair (i, j) attends while i < death[j], so pruning a whole pass is one number for a key.
Arguments as in `selective`, of a whole sequence: T = S, nothing carried. It has no derivative.

Source: Selective Attention (arXiv 2410.02703) prunes by F down to a budget for each layer; it does
not say whether the new token attends before or after, nor what happens to equals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_compiler.errors import UnsupportedCall
from attn_compiler.ir.evaluate import evaluate
from attn_compiler.ir.score import Program
from attn_compiler.kernels import devices, eviction_triton
from attn_compiler.kernels.grid import spans
from attn_compiler.kernels.masking import PROTECTED
from attn_compiler.kernels.schema import LIBRARY
from attn_compiler.kernels.selection import Selection
from attn_compiler.kernels.selective import selection_of
from attn_compiler.kernels.selective_paths import form_of, scan_of

_BUDGET = 2**20
_ROWS = 128
LIBRARY.define(
    "selective_deaths(Tensor q, Tensor k, Tensor[] reads, SymInt[] ints, Tensor[] selector, *, "
    "str program, float scale, int head, str select_from, int budget) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
selective_deaths = torch.ops.attn_compiler.selective_deaths.default


def _forward(
    q: Tensor,
    k: Tensor,
    reads: Sequence[Tensor],
    ints: Sequence[int],
    selector: Sequence[Tensor],
    *,
    budget: int,
    **options: Any,
) -> Tensor:
    args = (q, k, k, reads, ints, None, selector, None, None)
    selection = selection_of(*args, dropout=0.0, **options)
    if budget < 2 or q.shape[2] != k.shape[2]:
        raise UnsupportedCall(
            "selective_deaths cannot evict",
            why=(f"given: budget {budget}, {q.shape[2]} rows, {k.shape[2]} keys",),
            do="give a budget of at least 2, and a whole sequence",
        )
    with devices.full_precision(q.device.type):
        cached = _see_themselves(selection)
        found = _by_kernels(selection, cached, budget)
        return _row_by_row(selection, cached, budget) if found is None else found


def _see_themselves(selection: Selection) -> Tensor:
    """Which rows may see their own key, [B, T]."""
    alone = selection.alone
    (batch, _, length, _), device = alone.q.shape, alone.q.device
    place = torch.arange(length, device=device)
    env: dict[str, Any] = {"B": batch, "T": length, "S": length, "q": place, "k": place}
    env["b"] = torch.arange(batch, device=device).unsqueeze(1)
    allowed = evaluate(Program.parse(alone.program).mask, env, alone.reads, alone.ints)
    return allowed.to(device).bool().expand(batch, length)


def _by_kernels(selection: Selection, cached: Tensor, budget: int) -> Tensor | None:
    """None where there are no kernels."""
    (batch, _, keys, _), state = selection.given.k.shape, None
    budget = min(budget, keys)
    if not eviction_triton.runs(budget) or scan_of(selection) is None:
        return None
    death = cached.long() * keys
    kept = eviction_triton.nothing_kept(batch, budget, cached.device)
    each = form_of(selection, "forward", inside=False).rows
    for start, end in selection.bands(each):
        part = selection.band(start, end, state)
        scan = scan_of(part)
        assert scan is not None  # as for the whole
        amount, state = scan.amounts()
        own = cached[:, start:end].contiguous()
        eviction_triton.evict(amount, scan.protected, own, death, kept, start, budget)
    return death


def _row_by_row(selection: Selection, cached: Tensor, budget: int) -> Tensor:
    masking = selection.masking()
    grid = masking.frame.grid
    amount = torch.zeros(grid.B, grid.S, dtype=masking.frame.dtype, device=masking.frame.device)
    death = torch.zeros_like(amount, dtype=torch.int64)
    for span in spans(grid, grid.B, _BUDGET, _ROWS):
        found = masking.block(span)
        protected = masking.protected(grid.whole())
        for a in range(span.r1 - span.r0):
            row = span.r0 + a
            amount[:, span.lo : span.hi] = found.amount[:, a]
            death[:, row] = cached[:, row].long() * grid.S
            alive = death == grid.S
            rank = amount.masked_fill(protected, PROTECTED).masked_fill(~alive, -torch.inf)
            rank[:, row] = -torch.inf
            over = alive.sum(1) > budget
            victim = rank.argmax(1, keepdim=True)
            fate = torch.where(over.unsqueeze(1), row, death.gather(1, victim))
            death.scatter_(1, victim, fate)
    return death


LIBRARY.impl("selective_deaths", _forward, "CompositeExplicitAutograd")


@torch.library.register_fake("attn_compiler::selective_deaths", lib=LIBRARY)
def _fake(q: Tensor, k: Tensor, *_: Any, **__: Any) -> Tensor:
    return k.new_empty((k.shape[0], k.shape[2]), dtype=torch.int64)


def samples() -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(operator, args, kwargs), small, on the CPU."""
    draw = torch.Generator().manual_seed(4)
    options: dict[str, Any] = {"program": "score: dot; mask: (k <= q); empty: any", "scale": 0.5}
    options |= {"head": 1, "select_from": "qk", "budget": 3}
    for number in (0, 2):
        selector = [torch.randn(2, 1, 7, 3, generator=draw) for _ in range(number)]
        q, k = (torch.randn(2, heads, 7, 8, generator=draw) for heads in (4, 2))
        yield selective_deaths, (q, k, [], [], selector), options


def kept(death: Tensor, budget: int) -> Tensor:
    """Positions of the keys that are left, in order, [B, budget] int64; -1 where there is none."""
    alive = death == death.shape[1]
    order = alive.byte().argsort(dim=1, descending=True, stable=True)[:, :budget]
    found = torch.where(alive.gather(1, order), order, -1)
    return torch.nn.functional.pad(found, (0, budget - found.shape[1]), value=-1)


def victim(amount: Tensor, positions: Tensor) -> Tensor:
    """The slot that the next token takes: a free one, or that of the token which is evicted.

    Args:
        amount: F of each slot, [B, slots]; below 0 where protected.
        positions: of the tokens in them, -1 where a slot is free; same shape.

    Returns:
        [B, 1] int64.
    """
    rank = torch.where(positions < 0, torch.inf, amount)
    worst = rank == rank.amax(1, keepdim=True)
    return torch.where(worst, positions, torch.iinfo(positions.dtype).max).argmin(1, keepdim=True)
