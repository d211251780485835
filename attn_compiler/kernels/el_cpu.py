"""The middle of EL-attention by PyTorch's flash kernel for CPUs, where the score is a sum.

    P x,  P = softmax(q' x^T + bias)   ->   one call:  heads and beams are its rows, x its keys and
    its values, as wide as the model

Scores and weights never leave the caches, and x is read once for the rows of all heads and beams.
What does not fit the kernel is computed in plain products (`el`).

Source: EL-Attention (arXiv 2105.04779).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attn_compiler.kernels.flash_cpu import added
from attn_compiler.kernels.frame import Frame
from attn_compiler.kernels.gathered_cpu import FORWARD
from attn_compiler.kernels.grid import Span

# rows that one thread of the kernel takes, below 192 of them
_ROWS = 32


def fits(frame: Frame) -> bool:
    """Is the score a sum without a sink, on a CPU?"""
    return frame.device.type == "cpu" and frame.plan.additive and frame.plan.sink is None


def attend(
    frame: Frame, span: Span, wide: Tensor, shift: Tensor | None, x: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Overwrite the expanded queries of a block of items with P x.

    Args:
        frame, span: the call, and the block's rows of it.
        wide: [B, H, rows, D], scaled; those of the block are overwritten.
        shift: [B, H, rows, 1], what the keys' bias adds to all scores of a row, or None.
        x: [items, S, D], in the dtype of `wide`; neighbouring rows of the block share an item.

    Returns:
        P 1 [b, H, rows, 1] and lse [b, H, rows]; None where a row may have no key, and nothing is
        done.
    """
    if not fits(frame):
        return None
    rows, (items, keys, width) = wide[span.b0 : span.b1], x.shape
    together = rows.numel() // (items * width)
    parts = _parts(items, together)
    bias = added(frame, span, wide.dtype)
    if bias is not None:
        bias = bias.expand(*rows.shape[:3], keys).reshape(items, parts, -1, keys)
    query, states = rows.reshape(items, parts, -1, width), x[:, None]
    out, lse = FORWARD(query, states, states, 0.0, False, attn_mask=bias, scale=1.0)
    # a sum of exponentials is one by accident or because there is none
    if bias is not None and bool((lse == 0).any()):
        return None
    rows.copy_(out.reshape(rows.shape))
    lse = lse.reshape(rows.shape[:3])
    if shift is not None:
        lse = lse + shift[span.b0 : span.b1, ..., 0]
    return rows.new_ones((*rows.shape[:3], 1)), lse


def _parts(items: int, rows: int) -> int:
    """Into how many heads the rows of an item are cut, so that every thread has work."""
    threads = torch.get_num_threads()
    return 1 if items * -(-rows // _ROWS) >= threads else math.gcd(rows, threads)
