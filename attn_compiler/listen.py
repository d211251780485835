"""The calls and reads that a trace listens to while the user's code runs.

    self.drop(x)                 ->   handle(drop, (x,), {})
    torch.is_grad_enabled()      ->   the trace knows that somebody asked
    if self.scale_attn: ...      ->   reads["", "scale_attn"] = True
    self.mask = mask             ->   store("", "mask", mask)
    DynamicCache(config)         ->   make(DynamicCache, (config,), {})

Only the calls of one thread are sent on; everything is put back at the end.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from attn_compiler.installed import SIMPLE, outline
from attn_compiler.symbols import CaptureError

_CHECKED = (*SIMPLE, list, tuple, dict)
# the tables that PyTorch keeps in every module
_FRAME = frozenset(vars(nn.Module()))
_PATCHING = threading.RLock()


class Listener(Protocol):
    """A trace."""

    grad_read: bool
    made: dict[int, nn.Module]
    reads: dict[tuple[str, str], Any]
    forms: dict[tuple[str, str], str]
    stores: dict[tuple[str, str], tuple[Any, Any]]

    @property
    def busy(self) -> bool: ...

    def call_module(self, module: nn.Module, args: Any, kwargs: Any) -> Any: ...

    def store(self, at: tuple[str, str], value: Any, register: dict[str, bool]) -> None: ...

    def make(self, kind: type, args: Any, kwargs: Any) -> Any: ...


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
    trace, and the modules that it makes.
    """
    init = nn.Module.__init__
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

    def module_init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if threading.get_ident() == thread and not trace.busy:
            trace.made[id(self)] = self

    with calls_through(trace.call_module):
        nn.Module.__init__ = module_init  # type: ignore[method-assign]
        torch.is_grad_enabled = is_grad_enabled
        torch.autograd.Function.apply = classmethod(refuse)  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.__init__ = init  # type: ignore[method-assign]
            torch.is_grad_enabled = enabled
            torch.autograd.Function.apply = apply  # type: ignore[method-assign]


@contextmanager
def watched(paths: dict[nn.Module, str], trace: Listener) -> Iterator[None]:
    """Write down what is read of these modules outside of calls that stay calls, simple attributes
    and the form of containers, and what is set.
    """
    kinds = {module: type(module) for module in paths}
    watching = {kind: _watching(kind, paths, trace) for kind in set(kinds.values())}
    try:
        for module, kind in kinds.items():
            module.__class__ = watching[kind]
        with _making(watching, trace):
            yield
    finally:
        for module, kind in kinds.items():
            module.__class__ = kind


class _Maker(type):
    """Of a class in whose place instances are made by a function."""

    _attn_make: Callable[..., Any]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._attn_make(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.__base__ or object)


@contextmanager
def _making(kinds: Iterable[type], trace: Listener) -> Iterator[None]:
    """Send the library's caches that are made in the files of these classes through the trace."""
    library = sys.modules.get("transformers.cache_utils")
    files = {base.__module__ for kind in kinds for base in kind.__mro__} if library else set()
    found = [
        (vars(file), name, value)
        for file in filter(None, map(sys.modules.get, files))
        for name, value in vars(file).items()
        if library is not None and isinstance(value, type) and issubclass(value, library.Cache)
    ]
    for names, name, kind in found:
        names[name] = _made_by(trace, kind)
    try:
        yield
    finally:
        for names, name, kind in found:
            names[name] = kind


def _made_by(trace: Listener, kind: type) -> type:
    thread = threading.get_ident()

    def make(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread or trace.busy:
            return kind(*args, **kwargs)
        return trace.make(kind, args, kwargs)

    return _Maker(kind.__name__, (kind,), {"_attn_make": staticmethod(make)})


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, also while it is watched."""
    kind = type(module)
    return kind.__mro__[1] if "_attn_watched" in kind.__dict__ else kind


def _read(trace: Listener, at: tuple[str | None, str], value: Any) -> None:
    path, name = at
    # what the forward has set itself is no assumption about its start
    if path is None or (path, name) in trace.stores:
        return
    if type(value) in SIMPLE:
        trace.reads[path, name] = value
    elif name not in _FRAME:
        trace.forms.setdefault((path, name), outline(value))


def _watching(
    kind: type[nn.Module], paths: dict[nn.Module, str], trace: Listener
) -> type[nn.Module]:
    # what the forward makes itself, as self.layers[1:], is not in `paths`: it holds nothing yet
    def __getattribute__(self: Any, name: str) -> Any:
        value = kind.__getattribute__(self, name)
        if type(value) in _CHECKED and not name.startswith("__") and not trace.busy:
            _read(trace, (paths.get(self), name), value)
        return value

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if not name.startswith("__") and self in paths:
            trace.store((paths[self], name), value, {})
        kind.__setattr__(self, name, value)

    def __delattr__(self: Any, name: str) -> None:
        if self in paths:
            raise CaptureError("owner.not_pure", f"it deletes {name}")
        kind.__delattr__(self, name)

    def register_buffer(self: Any, name: str, tensor: Any, persistent: bool = True) -> None:
        if self in paths:
            trace.store((paths[self], name), tensor, {"persistent": persistent})
        kind.register_buffer(self, name, tensor, persistent)

    body = {
        "__getattribute__": __getattribute__,
        "__setattr__": __setattr__,
        "__delattr__": __delattr__,
        "register_buffer": register_buffer,
        "__module__": kind.__module__,
        "_attn_watched": True,
    }
    return type(kind)(kind.__name__, (kind,), body)  # type: ignore[no-any-return,misc]
