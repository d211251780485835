"""Objects that a traced forward is given, or makes, and that are no tensors: caches, mostly.

    key, value = past.update(key, value, 3)    ->   update = past.update(key, value, 3); update[0];
    update[1]

The trace runs on a deep copy with fake tensors. What the code reads of the object or calls on it
becomes a node, in
order; tensors that come back are read from that node. A flag that the code branches on is an
assumption, checked before
the call if it can be read then, and checked again where it was read. An integer that comes back
stays symbolic.
"""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from attn_compiler.errors import require
from attn_compiler.ir.site import AttentionSite
from attn_compiler.symbols import CaptureError, Symbols

_DEEPEST = 8
CONSTANTS = (bool, type(None), str, float, torch.dtype, torch.device)
# marks a node that holds a number which an object gave
NUMBER = "opaque_number"


@dataclass(frozen=True)
class Assumption:
    """A value that the trace took a branch on.

    Attributes:
        node: computes it while the graph runs.
        value: what it was.
        text: the same before the call, over its arguments; "" if it cannot be read then.
    """

    node: fx.Node
    value: Any
    text: str


class Recorder(Protocol):
    """What an opaque object needs of the trace it is part of."""

    graph: fx.Graph
    symbols: Symbols
    assumptions: list[Assumption]

    def argument(self, value: Any) -> Any: ...

    def learn(self, value: torch.Tensor, node: fx.Node) -> None: ...

    def paused(self) -> Any: ...


def shadow(value: Any, symbols: Symbols, sites: Iterable[AttentionSite] = ()) -> Any:
    """A deep copy whose tensors are fakes.

    Args:
        value: the object.
        symbols: of the trace.
        sites: what stands rewritten in the module that is traced. The original is traced, so a
            cache has to show keys and values of the original's sizes.

    Raises:
        CaptureError: `owner.argument`, the object cannot be copied.
    """
    memo: dict[int, Any] = {}
    for tensor in _tensors(value, 0):
        memo[id(tensor)] = symbols.fixed(tensor)
    try:
        found = copy.deepcopy(value, memo)
    except Exception as error:  # runs the object's own code
        raise CaptureError(
            "owner.argument", f"an argument of type {type(value).__name__} cannot be copied"
        ) from error
    for site in sites:
        if site.decision.cached is not None:
            for layer in _layers(found, 0):
                _resize(layer, site)
    return found


def _layers(value: Any, depth: int) -> Iterator[Any]:
    """Objects that hold keys and values."""
    held = getattr(value, "__dict__", {})
    if isinstance(held.get("keys"), torch.Tensor) and isinstance(held.get("values"), torch.Tensor):
        yield value
    elif depth < _DEEPEST and not isinstance(value, type | str | int | float | torch.Tensor):
        for child in _children(value):
            yield from _layers(child, depth + 1)


def _resize(layer: Any, site: AttentionSite) -> None:
    for name, width in (("keys", site.head_dim), ("values", site.value_dim)):
        tensor = getattr(layer, name)
        if tensor.dim() == 4 and (tensor.shape[1], tensor.shape[3]) == site.decision.cached:
            shape = (tensor.shape[0], site.kv_heads, tensor.shape[2], width)
            layer.__dict__[name] = tensor.new_empty(shape)


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    yield from getattr(value, "__dict__", {}).values()


