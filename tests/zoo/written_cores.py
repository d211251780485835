"""The product, the scale, the sum over values and the heads, as people write them.

Every function is the same attention, softmax(q k^T / sqrt(d)) v, unless its name says otherwise.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from zoo.entry import WIDTH, B, D, Entry, G, H, S, Site, T, hidden, normal, site

SCALE = 1 / math.sqrt(D)

# ---------------------------------------------------------------- contractions


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)), dim=-1) @ v


def by_name(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    dots = torch.einsum("b h i d, b h j d -> b h i j", q, k) * SCALE
    return torch.einsum("b h i j, b h j d -> b h i d", dots.softmax(dim=-1), v)


def time_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bthd,bshd->bhts", q, k) * SCALE
    return torch.einsum("bhts,bshd->bthd", F.softmax(scores, dim=-1), v)


def flax_like(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q / q.shape[-1] ** 0.5
    weights = torch.einsum("...qhd,...khd->...hqk", q, k).softmax(-1)
    return torch.einsum("...hqk,...khd->...qhd", weights, v)


def batched_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, t, d = q.shape
    flat = [x.reshape(b * h, -1, x.shape[-1]) for x in (q, k, v)]
    weights = F.softmax(torch.bmm(flat[0], flat[1].transpose(1, 2)) * d**-0.5, dim=2)
    return torch.bmm(weights, flat[2]).view(b, h, t, -1)


def scaled_by_alpha(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, t, _ = q.shape
    q3, k3, v3 = (x.reshape(b * h, -1, x.shape[-1]) for x in (q, k, v))
    nothing = torch.empty(b * h, t, k3.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(nothing, q3, k3.transpose(-1, -2), beta=0, alpha=SCALE)
    return torch.bmm(scores.softmax(dim=-1), v3).reshape(b, h, t, -1)


def bias_by_beta(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    b, h, t, _ = q.shape
    q3, k3, v3 = (x.reshape(b * h, -1, x.shape[-1]) for x in (q, k, v))
    scores = torch.baddbmm(bias, q3, k3.mT, beta=0.5, alpha=SCALE)
    return (scores.view(b, h, t, -1).softmax(-1).view(b * h, t, -1) @ v3).view(b, h, t, -1)


def multiply_and_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q[:, :, :, None, :] * k[:, :, None, :, :]).sum(-1) * SCALE
    weights = scores.softmax(-1)
    return (weights.unsqueeze(-1) * v.unsqueeze(2)).sum(dim=3)


def keys_stored_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k_t = k.permute(0, 1, 3, 2).contiguous()
    return torch.matmul(torch.matmul(q, k_t).div(math.sqrt(D)).softmax(-1), v)


def keys_in_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(k, q.transpose(2, 3)) * SCALE
    return scores.softmax(dim=2).transpose(2, 3) @ v


def result_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * SCALE).softmax(-1)
    return (v.mT @ weights.mT).mT


def values_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhqd,bhkd->bqkh", q, k).mul(SCALE).softmax(2)
    return torch.einsum("bhkd,bqkh->bhqd", v, weights)


def over_time_major(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # fairseq-like: [T, B*H, d]
    b, h, _, d = q.shape
    q, k, v = (
        x.permute(2, 0, 1, 3).reshape(x.shape[2], b * h, d).transpose(0, 1) for x in (q, k, v)
    )
    attn = torch.bmm(F.softmax(torch.bmm(q * SCALE, k.transpose(1, 2)), dim=-1), v)
    return attn.transpose(0, 1).reshape(-1, b, h, d).permute(1, 2, 0, 3)


# ---------------------------------------------------------------- scales


def scale_on_q(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * SCALE
    return (q @ k.mT).softmax(-1) @ v


def scale_on_k(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ (k / math.sqrt(D)).mT).softmax(-1) @ v


def scale_split(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    root = math.sqrt(math.sqrt(D))
    return ((q / root) @ (k / root).mT).softmax(-1) @ v


def scale_in_a_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / torch.sqrt(torch.tensor(k.size(-1), dtype=q.dtype))).softmax(-1) @ v


def scale_absent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def scale_in_the_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum(
        "bhij,bhjd->bhid",
        (torch.einsum("bhid,bhjd,->bhij", q, k, q.new_tensor(SCALE))).softmax(-1),
        v,
    )


def scale_given(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return (q @ k.mT * scale).softmax(-1) @ v


def scale_negative_and_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-(q * -2.0) @ (k * 0.5).mT * SCALE).softmax(-1) @ v


class ScaleAttribute(nn.Module):
    """The scale is a float attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = D**-0.5

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (self.scale * q @ k.mT).softmax(-1) @ v


