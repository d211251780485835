"""Which kernels a device runs; what has none of its own runs the composite ones.

attention(q on "cpu", ...)   ->   IMPLEMENTATIONS.get("cpu", COMPOSITE).forward
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_compiler.kernels import attention as composite
from attn_compiler.kernels import gpu
from attn_compiler.kernels.frame import Inputs
from attn_compiler.kernels.schema import LIBRARY, check


@dataclass(frozen=True, slots=True)
class Implementation:
    """The two kernels of a device type, with the signatures of `kernels.attention`."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, list[Tensor]]]


COMPOSITE = Implementation(composite.forward, composite.backward)
# by device type; what is missing here runs COMPOSITE
IMPLEMENTATIONS: dict[str, Implementation] = {"cuda": Implementation(gpu.forward, gpu.backward)}


def full_precision(device: str) -> AbstractContextManager[object]:
    """Kernels re-enter the dispatcher and must see the dtypes they chose."""
    return torch.autocast(device, enabled=False) if under_autocast(device) else nullcontext()


def under_autocast(device: str) -> bool:
    """Is autocast on for this type of device; there are types that have none."""
    return device in _WITH_AUTOCAST and torch.is_autocast_enabled(device)


# asked once: torch 2.11's Dynamo does not trace the question, and a decorator that hides it from
# Dynamo imports Dynamo
_WITH_AUTOCAST = frozenset(
    name
    for name in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", "privateuseone")
    if torch.amp.is_autocast_available(name)
)


def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """attn_compiler::attention, without derivatives."""
    given = Inputs.of(*args, **kwargs)
    check(given.q, given.k, given.v, given.drop)
    for observer in _observers:
        observer(given)
    with full_precision(given.q.device.type):
        return kernels_for(given).forward(given)


_observers: list[Callable[[Inputs], None]] = []


@contextmanager
def observed(observer: Callable[[Inputs], None]) -> Iterator[None]:
    """Show every call of attention to an observer, before it runs."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def backward(
    grad_out: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """attn_compiler::attention_backward, without derivatives."""
    *forward_args, out, lse, needs = args
    given = Inputs.of(*forward_args, **kwargs)
    needs = needs[: len(given.reads)]  # the seed has no gradient
    with full_precision(given.q.device.type):
        return kernels_for(given).backward(given, grad_out, (out, lse), needs)


def kernels_for(given: Inputs) -> Implementation:
    """Those of the device that the tensors are on."""
    return IMPLEMENTATIONS.get(given.q.device.type, COMPOSITE)


LIBRARY.impl("attention", forward, "CompositeExplicitAutograd")
LIBRARY.impl("attention_backward", backward, "CompositeExplicitAutograd")
