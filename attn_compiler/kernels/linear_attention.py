"""attn_compiler::linear_attention: softmax near, linear attention far, one denominator.

    linear_attention(q, k, v, f, g, valid, state, *, window, scale) -> (out, lse)

The arguments are those of `far_tiles.NearAndFar`: q [B, H, T, d] stands at the last T rows of
k [B, G, S, d] and v [B, G, S, dv]; f [B, H, T, F] and g [B, G, S, F] are features, none below 0,
made outside of the operator; valid [B, S] says which keys count; state [B, G, F, dv + 1] is the sum
of earlier keys. Row i sees keys i - window + 1 .. i by softmax, those before by their features, and
none after it. Rows without a key are 0. With a window of S keys or more, and no state, it is causal
softmax attention. `out` lies in memory as `empty_heads`; `lse`, [B, H, T], has no gradient.

Every device runs the same PyTorch code, of products over tiles; there is no kernel of its own.

`reference` is the specification, by matrices of T x S.

Source: LoLCATs (arXiv 2410.10254).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels import far_linear
from attn_compiler.kernels.derivatives import derive
from attn_compiler.kernels.devices import full_precision
from attn_compiler.kernels.far_tiles import INF, NearAndFar
from attn_compiler.kernels.frame import empty_heads, empty_lse
from attn_compiler.kernels.schema import LIBRARY

_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor f, Tensor g, Tensor? valid, Tensor? state"
_OPTIONS = "*, int window, float scale"
_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(
    f"linear_attention({_ARGUMENTS}, {_OPTIONS}) -> (Tensor out, Tensor lse)", tags=_TAGS
)
LIBRARY.define(
    f"linear_attention_backward(Tensor grad_out, {_ARGUMENTS}, Tensor out, Tensor lse, "
    f"bool[] needs, {_OPTIONS}) -> Tensor[]",
    tags=_TAGS,
)
linear_attention = torch.ops.attn_compiler.linear_attention.default
linear_attention_backward = torch.ops.attn_compiler.linear_attention_backward.default


def _call(*args: Any, **kwargs: Any) -> NearAndFar:
    found = NearAndFar(*args, **kwargs)
    reason = found.problem()
    if reason:
        named = zip("qkvfg", args, strict=False)
        given = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named)
        raise UnsupportedCall(
            "linear_attention cannot read its arguments",
            why=(reason, f"given: {given}, window {found.window}"),
            do="see attn_compiler.kernels.linear_attention",
        )
    return found


# ---------------------------------------------------------------- the specification


def reference(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The operator in plain PyTorch, differentiable to any order; same arguments and results."""
    call = _call(*args, **kwargs)
    dtype, repeats = call.dtype, call.q.shape[1] // call.k.shape[1]
    q, f = call.q.to(dtype), call.f.to(dtype)
    k, v, g = (x.to(dtype).repeat_interleave(repeats, 1) for x in (call.k, call.v, call.g))
    index = torch.arange(k.shape[2], device=q.device)
    row = torch.arange(q.shape[2], device=q.device)[:, None] + call.past
    counts = torch.ones_like(index, dtype=torch.bool)[None, :]
    counts = (counts if call.valid is None else call.valid)[:, None, None]
    near = (index <= row) & (index > row - call.window) & counts
    far = (index <= row - call.window) & counts
    scores = (q @ k.mT * call.scale).masked_fill(~near, -INF)
    linear = (f @ g.mT).masked_fill(~far, 0.0)
    values = torch.nn.functional.pad(v, (0, 1), value=1.0)
    outside = linear @ values
    if call.state is not None:
        outside = outside + f @ call.state.to(dtype).repeat_interleave(repeats, 1)
    # divided by the larger part, so that nothing overflows
    most = torch.maximum(
        scores.detach().amax(-1, keepdim=True) if k.shape[2] else outside.new_tensor(-INF),
        outside.detach()[..., -1:].log(),
    )
    nothing = most == -INF
    most = most.masked_fill(nothing, 0.0)
    least = (-most).exp().clamp(max=torch.finfo(dtype).max ** 0.5)
    both = (scores - most).exp() @ values + outside * least
    total = both[..., -1:].masked_fill(nothing, 1.0)
    out = both[..., :-1] / total
    lse = (total.log() + most).masked_fill(nothing, -INF)
    return out.to(call.v.dtype), lse.squeeze(-1)


# ---------------------------------------------------------------- the operator


def _forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    with full_precision(args[0].device.type):
        return far_linear.forward(_call(*args, **kwargs))


def _backward(grad_out: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
    *own, out, lse, needs = args
    with full_precision(grad_out.device.type):
        call = _call(*own, **kwargs)
        found = far_linear.backward(call, grad_out, out, lse)
    wanted = [found.q, found.k, found.v, found.f, found.g]
    if call.state is not None and needs[-1]:
        wanted.append(found.state.to(call.state.dtype))
    return wanted


LIBRARY.impl("linear_attention", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("linear_attention_backward", _backward, "CompositeExplicitAutograd")
derive(
    linear_attention,
    linear_attention_backward,
    reference=reference,
    always=5,
    kernels=(_forward, _backward),
)


@torch.library.register_fake("attn_compiler::linear_attention", lib=LIBRARY)
def _fake(q: Tensor, k: Tensor, v: Tensor, f: Tensor, g: Tensor, *_: Any, **__: Any) -> Any:
    dtype = NearAndFar(q, k, v, f, g, None, None, 1, 1.0).dtype
    return empty_heads(v, (*q.shape[:3], v.shape[3])), empty_lse(q, dtype)


@torch.library.register_fake("attn_compiler::linear_attention_backward", lib=LIBRARY)
def _fake_backward(grad_out: Tensor, *args: Any, **_: Any) -> list[Tensor]:
    *tensors, _valid, state, _out, _lse, needs = args
    found = [empty_heads(x, x.shape) for x in tensors]
    return [*found, state.new_empty(state.shape)] if state is not None and needs[-1] else found


# ---------------------------------------------------------------- samples


def samples() -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(operator, args, kwargs) for both operators and every option, small, on the CPU."""
    draw = torch.Generator().manual_seed(1)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    valid = torch.arange(7) >= torch.tensor([[0], [2]])
    state = tensor(2, 2, 3, 7).abs()
    calls: list[tuple[int, Tensor | None, Tensor | None, torch.dtype]] = [
        (7, None, None, torch.float32),
        (7, valid, None, torch.float32),
        (2, None, state, torch.float32),
        (1, valid, state.clone().requires_grad_(), torch.float32),
        (7, None, None, torch.bfloat16),
    ]
    for rows, counts, before, dtype in calls:
        sizes = ((4, rows, 5), (2, 7, 5), (2, 7, 6), (4, rows, 3), (2, 7, 3))
        given = [tensor(2, *size).to(dtype) for size in sizes]
        given[3:] = [x.exp() for x in given[3:]]
        args = (*(x.requires_grad_() for x in given), counts, before)
        options = {"window": 3, "scale": 0.4}
        yield linear_attention, args, options
        with torch.no_grad():
            results = linear_attention(*args, **options)
        plain = [None if x is None else x.detach() for x in args]
        needs = [x.requires_grad for x in args[5:] if x is not None]
        grad = torch.ones_like(results[0])
        yield linear_attention_backward, (grad, *plain, *results, needs), options
