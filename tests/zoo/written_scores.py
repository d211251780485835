"""What else stands between the product and the softmax: biases, caps, sinks. And caches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import B, D, Entry, H, Site, T, constant, hidden, normal, site
from zoo.written_masks import dots, finish, tril

INF = float("-inf")


def _distance(t: int, s: int) -> Tensor:
    return torch.arange(s)[None, :] - torch.arange(t)[:, None]


def _slopes() -> Tensor:
    return torch.tensor([2.0 ** (-(i + 1)) for i in range(H)])


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q.shape[-2]
    bias = _slopes().to(q.dtype)[:, None, None] * _distance(t, t)
    return finish((dots(q, k) + bias).masked_fill(~tril(t), INF), v)


class AlibiOfABuffer(nn.Module):
    """Slopes in a buffer, and a finite number where no key may be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", _slopes())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        bias = self.slopes[:, None, None] * _distance(t, t)
        return finish((dots(q, k) + bias).masked_fill(~tril(t), torch.finfo(q.dtype).min), v)


def alibi_by_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = _slopes().to(q.dtype).view(1, H, 1, 1) * torch.arange(k.shape[2]).view(1, 1, 1, -1)
    return finish((dots(q, k) + bias).masked_fill(~tril(q.shape[2]), INF), v)


