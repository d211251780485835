"""The example run of `rewrite`: which modules attend, and what they were given.

Modules are known by their calls: the stack of running modules when a softmax or a fused attention
is called. Nothing of the run stays in the model: what it holds and random numbers are put back.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from attn_compiler.installed import base_of, names_of, parameters_of
from attn_compiler.ir import ops
from attn_compiler.listen import calls_through
from attn_compiler.snapshot import Snapshot

_ANCHORS = ops.SOFTMAX | ops.SDPA | ops.MHA | ops.FLEX | ops.EXPONENTIAL
_DEEPEST = 8


@dataclass(frozen=True)
class Example:
    """What the example run showed.

    Attributes:
        stacks: for each module that called an anchor, the paths of all running modules, outermost
            first.
        calls: the first call of every module in a stack.
    """

    stacks: dict[str, tuple[str, ...]]
    calls: dict[str, Recorded]


@dataclass(frozen=True)
class Recorded:
    """One call of a module.

    Attributes:
        values: copies of its arguments, by parameter.
        autocast: device, enabled and dtype of the autocast modes around it.
    """

    values: tuple[Any, ...]
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @contextmanager
    def state(self) -> Iterator[None]:
        """The state in which it was called."""
        with ExitStack() as stack:
            for device, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            yield


def watch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
    """Run the model twice: once to find the modules, once to copy their arguments."""
    names = {id(module): path for path, module in model.named_modules()}
    stacks = _Stacks(names)
    with untouched(model), piecewise(), calls_through(stacks.call), stacks:
        model(*copied(args), **copied(kwargs))
    calls = _Calls(names, frozenset(path for stack in stacks.found.values() for path in stack))
    with untouched(model), piecewise(), calls_through(calls.call):
        model(*copied(args), **copied(kwargs))
    return Example(stacks.found, calls.found)


@contextmanager
def piecewise() -> Iterator[None]:
    """Run PyTorch's encoders module by module, as in training. In inference one native call is a
    whole layer, and padded sequences are packed before it.
    """
    native = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(native)


class _Stacks(TorchFunctionMode):
    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.found: dict[str, tuple[str, ...]] = {}
        self.running: list[str] = []

    def call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        path = self.names.get(id(module))
        if path is None:
            return module._call_impl(*args, **kwargs)
        self.running.append(path)
        try:
            return module._call_impl(*args, **kwargs)
        finally:
            self.running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _ANCHORS and self.running:
            self.found.setdefault(self.running[-1], tuple(self.running))
        return func(*args, **(kwargs or {}))


@dataclass
class _Calls:
    """Copies of the arguments of the first call of some modules."""

    names: dict[int, str]
    wanted: frozenset[str]
    found: dict[str, Recorded] = field(default_factory=dict)

    def call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        path = self.names.get(id(module))
        if path in self.wanted and path not in self.found:
            values = copied(bound(base_of(module), args, kwargs))
            self.found[path] = Recorded(values, tuple(autocast()))
        return module._call_impl(*args, **kwargs)


def autocast() -> Iterator[tuple[str, bool, torch.dtype]]:
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            yield device, True, torch.get_autocast_dtype(device)


def bound(base: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments by parameter, in the order of `names_of`."""
    call = inspect.Signature(parameters_of(base.forward)).bind(*args, **kwargs)
    call.apply_defaults()
    return tuple(call.arguments[name] for name in names_of(base.forward))


def copied(value: Any, change: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> Any:
    """Arguments that nothing done to the copy changes; a tensor given twice stays one tensor."""
    memo: dict[int, Any] = {}
    for tensor in tensors_of(value, 0):
        memo[id(tensor)] = change(tensor.detach()).requires_grad_(tensor.requires_grad)
    return copy.deepcopy(value, memo)


def tensors_of(value: Any, depth: int, ordinary: bool = False) -> Iterator[torch.Tensor]:
    """Tensors in an argument, also within objects; `ordinary` asks for those that an object of ours
    stands for.
    """
    if isinstance(value, torch.Tensor):
        yield value
    elif ordinary and hasattr(type(value), "ordinary_tensors"):
        yield from value.ordinary_tensors()
    elif depth < _DEEPEST and not isinstance(value, type | str | int | float | nn.Module):
        held = value.values() if isinstance(value, dict) else value
        items = list(held) if isinstance(value, dict | list | tuple | set) else []
        for child in (*items, *getattr(value, "__dict__", {}).values()):
            yield from tensors_of(child, depth + 1, ordinary)


@contextmanager
def untouched(model: Any, grad: bool = False) -> Iterator[None]:
    """Run the model without a trace in what it holds or in the random numbers."""
    held = Snapshot(model) if isinstance(model, nn.Module) else None
    before = {key: t.detach().clone() for key, t in held.tensors.items()} if held else {}
    with torch.random.fork_rng(), torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        try:
            yield
        finally:
            if held is not None:
                held.put_back()
                with torch.no_grad():
                    for key, tensor in held.tensors.items():
                        if tensor.shape == before[key].shape:
                            tensor.copy_(before[key])
