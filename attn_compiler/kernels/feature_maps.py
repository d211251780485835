"""The features of queries and keys that linear attention reads, learned for each head.

    g(k) = [softmax(k W_k), softmax(-k W_k)]
    f(q) = d/2 exp(weight) [softmax(q W_q), softmax(-q W_q)]

A product of features is large where q and k point the same way, as exp(q k) is. Where neither
says anything it is exp(weight): 1 at the start, what a score of 0 counts among the near keys. W
starts as a multiple of the identity, so that channels of queries meet those of keys. Keys that are
rotated by their position are mapped as they are, rotated.

Source: LoLCATs (arXiv 2410.10254) for maps learned after a training, Hedgehog (arXiv 2402.04347)
for the pair of softmaxes; the factor is derived from their product at 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attn_compiler.kernels.frame import accumulator

# the identity itself is blunter than exp(q k / sqrt d), whose slope at 0 would ask for d^(1/4)
_START = 1.5


class FeatureMaps(nn.Module):
    """The maps of one attention.

    Args:
        heads, groups: query heads and kv heads.
        width: d, features of a query and of a key.

    Attributes:
        w_q, w_k: [H, d, d] and [G, d, d].
        weight: [H], the logarithm of what far keys count, beside what their features say.
    """

    def __init__(self, heads: int, groups: int, width: int) -> None:
        super().__init__()
        eye = _START * torch.eye(width)
        self.w_q = nn.Parameter(eye.repeat(heads, 1, 1))
        self.w_k = nn.Parameter(eye.repeat(groups, 1, 1))
        self.weight = nn.Parameter(torch.zeros(heads))

    def queries(self, q: Tensor) -> Tensor:
        """Features [B, H, T, 2 d] of queries [B, H, T, d], at least in float32."""
        found = _features(q, self.w_q)
        factor = 0.5 * q.shape[-1] * self.weight.to(found.dtype).exp()
        return found * factor[:, None, None]

    def keys(self, k: Tensor) -> Tensor:
        """Features [B, G, S, 2 d] of keys [B, G, S, d], at least in float32."""
        return _features(k, self.w_k)

    def extra_repr(self) -> str:
        heads, width, _ = self.w_q.shape
        return f"heads={heads}, groups={self.w_k.shape[0]}, width={width}"


def _features(x: Tensor, w: Tensor) -> Tensor:
    dtype = accumulator(x, w)
    z = x.to(dtype) @ w.to(dtype)
    return torch.cat((z.softmax(-1), (-z).softmax(-1)), -1)
