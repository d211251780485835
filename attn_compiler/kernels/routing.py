"""Which experts a token takes, and how much of each.

    logits = x w^T [B, T, H, E],  index = the k largest of a head,  gate = sigmoid(logits[index])

Not competitive: a gate does not depend on the other experts. Gradients reach a router through the
gates that were chosen, and through nothing else.

Source: SwitchHead (arXiv 2312.07987v3), equations 7 and 8. The choice is made on logits, because
sigmoids of logits above 17 are all 1 in float32. Entropies: sigma-MoE (arXiv 2310.10837), MoEUT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels.devices import full_precision
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.frame import accumulator

_observers: list[Callable[[Tensor, Routes], None]] = []


@contextmanager
def observed(observe: Callable[[Tensor, Routes], None]) -> Iterator[None]:
    """Show every choice, with the router that made it, while the context lasts."""
    _observers.append(observe)
    try:
        yield
    finally:
        _observers.remove(observe)


@dataclass(frozen=True, slots=True)
class Routes:
    """The experts of every token.

    Attributes:
        index: [B, T, H, k], int32, from 0, below E.
        gate: [B, T, H, k], float32 or wider.
        logits: [B, T, H, E] as they were before dropout, in the dtype of `gate`.
    """

    index: Tensor
    gate: Tensor
    logits: Tensor


def route(
    x: Tensor,
    w: Tensor,
    *,
    heads: int,
    k: int,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    silent: bool = False,
) -> Routes:
    """Choose experts.

    Args:
        x: [B, T, D].
        w: the router, [H E, D]; row h E + e scores expert e of head h.
        heads: H.
        k: experts that are chosen.
        dropout: probability that an expert cannot be chosen by a token, and is chosen only where
            fewer than k others are left. Gates are not scaled.
        seed: int64, one element, iff dropout > 0: the draw is a function of it.
        silent: an expert that was dropped and still chosen has gate 0; else the gate that it would
            have had.

    Raises:
        UnsupportedCall: sizes that do not belong together; dropout without a seed, or a seed
            without dropout.
    """
    _check(w, heads, k, dropout, seed)
    # half precision would tie logits that differ; under autocast it would come back
    wide = accumulator(x, w)
    with full_precision(x.device.type):
        logits = (x.to(wide) @ w.to(wide).mT).unflatten(-1, (heads, -1))
    batch, length, _, experts = logits.shape
    dropped = Drop(seed, dropout).dropped((heads, length), (0, batch), (0, length), (0, experts))
    scores = logits
    if dropped is not None:
        scores = logits.masked_fill(dropped.transpose(1, 2), -torch.inf)
    index = scores.detach().topk(k, dim=-1).indices
    gate = (scores if silent else logits).gather(-1, index).sigmoid()
    found = Routes(index.to(torch.int32), gate, logits)
    for observe in _observers:
        observe(w, found)
    return found


def _check(w: Tensor, heads: int, k: int, dropout: float, seed: Tensor | None) -> None:
    experts, rest = divmod(w.shape[0], heads)
    why = ""
    if rest or not 1 <= k <= experts:
        why = f"{w.shape[0]} rows of scores are no {heads} heads with at least k={k} experts each"
    elif not 0 <= dropout < 1 or (seed is None) != (dropout == 0):
        why = "dropout is at least 0 and below 1, and a seed is given exactly when it is above 0"
    if why:
        raise UnsupportedCall(
            "experts cannot be chosen", why=(why,), do="give a router [heads * experts, width]"
        )


# ---------------------------------------------------------------- what routers do


def usage(index: Tensor, experts: int) -> Tensor:
    """Share of the routes of a head that go to each of its experts: [H, E], rows sum to 1.

    Args:
        index: [B, T, H, k].
        experts: E.
    """
    heads = index.shape[2]
    flat = index.to(torch.int64).transpose(0, 2).reshape(heads, -1)
    counts = torch.zeros(heads, experts, device=index.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=counts.dtype))
    return counts / max(1, flat.shape[1])


def mean_choice(logits: Tensor) -> Tensor:
    """softmax(logits) averaged over all tokens: [H, E], from logits [B, T, H, E]."""
    return logits.softmax(-1).flatten(0, 1).mean(0)


def entropy(shares: Tensor) -> Tensor:
    """-sum_e p log p of each row, in nats: log E where all experts are used alike, 0 where one is.

    Of `mean_choice`, times minus a weight, it is the regulariser that keeps experts in use; of
    `usage`, it is what to look at.

    Args:
        shares: [..., E], rows sum to 1.
    """
    return -torch.xlogy(shares, shares).sum(-1)


@lru_cache
def mixture_deviation(k: int, experts: int) -> float:
    """Deviation of the outputs of k chosen among E independent maps with their gates, for one of
    such a map: the root of E integral P(chosen | z) sigma(z)^2 dN(z), where logits z are standard
    normal, as they are for inputs of unit variance and rows of length 1.
    """
    logits = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    density = torch.exp(-logits.square() / 2) / math.sqrt(2 * math.pi)
    above = torch.special.ndtr(-logits)
    others = experts - 1
    chosen = sum(math.comb(others, n) * above**n * (1 - above) ** (others - n) for n in range(k))
    square = torch.trapezoid(density * chosen * logits.sigmoid().square(), logits)
    return math.sqrt(experts * float(square))
