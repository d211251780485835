"""Equal spellings: a hypothesis strategy that writes one attention in many ways.

    facts (mask, heads, groups, head dim, scale)  x  choices (contraction, place of the scale, ...)
        ->  a module, its inputs

Two modules with the same facts compute the same function whatever the choices, and must raise to
one record.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

INF = float("-inf")
B, T = 2, 11


@dataclass(frozen=True)
class Facts:
    """What is computed."""

    heads: int = 6
    groups: int = 6
    head_dim: int = 8
    scale: float = 8**-0.5
    mask: str = "none"
    keys: int = T

    def inputs(self) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(0)
        q = torch.randn(B, T, self.heads, self.head_dim, generator=g)
        k, v = (
            torch.randn(B, self.keys, self.groups, self.head_dim, generator=g) for _ in range(2)
        )
        keep = torch.arange(self.keys)[None, :] < torch.tensor([self.keys, self.keys - 4])[:, None]
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), keep


@dataclass(frozen=True)
class Choices:
    """How it is written; each field names a function of a table below."""

    layout: str
    expand: str
    scale: str
    product: str
    condition: str
    place: str
    softmax: str
    total: str
    padding_first: bool = False


# -------- q, k, v: [B, rows, heads, d] -> [B, heads, rows, d]

LAYOUT: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(0, 2, 1, 3),
    "contiguous": lambda x: x.transpose(1, 2).contiguous(),
    "movedim": lambda x: x.movedim(2, 1),
    "flatten": lambda x: x.flatten(2).view(x.shape[0], x.shape[1], x.shape[2], -1).swapaxes(1, 2),
    "packed": lambda x: torch.stack([x, x], dim=3)[:, :, :, 0].transpose(1, 2),
    "chunks": lambda x: torch.cat([x, x], dim=-1).chunk(2, dim=-1)[1].transpose(1, 2),
}


def _expand_reshape(x: Tensor, n: int) -> Tensor:
    b, g, s, d = x.shape
    return x[:, :, None, :, :].expand(b, g, n, s, d).reshape(b, g * n, s, d)


EXPAND: dict[str, Callable[[Tensor, int], Tensor]] = {
    "repeat_interleave": lambda x, n: x.repeat_interleave(n, dim=1),
    "expand": _expand_reshape,
    "repeat": lambda x, n: x.unsqueeze(2).repeat(1, 1, n, 1, 1).flatten(1, 2),
}

# -------- scale: (on q, on k, on the scores)

SCALE: dict[str, Callable[[float], tuple[float, float, float]]] = {
    "scores": lambda s: (1.0, 1.0, s),
    "query": lambda s: (s, 1.0, 1.0),
    "key": lambda s: (1.0, s, 1.0),
    "split": lambda s: (math.sqrt(s), math.sqrt(s), 1.0),
    "twice": lambda s: (s * 2.0, 1.0, 0.5),
}

# -------- scores: [B, H, T, S]


def _bmm(q: Tensor, k: Tensor) -> Tensor:
    b, h, t, d = q.shape
    return torch.bmm(q.reshape(b * h, t, d), k.reshape(b * h, -1, d).transpose(1, 2)).view(
        b, h, t, -1
    )


def _baddbmm(q: Tensor, k: Tensor) -> Tensor:
    b, h, t, d = q.shape
    nothing = torch.zeros(b * h, t, k.shape[2], dtype=q.dtype)
    return torch.baddbmm(
        nothing, q.reshape(-1, t, d), k.reshape(b * h, -1, d).mT, beta=0, alpha=1
    ).unflatten(0, (b, h))


PRODUCT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda q, k: torch.matmul(q, k.transpose(-1, -2)),
    "at": lambda q, k: q @ k.mT,
    "keys_first": lambda q, k: (k @ q.mT).mT,
    "einsum": lambda q, k: torch.einsum("bhtd,bhsd->bhts", q, k),
    "einsum_swapped": lambda q, k: torch.einsum("bhjd,bhid->bhij", k, q),
    "einsum_time_first": lambda q, k: torch.einsum(
        "bthd,bshd->bhts", q.transpose(1, 2), k.transpose(1, 2)
    ),
    "bmm": _bmm,
    "baddbmm": _baddbmm,
    "multiply": lambda q, k: (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1),
    "contiguous_keys": lambda q, k: q @ k.permute(0, 1, 3, 2).contiguous(),
}

# -------- conditions: True where a key may be seen

CAUSAL: dict[str, Callable[[int, int], Tensor]] = {
    "tril": lambda t, s: torch.ones(t, s).tril(s - t) == 1,
    "triu": lambda t, s: ~torch.ones(t, s, dtype=torch.bool).triu(s - t + 1),
    "arange": lambda t, s: torch.arange(s)[None, :] <= torch.arange(t)[:, None] + (s - t),
    "arange_offset": lambda t, s: torch.arange(s - t, s).view(-1, 1) >= torch.arange(s).view(1, -1),
    "difference": lambda t, s: (
        torch.arange(s).unsqueeze(0) - torch.arange(t).unsqueeze(1) < s - t + 1
    ),
    "not_greater": lambda t, s: torch.logical_not(
        torch.arange(s) > (torch.arange(t) + (s - t))[:, None]
    ),
    "infinities": lambda t, s: torch.full((t, s), INF).triu(s - t + 1) == 0,
}


def condition(name: str, mask: str, t: int, s: int) -> Tensor | None:
    """The condition of a mask over rows and columns, without padding; None if there is none."""
    if "causal" not in mask:
        return None
    allowed = CAUSAL[name](t, s)
    if "window" in mask:
        near = torch.arange(t)[:, None] + (s - t) - torch.arange(s)[None, :] < 4
        allowed = allowed & near
    return allowed


def _by_view(s: Tensor, allowed: Tensor) -> Tensor:
    s = s.contiguous()
    s.view(-1, s.shape[-2], s.shape[-1]).view(s.shape).masked_fill_(~allowed, INF)
    return s


PLACE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked_fill": lambda s, a: s.masked_fill(~a, INF),
    "masked_fill_zero": lambda s, a: s.masked_fill(a == 0, INF),
    "masked_fill_in_place": lambda s, a: s.masked_fill_(a.logical_not(), INF),
    "view_in_place": _by_view,
    "where": lambda s, a: torch.where(a, s, INF),
    "where_tensor": lambda s, a: torch.where(~a, torch.tensor(INF, dtype=s.dtype), s),
    "add": lambda s, a: s + torch.zeros_like(a, dtype=s.dtype).masked_fill(~a, INF),
    "add_swapped": lambda s, a: torch.where(a, 0.0, INF).to(s.dtype) + s,
    "finite": lambda s, a: s.masked_fill(~a, -1e9),
    "finite_min": lambda s, a: torch.where(a, s, torch.finfo(s.dtype).min),
    # no (1 - a) * finfo.min: twice in one sum it is another function in a row without keys
}

# -------- softmax over the last axis


def _by_hand(s: Tensor) -> Tensor:
    e = torch.exp(s - s.max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


SOFTMAX: dict[str, Callable[[Tensor], Tensor]] = {
    "function": lambda s: F.softmax(s, dim=-1),
    "method": lambda s: s.softmax(-1),
    "torch": lambda s: torch.softmax(s, 3),
    "float32": lambda s: F.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype),
    "cast": lambda s: s.float().softmax(-1).type_as(s),
    "by_hand": _by_hand,
    "logsumexp": lambda s: (s - s.logsumexp(-1, keepdim=True)).exp(),
    "log_softmax": lambda s: F.log_softmax(s, -1).exp(),
    "dropout": lambda s: F.dropout(s.softmax(-1), 0.0, True),
}

# -------- probabilities and values -> [B, T, H, d]

TOTAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda p, v: torch.matmul(p, v).transpose(1, 2),
    "einsum": lambda p, v: torch.einsum("bhts,bhsd->bthd", p, v),
    "einsum_swapped": lambda p, v: torch.einsum("bhjd,bhij->bhid", v, p).permute(0, 2, 1, 3),
    "bmm": lambda p, v: (
        torch.bmm(p.flatten(0, 1), v.flatten(0, 1)).unflatten(0, p.shape[:2]).transpose(1, 2)
    ),
    "values_first": lambda p, v: (v.mT @ p.mT).permute(0, 3, 1, 2),
    "multiply": lambda p, v: (p.unsqueeze(-1) * v.unsqueeze(2)).sum(3).transpose(1, 2).contiguous(),
}


class Spelling(nn.Module):
    """One attention, written as the choices say. The inputs are [B, rows, heads, d]."""

    def __init__(self, facts: Facts, choices: Choices) -> None:
        super().__init__()
        self.facts, self.choices = facts, choices

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        f, c = self.facts, self.choices
        q, k, v = (LAYOUT[c.layout](x) for x in (q, k, v))
        if f.groups != f.heads:
            k, v = (EXPAND[c.expand](x, f.heads // f.groups) for x in (k, v))
        on_q, on_k, on_scores = SCALE[c.scale](f.scale)
        q, k = q if on_q == 1.0 else q * on_q, k if on_k == 1.0 else k / (1 / on_k)
        scores = PRODUCT[c.product](q, k)
        scores = scores if on_scores == 1.0 else scores * on_scores
        p = SOFTMAX[c.softmax](self.masked(scores, keep))
        return TOTAL[c.total](p, v)

    def masked(self, scores: Tensor, keep: Tensor) -> Tensor:
        f, c = self.facts, self.choices
        conditions = [condition(c.condition, f.mask, scores.shape[-2], scores.shape[-1])]
        conditions.append(keep[:, None, None, :] if "padding" in f.mask else None)
        for allowed in reversed(conditions) if c.padding_first else conditions:
            if allowed is not None:
                scores = PLACE[c.place](scores, allowed)
        return scores


MASKS = ("none", "causal", "causal & window(4)", "padding", "causal & padding")

facts = st.builds(
    Facts,
    groups=st.sampled_from([6, 6, 2, 1]),
    scale=st.sampled_from([8**-0.5, 0.25]),
    mask=st.sampled_from(MASKS),
    keys=st.sampled_from([T, T, 17]),
)
choices = st.builds(
    Choices,
    layout=st.sampled_from(sorted(LAYOUT)),
    expand=st.sampled_from(sorted(EXPAND)),
    scale=st.sampled_from(sorted(SCALE)),
    product=st.sampled_from(sorted(PRODUCT)),
    condition=st.sampled_from(sorted(CAUSAL)),
    place=st.sampled_from(sorted(PLACE)),
    softmax=st.sampled_from(sorted(SOFTMAX)),
    total=st.sampled_from(sorted(TOTAL)),
    padding_first=st.booleans(),
)

CANONICAL = Choices(
    "transpose", "expand", "scores", "matmul", "tril", "masked_fill", "function", "matmul"
)


def record(report: Any) -> tuple[Any, ...]:
    """What must not depend on the spelling."""
    (site,) = report.sites
    # a scale split over q and k is its own square root squared: equal up to rounding
    scale = None if site.scale is None else round(float(site.scale), 6)
    heads = (site.query_heads, site.kv_heads, site.head_dim)
    return (str(site.mask), str(site.score), scale, *heads, site.decision.accepted)


def canonical(of: Facts) -> Spelling:
    return Spelling(of, CANONICAL)


def one_at_a_time() -> list[Choices]:
    """The canonical choices with one field changed: every word of every table once."""
    tables = {
        "layout": LAYOUT,
        "expand": EXPAND,
        "scale": SCALE,
        "product": PRODUCT,
        "condition": CAUSAL,
        "place": PLACE,
        "softmax": SOFTMAX,
        "total": TOTAL,
    }
    base = {name: getattr(CANONICAL, name) for name in tables}
    return [Choices(**(base | {name: word})) for name, table in tables.items() for word in table]
