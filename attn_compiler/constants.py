"""Constants made for real where everything else is fake.

    @functools.lru_cache
    def angles(length): ...          # a table for each length, kept where no trace looks

A forward is traced on fake tensors. Whatever it keeps in modules is put back; what a function with
a cache or a dict of the user's file keeps stays there, and the next real call would read a fake.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# of operators whose result, or its shape, is known only with the values
_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_REAL = (torch.Tensor, nn.Parameter)
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


class RealConstants(TorchDispatchMode):
    """Operators on numbers and real tensors alone run for real, outside of a fake mode.

    Not those that draw random numbers, that write to a tensor which was there before, or that let
    the code see values of such a tensor. A fake mode by itself would write to it.

    Args:
        mode: the fake mode.
        rests: is everything left to that mode now?
    """

    def __init__(self, mode: FakeTensorMode, rests: Callable[[], bool] = lambda: False) -> None:
        super().__init__()
        self._mode, self._rests = mode, rests
        self._made: dict[int, torch.UntypedStorage] = {}
        self._stale: dict[int, torch.UntypedStorage] = {}  # a fake was written to it

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._rests():
            return func(*args, **kwargs)
        if not self._is_constant(func, args, kwargs):
            written = _written(func, args, kwargs)
            self._stale |= _places(written)
            foreign = {id(x) for x in _tensors(written) if self._is_foreign(x)}
            fake = partial(self._mode.from_tensor, static_shapes=True)
            args, kwargs = tree_map(lambda x: fake(x) if id(x) in foreign else x, (args, kwargs))
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            result = func(*args, **kwargs)
        if not func.is_view or func is torch.ops.aten.lift_fresh.default:  # torch.tensor(...)
            self._made |= _places(result)
        return result

    def _is_constant(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        leaves = tree_leaves((args, kwargs))
        tensors = _tensors(leaves)
        if any(isinstance(x, _SYMBOLS) for x in leaves) or not all(map(self._is_real, tensors)):
            return False
        if torch.Tag.nondeterministic_seeded in func.tags:
            return False
        seen = tensors if _VALUES & set(func.tags) else _written(func, args, kwargs)
        return _places(seen).keys() <= self._made.keys()

    def _is_foreign(self, tensor: torch.Tensor) -> bool:
        return type(tensor) in _REAL and _places(tensor).keys().isdisjoint(self._made)

    def _is_real(self, tensor: torch.Tensor) -> bool:
        return type(tensor) in _REAL and _places(tensor).keys().isdisjoint(self._stale)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def _places(values: Any) -> dict[int, torch.UntypedStorage]:
    """Where tensors lie."""
    storages = [x.untyped_storage() for x in _tensors(values)]
    return {storage._cdata: storage for storage in storages}


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes to."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    return [
        given.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write
    ]
