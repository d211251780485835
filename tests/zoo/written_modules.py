"""Whole attention modules in the styles of well-known code bases, written anew."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, einsum, nn

from zoo.entry import WIDTH, B, D, Entry, H, S, T, constant, hidden, normal


class PackedCausal(nn.Module):
    """nanoGPT-like: one linear layer for q, k and v, a tril buffer, dropout twice."""

    def __init__(self, fast: bool = False) -> None:
        super().__init__()
        self.fast = fast
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.0), nn.Dropout(0.0)
        self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(WIDTH, dim=2)
        q, k, v = (y.view(b, t, H, c // H).transpose(1, 2) for y in (q, k, v))
        if self.fast:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        y = y.transpose(1, 2).contiguous().view(b, t, c)
        return self.resid_dropout(self.c_proj(y))  # type: ignore[no-any-return]


class SeparateCausal(nn.Module):
    """minGPT-like: three layers and a block with a residual, a norm and a feed-forward net."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.key, self.query, self.value, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 37), nn.GELU(), nn.Linear(37, WIDTH))
        self.register_buffer("mask", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        b, t, c = y.size()
        k = self.key(y).view(b, t, H, c // H).transpose(1, 2)
        q = self.query(y).view(b, t, H, c // H).transpose(1, 2)
        v = self.value(y).view(b, t, H, c // H).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.mask[:, :, :t, :t] == 0, -1e10)
        x = x + self.proj((F.softmax(att, dim=-1) @ v).transpose(1, 2).contiguous().view(b, t, c))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class Annotated(nn.Module):
    """Like the annotated transformer: cloned layers, weights returned, a mask of ones and zeros."""

    def __init__(self, keep_weights: bool = False) -> None:
        super().__init__()
        self.linears = nn.ModuleList([copy.deepcopy(nn.Linear(WIDTH, WIDTH)) for _ in range(4)])
        for layer in self.linears:
            nn.init.normal_(layer.weight, std=0.3)  # type: ignore[arg-type]
        self.dropout, self.keep_weights = nn.Dropout(0.0), keep_weights
        self.attn: Tensor | None = None

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.size(-1))
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        p_attn = self.dropout(scores.softmax(dim=-1))
        return torch.matmul(p_attn, value), p_attn

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> object:
        mask = mask.unsqueeze(1) if mask is not None else None
        n = query.size(0)
        q, k, v = (
            layer(x).view(n, -1, H, D).transpose(1, 2)
            for layer, x in zip(self.linears, (query, key, value), strict=False)
        )
        x, attn = self.attention(q, k, v, mask)
        y = self.linears[-1](x.transpose(1, 2).contiguous().view(n, -1, H * D))
        return (y, attn) if self.keep_weights else y


class CosineCausal(nn.Module):
    """x-transformers-like: einsum, l2-normalised q and k, a mask by triu(1), maybe a key mask."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.to_out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            rearrange(f(x), "b n (h d) -> b h n d", h=H) for f in (self.to_q, self.to_k, self.to_v)
        )
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        dots = einsum("b h i d, b h j d -> b h i j", q, k) * 10
        lowest = -torch.finfo(dots.dtype).max
        if mask is not None:
            dots = dots.masked_fill(~rearrange(mask, "b j -> b 1 1 j"), lowest)
        i, j = dots.shape[-2:]
        dots = dots.masked_fill(torch.ones((i, j), dtype=torch.bool).triu(j - i + 1), lowest)
        out = einsum("b h i j, b h j d -> b h i d", dots.softmax(dim=-1), v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))  # type: ignore[no-any-return]


class Patches(nn.Module):
    """vit-pytorch-like: a norm, chunk, einops, softmax as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attend, self.dropout = (
            nn.LayerNorm(WIDTH),
            nn.Softmax(dim=-1),
            nn.Dropout(0.0),
        )
        self.scale = D**-0.5
        self.to_qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=H) for t in qkv)
        dots = torch.matmul(q, k.transpose(-1, -2)) * self.scale
        out = torch.matmul(self.dropout(self.attend(dots)), v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))  # type: ignore[no-any-return]


class Timm(nn.Module):
    """timm-like: qkv in one tensor of five axes, unbound, with norms of q and k."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.q_norm(q) * D**-0.5
        attn = (q @ self.k_norm(k).transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, c))  # type: ignore[no-any-return]


class OverPixels(nn.Module):
    """Diffusion-like: 1x1 convolutions, channels first, keys summed over the middle axis."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(4, WIDTH), nn.Conv2d(WIDTH, 3 * WIDTH, 1)
        self.proj = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b * H, 3 * D, h * w).split(D, dim=1)
        scale = 1 / math.sqrt(math.sqrt(D))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        return x + self.proj(torch.einsum("bts,bcs->bct", weight, v).reshape(b, c, h, w))  # type: ignore[no-any-return]


