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


@dataclass(frozen=True, slots=True)
class Given:
    """Inputs of a layer in one call.

    Attributes:
        x_q, x_kv: [B, T, D] and [B, S, D].
        scores: with what the program reads in this call; None for those of the layer.
        rows: [B, S], keys that a query sees, and so the rows of both sides where these are one;
            None for all. Padding teaches nothing.
    """

    x_q: Tensor
    x_kv: Tensor
    scores: Scores | None = None
    rows: Tensor | None = None

    @property
    def queries(self) -> Tensor:
        """[N, D]: rows of the queries' side that count."""
        return self.counted(self.x_q, self.x_q is self.x_kv)

    @property
    def keys(self) -> Tensor:
        """[N, D]: rows of the keys' side that count."""
        return self.counted(self.x_kv)

    def counted(self, x: Tensor, here: bool = True) -> Tensor:
        """[N, ...]: the rows of x [B, rows, ...] that count, `here` if x is of the keys' side."""
        if self.rows is None or not here:
            return x.flatten(0, 1)
        return x[self.rows]


# inputs of a layer: the queries' side [B, T, D] and the keys' side [B, S, D], or with more
Batches = Sequence[tuple[Tensor, Tensor] | Given]


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


def in_double(batches: Batches) -> Iterator[Given]:
    """The inputs in double; one tensor for both sides stays one."""
    for batch in batches:
        given = batch if isinstance(batch, Given) else Given(*batch)
        x_q = given.x_q.detach().to(_WIDE)
        same = given.x_kv is given.x_q
        yield replace(given, x_q=x_q, x_kv=x_q if same else given.x_kv.detach().to(_WIDE))


def calls(layer: Ordinary, batches: Batches) -> Iterator[tuple[Ordinary, Given]]:
    """The inputs in double, each with the layer as it is in that call."""
    for given in in_double(batches):
        yield layer if given.scores is None else replace(layer, scores=given.scores), given


def seen(layer: Ordinary, batches: Batches) -> list[Given]:
    """The batches, with the keys that a query sees."""
    found = []
    for batch, (wide, given) in zip(batches, calls(layer.each(), batches), strict=True):
        rows = torch.cat([p.amax((0, 1)).unsqueeze(0) > 0 for p in maps(wide, given)])
        found.append(replace(batch if isinstance(batch, Given) else Given(*batch), rows=rows))
    return found


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean [D] and second moment [D, D] of the rows of one side."""

    mean: Tensor
    second: Tensor


def moments(batches: Batches) -> tuple[Moments, Moments]:
    """Of the queries' side, and of the keys' side."""
    sides = []
    for side in ("queries", "keys"):
        rows, mean, second = 0, torch.zeros(()), torch.zeros(())
        for given in in_double(batches):
            x: Tensor = getattr(given, side)
            rows, mean, second = rows + len(x), mean + x.sum(0), second + x.mT @ x
        second = second / rows
        ridge = _RIDGE * second.diagonal().mean().expand(len(second)).diag()
        sides.append(Moments(mean / rows, second + ridge))
    return sides[0], sides[1]


def maps(layer: Ordinary, given: Given) -> Iterator[Tensor]:
    """Attention maps [H, T, S] of one sequence after another: what attention makes of unit values.

    Args:
        layer: with keys of its own for every head.
    """
    # what the program reads belongs to all sequences of a call
    whole = bool(layer.scores.reads)
    sides = [[x] if whole else x.split(1) for x in (given.x_q, given.x_kv)]
    for x_q, x_kv in zip(*sides, strict=True):
        batch, keys = x_kv.shape[:2]
        unit = torch.eye(keys, dtype=x_kv.dtype, device=x_kv.device)
        yield from attended(layer, x_q, x_kv, unit.expand(batch, layer.heads, -1, -1))


def computed(layer: Ordinary, given: Given) -> Tensor:
    """What the layer puts out, [B, T, D]."""
    values = projected(given.x_kv, layer.w_v, layer.b_v)
    out = attended(layer, given.x_q, given.x_kv, values)
    y = torch.einsum("bhtc,hcd->btd", out, layer.w_o)
    return y if layer.b_o is None else y + layer.b_o


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
