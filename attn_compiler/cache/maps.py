"""How keys and values are made of x: two linear maps of parameters that a module owns.

    k = gain * (z - mean z) / size(z) + bias,   z = x W_k^T + b_k;       v = x W_v^T + b_v

Without a norm k is z. Some features of a key may be no such image, and are kept as they are: keys
are k with those beside it. No library is imported here.

Source: EL-Attention (arXiv 2105.04779).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels.el import built
from attn_compiler.kernels.frame import accumulator


class Rows(NamedTuple):
    """Which outputs of a linear map are the features of which head.

    Feature f of head g is output  start + g * step + f.

    Attributes:
        start, step: see above.
        heads, features: how many.
        transposed: is the weight [D, outputs] and not [outputs, D]?
    """

    start: int
    step: int
    heads: int
    features: int
    transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a weight as [heads, features, D], of a bias as [heads, features]; a view."""
        outputs = tensor.t() if self.transposed and tensor.dim() == 2 else tensor
        if self.step == self.features:
            rows = outputs.narrow(0, self.start, self.heads * self.features)
            return rows.unflatten(0, (self.heads, self.features))  # type: ignore[no-any-return]
        first, inner = divmod(self.start, self.step)
        rows = outputs.narrow(0, first * self.step, self.heads * self.step)
        split: Tensor = rows.unflatten(0, (self.heads, self.step))
        return split.narrow(1, inner, self.features)


