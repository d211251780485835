"""Derivatives of the operators: reverse mode by the backward operator, all others by the reference.

    ordinary backward             attention_backward; it has no derivative, a second order raises
    torch.func (grad, jvp, ...)   `reference` at that level, which has all of them
    forward-mode AD               `reference`
    vmap                          one call per element

The operators have kernels of their own for the Autograd key, instead of
`torch.library.register_autograd`, because only there can a call be sent to the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels import devices
from attn_compiler.kernels.attention import reference
from attn_compiler.kernels.frame import Inputs
from attn_compiler.kernels.schema import LIBRARY, attention, attention_backward, check

_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
_BELOW = torch._C._after_autograd_keyset - _VIEWS
_DEVICES = frozenset({torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA})


def _below(operator: Any, keyset: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the kernel of the device; its results are no views: anybody may write to them."""
    keyset = keyset & _BELOW
    with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_VIEWS):
        if keyset.highestPriorityTypeId() in _DEVICES:
            # no mode looks on: the dispatcher would take longer than a short attention
            return _KERNELS[operator](*args, **kwargs)
        return operator.redispatch(keyset, *args, **kwargs)


_KERNELS: dict[Any, Callable[..., Any]] = {
    attention: devices.forward,
    attention_backward: devices.backward,
}


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, keyset: Any, kwargs: dict[str, Any], ints: Any, seed: Any, *tensors: Tensor
    ) -> Any:
        q, k, v, *reads = tensors
        out, lse = _below(attention, keyset, q, k, v, reads, ints, seed, **kwargs)
        ctx.save_for_backward(out, lse, seed, *tensors)
        ctx.kwargs, ctx.ints = kwargs, ints
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> Any:
        wants = ctx.needs_input_grad[4:]
        if grad_out is None:
            return (None,) * (4 + len(wants))
        out, lse, seed, q, k, v, *reads = ctx.saved_tensors
        needs = list(wants[3:])
        dq, dk, dv, dreads = attention_backward(
            grad_out, q, k, v, reads, ctx.ints, seed, out, lse, needs, **ctx.kwargs
        )
        rest = iter(dreads)
        return (None,) * 4 + (dq, dk, dv, *(next(rest) if need else None for need in needs))


def _autograd(keyset: Any, *args: Any, **kwargs: Any) -> Any:
    *qkv, reads, ints, seed = args
    tensors = (*qkv, *reads)
    if any(_transformed(t) for t in tensors):
        return _by_reference(*args, **kwargs)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Attention.apply(keyset, kwargs, ints, seed, *tensors)
    return _below(attention, keyset, *args, **kwargs)


def _transformed(tensor: Tensor) -> bool:
    """Does torch.func or forward mode look at this tensor? The backward operator lacks both."""
    if torch._C._functorch.is_gradtrackingtensor(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def _by_reference(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    given = Inputs.of(*args, **kwargs)
    drop = given.drop
    check(*given.qkv, drop)
    (batch, heads, length, _), keys = given.q.shape, given.k.shape[2]
    with devices.full_precision(given.q.device.type):
        dropped = drop.dropped((heads, length), (0, batch), (0, length), (0, keys))
        factor = None if dropped is None else (~dropped).to(given.dtype) * drop.gain
        out, lse = reference(
            *given.qkv, given.reads, given.ints, given.program, given.scale, factor
        )
    return out, lse.detach()


class _OnlyOnce(torch.autograd.Function):
    """The backward operator where somebody may differentiate it: refused when it happens."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, call: Callable[[], Any], *tensors: Tensor) -> Any:
        dq, dk, dv, dreads = call()
        return dq, dk, dv, *dreads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise UnsupportedCall(
            "the gradient of attention_backward was asked for",
            why=("fused attention has first derivatives only",),
            do="use torch.func or forward-mode AD, which run the plain reference",
        )


def _autograd_backward(keyset: Any, *args: Any, **kwargs: Any) -> Any:
    tensors = (*args[:4], *args[4])
    if any(_transformed(t) for t in tensors):
        raise UnsupportedCall(
            "a backward of attention was recorded outside of the transform that differentiates it",
            why=("attention_backward has no forward-mode derivative",),
            do="run the forward pass inside the same torch.func transform or dual level",
        )

    def call() -> Any:
        return _below(attention_backward, keyset, *args, **kwargs)

    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return call()
    dq, dk, dv, *dreads = _OnlyOnce.apply(keyset, call, *tensors)
    return dq, dk, dv, dreads


LIBRARY.impl("attention", _autograd, "Autograd", with_keyset=True)
LIBRARY.impl("attention_backward", _autograd_backward, "Autograd", with_keyset=True)


# ---------------------------------------------------------------- vmap


def _looped(operator: Any) -> Callable[..., Any]:
    """A batching rule: one call per element, each large enough and linear in memory."""

    def pick(value: Any, dim: Any, index: int) -> Any:
        if isinstance(value, list | tuple):
            dims = dim if isinstance(dim, list | tuple) else [dim] * len(value)
            return [pick(x, d, index) for x, d in zip(value, dims, strict=True)]
        return value if dim is None or not isinstance(value, Tensor) else value.select(dim, index)

    def rule(info: Any, in_dims: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        calls = [
            operator(*(pick(a, d, i) for a, d in zip(args, in_dims, strict=True)), **kwargs)
            for i in range(info.batch_size)
        ]
        results = tuple(
            [torch.stack(parts) for parts in zip(*column, strict=True)]
            if isinstance(column[0], list | tuple)
            else torch.stack(column)
            for column in zip(*calls, strict=True)
        )
        return results, tuple([0] * len(r) if isinstance(r, list) else 0 for r in results)

    return rule


torch.library.register_vmap("attn_compiler::attention", _looped(attention), lib=LIBRARY)
torch.library.register_vmap(
    "attn_compiler::attention_backward", _looped(attention_backward), lib=LIBRARY
)
