"""Small models with attention spelled in several ways, and what a layer of SwitchHead computes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

D, H, FEATURES = 42, 6, 7


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, FEATURES)).transpose(1, 2)


def causal(scores: Tensor) -> Tensor:
    rows, keys = scores.shape[-2:]
    seen = torch.arange(keys) <= torch.arange(rows)[:, None] + (keys - rows)
    return scores.masked_fill(~seen, float("-inf"))


class Separate(nn.Module):
    """A matrix for each of q, k and v."""

    groups = H

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q = nn.Linear(D, H * FEATURES, bias=bias)
        self.k = nn.Linear(D, self.groups * FEATURES, bias=bias)
        self.v = nn.Linear(D, self.groups * FEATURES, bias=bias)
        self.out = nn.Linear(H * FEATURES, D)

    def sides(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return heads(self.q(x)), heads(self.k(y)), heads(self.v(y))

    def scores(self, dot: Tensor) -> Tensor:
        return causal(dot)

    def result(self, out: Tensor) -> Tensor:
        return self.out(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        q, k, v = self.sides(x, x if y is None else y)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = self.scores(q @ k.transpose(-1, -2) * FEATURES**-0.5)
        return self.result(scores.softmax(-1) @ v)


class Fused(Separate):
    """One matrix, and a fused attention."""

    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v
        self.qkv = nn.Linear(D, 3 * D)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        q, k, v = (heads(t) for t in self.qkv(x).split(D, -1))
        return self.result(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class Grouped(Separate):
    groups = 2


class Einsums(Separate):
    """Parameters of its own, one of which has the name of a new one."""

    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v, self.out
        for name in ("w_q", "key", "value"):
            setattr(self, name, nn.Parameter(torch.randn(H, D, FEATURES) / D**0.5))
        self.outer = nn.Parameter(torch.randn(H, FEATURES, D) / D**0.5)

    def sides(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = torch.einsum("btd,hdf->bhtf", x, self.w_q)
        k, v = (torch.einsum("btd,hdf->bhtf", y, w) for w in (self.key, self.value))
        return q, k, v

    def result(self, out: Tensor) -> Tensor:
        return torch.einsum("bhtf,hfd->btd", out, self.outer)


class Conv1D(nn.Module):
    """A linear map with its weight the other way round."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inner, outer) / inner**0.5)
        self.bias = nn.Parameter(torch.randn(outer))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.size()[:-1], self.bias.shape[0])
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Transposed(Separate):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (Conv1D(D, D) for _ in range(4))


class Elsewhere(Separate):
    """The output projection stands in a module beside."""

    class After(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

        def forward(self, out: Tensor, x: Tensor) -> Tensor:
            return self.norm(self.dense(out) + x)  # type: ignore[no-any-return]

    class Inner(Separate):
        def __init__(self) -> None:
            super().__init__()
            del self.out

        def result(self, out: Tensor) -> Tensor:
            return out.transpose(1, 2).flatten(2)

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.inner, self.after = self.Inner(), self.After()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.after(self.inner(x), x)  # type: ignore[no-any-return]


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position in the layout of halves; an even number of channels."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 100.0 ** (-torch.arange(half) / half)
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin


class Rotary(Separate):
    """Rotates all channels but the last."""

    def sides(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().sides(x, y)
        positions = torch.arange(x.shape[1])
        q, k = (torch.cat([rotated(t[..., :-1], positions), t[..., -1:]], -1) for t in (q, k))
        return q, k, v


class Relative(Separate):
    """Transformer-XL's positions: queries times projected distances, shifted row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.apart = nn.Linear(D, H * FEATURES, bias=False)
        self.of_keys, self.of_distances = (nn.Parameter(torch.randn(H, 1, FEATURES)) for _ in "uv")

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        q, k, v = self.sides(x, x)
        batch, _, rows, _ = q.shape
        rates = 100.0 ** (-torch.arange(0, D, 2, device=x.device) / D)
        angles = torch.arange(rows - 1, -rows, -1, device=x.device)[:, None] * rates
        p = heads(self.apart(torch.cat([angles.sin(), angles.cos()], -1)[None]))
        apart = nn.functional.pad((q + self.of_distances) @ p.mT, (1, 0))
        shifted = apart.view(batch, H, 2 * rows, rows)[:, :, 1:].reshape(batch, H, rows, -1)
        dot = self.sum((q + self.of_keys) @ k.mT, shifted[..., :rows])
        return self.result((dot * FEATURES**-0.5).softmax(-1) @ v)

    def sum(self, dot: Tensor, apart: Tensor) -> Tensor:
        return causal(dot + apart)


class Stack(nn.Module):
    """Layers with a residual."""

    def __init__(self, kind: type[nn.Module], number: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(number))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def draw(seed: int = 1, batch: int = 3, length: int = 11) -> Tensor:
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(seed))


def routed(x: Tensor, w: Tensor, router: Tensor, h: int, e: int, k: int) -> Tensor:
    """Sum over the k best experts of gate times x W: [B, H, T, c]; x [B, T, D]."""
    return _weighed(x, w, gates(x, router, h, e, k), e)


def gates(x: Tensor, router: Tensor, h: int, e: int, k: int) -> Tensor:
    """[B, T, H, E], 0 for what is not chosen."""
    logits = (x @ router.mT).unflatten(-1, (h, e))
    kept = logits.topk(k, -1).indices
    mask = torch.zeros_like(logits).scatter(-1, kept, 1.0)
    return mask * logits.sigmoid()


def _weighed(x: Tensor, w: Tensor, gate: Tensor, e: int) -> Tensor:
    each = torch.einsum("btd,hedc->bthec", x, w.unflatten(0, (-1, e)))
    return torch.einsum("bthec,bthe->bhtc", each, gate)


def expected(
    module: Any, x: Tensor, y: Tensor, spec: Any, seen: Tensor | None = None, turned: bool = False
) -> Tensor:
    """A layer with experts on values and outputs, in float64, from the equations of the paper."""
    h, e, k = spec.heads, spec.experts, spec.k
    own = {n: p.detach().double() for n, p in module.named_parameters(recurse=False)}
    x, y = x.double(), y.double()
    q = torch.einsum("btd,hdc->bhtc", x, own["w_q"])
    key = torch.einsum("btd,hdc->bhtc", y, own["w_k"])
    if turned:
        q, key = (_turned(t) for t in (q, key))
    v = routed(y, own["w_v"], own.get("w_s", own["w_d"]), h, e, k)
    scores = q @ key.mT / math.sqrt(q.shape[-1])
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    r = scores.softmax(-1) @ v
    gate = gates(x, own["w_d"], h, e, k)
    return torch.einsum("bhtc,hecd,bthe->btd", r, own["w_o"].unflatten(0, (-1, e)), gate)


def _turned(x: Tensor) -> Tensor:
    n = x.shape[-1] // 2 // 2 * 2
    angles = torch.arange(x.shape[2])[:, None] * 10000.0 ** (-torch.arange(0, n, 2) / n).double()
    a, b = x[..., : n // 2], x[..., n // 2 : n]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., n:]], -1)


def below(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()