class Temperature(nn.Module):
    """A learned scale per head, as in Swin v2, on cosine similarities."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(
            torch.log(torch.tensor([[[2.0]], [[3.0]], [[5.0]], [[7.0]]]))
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        return (scores * self.logit_scale.clamp(max=4.0).exp()).softmax(-1) @ v


# ---------------------------------------------------------------- heads


def interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.repeat_interleave(H // G, dim=1), v.repeat_interleave(H // G, dim=1)
    return plain(q, k, v)


def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def repeat(x: Tensor) -> Tensor:
        b, g, s, d = x.shape
        return x[:, :, None].expand(b, g, H // G, s, d).reshape(b, H, s, d)

    return plain(q, repeat(k), repeat(v))


def stacked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (torch.stack([x] * (H // G), dim=2).flatten(1, 2) for x in (k, v))
    return plain(q, k, v)


def tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.repeat(1, H // G, 1, 1), v.repeat(1, H // G, 1, 1)
    return plain(q, k, v)


def indexed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    chosen = torch.arange(H) // (H // G)
    return plain(q, k[:, chosen], v.index_select(1, chosen))


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, _, t, d = q.shape
    q = q.view(b, G, H // G, t, d)
    out = (q @ k.unsqueeze(2).transpose(-2, -1) * SCALE).softmax(-1) @ v.unsqueeze(2)
    return out.reshape(b, H, t, -1)


def grouped_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = rearrange(q, "b (g r) t d -> b g r t d", g=G)
    weights = (torch.einsum("bgrtd,bgsd->bgrts", q, k) * SCALE).softmax(-1)
    return rearrange(torch.einsum("bgrts,bgsd->bgrtd", weights, v), "b g r t d -> b (g r) t d")


def grouped_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # the heads of a group become further rows
    b, _, t, d = q.shape
    rows = q.reshape(b, G, H // G * t, d)
    return plain(rows, k, v).reshape(b, H, t, -1)


def multi_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.squeeze(1), v.squeeze(1)
    weights = (torch.einsum("bhid,bjd->bhij", q, k) * SCALE).softmax(-1)
    return torch.einsum("bhij,bjd->bhid", weights, v)


def multi_query_rows_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # the heads, which only queries have, stand between the rows and the keys
    k, v = k.squeeze(2), v.squeeze(2)
    scores = torch.einsum("bihd,bjd->bihj", q, k) * SCALE
    rows = torch.arange(q.shape[1])
    future = rows[:, None, None] < rows
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("bihj,bjd->bihd", weights, v)


def grouped_rows_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = rearrange(q, "b t (g r) d -> b t g r d", g=G)
    weights = (torch.einsum("btgrd,bsgd->btgrs", q, k) * SCALE).softmax(-1)
    return torch.einsum("btgrs,bsgd->btgrd", weights, v).flatten(2, 3)


def one_head_at_a_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([plain(q[:, i], k[:, i], v[:, i]) for i in range(H)], dim=1)


def over_channels_as_they_are(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # the channels of a head lie beside it, in queries and in keys (DaViT)
    return ((q.mT @ k * SCALE).softmax(-1) @ v.mT).mT


def over_channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # cross-covariance attention (XCiT): the features are the rows, the sequence is summed
    q, k = F.normalize(q, dim=-2), F.normalize(k, dim=-2)
    return ((q.mT @ k).softmax(-1) @ v.mT).mT


class OneHead(nn.Module):
    """A single head without a head axis; with `flat` not even a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, 16, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        return torch.softmax(q @ k.transpose(-2, -1) * 16**-0.5, dim=-1) @ v  # type: ignore[no-any-return]


