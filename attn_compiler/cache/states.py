"""The tensor that keys and values are made of, kept in their place: what a layer's cache shares.

    keys [B beams, G, S, d] and values, for each layer   ->   x [B, S, D], one for all who read it

Rows that are equal, as beams of one sample are, are kept once; a reordering within a sample is then
nothing to do. No library is imported here.

Source: EL-Attention (arXiv 2105.04779).
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from attn_compiler.cache.maps import Maps
from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels.el import built


class Repeated(Tensor):
    """Each row of x so many times, without a storage: x[b // beams] in row b.

    Any operation sees the copies that `repeat_interleave` makes; sizes, dtype and device are those
    of the copies.

    Attributes:
        states: x.
        beams: how often each row stands.
    """

    states: Tensor
    beams: int

    @staticmethod
    def __new__(cls, states: Tensor, beams: int) -> Repeated:
        """Args: states [B, ...]; the result is [B * beams, ...]."""
        made: Repeated = Tensor._make_wrapper_subclass(
            cls,
            (states.shape[0] * beams, *states.shape[1:]),
            dtype=states.dtype,
            device=states.device,
            storage_size=0,
        )
        made.states, made.beams = states, beams
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Repeated({tuple(self.states.shape)}, {self.beams})"

    # by these torch.compile takes it apart and puts it together

    def __tensor_flatten__(self) -> tuple[list[str], int]:
        return ["states"], self.beams

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], beams: int, outer_size: Any, outer_stride: Any
    ) -> Repeated:
        return Repeated(inner["states"], beams)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = tree_map_only(Repeated, whole, (args, kwargs or {}))
        return func(*given[0], **given[1])


def whole(x: Repeated) -> Tensor:
    """The copies that it stands for."""
    return x.states.repeat_interleave(x.beams, 0)


class States:
    """x, and how it stands for the rows of a batch: row b is x[b // beams].

    Attributes:
        x: [rows / beams, S, D].
        beside: what is kept of each key besides, each [rows / beams, heads, S, features].
        beams: how many neighbouring rows share one of x.
        borrowed: is x somebody else's, the output of an encoder?
        changes: how many changes of the batch were made; layers that share x are told of each.
    """

    def __init__(self, x: Tensor, *, borrowed: bool, beside: Sequence[Tensor] = ()) -> None:
        """Keep x: as it is where it is borrowed, else as a copy.

        Args:
            x: [rows, S, D].
            borrowed: somebody else keeps it anyway, and does not write to it.
            beside: each [rows, heads, S, features], of an x that is not borrowed.
        """
        self.beside = tuple(t.clone() for t in beside)
        if type(x) is Repeated:
            self.x, self.beams = x.states, x.beams
        elif borrowed:
            self.beams = equal_neighbours(x)
            self.x = x[:: self.beams]
        else:
            self.x, self.beams = x.clone(), 1
        self.borrowed = borrowed
        self.changes = 0
        self._given = weakref.ref(x) if borrowed else None
        self._version = _version(self.x)

    def stands_for(self, x: Tensor) -> bool:
        """Was it made of this very tensor, and is it as it was then?"""
        given = None if self._given is None else self._given()
        return given is x and self.changes == 0 and not self._overwritten()

    def _overwritten(self) -> bool:
        now = _version(self.x)
        return self._version is not None and now is not None and now != self._version

    @property
    def rows(self) -> int:
        return self.x.shape[0] * self.beams

    def read(self) -> Tensor:
        """x.

        Raises:
            UnsupportedCall: somebody has written to a tensor that was borrowed.
        """
        if self._overwritten():
            raise UnsupportedCall(
                "the states that a cache holds were overwritten",
                why=("the encoder's output is kept instead of keys and values made of it",),
                do="do not write in place to what the encoder gave, or copy it before",
            )
        return self.x

    def put(self, x: Tensor, beams: int) -> None:
        self.x, self.beams, self._given, self._version = x, beams, None, _version(x)

    def _choose(self, rows: Tensor, beams: int) -> None:
        self.put(self.x.index_select(0, rows), beams)
        self.beside = tuple(t.index_select(0, rows) for t in self.beside)

    def __deepcopy__(self, memo: dict[int, Any]) -> States:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.put(copy.deepcopy(self.x, memo), self.beams)
        twin.beside = copy.deepcopy(self.beside, memo)
        return twin

    def first(self, length: int) -> States:
        """The first keys, to read them."""
        twin = copy.copy(self)
        twin.x, twin.beside = self.x[:, :length], tuple(t[:, :, :length] for t in self.beside)
        return twin

    def own(self) -> States:
        """The same for one layer alone."""
        return copy.copy(self)

    def append(self, x: Tensor, beside: Sequence[Tensor] = ()) -> None:
        """More rows [rows, t, D] behind those of each batch item, and each [rows, heads, t,
        features] beside them.
        """
        pairs = zip(self.beside, beside, strict=True)
        self.beside = tuple(torch.cat([self._of_rows(a), b], 2) for a, b in pairs)
        self.put(torch.cat([self._of_rows(self.x), x], 1), 1)

    def _of_rows(self, tensor: Tensor) -> Tensor:
        return tensor if self.beams == 1 else tensor.repeat_interleave(self.beams, 0)

    def select(self, index: Tensor) -> None:
        """Rows index[0], index[1], ... of the batch take the places 0, 1, ..."""
        rows = index.to(self.x.device) // self.beams
        samples = rows.view(-1, self.beams) if len(rows) % self.beams == 0 else rows[:, None]
        if self.beams > 1 and (samples.shape[1] == 1 or bool((samples != samples[:, :1]).any())):
            self._choose(rows, 1)
            return
        chosen = samples[:, 0]
        same = torch.arange(len(self.x), device=chosen.device)
        if self.beams > 1 and torch.equal(chosen, same):
            return
        self._choose(chosen, self.beams)

    def repeat(self, times: int) -> None:
        """Each row of the batch becomes `times` neighbours."""
        self.beams *= times

    def shorten(self, count: int) -> None:
        """Drop the last keys, all of them where there are fewer."""
        length = max(0, self.x.shape[1] - count)
        self.put(self.x[:, :length], self.beams)
        self.beside = tuple(t[:, :, :length] for t in self.beside)

    def shape_of(self, maps: Maps, position: int) -> Tensor:
        """An empty tensor without memory in the shape of keys (0) or values (1)."""
        shape = (self.rows, maps.rows[position].heads, self.x.shape[1], maps.features[position])
        return torch.empty(shape, dtype=self.x.dtype, device="meta")

    def keys_and_values(self, maps: Maps) -> tuple[Tensor, Tensor]:
        """What an ordinary cache holds: [rows, G, S, d] and [rows, G, S, dv]."""
        if isinstance(self.x, FakeTensor):
            # while a call is analysed, sizes alone count, and weights are no fakes
            first = (self.rows, maps.rows[0].heads, self.x.shape[1])
            key, value = (self.x.new_empty((*first, features)) for features in maps.features)
            return key, value
        _, _, w_v, b_v = maps.views()
        x = self.read()
        key, value = maps.keys(x), built(x, w_v, b_v)
        if maps.beside is not None:
            key = maps.beside.join(key, self.beside[0])
        return self._of_rows(key), self._of_rows(value)


class Reserved(States):
    """x with room for all keys that a static cache may get: written in place, its address stays.

    Attributes:
        written: how many keys there are, an integer as a tensor; what lies behind them is zero.
    """

    def __init__(self, x: Tensor, beside: Sequence[Tensor], length: int) -> None:
        """Args: x [rows, t, D] are the first keys of `length`; beside, see `States`."""
        self.x = x.new_zeros((x.shape[0], length, x.shape[2]))
        self.beside = tuple(t.new_zeros((*t.shape[:2], length, t.shape[3])) for t in beside)
        self.beams, self.borrowed, self.changes = 1, False, 0
        self._given = self._version = None
        self.written = torch.zeros((), dtype=torch.int64, device=x.device)
        self.append(x, beside)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is written in place."""
        return (self.x, *self.beside, self.written)

    def append(self, x: Tensor, beside: Sequence[Tensor] = ()) -> None:
        places = torch.arange(x.shape[1], device=x.device) + self.written
        self.written.add_(x.shape[1])
        self.x.index_copy_(1, places, x)
        for room, new in zip(self.beside, beside, strict=True):
            room.index_copy_(2, places, new)

    def select(self, index: Tensor) -> None:
        for tensor in (self.x, *self.beside):
            tensor.copy_(tensor.index_select(0, index.to(tensor.device)))

    def clear(self) -> None:
        """Forget all keys."""
        for tensor in self.tensors:
            tensor.zero_()

    def __deepcopy__(self, memo: dict[int, Any]) -> Reserved:
        twin = cast("Reserved", super().__deepcopy__(memo))
        twin._version, twin.written = None, copy.deepcopy(self.written, memo)
        return twin

    def keys_and_values(self, maps: Maps) -> tuple[Tensor, Tensor]:
        """As a static cache holds them: zero where nothing was written, and not a bias."""
        found = super().keys_and_values(maps)
        if not isinstance(self.x, FakeTensor):
            rest = torch.arange(self.x.shape[1], device=self.x.device) >= self.written
            for side in found:
                side.masked_fill_(rest[:, None], 0)
        return found


def _version(x: Tensor) -> int | None:
    """Counts the writes to its storage, where they are counted."""
    if torch.compiler.is_compiling() or x.is_inference():
        return None
    return x._version


def equal_neighbours(x: Tensor) -> int:
    """The largest n such that rows 0..n, n..2n, ... of x are each the same row n times."""
    if x.shape[0] < 2 or x.numel() == 0 or isinstance(x, FakeTensor):
        return 1
    # most batches are told apart by their first numbers
    for part in (x[:, 0, :8], x):
        same = (part[1:] == part[:-1]).flatten(1).all(1).tolist()
        starts = [0, *(i + 1 for i, equal in enumerate(same) if not equal), x.shape[0]]
        lengths = {b - a for a, b in itertools.pairwise(starts)}
        if len(lengths) > 1 or lengths == {1}:
            return 1
    return int(lengths.pop())