class Beside(NamedTuple):
    """Features of keys that are no linear image of x, such as rotated ones; a cache holds them.

    Attributes:
        start, features: features start, start + 1, ... of a key.
        heads: 1 where all heads have the same, else the number of kv heads.
    """

    start: int
    features: int
    heads: int

    def of(self, keys: Tensor) -> Tensor:
        """That part of keys [B, G, S, d] as [B, heads, S, features]; a view."""
        return keys.narrow(1, 0, self.heads).narrow(3, self.start, self.features)

    def split(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The two parts of queries [B, H, T, d]: for x, and for what stands beside it."""
        end = self.start + self.features
        rest = q[..., end:] if self.start == 0 else q[..., : self.start]
        return rest, q[..., self.start : end]

    def join(self, rest: Tensor, beside: Tensor) -> Tensor:
        """Keys [B, G, S, d] of their two parts."""
        beside = beside.expand(*rest.shape[:3], self.features)
        return torch.cat((beside, rest) if self.start == 0 else (rest, beside), -1)


class Norm(NamedTuple):
    """How keys are normalised.

    Attributes:
        centred: is the mean of z taken off?
        eps: is added to the mean of squares.
        rows: z, each head by itself, or one that is all of them.
        offset, step: feature f of head g of the keys is feature offset + g * step + f of z, where z
            is one for all heads; offset + f where step is 0.
    """

    centred: bool
    eps: float
    rows: Rows
    offset: int
    step: int

    def part(self, tensor: Tensor, heads: int, features: int) -> Tensor:
        """What of [n, ...] belongs to the keys: [G or 1, features, ...]; a view."""
        if self.step == 0:
            return tensor.narrow(0, self.offset, features)[None]
        return Rows(self.offset, self.step, heads, features).of(tensor)

    def sizes(self, z: Tensor) -> Tensor:
        """What z [B, heads, S, n], without its mean, is multiplied by: [B, heads, S, 1]."""
        return torch.rsqrt(z.square().mean(-1, keepdim=True) + self.eps)


class Maps:
    """The two linear maps from x to keys and values, of parameters that a module owns.

    A cache must neither keep a model alive nor be counted with its weights: references are weak.

    Attributes:
        rows: which outputs are the features of keys, and of values.
        beside: features of keys that are not among them, None where all are.
        norm: of keys that are normalised.
    """

    def __init__(
        self,
        weights: Sequence[Tensor | None],
        rows: tuple[Rows, Rows],
        beside: Beside | None = None,
        norm: Norm | None = None,
    ) -> None:
        """Args: weights are those of keys and their bias, of values and their bias, and the two of
        a norm.
        """
        self._weights = tuple(None if w is None else weakref.ref(w) for w in weights)
        self.rows = rows
        self.beside = beside
        self.norm = norm

    @property
    def features(self) -> tuple[int, int]:
        """Of a key and of a value, all of them."""
        more = 0 if self.beside is None else self.beside.features
        return self.rows[0].features + more, self.rows[1].features

    def __deepcopy__(self, memo: dict[int, Any]) -> Maps:
        return self

    def same(self, other: Maps) -> bool:
        """Are they of the same parameters?"""
        mine, theirs = ((m.rows, m.beside, m.norm) for m in (self, other))
        if mine != theirs or len(self._weights) != len(other._weights):
            return False
        pairs = zip(self._weights, other._weights, strict=True)
        return all((a and a()) is (b and b()) for a, b in pairs)

    def views(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """w_k [G, d, D], b_k [G, d], w_v [G, dv, D], b_v [G, dv].

        Raises:
            UnsupportedCall: the model is gone.
        """
        key, value = self.rows
        w_k, b_k, w_v, b_v = map(_alive, self._weights[:4])
        assert w_k is not None and w_v is not None
        return (
            key.of(w_k),
            None if b_k is None else key.of(b_k),
            value.of(w_v),
            None if b_v is None else value.of(b_v),
        )

    # ------------------------------------------------------------ keys

    def kept(self, x: Tensor, keys: Tensor | None) -> tuple[Tensor, ...]:
        """What a cache holds of new tokens besides x.

        Args:
            x: [B, t, D].
            keys: [B, G, t, d], where some of their features are kept.

        Returns:
            Features [B, heads, t, features] if there are any; float32 [B, heads, t, 1], by which
            keys are multiplied in their norm, if they have one.
        """
        found = () if self.beside is None or keys is None else (self.beside.of(keys),)
        return found if self.norm is None else (*found, self.norm.sizes(self._before_norm(x)))

    def keys(self, x: Tensor) -> Tensor:
        """Those features that are made of x [B, S, D]: [B, G, S, d]."""
        w_k, b_k, _, _ = self.views()
        if self.norm is None:
            return built(x, w_k, b_k)
        z, (gain, bias) = self._before_norm(x), self.gains()
        z = z * self.norm.sizes(z)
        heads, features = self.rows[0].heads, self.rows[0].features
        wide = z if self.norm.step == 0 else z[:, 0]
        part = self.norm.part(wide.movedim(-1, 0), heads, features)
        # [1, d, B, G, S], or [G, d, B, S] of one z for all heads
        found = part[0].permute(1, 2, 3, 0) if self.norm.step == 0 else part.permute(2, 0, 3, 1)
        found = found if gain is None else found * gain[:, None]
        found = found if bias is None else found + bias[:, None]
        return found.to(x.dtype)

    def gains(self) -> tuple[Tensor | None, Tensor | None]:
        """Gain and bias of the norm for the keys: [G or 1, d] each, not rounded."""
        assert self.norm is not None
        rows = self.rows[0]
        gain, bias = (
            None if w is None else self.norm.part(w, rows.heads, rows.features).to(accumulator(w))
            for w in map(_alive, self._weights[4:])
        )
        return gain, bias

    def normalised(self) -> tuple[Tensor, Tensor | None]:
        """Weight [heads, n, D] and bias [heads, n] of z."""
        assert self.norm is not None
        w_k, b_k = map(_alive, self._weights[:2])
        assert w_k is not None
        rows = self.norm.rows
        return rows.of(w_k), None if b_k is None else rows.of(b_k)

    def _before_norm(self, x: Tensor) -> Tensor:
        """z [B, heads, S, n], not rounded from here on; without its mean if that is taken off."""
        assert self.norm is not None
        z = built(x, *self.normalised())
        z = z.to(accumulator(z))
        return z - z.mean(-1, keepdim=True) if self.norm.centred else z


def _alive(reference: Callable[[], Tensor | None] | None) -> Tensor | None:
    if reference is None:
        return None
    found = reference()
    if found is None:
        raise UnsupportedCall(
            "a cache is read whose model is gone",
            why=("it holds hidden states, which only the model's weights make keys and values of",),
            do="keep the model while its cache is in use",
        )
    return found
