"""The softmax, as people write it, and its shifted and extended forms.

Every function is the same attention, softmax(q k^T / sqrt(d)) v, unless its name says otherwise.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import B, D, Entry, H, T, constant, normal, site

SCALE = 1 / math.sqrt(D)


def stable_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    e = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return (e / e.sum(dim=-1, keepdim=True)) @ v


def detached_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    e = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    return e.div(e.sum(-1, True)) @ v


def naive_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT * SCALE).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def by_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True)) @ v


def by_log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(q @ k.mT * SCALE, dim=-1).exp() @ v


def divided_at_the_end(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    e = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    return (e @ v) / e.sum(dim=-1, keepdim=True)


def divided_in_another_layout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.einsum("bhtd,bhsd->bhts", q * SCALE, k).exp()
    y = torch.einsum("bhts,bhsd->bthd", e, v) * e.sum(-1).transpose(1, 2)[..., None].reciprocal()
    return y.transpose(1, 2)


def divided_by_others(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp(q @ k.mT * SCALE)
    return (e @ v) / e.flip(1).sum(dim=-1, keepdim=True)


def divided_once_more(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp(q @ k.mT * SCALE)
    return ((e / e.sum(-1, keepdim=True)) @ v) / (1 + v.abs())[:, :, :1]


def powers_of_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * (SCALE * math.log2(math.e))
    e = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def softmin(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmin(-SCALE * q @ k.mT, dim=-1) @ v


def over_a_positive_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.mT * SCALE, dim=3) @ v


def in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def cast_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax((q @ k.mT * SCALE).float(), dim=-1).type_as(v) @ v


def everything_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q.float() @ k.float().mT * SCALE).softmax(-1) @ v.float()).to(q.dtype)


def dropout_of_nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT * SCALE).softmax(-1), 0.0, training=True) @ v


class SoftmaxModule(nn.Module):
    """Softmax and dropout are modules; in eval mode the dropout does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax, self.dropout = nn.Softmax(dim=-1), nn.Dropout(0.3)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.dropout(self.softmax(q @ k.mT * SCALE)) @ v


# ---------------------------------------------------------------- shifted


def shift_in_second_names(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.multiply(q @ k.mT, SCALE)
    e = torch.exp(torch.subtract(scores, scores.max(dim=-1, keepdim=True).values))
    return torch.divide(e, e.sum(-1, keepdim=True)) @ v


def maximum_of_everything(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return (scores - scores.max()).softmax(-1) @ v


def maximum_of_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return (scores - scores.amax((1, -1), keepdim=True)).softmax(-1) @ v


def maximum_with_a_floor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    e = torch.exp(scores - scores.amax(-1, keepdim=True).clamp(min=0))
    return (e / e.sum(-1, keepdim=True)) @ v


def negative_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return torch.softmax(-scores.amax(-1, keepdim=True) + scores, -1) @ v


def exponential_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return (scores.exp() / scores.exp().sum(-1, keepdim=True)) @ v


def quieter_than_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp(x) / (2.5 + sum(exp(x))), shifted."""
    scores = q @ k.mT * SCALE
    top = scores.max(dim=-1, keepdim=True).values
    e = torch.exp(scores - top)
    return (e / (e.sum(-1, keepdim=True) + torch.exp(top * -1) * 2.5)) @ v


def causal_quiet(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp(x) / (1 + sum(exp(x))) of what is not masked, shifted by a maximum of at least 0."""
    scores = (q @ k.mT).masked_fill(torch.ones(q.shape[2], k.shape[2]).triu(1).bool(), -math.inf)
    top = scores.amax(-1, keepdim=True).clamp(min=0)
    e = torch.exp(scores - top)
    return (e / (e.sum(-1, keepdim=True) + torch.exp(-top))) @ v


def shifted_when_small(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE / 32
    return F.softmax((scores - scores.amax(dim=-1).unsqueeze(-1)) * 32, -1) @ v


def minus_a_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT * SCALE - F.relu(bias)).softmax(-1) @ v


def masked_after_exp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    e = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    e = e * torch.ones(q.shape[2], k.shape[2]).tril()
    return torch.einsum("bhqk,bhkd->bhqd", e / e.sum(-1, keepdim=True), v)


def chosen_after_exp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    e = torch.where(keep, (q @ k.mT * SCALE).exp(), 0.0)
    return (e @ v) / e.sum(-1, keepdim=True)


def padded_after_exp(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    # the first item has no key at all
    e = keep[:, None, None].float() * (q @ k.mT * SCALE).exp()
    return (e / (e.sum(-1, keepdim=True) + 1e-6)) @ v


def normalised_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * SCALE).softmax(-1) * torch.ones(q.shape[2], k.shape[2]).tril()
    return (weights / weights.sum(-1, keepdim=True)) @ v


def cleared_by_index(q: Tensor, k: Tensor, v: Tensor, drop: Tensor) -> Tensor:
    # rows without keys are NaN, until these are set to zero as well
    scores = q @ k.mT * SCALE
    drop = drop.expand_as(scores)
    scores[drop] = -math.inf
    weights = scores.softmax(-1).clone()
    weights[drop] = 0
    return weights @ v


def cleared_exponentials(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT * SCALE).exp().clone()
    e[..., torch.ones(q.shape[2], k.shape[2]).triu(1) > 0] = 0
    return (e / e.sum(-1, keepdim=True)) @ v


_SAME = (
    stable_by_hand, detached_maximum, naive_by_hand, by_logsumexp, by_log_softmax, powers_of_two,
    softmin, over_a_positive_axis, in_float32, cast_before, everything_in_float32,
    dropout_of_nothing, shift_in_second_names, maximum_of_everything, maximum_of_heads,
    maximum_with_a_floor, negative_maximum, exponential_twice, quieter_than_zero,
    shifted_when_small,
)  # fmt: skip

ENTRIES: tuple[Entry, ...] = (
    *(site(f.__name__, f) for f in _SAME),
    site("causal_quiet", causal_quiet, mask="causal"),
    *(
        site(f.__name__, f, mask="causal")
        for f in (masked_after_exp, chosen_after_exp, normalised_again, cleared_exponentials)
    ),
    site(
        "cleared_by_index",
        cleared_by_index,
        constant((torch.arange(T)[:, None] < torch.arange(T)) | (torch.arange(T)[:, None] == 2)),
        mask="tensor(",
    ),
    site(
        "padded_after_exp",
        padded_after_exp,
        constant(torch.arange(T) < torch.tensor([[0], [6]])),
        mask="padding(",
    ),
    site("minus_a_bias", minus_a_bias, normal(B, H, T, T)),
    site("softmax_module", SoftmaxModule, training=False),
    site("divided_at_the_end", divided_at_the_end),
    site("divided_in_another_layout", divided_in_another_layout),
    site("divided_once_more", divided_once_more),
    site(
        "divided_by_others",
        divided_by_others,
        refused=("not_attention.no_softmax",),
        why="it is divided by the sum of other weights",
    ),
)
