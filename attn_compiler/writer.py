"""The graph that a trace writes: calls, arguments and results as nodes.

    torch.matmul(fake q, fake k)   ->   matmul = torch.matmul(q, k),  with its line in the code

A tensor is known by identity: the fakes made so far, and the parameters and buffers of the root.
"""

from __future__ import annotations

import keyword
import operator
import re
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import reduce
from typing import Any

import torch
from torch import fx, nn

from attn_compiler.holding import SELF, held, keep, store
from attn_compiler.opaque import CONSTANTS, Opaque
from attn_compiler.symbols import CaptureError, Symbols

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_WRITABLE = (*CONSTANTS, fx.Node, int, type(...), torch.layout, torch.memory_format)
# the tables that PyTorch keeps in every module
_FRAME = frozenset(vars(nn.Module()))
_TRACING = ("attn_compiler.record", "attn_compiler.listen", "torch.overrides", __name__)


class Written(fx.Graph):
    """A graph whose text may name a module `in`: fx itself writes `self.in(x)`."""

    def python_code(self, root_module: str, **options: Any) -> fx.graph.PythonCode:
        code = super().python_code(root_module, **options)
        for node in self.nodes:
            parts = str(node.target).split(".")
            if node.op in ("call_module", "get_attr") and any(map(keyword.iskeyword, parts)):
                wrong = reduce(_as_fx_reads, parts, root_module)
                right = reduce(attribute, parts, root_module)
                code.src = right.join(re.split(rf"{re.escape(wrong)}(?!\w)", code.src))
        return code


def attribute(home: str, name: str) -> str:
    """The text that reads an attribute, which may have any name."""
    plain = name.isidentifier() and not keyword.iskeyword(name)
    return f"{home}.{name}" if plain else f"getattr({home}, {name!r})"


def _as_fx_reads(home: str, name: str) -> str:
    return f"{home}.{name}" if name.isidentifier() else f'getattr({home}, "{name}")'


