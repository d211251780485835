"""What looks like attention and is not, or may not be replaced: none of these may be rewritten.

Each row says why. Outputs and gradients must stay as they were, and no site may be accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import WIDTH, Attend, B, D, H, S, Site, T, constant, hidden, normal
from zoo.lookalike_modules import (
    Additive,
    Classifier,
    LinearRouter,
    NearestNeighbours,
    Pooling,
    PoolingByProduct,
    Router,
    SoftExperts,
    Squeeze,
    Synthesizer,
)
from zoo.written_masks import dots, tril

SELF = hidden()


@dataclass(frozen=True)
class Lookalike:
    """One row: a module, its inputs, and the reason for leaving it alone."""

    name: str
    build: Callable[[], nn.Module]
    why: str
    inputs: Callable[[torch.Generator], tuple[Any, ...]] = SELF

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()

    def arguments(self) -> tuple[Any, ...]:
        return self.inputs(torch.Generator().manual_seed(0))

    def __str__(self) -> str:
        return self.name


def core(
    attend: Attend, why: str, *more: Callable[[torch.Generator], Any], **options: Any
) -> Lookalike:
    def build() -> nn.Module:
        return Site(attend() if isinstance(attend, type) else attend, **options)

    return Lookalike(attend.__name__.lower(), build, why, hidden(*more))


# ---------------------------------------------------------------- the wrong axis


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dots(q, k).softmax(-2) @ v


def over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dots(q, k).softmax(1) @ v


def over_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dots(q, k).softmax(0) @ v


def over_queries_and_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = dots(q, k)
    return s.flatten(-2).softmax(-1).view_as(s) @ v


def over_heads_and_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # one distribution over all heads' keys, a sum over heads' values for free
    b, h, t, s = dots(q, k).shape
    joint = dots(q, k).transpose(1, 2).reshape(b, t, h * s).softmax(-1)
    return joint.view(b, t, h, s).transpose(1, 2) @ v


def slots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # slot attention: the slots compete for the inputs, then each is normalised
    weights = dots(q, k).softmax(dim=2) + 1e-6
    return (weights / weights.sum(-1, keepdim=True)) @ v


# ---------------------------------------------------------------- not normalised as attention is


def log_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(dots(q, k), dim=-1) @ v


def sigmoid_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dots(q, k).sigmoid() @ v


def relu_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (dots(q, k).relu().square() / q.shape[2]) @ v


def no_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (dots(q, k) * tril(q.shape[2])) @ v


def normalised_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dots(q, k).softmax(-1).softmax(-1) @ v


def scores_normalised_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = dots(q, k)
    s = (s - s.mean(-1, keepdim=True)) / s.std(-1, keepdim=True)
    return s.softmax(-1) @ v


def sinkhorn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = dots(q, k)
    for _ in range(2):
        s = s - s.logsumexp(-1, keepdim=True)
        s = s - s.logsumexp(-2, keepdim=True)
    return s.exp() @ v


def squared_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = dots(q, k).exp()
    return (e / e.square().sum(-1, keepdim=True).sqrt()) @ v


def wrong_denominator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # the sum is over what is not masked, the numerator over everything
    s = dots(q, k)
    return (
        s.exp() / s.masked_fill(~tril(q.shape[2]), float("-inf")).exp().sum(-1, keepdim=True)
    ) @ v


def wrong_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # two different shifts do not cancel
    s = dots(q, k)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e / (s - s.amax(-2, keepdim=True)).exp().sum(-1, keepdim=True)) @ v


def maximum_of_a_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # the first key is forbidden: the shift is infinite, and so is every output
    s = dots(q, k).masked_fill(torch.arange(k.shape[2]) == 0, float("-inf"))
    return (s - s[..., :1].amax(-1, keepdim=True)).softmax(-1) @ v


def maximum_of_another_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = dots(q, k).masked_fill(torch.zeros(T, T).index_fill(0, torch.tensor(0), 1).bool(), -INF)
    return (s - s.amax(-1, keepdim=True).flip(-2)).softmax(-1) @ v


def maximum_of_all_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    # a row without keys is NaN, and by the gradient of the maximum so are the others
    s = dots(q, k).masked_fill(mask, -INF)
    return (s - s.amax()).softmax(-1) @ v


def norms_of_columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # without keepdim the sums of the rows land on the columns
    s = dots(q, k)
    return (s - s.logsumexp(-1).unsqueeze(-2)).exp() @ v


def quiet_without_keys(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    # a row without keys is NaN in spite of the extra column, whose shift is infinite
    s = dots(q, k).masked_fill(mask, -INF)
    top = s.amax(-1, keepdim=True)
    e = (s - top).exp()
    return (e / (e.sum(-1, keepdim=True) + (-top).exp())) @ v


def unshifted_where_filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    # every exponential of a filled row is zero, and the row NaN: a softmax would be uniform
    e = dots(q, k).masked_fill(mask, -1e9).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def cut_without_keys(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    # the row is NaN, but no gradient of it reaches the scores
    e = dots(q, k).exp().masked_fill(mask, 0)
    return (e / e.sum(-1, keepdim=True)) @ v


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def linear_attention_in_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # associated the other way it even has a T x T product
    return (q.softmax(-1) @ k.softmax(-2).mT) @ v


# -------- between the softmax and the values


def gated(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return (dots(q, k).softmax(-1) * gate) @ v


def masked_afterwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (dots(q, k).softmax(-1) * tril(q.shape[2])) @ v


def bias_afterwards(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (dots(q, k).softmax(-1) + bias) @ v


class Talking(nn.Module):
    """Talking heads: the heads are mixed after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(H, H))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhij,hg->bgij", dots(q, k).softmax(-1), self.mix) @ v


