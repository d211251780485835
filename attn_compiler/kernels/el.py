"""attn_compiler::el_attention: attention over the tensor that keys and values are made of.

    k = x W_k^T + b_k;     v = x W_v^T + b_v;                       out = softmax(scale q k^T) v
    q' = scale q W_k;      P = softmax(q' x^T + scale q b_k);       out = (P x) W_v^T + (P 1) b_v

    el_attention(q, x, w_k, b_k, w_v, b_v, reads, ints, *, program, scale) -> (out, lse)

q [B, H, T, d], x [Bx, S, D], w_k [G, d, D], b_k [G, d] or None, w_v [G, dv, D], b_v [G, dv] or
None; G divides H, and B = Bx * beams: row b of q reads x[b // beams]. Program, reads and ints as in
`schema`, with b running over B. No key and no value is built: x is read once for all heads and
beams, D wide, which is H times the operations of ordinary attention and pays where few rows wait
for a long x. `b_k` moves the scores of a row together; whoever knows that its softmax does not see
that leaves it out. Rows of P need not sum to one (sinks, empty rows), so b_v is weighed.

`reference` is the specification: ordinary attention over keys and values that are built, as the
gradients do.

Source: EL-Attention (arXiv 2105.04779).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_compiler.errors import UnsupportedCall
from attn_compiler.ir.expr import parse
from attn_compiler.ir.score import Program
from attn_compiler.kernels import attention as ordinary
from attn_compiler.kernels import el_cpu, el_triton, gpu
from attn_compiler.kernels.derivatives import derive
from attn_compiler.kernels.devices import full_precision
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.frame import Frame, Inputs, accumulator, empty_heads
from attn_compiler.kernels.grid import Span
from attn_compiler.kernels.rows import weighed
from attn_compiler.kernels.schema import LIBRARY

# elements of x that are read twice while they are near (in the last cache of a CPU), and of what is
# held D wide at once
_NEAR = 2**22
_WIDE = 2**24

LIBRARY.define(
    "el_attention(Tensor q, Tensor x, Tensor w_k, Tensor? b_k, Tensor w_v, Tensor? b_v, "
    "Tensor[] reads, SymInt[] ints, *, str program, float scale) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "el_attention_backward(Tensor grad_out, Tensor q, Tensor x, Tensor w_k, Tensor? b_k, "
    "Tensor w_v, Tensor? b_v, Tensor[] reads, SymInt[] ints, Tensor out, Tensor lse, "
    "bool[] needs, *, str program, float scale) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
el_attention = torch.ops.attn_compiler.el_attention.default
el_attention_backward = torch.ops.attn_compiler.el_attention_backward.default


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments, in the order of the schema."""

    q: Tensor
    x: Tensor
    w_k: Tensor
    b_k: Tensor | None
    w_v: Tensor
    b_v: Tensor | None
    reads: Sequence[Tensor]
    ints: Sequence[int]
    program: str
    scale: float

    @property
    def dtype(self) -> torch.dtype:
        return accumulator(self.q, self.x, self.w_k, self.w_v)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the result."""
        return (*self.q.shape[:3], self.w_v.shape[1])

    @property
    def beams(self) -> int:
        return self.q.shape[0] // self.x.shape[0] if self.x.shape[0] else 1

    def problem(self) -> str:
        """Why the shapes do not belong together, "" if they do."""
        q, x, w_k, w_v = self.q, self.x, self.w_k, self.w_v
        if (q.dim(), x.dim(), w_k.dim(), w_v.dim()) != (4, 3, 3, 3):
            return "q has four dimensions; x, w_k and w_v have three"
        if not x.shape[2] == w_k.shape[2] == w_v.shape[2] or w_k.shape[1] != q.shape[3]:
            return "x, w_k and w_v share their width; q and w_k share the head dim"
        groups = w_k.shape[0]
        if groups != w_v.shape[0] or groups == 0 or q.shape[1] % groups:
            return "the number of kv heads divides the number of query heads"
        if x.shape[0] * self.beams != q.shape[0]:
            return "the batch of x divides that of q"
        for bias, weight in ((self.b_k, w_k), (self.b_v, w_v)):
            if bias is not None and bias.shape != weight.shape[:2]:
                return "a bias has the shape of its weight without the width"
        return ""

    def built(self) -> tuple[Tensor, Tensor]:
        """Keys and values in the accumulator's dtype, for every row of q."""
        x, sides = self.x.to(self.dtype), ((self.w_k, self.b_k), (self.w_v, self.b_v))
        key, value = (
            built(x, w.to(self.dtype), None if b is None else b.to(self.dtype)) for w, b in sides
        )
        return key.repeat_interleave(self.beams, 0), value.repeat_interleave(self.beams, 0)

    def checked(self) -> _Call:
        reason = self.problem()
        if reason:
            given = ", ".join(f"{n} {tuple(getattr(self, n).shape)}" for n in _SHAPED)
            raise UnsupportedCall(
                "el_attention cannot read its arguments",
                why=(reason, f"given: {given}"),
                do="hand over q [B, H, T, d], x [B / beams, S, D] and weights [kv heads, d, D]",
            )
        return self