class Perceiver(nn.Module):
    """Learned queries read a longer sequence, as in Perceiver and Q-Former."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(5, WIDTH))
        self.to_q, self.to_kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        latents = repeat(self.latents, "n d -> b n d", b=x.shape[0])
        k, v = rearrange(self.to_kv(x), "b n (two h d) -> two b h n d", two=2, h=H)
        q = rearrange(self.to_q(latents), "b n (h d) -> b h n d", h=H)
        sim = einsum("bhid,bhjd->bhij", q, k) * D**-0.5
        sim = sim - sim.amax(dim=-1, keepdim=True).detach()
        return rearrange(einsum("bhij,bhjd->bhid", sim.softmax(dim=-1), v), "b h n d -> b n (h d)")  # type: ignore[no-any-return]


class Head(nn.Module):
    """One causal head of a lecture's multi-head attention."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, D, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(16, 16)))

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        wei = self.query(x) @ self.key(x).transpose(-2, -1) * D**-0.5
        wei = wei.masked_fill(self.tril[:t, :t] == 0, float("-inf"))
        return F.softmax(wei, dim=-1) @ self.value(x)  # type: ignore[no-any-return]


class ManyHeads(nn.Module):
    """Heads in a list, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([Head() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([h(x) for h in self.heads], dim=-1)


class Tensor2Tensor(nn.Module):
    """Self-attention, then attention over a second sequence, by one module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Annotated()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.inner(x, x, x)
        return x + self.inner(x, memory, memory)  # type: ignore[no-any-return]


class ScaledInPlace(nn.Module):
    """What a projection gives is scaled where it stands, a row of padding with it."""

    def __init__(self, times: int = 1, cast: bool = False) -> None:
        super().__init__()
        self.times, self.cast = times, cast
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = [f(x).view(*x.shape[:2], H, D).transpose(1, 2) for f in (self.q, self.k, self.v)]
        q, k, v = parts
        if self.cast:  # of a new tensor, which the cast gives back as it is
            q = torch.cat([-q[..., D // 2 :], q[..., : D // 2]], dim=-1)
            q = q.type_as(x)
        for _ in range(self.times):
            q *= D ** (-0.5 / self.times)
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


class LinearByKeyword(nn.Module):
    """Projections that are called with all of their arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.bias = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) / 4), None

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(input=x, weight=self.qkv, bias=self.bias)
        q, k, v = rearrange(qkv, "b t (n h d) -> n b h t d", n=3, h=H)
        return rearrange((q @ k.mT / D**0.5).softmax(-1) @ v, "b h t d -> b t (h d)")  # type: ignore[no-any-return]


def _three(g: torch.Generator) -> tuple[Tensor, ...]:
    memory = torch.randn(B, S, WIDTH, generator=g).requires_grad_()
    return torch.randn(B, T, WIDTH, generator=g).requires_grad_(), memory, memory.detach().clone()


def _masked_three(g: torch.Generator) -> tuple[Tensor, ...]:
    mask = (torch.arange(T)[None, None, :] < torch.tensor([T, 6])[:, None, None]) & torch.ones(
        T, T
    ).tril().bool()
    x = torch.randn(B, T, WIDTH, generator=g)
    return x.requires_grad_(), x.detach().clone(), x.detach().clone(), mask


KEEP = constant(torch.arange(T) < torch.tensor([[T], [6]]))

ENTRIES: tuple[Entry, ...] = (
    Entry("nanogpt", PackedCausal, hidden(), mask=None),
    Entry("nanogpt_fast", lambda: PackedCausal(fast=True), hidden(), mask="causal"),
    Entry("mingpt", SeparateCausal, hidden(), mask=None),
    Entry("annotated", Annotated, _three),
    Entry("annotated_mask", Annotated, _masked_three, mask=None),
    Entry(
        "annotated_returns_weights",
        lambda: Annotated(keep_weights=True),
        _three,
        refused=("",),
        why="the caller reads the probabilities",
    ),
    Entry("x_transformers", CosineCausal, hidden(), mask="causal"),
    Entry("x_transformers_mask", CosineCausal, hidden(KEEP), mask="causal & padding("),
    Entry("vit_pytorch", Patches, hidden()),
    Entry("timm", Timm, hidden()),
    Entry(
        "over_pixels",
        OverPixels,
        lambda g: (torch.randn(B, WIDTH, 3, 5, generator=g),),
        heads=None,
        kv_heads=None,
    ),
    Entry("perceiver", Perceiver, hidden()),
    Entry("scaled_in_place", ScaledInPlace, hidden()),
    Entry("scaled_in_place_twice", lambda: ScaledInPlace(2), hidden()),
    Entry("scaled_in_place_cast", lambda: ScaledInPlace(cast=True), hidden()),
    Entry("linear_by_keyword", LinearByKeyword, hidden()),
    Entry("lecture", ManyHeads, hidden(), mask=None, heads=1, kv_heads=1, sites=3),
    Entry("two_calls", Tensor2Tensor, hidden(normal(B, S, WIDTH)), sites=2),
)
