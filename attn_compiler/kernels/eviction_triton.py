"""Which tokens a cache of fixed size drops, by a generated kernel: one program for each sample.

    rows of F [B, R, S], one after the other   ->   death [B, S] and what is kept, in place

A program holds the numbers of the keys that are kept and reads F of these alone, so a prompt may be
of any length, and the host launches once for a band of rows. Nothing of it was measured.

Source: Selective Attention (arXiv 2410.02703), whose caches drop what is masked most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_compiler.kernels.launch import Launch, power
from attn_compiler.kernels.template import load, render

# kept keys that the registers of a program hold, on every device that the tests compile for
_MOST = 2**14
_KEYS_OF_A_WARP = 2**8


def runs(budget: int) -> bool:
    """Does a program hold so many kept keys?"""
    return budget <= _MOST


def nothing_kept(batch: int, budget: int, device: torch.device) -> Tensor:
    """What no row has come to yet: numbers of the kept keys, -1 for none."""
    return torch.full((batch, power(budget)), -1, dtype=torch.int32, device=device)


def evict(
    amount: Tensor,
    protected: Tensor,
    cached: Tensor,
    death: Tensor,
    kept: Tensor,
    first: int,
    budget: int,
) -> None:
    """Let some rows come, one after the other.

    Args:
        amount: F of these rows, [B, R, S], float32.
        protected: keys that nobody masks, [B, S], int8.
        cached: rows that may see their own key, boolean [B, R].
        death: of all keys as the rows before left it, [B, S] int64, S for these rows' own where
            they are cached; changed in place.
        kept: likewise, see `nothing_kept`.
        first: number of the first of these rows.
        budget: tokens that stay, the newest included.
    """
    launch(amount, protected, cached, death, kept, first, budget).run()


def launch(
    amount: Tensor,
    protected: Tensor,
    cached: Tensor,
    death: Tensor,
    kept: Tensor,
    first: int,
    budget: int,
) -> Launch:
    """The kernel with its arguments, see `evict`."""
    batch, rows, keys = amount.shape
    block = kept.shape[1]
    warps = min(16, max(1, block // _KEYS_OF_A_WARP))
    args = (amount, protected, cached, death, kept, rows, first, keys, budget)
    kernel = load("evict", render("evict")).evict
    return Launch(kernel, (batch, 1, 1), args, {"BLOCK": block, "num_warps": warps})