_SHAPED = ("q", "x", "w_k", "w_v")


# ---------------------------------------------------------------- the specification


def built(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The keys or values that x stands for.

    Args:
        x: [B, S, D].
        weight: [G, d, D].
        bias: [G, d] or None.

    Returns:
        [B, G, S, d], in the memory layout of `empty_heads`.
    """
    flat = None if bias is None else bias.reshape(-1)
    wide = torch.nn.functional.linear(x, weight.reshape(-1, weight.shape[2]), flat)
    heads: Tensor = wide.unflatten(-1, tuple(weight.shape[:2]))
    return heads.transpose(1, 2)


def reference(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The operator in plain PyTorch, differentiable to any order.

    Returns:
        out [B, H, T, dv] and lse [B, H, T].
    """
    call = _Call(*args, **kwargs).checked()
    key, value = call.built()
    out, lse = ordinary.reference(
        call.q, key, value, call.reads, call.ints, call.program, call.scale
    )
    return out.to(call.x.dtype), lse


# ---------------------------------------------------------------- the implementation


def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """out and lse, both in the layout of `empty_heads`."""
    call = _Call(*args, **kwargs).checked()
    out, lse = (
        empty_heads(call.x, call.shape),
        empty_heads(call.q, call.q.shape[:3], call.dtype),
    )
    if any(t.numel() == 0 for t in (call.q, call.x, out)):
        return out.zero_(), lse.fill_(-ordinary.INF)
    with full_precision(call.q.device.type):
        _fill(call, out, lse)
    return out, lse


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (t for t in value if isinstance(t, Tensor))


def _fill(call: _Call, out: Tensor, lse: Tensor) -> None:
    states = call.x[:, None]
    given = Inputs(
        *(call.q, states, states, call.reads, call.ints), Drop(None, 0.0), call.program, call.scale
    )
    frame = Frame(given)
    batch, heads, rows = call.q.shape[:3]
    w_k, w_v = call.w_k.to(call.dtype), call.w_v.to(call.dtype)
    step = max(1, _WIDE // (batch * heads * max(call.x.shape[1:])))
    for r0 in range(0, rows, step):
        r1 = min(r0 + step, rows)
        q = call.q[:, :, r0:r1].to(call.dtype) * call.scale
        wide = _per_head(q, w_k)
        shift = None if call.b_k is None else _per_head(q, call.b_k.to(call.dtype)[..., None])
        if step >= rows and generates(given):
            wide, found, mass = el_triton.forward(frame, _tile(given), wide, shift)
            lse.copy_(found)
            mass = mass[..., None]
        else:
            mass = wide.new_empty((*wide.shape[:3], 1))
            for near in _items(call, frame):
                bounds = near.start * call.beams, near.stop * call.beams
                span = Span(r0, r1, 0, frame.grid.S, *bounds, True)
                x = call.x[near].to(call.dtype)
                part = el_cpu.attend(frame, span, wide, shift, x)
                part = part or _attend(frame, span, wide, shift, x)
                mass[span.b0 : span.b1], lse[span.rows] = part
        values = _per_head(wide, w_v.transpose(1, 2))
        if call.b_v is not None:
            groups = call.b_v.shape[0]
            bias = call.b_v.to(call.dtype).repeat_interleave(heads // groups, 0)
            values = values.addcmul_(mass, bias[None, :, None])
        out[:, :, r0:r1] = values


def generates(given: Inputs) -> bool:
    """Is there a generated kernel for this call on its device?"""
    if given.q.device.type != "cuda" or el_triton.refusal(given):
        return False
    return bool(gpu.family(given.q.device))


def _tile(given: Inputs) -> el_triton.WideTile:
    machine = gpu.hardware(given.q.device)
    if machine is None:
        return el_triton.tile(given, 1)
    return el_triton.tile(given, machine.processors, machine.arch)


def _items(call: _Call, frame: Frame) -> Iterator[slice]:
    """Blocks of batch items of x, small enough to be near when they are read again; a product of
    fewer items than threads would leave threads idle. One block where a kernel reads x as it is.
    """
    count, length, width = call.x.shape
    if el_cpu.fits(frame) and call.x.dtype == call.dtype:
        return iter((slice(0, count),))
    threads = torch.get_num_threads() if call.x.device.type == "cpu" else 1
    step = max(threads, _NEAR // (length * width))
    return (slice(i, min(i + step, count)) for i in range(0, count, step))


def _attend(
    frame: Frame, span: Span, wide: Tensor, shift: Tensor | None, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Overwrite the expanded queries `wide` of a block of items x with P x; P 1 and lse.

    Rounded to half precision, an expanded query would no longer be orthogonal to what the keys do
    not see of x, however large that is: so both products are taken in the accumulator's dtype.
    """
    rows = wide[span.b0 : span.b1]
    flat = rows.reshape(x.shape[0], -1, x.shape[2])
    dot = (flat @ x.transpose(1, 2)).view(*rows.shape[:3], x.shape[1])
    if shift is not None:
        dot = dot.add_(shift[span.b0 : span.b1])
    block = weighed(frame, span, dot)
    mass = block.e.sum(-1, keepdim=True).div_(block.total)
    found = (block.e.view(x.shape[0], -1, x.shape[1]) @ x).view_as(rows)
    torch.div(found, block.total, out=rows)
    return mass, block.lse


def _per_head(x: Tensor, weight: Tensor) -> Tensor:
    """[B, H, rows, n] times [G, n, m], each head with the matrix of its group, as [B, H, rows, m].

    One product for each group, so that no matrix is repeated for each batch item.
    """
    batch, heads, rows, width = x.shape
    groups = weight.shape[0]
    grouped = (
        x.view(batch, groups, -1, width)
        if x.is_contiguous()
        else x.reshape(batch, groups, -1, width)
    )
    product = grouped.transpose(0, 1).reshape(groups, -1, width) @ weight
    product = product.view(groups, batch, heads // groups, rows, weight.shape[2])
    return product.transpose(0, 1).reshape(batch, heads, rows, weight.shape[2])


# ---------------------------------------------------------------- gradients


def backward(grad_out: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
    """Gradients of the tensors that `needs` marks, by those of keys and values that are built.

    dx = dk W_k + dv W_v;   dW = dk^T x;   db = sum of dk
    """
    *forward_args, out, lse, needs = args
    call = _Call(*forward_args, **kwargs)
    with full_precision(call.q.device.type):
        return _gradients(call, grad_out, (out, lse), needs)


def _gradients(
    call: _Call, grad: Tensor, saved: tuple[Tensor, Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    x, w_k, w_v = (t.to(call.dtype) for t in (call.x, call.w_k, call.w_v))
    key, value = call.built()
    rest = (call.reads, call.ints, Drop(None, 0.0), call.program, call.scale)
    count = len(needs) - len(call.reads)
    found = ordinary.backward(
        Inputs(call.q.to(call.dtype), key, value, *rest), grad, saved, needs[count:]
    )
    dq, *dkv = found[:3]
    # [B, G, S, d] -> the sum over beams, [Bx, S, G, d]
    dk, dv = (g.unflatten(0, (-1, call.beams)).sum(1).transpose(1, 2) for g in dkv)
    dx = torch.einsum("bsgd,gdw->bsw", dk, w_k) + torch.einsum("bsgd,gdw->bsw", dv, w_v)
    sides = []
    for g, bias in ((dk, call.b_k), (dv, call.b_v)):
        sides.append(torch.einsum("bsgd,bsw->gdw", g, x))
        sides += [] if bias is None else [g.sum((0, 1))]
    tensors, dreads = (
        list(_tensors((call.q, call.x, call.w_k, call.b_k, call.w_v, call.b_v, call.reads))),
        iter(found[3]),
    )
    results = [dq, dx, *sides]
    return [
        (results[i] if i < count else next(dreads)).to(tensor.dtype)
        for i, (tensor, need) in enumerate(zip(tensors, needs, strict=True))
        if need
    ]


# ---------------------------------------------------------------- the operator


@torch.library.register_fake("attn_compiler::el_attention", lib=LIBRARY)
def _fake(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    call = _Call(*args, **kwargs)
    lse = empty_heads(call.q, call.q.shape[:3], call.dtype)
    return empty_heads(call.x, call.shape), lse


@torch.library.register_fake("attn_compiler::el_attention_backward", lib=LIBRARY)
def _fake_backward(grad_out: Tensor, *args: Any, **_: Any) -> list[Tensor]:
    *forward_args, _out, _lse, needs = args
    q = forward_args[0]
    wanted = [t for t, need in zip(_tensors(forward_args), needs, strict=True) if need]
    return [empty_heads(t, t.shape) if t is q else t.new_empty(t.shape) for t in wanted]


LIBRARY.impl("el_attention", forward, "CompositeExplicitAutograd")
LIBRARY.impl("el_attention_backward", backward, "CompositeExplicitAutograd")
derive(el_attention, el_attention_backward, reference=reference, kernels=(forward, backward))


# ---------------------------------------------------------------- samples


def samples() -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(operator, args, kwargs): beams, grouped heads, biases, kinds of programs; small."""
    draw = torch.Generator().manual_seed(3)

    def some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    keep = torch.arange(7) >= torch.tensor([[2], [0], [7], [1]])
    padded = Program(mask=parse("t0[b, k]"), empty="uniform")
    sink = Program(mask=parse("k <= q + (S - T)"), sink=parse("t0[h]"))
    for program, reads, dtype in (
        (Program(), [], torch.float32),
        (padded, [keep], torch.float32),
        (sink, [some(6)], torch.float32),
        (Program(parse("dot + t0[0, h, q, k]")), [some(1, 6, 3, 7)], torch.bfloat16),
    ):
        q = some(4, 3, 6, 5, dtype=dtype).transpose(1, 2)
        x, w_k, w_v = (some(*s, dtype=dtype) for s in ((2, 7, 11), (2, 5, 11), (2, 3, 11)))
        biases = (some(2, 5, dtype=dtype), some(2, 3, dtype=dtype)) if reads else (None, None)
        args: tuple[Any, ...] = (q, x, w_k, biases[0], w_v, biases[1], reads, [])
        options = {"program": str(program), "scale": 0.45}
        yield el_attention, args, options
        with torch.no_grad():
            out, lse = el_attention(*args, **options)
        needs = [True] * sum(isinstance(x, Tensor) for x in args) + [False] * len(reads)
        yield el_attention_backward, (torch.ones_like(out), *args, out, lse, needs), options
