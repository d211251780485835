"""The heads of a trained model with softmax inside a chunk and linear attention outside of it.

    out_i = (sum_near exp(s_ij) v_j + f_i sum_far g_j v_j) / (sum_near exp(s_ij) + f_i sum_far g_j)

Weights of the projections stay; f and g, features of queries and keys that are 0 or more, are what
is learned. Both sums are divided by the larger one first, so that no score overflows.

Source: LoLCATs (arXiv 2410.10254), its idea of a softmax in windows beside linear attention; here
the window is the chunk of the row, so that one state for each chunk is all there is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels.frame import accumulator

INF = float("inf")


def near_and_far(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: tuple[Tensor, Tensor],
    *,
    chunk: int,
    causal: bool,
    scale: float,
    valid: Tensor | None = None,
) -> Tensor:
    """Attention of every head in time and memory linear in T, differentiable to any order.

    Args:
        q: [B, H, T, d].
        k, v: [B, G, T, d] and [B, G, T, dv]; G divides H.
        features: of queries [B, H, T, f] and of keys [B, G, T, f], none below 0.
        chunk: tokens that see each other by softmax.
        causal: a token sees those before it, linearly those of the chunks before.
        scale: of q k^T.
        valid: [B, T] bool, False for keys that nobody sees.

    Returns:
        [B, H, T, dv] in the dtype of v, 0 for rows without keys.

    Raises:
        UnsupportedCall: shapes that do not belong together.
    """
    _check(q, k, v, features, chunk)
    heads, length, dtype = q.shape[1], q.shape[2], accumulator(q, k, v)
    counted = q.new_ones((1, length), dtype=torch.bool) if valid is None else valid

    def chunks(x: Tensor) -> Tensor:  # [B, H, chunks, C, ...]
        wide = x.to(dtype).repeat_interleave(heads // x.shape[1], 1)
        cut: Tensor = pad(wide, (0, 0, 0, -length % chunk)).unflatten(2, (-1, chunk))
        return cut

    queries, keys, value, f, g = (chunks(x) for x in (q, k, v, *features))
    allowed = pad(counted, (0, -length % chunk)).unflatten(1, (-1, chunk))[:, None, :, None]
    g = g * allowed.mT
    order = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device)
    seen = allowed & (order.tril() if causal else order)
    scores = (queries @ keys.mT * scale).masked_fill(~seen, -INF)
    alone = ~seen.any(-1, keepdim=True)
    near = scores.masked_fill(alone, 0.0).softmax(-1) @ value
    near_size = scores.masked_fill(alone, 0.0).logsumexp(-1, keepdim=True)
    # the denominator is one more channel of the values
    states = g.mT @ pad(value, (0, 1), value=1.0)
    far = f @ _outside(states, causal)
    near_share, far_share = _shares(near_size, far[..., -1:], alone)
    total = near_share + far[..., -1:] * far_share
    mixed = near * near_share + far[..., :-1] * far_share
    nothing = total <= 0
    out: Tensor = mixed.masked_fill(nothing, 0.0) / total.masked_fill(nothing, 1.0)
    return out.flatten(2, 3)[:, :, :length].to(v.dtype)


def _shares(near_size: Tensor, far_sum: Tensor, alone: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the normed near part and of the far sums: exp(near_size), 1, both divided by the
    larger part, so that neither overflows.
    """
    far_size = far_sum.detach().clamp(min=torch.finfo(far_sum.dtype).tiny).log()
    size = torch.maximum(near_size.detach().masked_fill(alone, -INF), far_size)
    near_share = (near_size - size).exp().masked_fill(alone, 0.0)
    # it stays a number beside a far part of 0, whose derivative needs it
    return near_share, (-size).exp().clamp(max=torch.finfo(size.dtype).max ** 0.5)


def _outside(states: Tensor, causal: bool) -> Tensor:
    """What a chunk sees of the others' states [B, H, chunks, ...]."""
    if causal:
        return pad(states.cumsum(2), (0, 0, 0, 0, 1, 0))[:, :, :-1]
    before = pad(states.cumsum(2), (0, 0, 0, 0, 1, 0))[:, :, :-1]
    after = pad(states.flip(2).cumsum(2), (0, 0, 0, 0, 1, 0))[:, :, :-1].flip(2)
    return before + after


def _check(q: Tensor, k: Tensor, v: Tensor, features: tuple[Tensor, Tensor], chunk: int) -> None:
    """Raise UnsupportedCall unless the shapes belong together."""
    f, g = features
    four = all(x.dim() == 4 for x in (q, k, v, f, g))
    good = four and f.shape[:3] == q.shape[:3] and g.shape[:3] == k.shape[:3] == v.shape[:3]
    good = good and (q.shape[0], q.shape[2:]) == (k.shape[0], k.shape[2:])
    if not (good and f.shape[3] == g.shape[3] and q.shape[1] % k.shape[1] == 0 and chunk > 0):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, f, g))
        raise UnsupportedCall(
            "attention near and far cannot read its arguments",
            why=(f"q, k, v, features of q and of k: {shapes}; chunk {chunk}",),
            do="hand over [batch, heads, tokens, features] of one sequence, chunk from 1",
        )