class TalkingBefore(Talking):
    """The heads are mixed before the softmax: a score is no product of one query and one key."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhij,hg->bgij", dots(q, k), self.mix).softmax(-1) @ v


def strongest_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = dots(q, k).softmax(-1)
    best, at = p.topk(3, dim=-1)
    return torch.zeros_like(p).scatter(-1, at, best / best.sum(-1, keepdim=True)) @ v


def threshold(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = dots(q, k).softmax(-1)
    return torch.where(p > 0.05, p, 0.0) @ v


def differential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q1, q2 = q.chunk(2, dim=-1)
    k1, k2 = k.chunk(2, dim=-1)
    return (dots(q1, k1).softmax(-1) - 0.3 * dots(q2, k2).softmax(-1)) @ v


def convolved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = dots(q, k).softmax(-1)
    return F.avg_pool1d(p.flatten(0, 1), 3, 1, 1).view_as(p) @ v


def shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dots(q, k).softmax(-1).roll(1, dims=-1) @ v


def cut_off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # the last key takes probability; its value is dropped
    return dots(q, k).softmax(-1)[..., :-1] @ v[:, :, :-1]


def rolled_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # an attention over values in another order than the keys
    return dots(q, k).softmax(-1).flip(-1) @ v


# ---------------------------------------------------------------- somebody else reads


class Reader(nn.Module):
    """Returns an inner tensor of the attention beside its result."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.inner = Site(self.attend)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = dots(q, k)
        masked = s.masked_fill(~tril(q.shape[2]), float("-inf"))
        p = masked.softmax(-1)
        entropy = -(p * p.clamp(min=1e-9).log()).sum(-1)
        self.read = {"probabilities": p, "scores": s, "entropy": entropy, "mean": p.mean(1)}[
            self.what
        ]
        return p @ v

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), self.read


class TwoValues(nn.Module):
    """The same probabilities weigh two things."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = Site(self.attend), nn.Linear(D, D)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = dots(q, k).softmax(-1)
        return p @ v + (p.mT @ self.other(v))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


AXIS = "the softmax is over another axis than the one that is summed with the values"
MIXED = "the probabilities are changed before they meet the values"
READ = "somebody else reads the tensor"
NO_KEYS = "the scores are no product of queries and keys"
SHIFT = "the shift is not the maximum of the row"
GATE = normal(B, H, T, T)
INF = float("inf")
EMPTY_ROW = constant(torch.arange(T)[:, None] == 2)

LOOKALIKES: tuple[Lookalike, ...] = (
    *(
        core(f, AXIS)
        for f in (
            over_queries,
            over_heads,
            over_batch,
            over_queries_and_keys,
            over_heads_and_keys,
            slots,
        )
    ),
    core(log_probabilities, "logarithms are summed"),
    *(core(f, "there is no softmax") for f in (sigmoid_attention, relu_attention, no_softmax)),
    core(normalised_twice, "a softmax of a softmax"),
    core(scores_normalised_first, "the scores depend on the whole row"),
    core(sinkhorn, "rows and columns are normalised in turn"),
    *(
        core(f, "the denominator is not the sum")
        for f in (squared_sum, wrong_denominator, wrong_maximum)
    ),
    *(core(f, SHIFT) for f in (maximum_of_a_part, maximum_of_another_row, norms_of_columns)),
    *(core(f, SHIFT, EMPTY_ROW) for f in (maximum_of_all_rows, quiet_without_keys)),
    core(unshifted_where_filled, "there is no shift", EMPTY_ROW),
    core(cut_without_keys, "the gradient of a row without keys stops", EMPTY_ROW),
    *(
        core(f, "two softmaxes, none of scores")
        for f in (linear_attention, linear_attention_in_rows)
    ),
    core(gated, MIXED, GATE),
    core(masked_afterwards, MIXED),
    core(bias_afterwards, MIXED, GATE),
    *(
        core(f, MIXED)
        for f in (Talking, strongest_only, threshold, convolved, shifted, cut_off, rolled_values)
    ),
    core(differential, "two distributions are subtracted before they meet the values"),
    core(TalkingBefore, "the scores mix heads"),
    *(
        Lookalike(f"reads_{w}", lambda w=w: Reader(w), READ)
        for w in ("probabilities", "scores", "entropy", "mean")
    ),  # type: ignore[misc]
    Lookalike("two_values", TwoValues, READ),
    Lookalike("router", Router, NO_KEYS),
    Lookalike("hard_router", lambda: Router(hard=True), NO_KEYS),
    Lookalike("linear_router", LinearRouter, NO_KEYS),
    Lookalike("soft_experts", SoftExperts, NO_KEYS),
    Lookalike("pooling", Pooling, NO_KEYS),
    Lookalike("pooling_by_a_network", lambda: Pooling(hidden_layer=True), NO_KEYS),
    Lookalike("pooling_by_product", PoolingByProduct, NO_KEYS),
    Lookalike("squeeze", Squeeze, NO_KEYS),
    Lookalike("additive", Additive, NO_KEYS, hidden(normal(B, S, WIDTH))),
    Lookalike("synthesizer", Synthesizer, NO_KEYS),
    Lookalike("classifier", Classifier, NO_KEYS),
    Lookalike("nearest_neighbours", NearestNeighbours, NO_KEYS, hidden(normal(B, S, WIDTH))),
)
# attentions all the same: a compiler that recomputes the inner tensor for its reader makes no error
MAY_BE_REWRITTEN = {
    "reads_probabilities",
    "reads_scores",
    "reads_mean",
    "reads_entropy",
    "two_values",
}
