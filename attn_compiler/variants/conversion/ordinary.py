"""A trained layer of ordinary attention, as conversions read it.

    y = sum_h attention(x_q W_Q^h + b_Q, x_kv W_K^g + b_K, x_kv W_V^g + b_V) W_O^h + b_O

Sums over many rows are taken in double.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attn_compiler.kernels.library import attention
from attn_compiler.kernels.switchhead import PLAIN, Rotate, Scores

_WIDE = torch.float64
# of a mean square: keeps inverses finite where inputs leave directions out
_RIDGE = 1e-6

# inputs of a layer: the queries' side [B, T, D] and the keys' side [B, S, D]
Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Ordinary:
    """A trained layer: H heads, G kv heads, d wide.

    Attributes:
        w_q, w_k, w_v: [H, D, d], [G, D, d], [G, D, d].
        w_o: [H, d, D].
        b_q, b_k, b_v, b_o: [H, d], [G, d], [G, d], [D].
        scores: its program and scale.
        rotate: of q and k.
    """

    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    w_o: Tensor
    b_q: Tensor | None = None
    b_k: Tensor | None = None
    b_v: Tensor | None = None
    b_o: Tensor | None = None
    scores: Scores = PLAIN
    rotate: tuple[Rotate, Rotate] | None = None

    @property
    def heads(self) -> int:
        return self.w_q.shape[0]

    @property
    def head_dim(self) -> int:
        return self.w_q.shape[2]

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.scores.scale is None else self.scores.scale

    @property
    def bias(self) -> Tensor | None:
        """[D], what biases of values and outputs add to every row: weights of keys sum to 1."""
        if self.b_v is None:
            return self.b_o
        through = torch.einsum("hc,hcd->d", self._each(self.b_v), self.w_o)
        return through if self.b_o is None else through + self.b_o

    def each(self) -> Ordinary:
        """The same layer with keys and values of its own for every query head."""
        return self._with(self._each, "w_k", "w_v", "b_k", "b_v")

    def wide(self) -> Ordinary:
        """The same layer in double."""
        names = [n for n in self.__slots__ if n[:2] in ("w_", "b_")]
        return self._with(lambda x: x.detach().to(_WIDE), *names)

    def _each(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.heads // x.shape[0], 0)

    def _with(self, change: Callable[[Tensor], Tensor], *names: str) -> Ordinary:
        changed: dict[str, Any] = {}
        for name in names:
            value = getattr(self, name)
            changed[name] = None if value is None else change(value)
        return replace(self, **changed)


def split_in(weight: Tensor, heads: int) -> Tensor:
    """[H d, D], as nn.Linear holds it, to [H, D, d]."""
    return weight.view(heads, -1, weight.shape[1]).mT


def split_out(weight: Tensor, heads: int) -> Tensor:
    """[D, H d], as nn.Linear holds it, to [H, d, D]."""
    return weight.mT.reshape(heads, -1, weight.shape[0])


def in_double(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """The inputs in double; one tensor for both sides stays one."""
    for x_q, x_kv in batches:
        wide = x_q.detach().to(_WIDE)
        yield wide, wide if x_kv is x_q else x_kv.detach().to(_WIDE)


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean [D] and second moment [D, D] of the rows of one side."""

    mean: Tensor
    second: Tensor


def moments(batches: Batches) -> tuple[Moments, Moments]:
    """Of the queries' side, and of the keys' side."""
    sides = []
    for side in (0, 1):
        rows, mean, second = 0, torch.zeros(()), torch.zeros(())
        for pair in in_double(batches):
            x = pair[side].flatten(0, 1)
            rows, mean, second = rows + len(x), mean + x.sum(0), second + x.mT @ x
        second = second / rows
        ridge = _RIDGE * second.diagonal().mean().expand(len(second)).diag()
        sides.append(Moments(mean / rows, second + ridge))
    return sides[0], sides[1]


def maps_of(layer: Ordinary, x_q: Tensor, x_kv: Tensor) -> Tensor:
    """Attention maps of one sequence, [H, T, S]: what attention makes of unit values."""
    keys = x_kv.shape[1]
    unit = torch.eye(keys, dtype=x_kv.dtype, device=x_kv.device).expand(1, layer.heads, -1, -1)
    return attended(layer, x_q, x_kv, unit)[0]


def attended(layer: Ordinary, x_q: Tensor, x_kv: Tensor, v: Tensor) -> Tensor:
    """[B, H, T, dv], values given. Biases of keys add the same to a whole row, and change nothing
    where nothing turns.
    """
    q = projected(x_q, layer.w_q, layer.b_q)
    k = projected(x_kv, layer.w_k, layer.b_k)
    if layer.rotate is not None:
        q, k = layer.rotate[0](q), layer.rotate[1](k)
    scores = layer.scores
    out: Tensor = attention(
        q, k, v, list(scores.reads), list(scores.ints), None,
        program=scores.program, scale=layer.scale, dropout=0.0,
    )[0]  # fmt: skip
    return out


def projected(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    found = torch.einsum("btd,hdc->bhtc", x, w)
    return found if b is None else found + b.unsqueeze(1)
