"""Derivatives of an operator: reverse mode by its backward operator, all others by its reference.

    ordinary backward             the backward operator; it has no derivative, a second order raises
    torch.func (grad, jvp, ...)   the reference at that level, which has all of them
    forward-mode AD               the reference
    vmap                          one call per element

Operators have kernels of their own for the Autograd key, instead of
`torch.library.register_autograd`, because only there can a call be sent to the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels.schema import LIBRARY

_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
_BELOW = torch._C._after_autograd_keyset - _VIEWS
_DEVICES = frozenset({torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA})


@dataclass(frozen=True, slots=True)
class Formula:
    """What is known about the derivative of an operator; see `derive`."""

    operator: Any
    backward: Any
    reference: Callable[..., Any]
    always: int
    kernels: dict[Any, Callable[..., Any]]

    def below(self, operator: Any, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the kernel of the device; its results are no views: anybody may write to them."""
        keyset = keyset & _BELOW
        with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_VIEWS):
            if operator in self.kernels and keyset.highestPriorityTypeId() in _DEVICES:
                # no mode looks on: the dispatcher would take longer than a short attention
                return self.kernels[operator](*args, **kwargs)
            return operator.redispatch(keyset, *args, **kwargs)

    @property
    def title(self) -> str:
        return str(self.operator.overloadpacket).rpartition(".")[2]


def derive(
    operator: Any,
    backward: Any,
    *,
    reference: Callable[..., Any],
    always: int = 0,
    kernels: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
) -> None:
    """Give an operator its derivatives.

    Args:
        operator: `operator(*args, **kwargs) -> (out, *saved)`, tensors, of which only `out` has a
            gradient; or `-> out` alone.
        backward: `backward(grad_out, *args, out, *saved, needs, **kwargs)` -> gradients, where
            `needs` has a boolean for each tensor of `args` (lists flattened, None skipped) beyond
            the first `always`. The result, flattened, lists the gradients of the first `always`
            tensors and then of those that `needs` marks.
        reference: the same in plain PyTorch, differentiable to any order.
        always: how many tensors always get a gradient.
        kernels: what both run on any device, called directly where nothing looks on.
    """
    direct = {} if kernels is None else dict(zip((operator, backward), kernels, strict=True))
    formula = Formula(operator, backward, reference, always, direct)
    for target, rule in ((operator, _autograd), (backward, _autograd_backward)):
        name = str(target.overloadpacket).rpartition(".")[2]
        LIBRARY.impl(name, partial(rule, formula), "Autograd", with_keyset=True)
        torch.library.register_vmap(f"attn_compiler::{name}", _looped(target), lib=LIBRARY)