def _tensors(value: Any, depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth < _DEEPEST and not isinstance(value, type | str | int | float):
        for child in _children(value):
            yield from _tensors(child, depth + 1)


def _state(value: Any, depth: int = 0) -> Any:
    """What an effect on the object would change."""
    if isinstance(value, torch.Tensor):
        return id(value), value._version
    if (
        isinstance(value, int | float | str | bool | None)
        or depth >= _DEEPEST
        or isinstance(value, type)
    ):
        return value if not isinstance(value, type) else id(value)
    return id(type(value)), tuple(_state(child, depth + 1) for child in _children(value))


class Opaque:
    """Stands for the object while the code is traced."""

    def __init__(self, recorder: Recorder, value: Any, node: fx.Node, text: str) -> None:
        put = object.__setattr__
        put(self, "_attn_recorder", recorder)
        put(self, "_attn_value", value)
        put(self, "_attn_node", node)
        put(self, "_attn_text", text)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(object.__getattribute__(self, "_attn_value"))

    def __getattr__(self, name: str) -> Any:
        with self._attn_recorder.paused():
            value = getattr(self._attn_value, name)
        text = f"{self._attn_text}.{name}" if self._attn_text else ""
        if callable(value) and not isinstance(value, type):
            return _Method(self, name, value, text)
        return _result(self, value, getattr, (self._attn_node, name), text)

    def __setattr__(self, name: str, value: Any) -> None:
        _effect(self, setattr, name, value)

    def __getitem__(self, key: Any) -> Any:
        text = (
            f"{self._attn_text}[{key!r}]" if self._attn_text and isinstance(key, int | str) else ""
        )
        return _result(self, self._attn_value[key], operator.getitem, (self._attn_node, key), text)

    def __setitem__(self, key: Any, value: Any) -> None:
        _effect(self, operator.setitem, key, value)

    def __len__(self) -> int:
        return int(self._fact(len))

    def __bool__(self) -> bool:
        return bool(self._fact(bool))

    def __contains__(self, key: Any) -> bool:
        node = self._attn_recorder.graph.call_function(operator.contains, (self._attn_node, key))
        text = (
            f"({key!r} in {self._attn_text})"
            if self._attn_text and isinstance(key, int | str)
            else ""
        )
        found = key in self._attn_value
        self._attn_recorder.assumptions.append(Assumption(node, found, text))
        return found

    def __iter__(self) -> Iterator[Any]:
        return (self[position] for position in range(len(self)))

    def _fact(self, read: Callable[[Any], Any]) -> Any:
        node = self._attn_recorder.graph.call_function(read, (self._attn_node,))
        text = f"{read.__name__}({self._attn_text})" if self._attn_text else ""
        found = read(self._attn_value)
        self._attn_recorder.assumptions.append(Assumption(node, found, text))
        return found


def made(recorder: Recorder, kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Opaque:
    """An object of a kind that the traced code makes itself."""
    node = recorder.graph.call_function(kind, recorder.argument(args), recorder.argument(kwargs))
    with recorder.paused():
        value = kind(*unwrap(args), **unwrap(kwargs))
    return Opaque(recorder, value, node, "")


class _Method:
    """A method of an opaque object, not yet called."""

    def __init__(self, owner: Opaque, name: str, function: Callable[..., Any], text: str) -> None:
        self.owner = owner
        self.name = name
        self.function = function
        self.text = text

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder = self.owner._attn_recorder
        before = _state(self.owner._attn_value)
        with recorder.paused():
            fixed = recorder.symbols.fixed
            value = self.function(*unwrap(args, fixed), **unwrap(kwargs, fixed))
        pure = before == _state(self.owner._attn_value)
        plain = not kwargs and all(isinstance(a, int | str | bool | None) for a in args)
        text = f"{self.text}({', '.join(map(repr, args))})" if self.text and pure and plain else ""
        node = recorder.graph.call_method(
            self.name, (self.owner._attn_node, *recorder.argument(args)), recorder.argument(kwargs)
        )
        if self.name == "update" and is_cache(self.owner._attn_value):
            return _cached(recorder, value, node, args)
        return _wrap(recorder, value, node, text)


def is_cache(value: Any) -> bool:
    """Is it a cache of the library whose protocol says what `update` gives?"""
    library = sys.modules.get("transformers.cache_utils")
    return library is not None and isinstance(value, library.Cache)


def _cached(recorder: Recorder, value: Any, node: fx.Node, given: tuple[Any, ...]) -> Any:
    """All keys and values [batch, heads, S, features]: but for S of the sizes of the new ones."""
    pieces = []
    for position, (found, new) in enumerate(zip(value, given[:2], strict=True)):
        piece = recorder.graph.call_function(operator.getitem, (node, position))
        with torch._C.DisableTorchFunction():
            sizes = list(new.size())
        sizes[-2] = None
        pieces.append(_tensor(recorder, found, piece, sizes))
        for dim, size in enumerate(sizes):
            if size is not None:
                _demand_size(recorder, pieces[-1], dim, size)
    return tuple(pieces)


def _demand_size(recorder: Recorder, tensor: torch.Tensor, dim: int, size: Any) -> None:
    read = recorder.graph.call_method("size", (recorder.argument(tensor), dim))
    same = recorder.graph.call_function(operator.eq, (read, recorder.argument(size)))
    text = f"dimension {dim} of what the cache holds is that of what it is given"
    recorder.graph.call_function(require, (same, text))


def unwrap(value: Any, fixed: Callable[[Any], Any] = lambda value: value) -> Any:
    """Arguments with the copies that opaque objects stand for, tensors and sizes changed by
    `fixed`.
    """
    if type(value) in (tuple, list):
        return type(value)(unwrap(item, fixed) for item in value)
    if type(value) is dict:
        return {key: unwrap(item, fixed) for key, item in value.items()}
    if type(value) is Opaque:
        return object.__getattribute__(value, "_attn_value")
    return fixed(value)


def _effect(owner: Opaque, write: Callable[..., None], key: Any, value: Any) -> None:
    recorder = owner._attn_recorder
    write(owner._attn_value, key, unwrap(value, recorder.symbols.fixed))
    recorder.graph.call_function(
        write, (owner._attn_node, recorder.argument(key), recorder.argument(value))
    )


def _result(
    owner: Opaque, value: Any, target: Callable[..., Any], args: tuple[Any, ...], text: str
) -> Any:
    recorder = owner._attn_recorder
    node = recorder.graph.call_function(target, recorder.argument(args))
    return _wrap(recorder, value, node, text)


def _wrap(recorder: Recorder, value: Any, node: fx.Node, text: str) -> Any:
    """What the traced code gets: a fake tensor, a symbol, a constant with an assumption, or an
    opaque object.
    """
    if isinstance(value, torch.Tensor):
        return _tensor(recorder, value, node)
    if type(value) is tuple:
        pieces = [
            recorder.graph.call_function(operator.getitem, (node, position))
            for position in range(len(value))
        ]
        return tuple(
            _wrap(recorder, item, pieces[position], f"{text}[{position}]" if text else "")
            for position, item in enumerate(value)
        )
    if isinstance(value, CONSTANTS):
        recorder.assumptions.append(Assumption(node, value, text))
        return value
    if isinstance(value, int):
        number = recorder.symbols.integer(value)
        recorder.symbols.bind(number, node, text)
        node.meta["example_value"] = number
        node.meta[NUMBER] = True
        return number
    return Opaque(recorder, value, node, text)


# ---------------------------------------------------------------- tensors out of opaque calls


def _tensor(
    recorder: Recorder, value: torch.Tensor, node: fx.Node, sizes: list[Any] | None = None
) -> torch.Tensor:
    """A fake for a tensor that an object gave, with these sizes or new symbols."""
    with torch._C.DisableTorchFunction():
        known = [None] * value.dim() if sizes is None else sizes
        shape = tuple(value.shape)  # on which the code may branch
        token = ("opaque", shape, value.dtype, value.device, value.requires_grad)
    with recorder.paused():  # one without any symbolic size would be taken for a constant
        found = recorder.symbols.produce(token, lambda: recorder.symbols.renewed(value, known))
    recorder.learn(found, read_later(recorder.graph, node))
    return found  # type: ignore[no-any-return]


def read_later(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A placeholder in the middle of the graph: no region may reach behind a tensor that an opaque
    call gave.
    """
    number = sum("opaque" in n.meta for n in graph.nodes)
    found = graph.create_node("placeholder", f"opaque{number}", ())
    found.meta["opaque"] = node
    return found


def settle(graph: fx.Graph) -> None:
    """Put the calls back behind their tensors, now that the graph is finished."""
    for placeholder in [n for n in graph.nodes if "opaque" in n.meta]:
        placeholder.replace_all_uses_with(placeholder.meta["opaque"])
        graph.erase_node(placeholder)
