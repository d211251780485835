"""Attention inside something: checkpoints, branches, autocast, no_grad; writes in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.entry import WIDTH, B, D, Entry, S, Site, T, hidden
from zoo.written_cores import plain, time_first
from zoo.written_masks import dots, finish, through_a_view, tril
from zoo.written_modules import PackedCausal


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return finish(through_a_view(dots(q, k), tril(q.shape[2])), v)


class Checkpointed(nn.Module):
    """The whole attention is recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Site(masked)

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.inner, x, use_reentrant=False)


class Branch(nn.Module):
    """A condition on data chooses between two attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Site(masked), Site(plain)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.cond(x.sum() > 0, self.one, self.two, (x,))  # type: ignore[no-any-return]
        return torch.where(x.sum() > 0, self.one(x), self.two(x))


class Autocast(nn.Module):
    """The attention runs under autocast, or (`out`) leaves it for the softmax."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, out: bool = False) -> None:
        super().__init__()
        self.dtype, self.out = dtype, out
        self.inner = Site(self.attend)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.out:
            return masked(q, k, v)
        with torch.autocast("cpu", enabled=False):
            return plain(q.float(), k.float(), v.float()).to(q.dtype)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=self.dtype):
            y = self.inner(x)
        return x + y  # type: ignore[no-any-return]


class WithoutGradient(nn.Module):
    """A frozen attention beside a learned layer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.learned = Site(plain), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.frozen(x)
        return self.learned(x + y)  # type: ignore[no-any-return]


class Detached(nn.Module):
    """Keys are detached: no gradient flows back through them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Site(lambda q, k, v: plain(q, k.detach(), v))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


class Layers(nn.Module):
    """One attention module applied three times."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = PackedCausal(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.inner(self.norm(x))
        return x


class WriteAfter(nn.Module):
    """The queries are written into after they were read."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Site(self.attend)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.contiguous()
        s = dots(q, k)
        q.mul_(0.0).add_(1.0)
        return finish(s, v) + q

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


def filled_at_indices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = dots(q, k)
    rows, columns = torch.triu_indices(q.shape[2], k.shape[2], offset=1)
    s[..., rows, columns] = float("-inf")
    return finish(s, v)


class WriteBetween(nn.Module):
    """The values are written into between the softmax and the sum over them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Site(self.attend)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        v = v.clone()
        weights = dots(q, k).softmax(-1)
        v[:, :, 0] = 0.0
        return weights @ v

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


class BufferWritten(nn.Module):
    """The mask's buffer is written before each use."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.zeros(T, T))
        self.inner = Site(self.attend)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.mask.fill_(float("-inf")).triu_(1)
        return finish(dots(q, k) + self.mask, v)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


class OutputOnly(nn.Module):
    """q, k and v are the inputs of the graph, strided as the caller likes."""

    def __init__(self, attend: Any = plain) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v)  # type: ignore[no-any-return]


def _strided(g: torch.Generator) -> tuple[Tensor, ...]:
    q = torch.randn(B, 2 * T, 4, D, generator=g)[:, ::2].transpose(1, 2)
    k = torch.randn(B, 1, S, D, generator=g).expand(B, 4, S, D)
    return q, k, torch.randn(B, 4, D, S, generator=g).mT


def _large(g: torch.Generator) -> tuple[Tensor, ...]:
    q, k, v = (torch.randn(B, 4, n, D, generator=g) for n in (T, S, S))
    return (q * 5).requires_grad_(), (k * 5).requires_grad_(), v.requires_grad_()


def _bthd(g: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(
        torch.randn(B, n, 4, D, generator=g).mT.contiguous().mT.requires_grad_() for n in (T, S, S)
    )


def _bhtd(rows: int, keys: int) -> Any:
    return lambda g: tuple(
        torch.randn(B, 4, n, D, generator=g).requires_grad_() for n in (rows, keys, keys)
    )


ENTRIES: tuple[Entry, ...] = (
    Entry("filled_at_indices", lambda: Site(filled_at_indices), hidden(), mask="causal"),
    Entry("checkpointed", Checkpointed, hidden(), mask="causal"),
    Entry("branch", Branch, hidden(), mask=None, sites=2),
    Entry("autocast", Autocast, hidden(), mask="causal"),
    Entry("autocast_left", lambda: Autocast(out=True), hidden()),
    Entry("without_gradient", WithoutGradient, hidden()),
    Entry("detached_keys", Detached, hidden()),
    Entry("one_module_three_times", Layers, hidden(), mask=None, sites=3),
    Entry("queries_written_after", WriteAfter, hidden(), training=False),
    Entry("values_written_between", WriteBetween, hidden()),
    Entry("mask_buffer_written", BufferWritten, hidden(), mask="causal"),
    Entry("strided_inputs", OutputOnly, _strided, training=False, kv_heads=None),
    Entry("large_scores", OutputOnly, _large),
    Entry("time_first_inputs", lambda: OutputOnly(time_first), _bthd),
    Entry("one_row", OutputOnly, _bhtd(1, S)),
    Entry("one_key", OutputOnly, _bhtd(T, 1)),
    Entry("one_of_each", Checkpointed, hidden(rows=1), mask=None),
)
