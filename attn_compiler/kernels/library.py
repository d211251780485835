"""The operator every exact site is lowered to, complete: import this file to have it.

    attn_compiler::attention(q, k, v, reads, ints, seed, *, program, scale, dropout) -> (out, lse)

Schema and meaning of the arguments: `schema`. Kernel per device: `devices`. Derivatives:
`derivatives`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_compiler.ir.expr import parse
from attn_compiler.ir.score import Program
from attn_compiler.kernels import devices
from attn_compiler.kernels.attention import reference
from attn_compiler.kernels.derivatives import derive
from attn_compiler.kernels.frame import Inputs, accumulator, empty_heads, empty_lse
from attn_compiler.kernels.schema import LIBRARY, attention, attention_backward, check

__all__ = [
    "attention",
    "attention_backward",
    "register_flops",
    "samples",
]


@torch.library.register_fake("attn_compiler::attention", lib=LIBRARY)
def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    lse = empty_lse(q, accumulator(q, k, v))
    return empty_heads(v, (*q.shape[:3], v.shape[-1])), lse


@torch.library.register_fake("attn_compiler::attention_backward", lib=LIBRARY)
def _fake_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, reads: Sequence[Tensor], *rest: Any, **_: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    needs = rest[-1][: len(reads)]
    dreads = [r.new_empty(r.shape) for r, need in zip(reads, needs, strict=True) if need]
    dq, dk, dv = (empty_heads(x, x.shape) for x in (q, k, v))
    return dq, dk, dv, dreads


# ---------------------------------------------------------------- derivatives


def _plain(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """`reference` with the arguments of the operator."""
    given = Inputs.of(*args, **kwargs)
    drop = given.drop
    check(*given.qkv, drop)
    (batch, heads, length, _), keys = given.q.shape, given.k.shape[2]
    with devices.full_precision(given.q.device.type):
        dropped = drop.dropped((heads, length), (0, batch), (0, length), (0, keys))
        factor = None if dropped is None else (~dropped).to(given.dtype) * drop.gain
        return reference(*given.qkv, given.reads, given.ints, given.program, given.scale, factor)


derive(
    attention,
    attention_backward,
    reference=_plain,
    always=3,
    kernels=(devices.forward, devices.backward),
)


# ---------------------------------------------------------------- flops


def _flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Two products; masked elements count, as they do for PyTorch's own attention."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _flops_backward(
    grad: Any, q: Sequence[int], k: Sequence[int], v: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    """Scores once more, then dv and dp, dq and dk."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


def register_flops() -> None:
    """Make `FlopCounterMode` count the operators.

    Its module imports triton, so it is not imported for this alone: runs when it is there already,
    and may be called again.
    """
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None or attention.overloadpacket in counter.flop_registry:
        return
    counter.register_flop_formula(attention.overloadpacket)(_flops)
    counter.register_flop_formula(attention_backward.overloadpacket)(_flops_backward)


register_flops()


# ---------------------------------------------------------------- samples


@dataclass(frozen=True, slots=True)
class _Sample:
    """One call, B H G T S d dv in `shape`."""

    program: Program
    reads: Sequence[Tensor] = ()
    ints: Sequence[int] = ()
    shape: tuple[int, int, int, int, int, int, int] = (2, 4, 2, 5, 7, 8, 8)
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0

    def args(self) -> tuple[Any, ...]:
        batch, heads, groups, rows, keys, width, value_width = self.shape
        draw = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(batch, length, number, features, generator=draw)
            .to(self.dtype)
            .transpose(1, 2)
            .requires_grad_()
            for length, number, features in (
                (rows, heads, width),
                (keys, groups, width),
                (keys, groups, value_width),
            )
        )
        seed = torch.tensor([17]) if self.dropout else None
        return q, k, v, list(self.reads), list(self.ints), seed

    def kwargs(self) -> dict[str, Any]:
        return {"program": str(self.program), "scale": 0.35, "dropout": self.dropout}


def samples() -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(operator, args, kwargs) for every operator and every kind of program, small, on the CPU."""
    draw = torch.Generator().manual_seed(1)
    padding = torch.arange(7) >= torch.tensor([[2], [0]])
    bias = torch.randn(1, 4, 5, 7, generator=draw, requires_grad=True)
    sinks = torch.randn(4, generator=draw, requires_grad=True)
    causal = Program(mask=parse("k <= q"))
    padded = Program(mask=parse("(k <= q) & t0[b, k]"), empty="uniform")
    samples = [
        _Sample(Program()),
        _Sample(causal),
        _Sample(padded, [padding]),
        _Sample(Program(mask=parse("k <= q + (S - T)"))),
        _Sample(Program(mask=parse("(k <= q) & (k > q - n0)")), ints=[3]),
        _Sample(Program(parse("dot + t0[0, h, q, k]")), [bias]),
        _Sample(Program(parse("5.0 * tanh(dot / 5.0)"), causal.mask)),
        _Sample(Program(mask=causal.mask, sink=parse("t0[h]")), [sinks]),
        _Sample(causal, dropout=0.25),
        _Sample(Program(), shape=(2, 4, 4, 5, 7, 8, 8)),
        _Sample(causal, shape=(2, 4, 1, 5, 7, 8, 6)),
        _Sample(causal, dtype=torch.bfloat16),
    ]
    for sample in samples:
        args, kwargs = sample.args(), sample.kwargs()
        yield attention, args, kwargs
        q, k, v, reads, ints, seed = args
        with torch.no_grad():
            out, lse = attention(*args, **kwargs)
        plain = [x.detach() for x in (torch.ones_like(out), q, k, v)]
        needs = [read.requires_grad for read in reads]
        inputs = (*plain, [r.detach() for r in reads], ints, seed, out, lse, needs)
        yield attention_backward, inputs, kwargs
