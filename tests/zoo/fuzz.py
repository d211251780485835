"""Random graphs that are attention, almost attention, or not: all must compute the same afterwards.

    draw(seed) -> a module that plays a list of random steps, and its inputs

Sizes are small and often equal, so that axes cannot be told apart by size; any step may break what
makes an attention (another axis, a gate, a slice, a second reader). There is no expected decision,
only expected numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[Tensor], Tensor]
LETTERS = "xyzw"


@dataclass
class Plan:
    """Sizes of one graph; `extra` are the tensors that its steps read, inputs of the graph."""

    rng: random.Random
    batch: tuple[int, ...] = ()
    rows: int = 1
    keys: int = 1
    dim: int = 1
    value_dim: int = 1
    groups: int = 1
    dtype: torch.dtype = torch.float32
    extra: list[Tensor] = field(default_factory=list)

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def add(self, tensor: Tensor) -> int:
        self.extra.append(tensor)
        return len(self.extra) - 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.batch, self.rows, self.keys)

    def broadcast(self) -> tuple[int, ...]:
        """A shape that broadcasts to the scores."""
        shape = [n if self.chance(0.6) else 1 for n in self.shape]
        return tuple(shape[self.rng.randrange(len(shape) - 1) if self.chance(0.4) else 0 :])

    def normal(self, *shape: int) -> Tensor:
        g = torch.Generator().manual_seed(self.rng.randrange(2**31))
        return torch.randn(shape, generator=g).to(self.dtype)

    def condition(self) -> Tensor:
        g = torch.Generator().manual_seed(self.rng.randrange(2**31))
        allowed = torch.rand(self.broadcast(), generator=g) < self.rng.choice([0.3, 0.6, 0.9])
        return allowed if self.chance(0.3) else allowed | (torch.arange(allowed.shape[-1]) == 0)


class Played(nn.Module):
    """q, k, v -> the layouts -> scores -> steps -> softmax -> steps -> sum over the values."""

    def __init__(self, parts: dict[str, Any]) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, q: Tensor, k: Tensor, v: Tensor, extra: list[Tensor]) -> Any:
        p = self.parts
        q, k, v = p["q"](q), p["k"](k), p["v"](v)
        s = p["product"](q, k)
        for step in p["before"]:
            s = step(s, extra)
        w = p["softmax"](s)
        for step in p["after"]:
            w = step(w, extra)
        out = p["total"](w, v)
        return (out, w) if p["read"] == "weights" else (out, s) if p["read"] == "scores" else out


def draw(seed: int) -> tuple[Played, tuple[Any, ...], bool]:
    """The module, its inputs, and whether to train."""
    rng = random.Random(seed)
    plan = Plan(rng)
    sizes = rng.choice([(1, 2, 3, 4, 5, 6), (2, 3), (4,), (3, 5, 7)])
    plan.batch = tuple(rng.choice(sizes) for _ in range(rng.choice([0, 1, 2, 2, 2, 2, 3])))
    plan.rows, plan.keys, plan.dim, plan.value_dim = (rng.choice(sizes) for _ in range(4))
    plan.groups = plan.batch[-1] if plan.batch else 1
    if plan.batch and plan.chance(0.25):
        plan.groups = rng.choice([n for n in range(1, plan.groups + 1) if plan.groups % n == 0])
    if plan.chance(0.3):
        plan.value_dim = plan.dim
    plan.dtype = rng.choice([torch.float32] * 6 + [torch.float64, torch.bfloat16, torch.float16])
    train = plan.chance(0.5)
    sources = [_source(plan, plan.rows, plan.dim, False), _source(plan, plan.keys, plan.dim, True)]
    sources.append(_source(plan, plan.keys, plan.value_dim, True))
    parts = {name: step for name, (_, step) in zip("qkv", sources, strict=True)}
    parts |= {"product": _product(plan), "before": _before(plan), "softmax": _softmax(plan)}
    parts |= {
        "after": _after(plan),
        "total": _total(plan),
        "read": "" if plan.chance(0.93) else rng.choice(["weights", "scores"]),
    }
    tensors = [t.requires_grad_(train) for t, _ in sources]
    extra = [
        t.requires_grad_(train and t.is_floating_point() and plan.chance(0.5)) for t in plan.extra
    ]
    return Played(parts), (*tensors, extra), train


# ---------------------------------------------------------------- where q, k and v come from


def _source(plan: Plan, rows: int, features: int, is_key: bool) -> tuple[Tensor, Step]:
    """A tensor in some order of axes, some strides; the step to [*batch, rows, features]."""
    batch = (*plan.batch[:-1], plan.groups) if is_key and plan.batch else plan.batch
    shape = (*batch, rows, features)
    order = list(range(len(shape)))
    if plan.chance(0.6):
        plan.rng.shuffle(order)
    stored = plan.normal(*(shape[i] for i in order))
    if plan.chance(0.15):
        stored = plan.normal(*(2 * n for n in stored.shape))[
            tuple(slice(None, None, 2) for _ in stored.shape)
        ]
    back = [order.index(i) for i in range(len(shape))]
    repeat = plan.batch[-1] // plan.groups if is_key and plan.batch else 1
    return stored, _bring(
        back,
        repeat,
        plan.rng.choice(["repeat", "expand", "tile", "index"]),
        plan.rng.choice([1.0, 1.0, 0.5, -1.5]),
    )


def _bring(back: list[int], repeat: int, how: str, factor: float) -> Step:
    def step(x: Tensor) -> Tensor:
        x = x.permute(back)
        x = x if factor == 1.0 else x * factor
        if repeat == 1:
            return x
        if how == "repeat":
            return x.repeat_interleave(repeat, dim=-3)
        if how == "tile":
            return torch.cat([x] * repeat, dim=-3)
        if how == "index":
            return x.index_select(-3, torch.arange(x.shape[-3] * repeat) // repeat)
        return x.unsqueeze(-3).expand(*x.shape[:-2], repeat, *x.shape[-2:]).flatten(-4, -3)

    return step


# ---------------------------------------------------------------- products


def _letters(rank: int) -> str:
    return LETTERS[: rank - 2]


def _mm(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


def _mm_swapped(q: Tensor, k: Tensor) -> Tensor:
    return (k @ q.mT).mT


def _einsum(q: Tensor, k: Tensor) -> Tensor:
    b = _letters(q.dim())
    return torch.einsum(f"{b}id,{b}jd->{b}ij", q, k)


def _broadcast(q: Tensor, k: Tensor) -> Tensor:
    return (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1)


def _flat(q: Tensor, k: Tensor) -> Tensor:
    shape = (*q.shape[:-1], k.shape[-2])
    return torch.bmm(q.reshape(-1, *q.shape[-2:]), k.reshape(-1, *k.shape[-2:]).mT).view(shape)


def _product(plan: Plan) -> Callable[[Tensor, Tensor], Tensor]:
    chosen = plan.rng.choice([_mm, _mm_swapped, _einsum, _broadcast, _flat])
    if plan.chance(0.05) and plan.rows == plan.keys:
        return lambda q, k: chosen(k, q) if q.shape == k.shape else chosen(q, k)
    return chosen


def _total(plan: Plan) -> Callable[[Tensor, Tensor], Tensor]:
    def by_einsum(w: Tensor, v: Tensor) -> Tensor:
        b = _letters(w.dim())
        return torch.einsum(f"{b}ij,{b}jd->i{b}d", w, v)

    def transposed(w: Tensor, v: Tensor) -> Tensor:
        # another sum altogether, unless rows and keys are as many
        return (w.mT @ v) if w.shape[-2] == v.shape[-2] else w @ v

    if plan.chance(0.05):
        return transposed
    choices: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda w, v: w @ v,
        by_einsum,
        lambda w, v: (v.mT @ w.mT).mT,
        lambda w, v: (w.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2),
        lambda w, v: torch.bmm(
            w.reshape(-1, *w.shape[-2:]), v.reshape(-1, *v.shape[-2:])
        ).unflatten(0, w.shape[:-2] or (1,)),
    ]
    return plan.rng.choice(choices)


# ---------------------------------------------------------------- softmax


def _by_hand(s: Tensor, dim: int) -> Tensor:
    e = (s - s.amax(dim, keepdim=True)).exp()
    return e / e.sum(dim, keepdim=True)


def _softmax(plan: Plan) -> Step:
    rank = len(plan.shape)
    dim = -1 if plan.chance(0.85) else plan.rng.randrange(rank)
    dim = dim if plan.chance(0.5) or dim >= 0 else rank - 1
    choices: list[Step] = [
        lambda s: s.softmax(dim),
        lambda s: F.softmax(s, dim=dim, dtype=torch.float32).to(s.dtype),
        lambda s: _by_hand(s, dim),
        lambda s: (s - s.logsumexp(dim, keepdim=True)).exp(),
        lambda s: F.log_softmax(s, dim).exp(),
        lambda s: s.exp() / s.exp().sum(dim, keepdim=True),
        lambda s: F.log_softmax(s, dim),
    ]
    return plan.rng.choices(choices, weights=[8, 2, 2, 1, 1, 1, 0.3])[0]


# ---------------------------------------------------------------- between product and softmax


def _fill(plan: Plan) -> float:
    return plan.rng.choice(
        [float("-inf"), float("-inf"), -1e4, -3.0, 0.0, float(torch.finfo(plan.dtype).min)]
    )


def _masking(plan: Plan) -> Any:
    value = _fill(plan)
    shift = plan.rng.choice([0, 0, None, 1, -1])  # None: the rows are the last of the keys
    kind = plan.rng.choice(["given", "given_added", "tril", "window", "in_place", "view", "set"])
    at = plan.add(plan.condition()) if kind in ("given", "given_added", "in_place") else -1

    def step(s: Tensor, extra: list[Tensor]) -> Tensor:
        if kind == "given":
            return s.masked_fill(~extra[at], value)
        if kind == "given_added":
            return s + torch.zeros_like(extra[at], dtype=s.dtype).masked_fill(~extra[at], value)
        if kind == "in_place":
            return s.clone().masked_fill_(extra[at].logical_not(), value)
        if kind == "set":
            s = s.clone()
            s[..., -1:] = value
            return s
        t, n = s.shape[-2:]
        allowed = torch.ones(t, n, dtype=torch.bool).tril(n - t if shift is None else shift)
        if kind == "window":
            allowed = allowed & (torch.arange(t)[:, None] - torch.arange(n) < 2)
        if kind == "view":
            s = s.contiguous()
            s.view(-1, t, n).masked_fill_(~allowed, value)
            return s
        return torch.where(allowed, s, value)

    return step


def _pointwise(plan: Plan) -> Any:
    factor = plan.rng.choice([0.5, -1.0, 2.0, 0.35])
    choices: list[Step] = [
        lambda s: s * factor,
        lambda s: s / factor,
        lambda s: factor * torch.tanh(s / factor),
        lambda s: s + factor,
        lambda s: s.square() * 0.1,
        lambda s: s.relu(),
        lambda s: s.clamp(-1.0, 1.5),
        lambda s: s.sigmoid(),
        lambda s: s.mT.contiguous().mT,
        lambda s: s.flatten().view(s.shape),
        lambda s: s.to(torch.float64).to(s.dtype),
        lambda s: s - s.amax(-1, keepdim=True).detach(),
        lambda s: s.flip(-1),
        lambda s: s - s.mean(-1, keepdim=True),
        lambda s: s.cumsum(-1) * 0.3,
    ]
    chosen = plan.rng.choices(choices, weights=[5, 3, 3, 2, 1, 1, 1, 1, 2, 2, 1, 1, 0.3, 0.5, 0.3])[
        0
    ]
    return lambda s, extra: chosen(s)


def _bias(plan: Plan) -> Any:
    at = plan.add(plan.normal(*plan.broadcast()))
    how = plan.rng.choice(["add", "add", "before", "multiply", "subtract"])

    def step(s: Tensor, extra: list[Tensor]) -> Tensor:
        t = extra[at]
        return {
            "add": lambda: s + t,
            "before": lambda: t + s,
            "multiply": lambda: s * t,
            "subtract": lambda: s - t,
        }[how]()

    return step


def _slopes(plan: Plan) -> Any:
    slope = plan.rng.choice([0.5, -0.25])
    return lambda s, extra: (
        s + slope * (torch.arange(s.shape[-1]) - torch.arange(s.shape[-2])[:, None]).to(s.dtype)
    )


def _before(plan: Plan) -> list[Any]:
    kinds = plan.rng.choices(
        [_masking, _pointwise, _bias, _slopes],
        weights=[4, 5, 2, 1],
        k=plan.rng.choice([0, 1, 2, 2, 3, 4]),
    )
    return [kind(plan) for kind in kinds]


# ---------------------------------------------------------------- between softmax and sum


def _after(plan: Plan) -> list[Any]:
    if plan.chance(0.75):
        return []
    at = plan.add(plan.normal(*plan.broadcast()))
    keep = plan.add(plan.condition())
    choices: list[Any] = [
        lambda w, e: F.dropout(w, 0.0, True),
        lambda w, e: w * 0.5,
        lambda w, e: w * e[at],
        lambda w, e: w + e[at],
        lambda w, e: w.masked_fill(e[keep], 0.0),
        lambda w, e: w.mT.contiguous().mT,
        lambda w, e: w.nan_to_num(0.0),
        lambda w, e: w.flip(-1),
        lambda w, e: w.roll(1, -2),
        lambda w, e: w.square(),
        lambda w, e: w.to(torch.float64).to(w.dtype),
        lambda w, e: w.softmax(-1),
    ]
    return [plan.rng.choice(choices)]
