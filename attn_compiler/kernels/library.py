"""The operator every exact site is lowered to, complete: import this file to have it.

    attn_compiler::attention(q, k, v, reads, ints, seed, *, program, scale, dropout) -> (out, lse)

Schema and meaning of the arguments: `schema`; kernel per device: `IMPLEMENTATIONS`; derivatives: `derivatives`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor

from attn_compiler.kernels import attention as composite
from attn_compiler.kernels.derivatives import full_precision
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.layout import accumulator, empty_heads
from attn_compiler.kernels.schema import LIBRARY, attention, attention_backward, check

__all__ = ["COMPOSITE", "IMPLEMENTATIONS", "Implementation", "attention", "attention_backward", "op_samples"]


@dataclass(frozen=True, slots=True)
class Implementation:
    """The two kernels of a device type, with the signatures of `kernels.attention`."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, list[Tensor]]]


COMPOSITE = Implementation(composite.forward, composite.backward)
# by device type; what is missing here runs COMPOSITE
IMPLEMENTATIONS: dict[str, Implementation] = {}


def _kernels(tensor: Tensor) -> Implementation:
    return IMPLEMENTATIONS.get(tensor.device.type, COMPOSITE)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reads: Sequence[Tensor],
    ints: Sequence[int],
    seed: Tensor | None,
    *,
    program: str,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    check(q, k, v, seed, dropout)
    with full_precision(q.device.type):
        return _kernels(q).forward(q, k, v, reads, ints, Drop(seed, dropout), program, scale)


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reads: Sequence[Tensor],
    ints: Sequence[int],
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs: Sequence[bool],
    *,
    program: str,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    drop = Drop(seed, dropout)
    with full_precision(q.device.type):
        return _kernels(q).backward(grad_out, q, k, v, reads, ints, drop, (out, lse), needs, program, scale)


LIBRARY.impl("attention", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("attention_backward", _backward, "CompositeExplicitAutograd")


# ---------------------------------------------------------------- fake


@torch.library.register_fake("attn_compiler::attention", lib=LIBRARY)
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reads: Sequence[Tensor],
    ints: Sequence[int | SymInt],
    seed: Tensor | None,
    *,
    program: str,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    return empty_heads(v, (*q.shape[:3], v.shape[-1])), empty_heads(q, q.shape[:3], accumulator(q, k, v))


@torch.library.register_fake("attn_compiler::attention_backward", lib=LIBRARY)
def _fake_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reads: Sequence[Tensor],
    ints: Sequence[int | SymInt],
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs: Sequence[bool],
    *,
    program: str,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    dreads = [r.new_empty(r.shape) for r, need in zip(reads, needs, strict=True) if need]
    dq, dk, dv = (empty_heads(x, x.shape) for x in (q, k, v))
    return dq, dk, dv, dreads


# ---------------------------------------------------------------- flops


def _flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Two products; masked elements count, as they do for PyTorch's own attention."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _flops_backward(grad: Any, q: Sequence[int], k: Sequence[int], v: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Scores once more, then dv and dp, dq and dk."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


def register_flops() -> None:
    """Make `FlopCounterMode` count the operators. Its module imports triton, so it is not imported for this alone."""
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None or attention.overloadpacket in counter.flop_registry:
        return
    counter.register_flop_formula(attention.overloadpacket)(_flops)
    counter.register_flop_formula(attention_backward.overloadpacket)(_flops_backward)


register_flops()


# ---------------------------------------------------------------- samples


def _sample(
    score: str = "dot",
    mask: str = "True",
    empty: str = "any",
    sink: str = "",
    reads: Sequence[Tensor] = (),
    ints: Sequence[int] = (),
    shape: tuple[int, ...] = (2, 4, 2, 5, 7, 8, 8),
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    batch, heads, groups, rows, keys, width, value_width = shape
    draw = torch.Generator().manual_seed(0)

    def tensor(length: int, number: int, features: int) -> Tensor:
        x = torch.randn(batch, length, number, features, generator=draw).to(dtype)
        return x.transpose(1, 2).detach().requires_grad_()

    q, k, v = tensor(rows, heads, width), tensor(keys, groups, width), tensor(keys, groups, value_width)
    seed = torch.tensor([17]) if dropout else None
    program = f"score: {score}; mask: {mask}{f'; sink: {sink}' if sink else ''}; empty: {empty}"
    return (q, k, v, list(reads), list(ints), seed), {"program": program, "scale": 0.35, "dropout": dropout}


def op_samples() -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(operator, args, kwargs) for every public operator and every kind of program, small and on the CPU."""
    draw = torch.Generator().manual_seed(1)
    padding = torch.arange(7) >= torch.tensor([[2], [0]])
    bias = torch.randn(1, 4, 5, 7, generator=draw, requires_grad=True)
    sinks = torch.randn(4, generator=draw, requires_grad=True)
    calls = [
        _sample(),
        _sample(mask="k <= q"),
        _sample(mask="(k <= q) & t0[b, k]", empty="uniform", reads=[padding]),
        _sample(mask="k <= q + (S - T)"),
        _sample(mask="(k <= q) & (k > q - n0)", ints=[3]),
        _sample(score="dot + t0[0, h, q, k]", reads=[bias]),
        _sample(score="5.0 * tanh(dot / 5.0)", mask="k <= q"),
        _sample(sink="t0[h]", mask="k <= q", reads=[sinks]),
        _sample(mask="k <= q", dropout=0.25),
        _sample(shape=(2, 4, 4, 5, 7, 8, 8)),
        _sample(shape=(2, 4, 1, 5, 7, 8, 6), mask="k <= q"),
        _sample(dtype=torch.bfloat16, mask="k <= q"),
    ]
    for args, kwargs in calls:
        yield attention, args, kwargs
        q, k, v, reads, ints, seed = args
        with torch.no_grad():
            out, lse = attention(*args, **kwargs)
        plain = [x.detach() for x in (torch.ones_like(out), q, k, v)]
        needs = [read.requires_grad for read in reads]
        inputs = (*plain, [r.detach() for r in reads], ints, seed, out, lse, needs)
        yield attention_backward, inputs, kwargs