def alibi_where_seen(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """One tensor holds the bias, and large negative numbers where no key may be seen."""
    seen = tril(q.shape[2]) & keep[:, None, None, :]
    slopes = 0.5 ** torch.arange(1, H + 1, dtype=q.dtype)
    bias = slopes[:, None, None] * _distance(q.shape[2], k.shape[2])
    mask = torch.where(seen, bias, torch.finfo(q.dtype).min)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def alibi_both_sides(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = -_distance(q.shape[2], k.shape[2]).abs() * _slopes().to(q.dtype).view(H, 1, 1)
    return finish(bias + dots(q, k), v)


def alibi_of_real_tokens(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    # BLOOM-like: positions count the tokens that are not padding
    positions = (keep.long().cumsum(-1) - 1) * keep
    bias = _slopes().to(q.dtype)[:, None] * positions[:, None, :]
    s = dots(q, k) + bias[:, :, None, :]
    return finish(
        s.masked_fill(~(tril(q.shape[2]) & keep[:, None, None, :]), torch.finfo(s.dtype).min), v
    )


def soft_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return finish((torch.tanh(dots(q, k) / 2.0) * 2.0).masked_fill(~tril(q.shape[2]), INF), v)


def squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return finish(dots(q, k).square() * 0.3 + 0.1, v)


def gaussian_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT - 0.5 * q.square().sum(-1, keepdim=True) - 0.5 * k.square().sum(-1).unsqueeze(-2)
    return finish(s * 0.4, v)


def between(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    lowest = torch.finfo(q.dtype).min
    s = dots(q, k) + torch.where(keep[:, None, None, :], 0.0, lowest)
    s = torch.max(s, torch.full((), lowest, dtype=s.dtype))
    return finish(torch.min(s, torch.full((), 1.5, dtype=s.dtype)), v)


def off_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = dots(q, k)
    e = s.exp()
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


def off_by_one_stable(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = dots(q, k)
    top = s.amax(-1, keepdim=True).clamp(min=0)
    e = (s - top).exp()
    return (e / (e.sum(-1, keepdim=True) + (-top).exp())) @ v


def off_by_one_padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.pad(dots(q, k), (0, 1), value=0.0).softmax(-1)[..., :-1] @ v


class Sinks(nn.Module):
    """One learned logit per head that takes probability and gives nothing."""

    def __init__(self, first: bool = False) -> None:
        super().__init__()
        self.first = first
        self.sinks = nn.Parameter(torch.tensor([0.5, -0.3, 1.1, 0.2]))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = dots(q, k).masked_fill(~tril(q.shape[2]), INF)
        column = self.sinks.view(1, H, 1, 1).expand(s.shape[0], H, s.shape[2], 1)
        if self.first:
            return torch.cat([column, s], dim=-1).softmax(-1)[..., 1:] @ v
        joined = torch.cat([s, column], dim=-1)
        joined = joined - joined.max(dim=-1, keepdim=True).values
        return joined.softmax(-1)[..., :-1] @ v


class SinksFirst(Sinks):
    """The extra column stands before the keys."""

    def __init__(self) -> None:
        super().__init__(first=True)


class Buckets(nn.Module):
    """T5's relative bias: near distances exactly, far ones by their logarithm."""

    def __init__(self, buckets: int = 8, furthest: int = 9) -> None:
        super().__init__()
        self.buckets, self.furthest = buckets, furthest
        self.table = nn.Embedding(buckets, H)

    def bucket(self, distance: Tensor) -> Tensor:
        half = self.buckets // 2
        result = (distance > 0).long() * half
        far = distance.abs()
        exact = half // 2
        logarithm = (
            torch.log(far.float().clamp(min=1) / exact)
            / math.log(self.furthest / exact)
            * (half - exact)
        )
        coarse = (exact + logarithm.long()).clamp(max=half - 1)
        return result + torch.where(far < exact, far, coarse)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.table(self.bucket(_distance(q.shape[2], k.shape[2])))
        return finish(q @ k.mT * 0.3 + bias.permute(2, 0, 1).unsqueeze(0), v)


class Table(nn.Module):
    """A learned bias, stored flat with an index buffer, as windows of images do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * T - 1, H))
        self.register_buffer("index", (_distance(T, T) + T - 1).view(-1), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.table[self.index].view(T, T, H).permute(2, 0, 1).contiguous()
        return finish(dots(q, k) + bias, v)


class RelativeKeys(nn.Module):
    """Shaw et al.: an embedding of the distance is added to the key."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.distance = nn.Embedding(2 * T - 1, D)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        table = self.distance(_distance(q.shape[2], k.shape[2]) + T - 1)
        return finish(dots(q, k) + torch.einsum("bhld,lrd->bhlr", q, table) * self.scale, v)


class Skewed(nn.Module):
    """Music Transformer and Transformer-XL: the same, by padding and reshaping."""

    def __init__(self) -> None:
        super().__init__()
        self.distance = nn.Parameter(torch.randn(H, T, D))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, t, _ = q.shape
        moved = F.pad(torch.einsum("bhtd,hsd->bhts", q, self.distance), (1, 0))
        shifted = moved.view(b, h, t + 1, t)[:, :, 1:]
        return finish((dots(q, k) + shifted).masked_fill(~tril(t), INF), v)


def rotated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q.shape[2]
    angle = (
        torch.arange(t).to(q.dtype)[:, None]
        * 10.0 ** -torch.arange(0, D, 2).to(q.dtype).div(D)[None]
    )
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-b, a), dim=-1) * sin

    return finish(dots(turn(q), turn(k)).masked_fill(~tril(t), INF), v)


# ---------------------------------------------------------------- caches


class Appended(nn.Module):
    """Decoding with a cache that grows by concatenation; the new cache is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Site(self.attend)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
        self.keys, self.values = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
        t, s = q.shape[2], self.keys.shape[2]
        allowed = torch.arange(s) <= torch.arange(s - t, s)[:, None]
        return finish(dots(q, self.keys).masked_fill(~allowed, INF), self.values)

    def forward(self, x: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.inner(x, past_k, past_v), self.keys, self.values


def _static(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor
) -> Tensor:
    cache_k.index_copy_(2, position, k)
    cache_v.index_copy_(2, position, v)
    allowed = torch.arange(cache_k.shape[2])[None, :] <= position[:, None]
    return finish(dots(q, cache_k).masked_fill(~allowed, INF), cache_v)


def _assigned(q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor) -> Tensor:
    t = k.shape[2]
    cache_k[:, :, 5 : 5 + t] = k
    cache_v[:, :, 5 : 5 + t] = v
    s = dots(q, cache_k[:, :, : 5 + t])
    return finish(s.masked_fill(~torch.ones(t, 5 + t).tril(5).bool(), INF), cache_v[:, :, : 5 + t])


def _assigned_at(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor
) -> Tensor:
    # a setitem gives nothing back: what is read is the argument that it wrote
    cache_k[:, :, position] = k
    cache_v[:, :, position] = v
    allowed = torch.arange(cache_k.shape[2])[None, :] <= position[:, None]
    return F.scaled_dot_product_attention(q, cache_k, cache_v, attn_mask=allowed)


class WithCache(nn.Module):
    """Also returns the caches that `attend` wrote into."""

    def __init__(self, attend: object) -> None:
        super().__init__()
        self.inner = Site(attend)  # type: ignore[arg-type]

    def forward(
        self, x: Tensor, k: Tensor, v: Tensor, *more: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.inner(x, k, v, *more), k, v


def by_lookups(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lookup: Tensor) -> Tensor:
    return finish(dots(q, k) + torch.einsum("hw,qkw->hqk", table, lookup), v)


def by_lookups_fused(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lookup: Tensor) -> Tensor:
    bias = torch.einsum("hw,qkw->hqk", table, lookup)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def of_queries_fused(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    # relative keys, given as a mask
    return F.scaled_dot_product_attention(q, k, v, attn_mask=q @ table.mT)


_LOOKUPS = (normal(H, 5), normal(T, T, 5))
_CACHES = (normal(B, H, 19, D, grad=False), normal(B, H, 19, D, grad=False))

ENTRIES: tuple[Entry, ...] = (
    *(site(f.__name__, f, mask="causal") for f in (alibi, alibi_by_key, soft_cap, rotated)),
    site("alibi_of_a_buffer", AlibiOfABuffer, mask="causal"),
    *(site(f.__name__, f) for f in (alibi_both_sides, squared, gaussian_kernel)),
    *(site(f.__name__, f) for f in (off_by_one, off_by_one_stable, off_by_one_padded)),
    site(
        "alibi_of_real_tokens",
        alibi_of_real_tokens,
        constant(torch.arange(T) < torch.tensor([[T], [6]])),
        mask=None,
    ),
    site(
        "alibi_where_seen",
        alibi_where_seen,
        constant(torch.arange(T) < torch.tensor([[T], [6]])),
        mask="causal & padding(",
    ),
    site(
        "between",
        between,
        constant(torch.arange(T) < torch.tensor([[T], [6]])),
        mask=None,
    ),
    site("by_lookups", by_lookups, *_LOOKUPS),
    site("by_lookups_fused", by_lookups_fused, *_LOOKUPS),
    site("of_queries_fused", of_queries_fused, normal(T, D)),
    site("sinks", Sinks, mask="causal"),
    site("sinks_first", SinksFirst, mask="causal"),
    site("buckets", Buckets),
    site("table", Table),
    site("relative_keys", RelativeKeys),
    site("skewed", Skewed, mask="causal"),
    Entry("appended", Appended, hidden(normal(B, H, 6, D), normal(B, H, 6, D), rows=1), mask=None),
    Entry(
        "appended_prefill",
        Appended,
        hidden(normal(B, H, 6, D), normal(B, H, 6, D), rows=4),
        mask="causal(+6)",
    ),
    Entry(
        "static_cache",
        lambda: WithCache(_static),
        hidden(*_CACHES, constant(torch.tensor([6])), rows=1),
        mask=None,
        training=False,
    ),
    Entry(
        "static_cache_prefill",
        lambda: WithCache(_static),
        hidden(*_CACHES, constant(torch.arange(3, 8)), rows=5),
        mask=None,
        training=False,
    ),
    Entry(
        "assigned_at_cache",
        lambda: WithCache(_assigned_at),
        hidden(*_CACHES, constant(torch.arange(3, 8)), rows=5),
        mask=None,
        training=False,
    ),
    Entry(
        "assigned_cache",
        lambda: WithCache(_assigned),
        hidden(*_CACHES, rows=4),
        mask="causal(+5)",
        training=False,
    ),
)