# ---------------------------------------------------------------- arguments


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor of a list of tensors goes."""

    index: int


def _taken_out(args: Sequence[Any]) -> tuple[list[Any], list[Tensor]]:
    """The arguments with a place for each tensor, and the tensors."""
    tensors: list[Tensor] = []

    def place(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return _Place(len(tensors) - 1)
        return [place(x) for x in value] if isinstance(value, list | tuple) else value

    return [place(value) for value in args], tensors


def _put_back(template: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(template, _Place):
        return tensors[template.index]
    if isinstance(template, list):
        return [_put_back(value, tensors) for value in template]
    return template


def _flat(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _flat(value)


# ---------------------------------------------------------------- reverse mode


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, formula: Formula, keyset: Any, call: tuple[list[Any], Any], *tensors: Tensor
    ) -> Any:
        template, kwargs = call
        args = _put_back(template, tensors)
        found = formula.below(formula.operator, keyset, *args, **kwargs)
        results = tuple(_flat(found))
        ctx.save_for_backward(*results, *tensors)
        ctx.formula, ctx.call, ctx.results = formula, call, len(results)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> Any:
        formula, (template, kwargs) = ctx.formula, ctx.call
        wants = ctx.needs_input_grad[3:]
        if grad_out is None:
            return (None,) * (3 + len(wants))
        saved = ctx.saved_tensors  # to be asked for only once: checkpoints count
        results, tensors = saved[: ctx.results], saved[ctx.results :]
        args, needs = _put_back(template, tensors), list(wants[formula.always :])
        found = _flat(formula.backward(grad_out, *args, *results, needs, **kwargs))
        wanted = [True] * formula.always + needs
        return (None,) * 3 + tuple(next(found) if want else None for want in wanted)


_plain: list[torch.dtype | None] = []


@contextmanager
def by_reference(dtype: torch.dtype | None = None) -> Iterator[None]:
    """Run the references in place of the kernels, in this dtype."""
    _plain.append(dtype)
    try:
        yield
    finally:
        _plain.pop()


def _in_dtype(formula: Formula, dtype: torch.dtype, args: Any, kwargs: Any) -> Any:
    template, tensors = _taken_out(args)
    wide = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
    found = formula.reference(*_put_back(template, wide), **kwargs)
    narrow = [x.to(tensors[0].dtype) if x.is_floating_point() else x for x in _flat(found)]
    return narrow[0] if isinstance(found, Tensor) else tuple(narrow)


def _autograd(formula: Formula, keyset: Any, *args: Any, **kwargs: Any) -> Any:
    template, tensors = _taken_out(args)
    if _plain and _plain[-1] is not None:
        return _in_dtype(formula, _plain[-1], args, kwargs)
    if _plain or any(_transformed(t) for t in tensors):
        found = formula.reference(*args, **kwargs)
        return found if isinstance(found, Tensor) else (found[0], *(x.detach() for x in found[1:]))
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Reverse.apply(formula, keyset, (template, kwargs), *tensors)
    return formula.below(formula.operator, keyset, *args, **kwargs)


def _transformed(tensor: Tensor) -> bool:
    """Does torch.func or forward mode look at this tensor? The backward operator lacks both."""
    if torch._C._functorch.is_gradtrackingtensor(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


class _OnlyOnce(torch.autograd.Function):
    """A backward operator where somebody may differentiate it: refused when it happens."""

    @staticmethod
    def forward(ctx: Any, name: str, call: Callable[[], Any], *tensors: Tensor) -> Any:
        ctx.name = name
        return tuple(_flat(call()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise UnsupportedCall(
            f"the gradient of {ctx.name}_backward was asked for",
            why=(f"fused {ctx.name} has first derivatives only",),
            do="use torch.func or forward-mode AD, which run the plain reference",
        )


def _autograd_backward(formula: Formula, keyset: Any, *args: Any, **kwargs: Any) -> Any:
    tensors = list(_flat(args))
    if any(_transformed(t) for t in tensors):
        raise UnsupportedCall(
            f"a backward of {formula.title} was recorded outside of the transform that"
            " differentiates it",
            why=(f"{formula.title}_backward has no forward-mode derivative",),
            do="run the forward pass inside the same torch.func transform or dual level",
        )
    shape: Any = None

    def call() -> Any:
        nonlocal shape
        found = formula.below(formula.backward, keyset, *args, **kwargs)
        shape, _ = _taken_out([found])
        return found

    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return call()
    flat = _OnlyOnce.apply(formula.title, call, *tensors)
    (found,) = _put_back(shape, flat)
    return found if _is_list(formula.backward) else tuple(found)


def _is_list(operator: Any) -> bool:
    """Does it return one list of tensors, and not several results?"""
    return len(operator._schema.returns) == 1


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
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        if _is_list(operator):
            stacked = [torch.stack(parts) for parts in zip(*calls, strict=True)]
            return stacked, [0] * len(stacked)
        results = tuple(
            [torch.stack(parts) for parts in zip(*column, strict=True)]
            if isinstance(column[0], list | tuple)
            else torch.stack(column)
            for column in zip(*calls, strict=True)
        )
        return results, tuple([0] * len(r) if isinstance(r, list) else 0 for r in results)

    return rule