class Writer:
    """Writes nodes, and knows which node holds which tensor.

    Args:
        root: the module whose forward is traced.
        symbols: sizes, fake mode, and the graph.
        prefix: path of the root in the model.
        home: path of the root in the module that owns the graph.

    Attributes:
        paths: parameters, buffers and other tensors that the root holds, by identity.
        stack: the modules that are being traced through, outermost first.
    """

    def __init__(self, root: nn.Module, symbols: Symbols, prefix: str, home: str) -> None:
        self.symbols = symbols
        self.graph = symbols.graph
        self.paths = _tensor_paths(root)
        self._items = _items(root)
        self.paths |= {i: f"{path}.{name}[{key!r}]" for i, (path, name, key) in self._items.items()}
        self._root = root
        self.stack: list[tuple[str, nn.Module]] = [("", root)]
        self._prefix = prefix
        self._home = home
        self._known: dict[int, fx.Node] = {}
        self._alive: list[Any] = []

    # ------------------------------------------------------------ calls

    def function(self, func: Callable[..., Any], args: Any, kwargs: Any, value: Any) -> None:
        """A call of a function or method of torch that gave this value."""
        name = getattr(func, "__name__", "")
        if name == "__get__":
            node = self.graph.call_function(getattr, (self.argument(args[0]), attribute_of(func)))
        elif name in ("__getitem__", "__setitem__"):
            node = self.graph.call_function(getattr(operator, name.strip("_")), self.argument(args))
        elif _is_method(func, name):
            node = self.graph.call_method(name, self.argument(args), self.argument(kwargs))
        else:
            node = self.graph.call_function(func, self.argument(args), self.argument(kwargs))
        self.provenance(node)
        self.results(value, node)

    def module(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """A call of a submodule of the root."""
        node = self.graph.call_module(self._at(path), self.argument(args), self.argument(kwargs))
        self.provenance(node)
        return node

    def store(self, at: tuple[str, str], value: Any, register: dict[str, bool]) -> None:
        """An attribute of a module below the root is set."""
        given: Any = (SELF, *at, self.argument(value), register)
        self.provenance(self.graph.call_function(store, given))

    def keep(self, at: tuple[str, str], key: Any, value: Any) -> None:
        """A dict that a module below the root holds gets a tensor."""
        given: Any = (SELF, *at, self.argument(key), self.argument(value))
        self.provenance(self.graph.call_function(keep, given))

    def results(self, value: Any, node: fx.Node) -> None:
        """The tensors that the node gave, each with a node of its own."""
        node.meta["example_value"] = value
        if isinstance(value, torch.Tensor):
            self.learn(value, node)
        elif isinstance(value, tuple | list):
            for position, item in enumerate(value):
                if holds_tensor(item):
                    piece = self.graph.call_function(operator.getitem, (node, position))
                    self.provenance(piece)
                    self.results(item, piece)

    def provenance(self, node: fx.Node) -> None:
        path, module = self.stack[-1]
        full = ".".join(filter(None, (self._prefix or self._home, path)))
        node.meta["nn_module_stack"] = {full: (full, type(module).__name__)}
        node.meta["stack_trace"] = _user_frames()

    def _at(self, path: str) -> str:
        return f"{self._home}.{path}" if self._home else path

    # ------------------------------------------------------------ tensors

    def learn(self, value: torch.Tensor, node: fx.Node, text: str = "") -> None:
        """This node holds this tensor; its sizes may be read there."""
        self.know(value, node)
        if type(value) is torch.Tensor:  # a constant
            with torch._C.DisableTorchFunction():
                value = self.symbols.mode.from_tensor(value, static_shapes=True)
            self.know(value, node)
        node.meta["example_value"] = value
        self.symbols.bind(value, node, text)

    def know(self, value: torch.Tensor, node: fx.Node) -> None:
        """This node, made elsewhere, holds this tensor."""
        self._known[id(value)] = node
        self._alive.append(value)

    def tensor(self, value: torch.Tensor) -> fx.Node:
        """The node that holds a tensor.

        Raises:
            CaptureError: `owner.not_pure`, it is neither an argument nor a parameter.
        """
        if id(value) not in self._known:
            path = self.paths.get(id(value))
            if path is None:
                raise CaptureError(
                    "owner.not_pure",
                    "it reads a tensor that is neither an argument nor a parameter",
                )
            item = self._items.get(id(value))
            where: Any = (SELF, *(item or ()))
            node = (
                self.graph.call_function(held, where)
                if item
                else self.graph.get_attr(self._at(path))
            )
            self._known[id(value)] = node
            with torch._C.DisableTorchFunction():  # what a module is given is met on its way in
                fake = self.symbols.mode.from_tensor(value, static_shapes=True)
            node.meta["example_value"] = fake
            self._known[id(node.meta["example_value"])] = node
            self._alive.append(value)
        return self._known[id(value)]

    # ------------------------------------------------------------ arguments

    def argument(self, value: Any) -> Any:
        """The value as an argument of a node.

        Raises:
            CaptureError: `owner.value`, of a type that no graph holds; `owner.not_pure`.
        """
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if type(value) is Opaque:
            return object.__getattribute__(value, "_attn_node")
        if isinstance(value, _SYMBOLIC):
            return self.symbols.node(value)
        if isinstance(value, _WRITABLE):
            return value
        return self._container(value)

    def _container(self, value: Any) -> Any:
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self.graph.call_function(type(value), tuple(map(self.argument, value)))
        if isinstance(value, tuple):
            return tuple(map(self.argument, value))
        if isinstance(value, list):
            return list(map(self.argument, value))
        if type(value) is dict:
            return {key: self.argument(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*map(self.argument, (value.start, value.stop, value.step)))
        for path, module in self._root.named_modules():
            for name, found in module.__dict__.items():
                if found is value:
                    where: Any = (SELF, path, name)
                    return self.graph.call_function(held, where)
        if is_dataclass(value) and not isinstance(value, type):
            given = {f.name: self.argument(getattr(value, f.name)) for f in fields(value) if f.init}
            return self.graph.call_function(type(value), (), given)
        raise CaptureError(
            "owner.value", f"a value of type {type(value).__name__} cannot be written down"
        )

    def fakes(self, value: Any) -> Any:
        """Parameters as fakes, everything else as it is."""
        if isinstance(value, torch.Tensor):
            known = id(value) in self.paths
            return self.tensor(value).meta["example_value"] if known else value
        if isinstance(value, tuple | list) and type(value) in (tuple, list):
            return type(value)(self.fakes(item) for item in value)
        if type(value) is dict:
            return {key: self.fakes(item) for key, item in value.items()}
        return value


def _tensor_paths(root: nn.Module) -> dict[int, str]:
    found: dict[int, str] = {}
    for path, module in root.named_modules():
        owned = {**module.__dict__, **module._parameters, **module._buffers}
        for name, value in owned.items():
            if isinstance(value, torch.Tensor):
                found.setdefault(id(value), f"{path}.{name}".lstrip("."))
    return found


def _items(root: nn.Module) -> dict[int, tuple[str, str, Any]]:
    """Tensors in dicts that modules hold: path of the module, name of the dict, and key."""
    found: dict[int, tuple[str, str, Any]] = {}
    for path, module in root.named_modules():
        for name, table in module.__dict__.items():
            if type(table) is dict and name not in _FRAME:
                for key, value in table.items():
                    if isinstance(value, torch.Tensor) and isinstance(key, (*CONSTANTS, int)):
                        found[id(value)] = path, name, key
    return found


def _is_method(func: Callable[..., Any], name: str) -> bool:
    """Does a tensor's method of this name do the same? `Tensor.__pow__` calls itself `pow`."""
    method = getattr(torch.Tensor, name, None)
    return method is func or (method is not None and func.__module__ == "torch._tensor")


def holds_tensor(value: Any) -> bool:
    """Is it a tensor, or are there tensors in it?"""
    if isinstance(value, tuple | list):
        return any(map(holds_tensor, value))
    return isinstance(value, torch.Tensor)


def attribute_of(getter: Any) -> str:
    """The name behind the `__get__` of a property of tensors."""
    return str(getter.__self__.__name__)


def _user_frames() -> str:
    """The frames of the traced code, outermost first, as a traceback prints them."""
    frame, lines = sys._getframe(3), []
    while frame is not None and frame.f_code.co_name != "run":
        if frame.f_globals.get("__name__") not in _TRACING:
            lines.append(
                f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}, '
                f"in {frame.f_code.co_name}\n"
            )
        frame = frame.f_back  # type: ignore[assignment]
    return "".join(reversed(lines))
