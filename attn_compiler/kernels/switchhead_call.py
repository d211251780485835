"""A layer of SwitchHead as a rewritten module calls it, with or without a cache.

    y = layer(x_q, x_k, x_v, reads, ints, w_q, w_k, ..., names=("w_q", ...), heads=2, ...)
    k, v, start = write(cache, ((x_k, x_v), weights), options, index)        for a cache
    y = read(x_q, k, v, start, reads, ints, w_q, w_k, ...)

Positions are those in the cache where there is one. Only their differences matter, so tokens of
padding in front do no harm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_compiler.kernels.relative import relative_positions
from attn_compiler.kernels.switchhead import (
    Mixture,
    Rotate,
    Scores,
    Weights,
    Written,
    attend,
    destination,
    drawn,
    keys_values,
    rotary,
    turned,
)

Start = int | Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """What a layer is called with; see `Mixture` and `Scores`.

    Attributes:
        names: of the weights, in order.
        turned: (share, base) of `rotary`, None for no rotation.
        speeds: of `turned`, instead of these.
        expert_dropout: 0 in evaluation.
    """

    names: tuple[str, ...]
    heads: int
    experts: int
    k: int
    experts_on: tuple[str, ...]
    shared: bool
    expert_dropout: float
    program: str
    dropout: float
    turned: tuple[float, float] | None
    speeds: tuple[float, ...] = ()
    later: str = ""
    gain: float = 1.0

    @property
    def turns(self) -> bool:
        return self.turned is not None or bool(self.speeds)

    @property
    def places(self) -> bool:
        """Does the layer ask where its tokens stand?"""
        return self.turns or "w_p" in self.names

    @property
    def mixture(self) -> Mixture:
        return Mixture(
            self.heads, self.experts, self.k, tuple(self.experts_on), self.shared,
            self.expert_dropout,
        )  # fmt: skip

    def scores(
        self,
        reads: Sequence[Tensor],
        ints: Sequence[int],
        w_p: Tensor | None,
        sizes: tuple[int, int, Start],
    ) -> Scores:
        """`sizes`: rows, keys, and the place of the first row among the keys."""
        offsets = None if w_p is None else relative_positions(w_p, *sizes)
        return Scores(
            self.program, reads, ints, gain=self.gain, offsets=offsets, later=self.later,
            dropout=self.dropout,
        )  # fmt: skip

    def weights(self, given: Sequence[Tensor]) -> tuple[Weights, Tensor | None, Tensor | None]:
        """And the bias of the outputs and the projection of distances, where there are such."""
        named = dict(zip(self.names, given, strict=True))
        own = Weights(*(named.get(n) for n in Weights.__slots__))  # type: ignore[arg-type]
        return own, named.get("b_o"), named.get("w_p")

    def seed(self, like: Tensor) -> Tensor | None:
        return drawn(like) if self.expert_dropout else None

    def rotate(self, start: Start, rows: int, like: Tensor) -> Rotate | None:
        if not self.turns:
            return None
        positions = torch.arange(rows, device=like.device) + start
        if self.turned is None:
            speeds = torch.tensor(self.speeds, device=like.device, dtype=torch.float32)
            return lambda x: turned(x, positions, speeds)
        share, base = self.turned
        return lambda x: rotary(x, positions, share=share, base=base)


def layer(
    x_q: Tensor,
    x_k: Tensor,
    x_v: Tensor,
    reads: Sequence[Tensor],
    ints: Sequence[int],
    /,
    *weights: Tensor,
    **options: Any,
) -> Tensor:
    """The layer without a cache: [B, T, D].

    Args:
        x_q, x_k, x_v: [B, T, D] and twice [B, S, D]; one tensor may stand for several.
        reads, ints: of the program.
        weights: see `Weights`, `b_o` [D] and `w_p` [H, D, c], see `relative_positions`.
        options: see `_Options`.
    """
    chosen = _Options(**options)
    own, bias, w_p = chosen.weights(weights)
    seed, mixture = chosen.seed(x_q), chosen.mixture
    turn = chosen.rotate(0, x_k.shape[1], x_k)
    written = keys_values(x_k, own, mixture, x_v=x_v, rotate=turn, seed=seed)
    # one choice serves both sides of a layer that has one router and one input
    routes = written.routes if mixture.shared and x_q is x_k else None
    routes = routes or destination(x_q, own, mixture, seed)
    scores = chosen.scores(reads, ints, w_p, (x_q.shape[1], x_k.shape[1], 0))
    y = attend(x_q, written, own, mixture, scores, rotate=turn, routes=routes)
    return y if bias is None else y + bias


def write(
    cache: Any,
    made: tuple[tuple[Tensor, Tensor], Sequence[Tensor]],
    options: Mapping[str, Any],
    index: int,
    *more: Any,
) -> tuple[Tensor, Tensor, Start]:
    """Instead of `cache.update(keys, values, index, *more)`.

    Args:
        cache: any object with `update` and `get_seq_length`.
        made: x_k and x_v [B, s, D] of the new tokens, and the weights.
        options: see `_Options`.
        index: of the layer.
        more: further arguments.

    Returns:
        All keys and all values, [B, H, S, c], and the index of the first new token.
    """
    (x_k, x_v), given = made
    chosen = _Options(**options)
    own, _, _ = chosen.weights(given)
    start: Start = 0
    if chosen.places:
        start = cache.get_seq_length(index)
        # a cache may count in a tensor of its own
        start = start.clone() if isinstance(start, Tensor) else start
    turn = chosen.rotate(start, x_k.shape[1], x_k)
    new = keys_values(x_k, own, chosen.mixture, x_v=x_v, rotate=turn, seed=chosen.seed(x_k))
    k, v = cache.update(new.k, new.v, index, *more)
    return k, v, start


def read(
    x_q: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Start,
    reads: Sequence[Tensor],
    ints: Sequence[int],
    /,
    *weights: Tensor,
    **options: Any,
) -> Tensor:
    """The queries' side, over what a cache holds: [B, T, D].

    Args:
        x_q: [B, T, D].
        keys, values: [B, H, S, c].
        start: index of the first query.
        reads, ints, weights, options: as of `layer`.
    """
    chosen = _Options(**options)
    own, bias, w_p = chosen.weights(weights)
    mixture = chosen.mixture
    scores = chosen.scores(reads, ints, w_p, (x_q.shape[1], keys.shape[2], start))
    routes = destination(x_q, own, mixture, chosen.seed(x_q))
    turn = chosen.rotate(start, x_q.shape[1], x_q)
    written = Written(keys.to(x_q.dtype), values.to(x_q.dtype))
    y = attend(x_q, written, own, mixture, scores, rotate=turn, routes=routes)
    return y if bias is None else y + bias
