"""Which tokens a cache of fixed size drops, by a generated kernel: one program for each sample.

    rows of F [B, R, S], one after the other   ->   death [B, S], in place

A program holds the fate of all keys of a sample and reads one row of F at a time, so the host
launches once for a band of rows. Nothing of it was measured.

Source: Selective Attention (arXiv 2410.02703), whose caches drop what is masked most.
"""

from __future__ import annotations

from torch import Tensor

from attn_compiler.kernels.launch import Launch
from attn_compiler.kernels.template import load, render

# keys whose fate the registers of a program hold, on every device that the tests compile for
_MOST = 2**13
_KEYS_OF_A_WARP = 2**8


def runs(keys: int) -> bool:
    """Does a program hold so many keys?"""
    return keys <= _MOST


def evict(
    amount: Tensor, protected: Tensor, cached: Tensor, death: Tensor, first: int, budget: int
) -> None:
    """Let some rows come, one after the other.

    Args:
        amount: F of these rows, [B, R, S], float32.
        protected: keys that nobody masks, [B, S], int8.
        cached: rows that may see their own key, boolean [B, R].
        death: of all keys as the rows before left it, [B, S] int64; changed in place.
        first: number of the first of these rows.
        budget: tokens that stay, the newest included.
    """
    launch(amount, protected, cached, death, first, budget).run()


def launch(
    amount: Tensor, protected: Tensor, cached: Tensor, death: Tensor, first: int, budget: int
) -> Launch:
    """The kernel with its arguments, see `evict`."""
    batch, rows, keys = amount.shape
    block = max(16, 1 << (keys - 1).bit_length())
    warps = min(16, max(1, block // _KEYS_OF_A_WARP))
    args = (amount, protected, cached, death, rows, first, keys, budget)
    kernel = load("evict", render("evict")).evict
    return Launch(kernel, (batch, 1, 1), args, {"BLOCK": block, "num_warps": warps})
