"""Which tokens a cache drops when it keeps only so many: those most masked by others.

    with token i there are more than K:  evict argmax of F[i,j] over the kept j, j < i

before token i attends; of equals the one that came first. A protected token counts as -1, so it
goes only when nothing else is left, and token i itself never goes. What was evicted never returns.
F of a kept token does not depend on what else its own layer evicts.

Source: Selective Attention (arXiv 2410.02703) prunes by F down to a budget for each layer; it does
not say whether the new token attends before or after, nor what happens to equals.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attn_compiler.kernels.grid import spans
from attn_compiler.kernels.masking import PROTECTED, Masked, Masking
from attn_compiler.kernels.selective_paths import Selection

_BUDGET = 2**20
_ROWS = 128


def deaths(selection: Selection, budget: int) -> Tensor:
    """The row that evicts each key when all rows come one after the other, [B, S] int64.

    S for a key that is never evicted, 0 for one that is never cached because its own row may not
    see it (padding). `pruned` makes a program of it.

    Args:
        selection: a whole sequence: T = S, nothing carried.
        budget: tokens that stay, the newest included; at least 2.
    """
    masking = selection.masking()
    grid = masking.frame.grid
    amount = torch.zeros(grid.B, grid.S, dtype=masking.frame.dtype, device=masking.frame.device)
    death = torch.zeros_like(amount, dtype=torch.int64)
    for span in spans(grid, grid.B, _BUDGET, _ROWS):
        found = masking.block(span)
        cached = _sees_itself(masking, found)
        protected = masking.protected(grid.whole())
        for a in range(span.r1 - span.r0):
            row = span.r0 + a
            amount[:, span.lo : span.hi] = found.amount[:, a]
            death[:, row] = cached[:, a].long() * grid.S
            alive = death == grid.S
            rank = amount.masked_fill(protected, PROTECTED).masked_fill(~alive, -torch.inf)
            rank[:, row] = -torch.inf
            over = alive.sum(1) > budget
            victim = rank.argmax(1, keepdim=True)
            fate = torch.where(over.unsqueeze(1), row, death.gather(1, victim))
            death.scatter_(1, victim, fate)
    return death


def _sees_itself(masking: Masking, found: Masked) -> Tensor:
    """Which rows of a block may see their own key, [B, rows]."""
    span, frame = found.span, masking.frame
    batch, rows, keys = found.chosen.shape
    allowed = frame.mask(replace(span, masked=True), found.tensors)
    if allowed is None:
        return torch.ones(batch, rows, dtype=torch.bool, device=frame.device)
    places = torch.arange(span.r0, span.r1, device=frame.device) - span.lo
    inside = (places >= 0) & (places < keys)
    own = allowed[:, 0].expand(batch, rows, keys)
    own = own.gather(2, places.clamp(0, keys - 1).view(1, -1, 1).expand(batch, -1, 1)).squeeze(2)
    return own & inside


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
