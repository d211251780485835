"""What a model holds, to see what a run has changed and to put it back.

    before = Snapshot(model);  model(x);  before.changed()   ->   ("attn", "mask"), ("", "history")

A forward may keep things: a mask that it builds when it is first called, a cache, a counter, its
last weights. These lie in attributes, and in the lists, dicts and plain objects that these hold.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from attn_compiler.installed import SIMPLE
from attn_compiler.ir.affine import is_listened_to
from attn_compiler.listen import kind_of

_DEEPEST = 3
# tables of a module whose keys are attributes; all else in a fresh module is PyTorch's own
_TABLES = ("_parameters", "_buffers", "_modules")
_FRAME = frozenset(vars(nn.Module()))
# what a rewritten module knows of itself
_OURS = "_attn_"
_SHUT = (torch.Tensor, nn.Module, type, ModuleType, FunctionType, MethodType)


@dataclass(frozen=True)
class _Table:
    """A dict, list or set as it was.

    Attributes:
        path: of the module that it was reached from.
        name: of the attribute; "" where its keys are attributes themselves.
        held: the thing itself.
        before: a shallow copy.
    """

    path: str
    name: str
    held: Any
    before: Any

    def changed(self) -> Iterator[str]:
        """The attributes that are not as they were."""
        if isinstance(self.held, dict) and not self.name:
            missing = object()
            for key in {**self.before, **self.held}:
                if self.held.get(key, missing) is not self.before.get(key, missing):
                    yield key
        elif not self.equal():
            yield self.name

    def put_back(self) -> None:
        if self.equal():
            return
        if isinstance(self.held, list):
            self.held[:] = self.before
        else:
            self.held.clear()
            self.held.update(self.before)

    def equal(self) -> bool:
        """Does it hold what it held?"""
        if isinstance(self.held, dict):
            same = list(map(id, self.held.values())) == list(map(id, self.before.values()))
            return same and list(map(id, self.held)) == list(map(id, self.before))
        return list(map(id, self.held)) == list(map(id, self.before))


class Snapshot:
    """The attributes of all modules below one, without the numbers in tensors.

    Attributes:
        tensors: those that are no parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[int, torch.Tensor] = {}
        self._tables: list[_Table] = []
        self._seen: set[int] = set()
        self._kinds = {path: type(module) for path, module in model.named_modules()}
        for path, module in model.named_modules():
            tables = [module.__dict__, *(module.__dict__.get(name) for name in _TABLES)]
            tables = [table for table in tables if isinstance(table, dict)]
            for table in tables:
                self._keep(path, "", table)
            for name, value in (item for table in tables for item in table.items()):
                if not name.startswith(_OURS):
                    self._visit(path, name, value, 0)

    def changed(self) -> Iterator[tuple[str, str]]:
        """Path of a module and name of an attribute, for all that is not as it was. A property that
        is computed once is as good computed again.
        """
        for table in self._tables:
            for name in table.changed():
                once = isinstance(getattr(self._kinds[table.path], name, None), cached_property)
                if name not in _FRAME and not once:
                    yield table.path, name

    def added(self, path: str, name: str, held: Any) -> dict[Any, Any]:
        """What this dict of an attribute has got, if nothing else has happened to the attribute."""
        tables = [t for t in self._tables if (t.path, t.name) == (path, name) and not t.equal()]
        if [t.held is held for t in tables] != [True] or type(held) is not dict:
            return {}
        before = tables[0].before
        if any(held.get(key, self) is not value for key, value in before.items()):
            return {}
        return {key: value for key, value in held.items() if key not in before}

    def put_back(self) -> None:
        """Let everything be held again that was; what was not, is dropped."""
        for table in self._tables:
            table.put_back()

    def _visit(self, path: str, name: str, value: Any, depth: int) -> None:
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            self.tensors[id(value)] = value
        if isinstance(value, _SHUT) or id(value) in self._seen or depth > _DEEPEST:
            return
        if isinstance(value, dict | list | set):
            self._keep(path, name, value)
            children = list(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, tuple):
            children = list(value)
        else:
            children = [d for d in [getattr(value, "__dict__", None)] if isinstance(d, dict)]
        for child in children:
            self._visit(path, name, child, depth + 1)

    def _keep(self, path: str, name: str, held: Any) -> None:
        if id(held) not in self._seen:
            self._seen.add(id(held))
            kind = next(k for k in (dict, list, set) if isinstance(held, k))
            self._tables.append(_Table(path, name, held, kind(held)))


def twin(model: nn.Module) -> nn.Module:
    """A copy. What an earlier run has left behind, with its derivatives, is copied without these:
    PyTorch copies no such tensor.
    """
    held = Snapshot(model).tensors.values()
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in held if not t.is_leaf})


def likeness(root: nn.Module) -> Any:
    """Equal for modules that give results of the same type and shape, and may be replaced alike."""
    found = []
    for path, module in root.named_modules():
        owned = [
            (n, p.shape, p.dtype, p.device) for n, p in module._parameters.items() if p is not None
        ]
        simple = [(n, v) for n, v in module.__dict__.items() if type(v) in SIMPLE]
        if kind_of(module).__module__.startswith("torch.nn."):
            simple = [(n, v) for n, v in simple if n != "training"]  # no matter to type and shape
        found.append((path, kind_of(module), is_listened_to(module), owned, simple))
    return found