class OneHeadLinear(OneHead):
    """Without a batch the product with the keys can be a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        weights = F.softmax(F.linear(self.query(x), self.key(x)) / 4, dim=1)
        return torch.mm(weights, self.value(x))


class OneHeadInner(OneHead):
    """Products by their older names."""

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.inner(self.query(x), self.key(x)).mul(0.25).softmax(-1)
        return torch.tensordot(weights, self.value(x), dims=1)


_BHTD = (
    plain, by_name, batched_heads, scaled_by_alpha, multiply_and_sum, keys_stored_transposed,
    keys_in_rows, result_transposed, values_first, over_time_major, scale_on_q, scale_on_k,
    scale_split, scale_in_a_tensor, scale_absent, scale_in_the_einsum, scale_negative_and_twice,
    ScaleAttribute, Temperature,
)  # fmt: skip
_GROUPED = (interleaved, expanded, grouped, grouped_einsum)

ENTRIES: tuple[Entry, ...] = (
    *(site(f.__name__, f) for f in _BHTD),
    *(site(f.__name__, f, layout="bthd") for f in (time_first, flax_like)),
    *(site(f.__name__, f, kv=G) for f in _GROUPED),
    # repeated in a way that leaves no trace of the groups: any number of kv heads is right
    *(site(f.__name__, f, kv=G, found=None) for f in (tiled, stacked, indexed)),
    Entry(
        "grouped_rows",
        lambda: Site(grouped_rows, kv_heads=G),
        hidden(),
        mask=None,
        heads=None,
        kv_heads=G,
    ),
    site("multi_query", multi_query, kv=1),
    site("multi_query_broadcast", plain, kv=1),
    site("multi_query_rows_first", multi_query_rows_first, kv=1, layout="bthd", mask="causal"),
    site("grouped_rows_first", grouped_rows_first, kv=G, layout="bthd"),
    site("bias_by_beta", bias_by_beta, normal(B * H, T, T)),
    site("scale_given", scale_given, lambda g: 0.3),
    site("cross", plain, normal(B, S, WIDTH), cross=True),
    site("cross_time_first", time_first, normal(B, S, WIDTH), cross=True, layout="bthd"),
    site("cross_keys_in_rows", keys_in_rows, normal(B, S, WIDTH), cross=True),
    site("cross_multiply_and_sum", multiply_and_sum, normal(B, S, WIDTH), cross=True),
    site("wide_values", plain, value_dim=12),
    site("narrow_values", by_name, value_dim=3),
    Entry(
        "one_head_at_a_time",
        lambda: Site(one_head_at_a_time),
        hidden(),
        heads=1,
        kv_heads=1,
        sites=H,
    ),
    Entry("over_channels", lambda: Site(over_channels), hidden(), head_dim=T),
    Entry(
        "over_channels_as_they_are",
        lambda: Site(over_channels_as_they_are),
        hidden(),
        head_dim=T,
    ),
    Entry("one_head", OneHead, hidden(), heads=1, kv_heads=1, head_dim=16),
    Entry(
        "one_head_flat",
        OneHead,
        lambda g: (torch.randn(T, WIDTH, generator=g),),
        heads=1,
        kv_heads=1,
        head_dim=16,
    ),
    *(
        Entry(
            name,
            build,
            lambda g: (torch.randn(T, WIDTH, generator=g),),
            heads=1,
            kv_heads=1,
            head_dim=16,
        )
        for name, build in (("one_head_linear", OneHeadLinear), ("one_head_inner", OneHeadInner))
    ),
)
