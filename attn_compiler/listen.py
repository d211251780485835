"""The calls and reads that a trace listens to while the user's code runs.

    self.drop(x)                 ->   handle(drop, (x,), {})
    torch.is_grad_enabled()      ->   the trace knows that somebody asked
    if self.scale_attn: ...      ->   reads["", "scale_attn"] = True

Only the calls of one thread are sent on; everything is put back at the end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from attn_compiler.symbols import CaptureError

# what a trace can write down of a module's attributes and check later
SIMPLE = (bool, int, float, str, type(None), torch.dtype)
_PATCHING = threading.RLock()


class Listener(Protocol):
    """A trace."""

    grad_read: bool

    @property
    def busy(self) -> bool: ...

    def call_module(self, module: nn.Module, args: Any, kwargs: Any) -> Any: ...


@contextmanager
def calls_through(handle: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    """Let this thread's calls of modules go to `handle(module, args, kwargs)`."""
    call, thread = nn.Module.__call__, threading.get_ident()

    def module_call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return call(self, *args, **kwargs)
        return handle(self, args, kwargs)

    with _PATCHING:
        nn.Module.__call__ = module_call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = call  # type: ignore[method-assign]


@contextmanager
def patched(trace: Listener) -> Iterator[None]:
    """Send this thread's module calls, grad mode questions and custom functions through the
    trace.
    """
    enabled, thread = torch.is_grad_enabled, threading.get_ident()
    apply = torch.autograd.Function.__dict__["apply"]

    def is_grad_enabled() -> bool:
        if threading.get_ident() == thread and not trace.busy:
            trace.grad_read = True
        return enabled()

    def refuse(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread or trace.busy:
            return apply.__get__(None, cls)(*args, **kwargs)
        raise CaptureError(
            "owner.autograd_function", f"it applies the autograd function {cls.__name__}"
        )

    with calls_through(trace.call_module):
        torch.is_grad_enabled = is_grad_enabled
        torch.autograd.Function.apply = classmethod(refuse)  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.is_grad_enabled = enabled
            torch.autograd.Function.apply = apply  # type: ignore[method-assign]


@contextmanager
def watched(
    modules: Iterable[tuple[str, nn.Module]], reads: dict[tuple[str, str], Any]
) -> Iterator[None]:
    """Write down what is read of these modules: simple attributes, by path and name."""
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for path, module in modules:
            kind = type(module)
            changed.append((module, kind))
            module.__class__ = _watching(kind, path, reads)
        yield
    finally:
        for module, kind in changed:
            module.__class__ = kind


def _watching(
    kind: type[nn.Module], path: str, reads: dict[tuple[str, str], Any]
) -> type[nn.Module]:
    def __getattribute__(self: Any, name: str) -> Any:
        value = kind.__getattribute__(self, name)
        if type(value) in SIMPLE and not name.startswith("__"):
            reads[path, name] = value
        return value

    return type(kind)(  # type: ignore[no-any-return,misc]
        kind.__name__,
        (kind,),
        {"__getattribute__": __getattribute__, "__module__": kind.__module__},
    )
