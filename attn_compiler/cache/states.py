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
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels.el import built


class Rows(NamedTuple):
    """Which outputs of a linear map are the features of which head.

    Feature f of head g is output  start + g * step + f.

    Attributes:
        start, step: see above.
        heads, features: how many.
        transposed: is the weight [D, outputs] and not [outputs, D]?
    """

    start: int
    step: int
    heads: int
    features: int
    transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a weight as [heads, features, D], of a bias as [heads, features]; a view."""
        outputs = tensor.t() if self.transposed and tensor.dim() == 2 else tensor
        if self.step == self.features:
            rows = outputs.narrow(0, self.start, self.heads * self.features)
            return rows.unflatten(0, (self.heads, self.features))  # type: ignore[no-any-return]
        first, inner = divmod(self.start, self.step)
        rows = outputs.narrow(0, first * self.step, self.heads * self.step)
        split: Tensor = rows.unflatten(0, (self.heads, self.step))
        return split.narrow(1, inner, self.features)


class Beside(NamedTuple):
    """Features of keys that are no linear image of x, such as rotated ones; a cache holds them.

    Attributes:
        start, features: features start, start + 1, ... of a key.
        heads: 1 where all heads have the same, else the number of kv heads.
    """

    start: int
    features: int
    heads: int

    def of(self, keys: Tensor) -> Tensor:
        """That part of keys [B, G, S, d] as [B, heads, S, features]; a view."""
        return keys.narrow(1, 0, self.heads).narrow(3, self.start, self.features)

    def split(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The two parts of queries [B, H, T, d]: for x, and for what stands beside it."""
        end = self.start + self.features
        rest = q[..., end:] if self.start == 0 else q[..., : self.start]
        return rest, q[..., self.start : end]

    def join(self, rest: Tensor, beside: Tensor) -> Tensor:
        """Keys [B, G, S, d] of their two parts."""
        beside = beside.expand(*rest.shape[:3], self.features)
        return torch.cat((beside, rest) if self.start == 0 else (rest, beside), -1)


class Maps:
    """The two linear maps from x to keys and values, of parameters that a module owns.

    A cache must neither keep a model alive nor be counted with its weights: references are weak.

    Attributes:
        rows: which outputs are the features of keys, and of values.
        beside: features of keys that are not among them, None where all are.
    """

    def __init__(
        self,
        weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
        rows: tuple[Rows, Rows],
        beside: Beside | None = None,
    ) -> None:
        self._weights = tuple(None if w is None else weakref.ref(w) for w in weights)
        self.rows = rows
        self.beside = beside

    @property
    def features(self) -> tuple[int, int]:
        """Of a key and of a value, all of them."""
        more = 0 if self.beside is None else self.beside.features
        return self.rows[0].features + more, self.rows[1].features

    def __deepcopy__(self, memo: dict[int, Any]) -> Maps:
        return self

    def same(self, other: Maps) -> bool:
        """Are they of the same parameters?"""
        if (self.rows, self.beside) != (other.rows, other.beside):
            return False
        pairs = zip(self._weights, other._weights, strict=True)
        return all((a and a()) is (b and b()) for a, b in pairs)

    def views(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """w_k [G, d, D], b_k [G, d], w_v [G, dv, D], b_v [G, dv].

        Raises:
            UnsupportedCall: the model is gone.
        """
        key, value = self.rows
        w_k, b_k, w_v, b_v = map(_alive, self._weights)
        assert w_k is not None and w_v is not None
        return (
            key.of(w_k),
            None if b_k is None else key.of(b_k),
            value.of(w_v),
            None if b_v is None else value.of(b_v),
        )


def _alive(reference: Callable[[], Tensor | None] | None) -> Tensor | None:
    if reference is None:
        return None
    found = reference()
    if found is None:
        raise UnsupportedCall(
            "a cache is read whose model is gone",
            why=("it holds hidden states, which only the model's weights make keys and values of",),
            do="keep the model while its cache is in use",
        )
    return found


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
        beside: what is kept of each key besides, [rows / beams, heads, S, features], or None.
        beams: how many neighbouring rows share one of x.
        borrowed: is x somebody else's, the output of an encoder?
        changes: how many changes of the batch were made; layers that share x are told of each.
    """

    def __init__(self, x: Tensor, *, borrowed: bool, beside: Tensor | None = None) -> None:
        """Keep x: as it is where it is borrowed, else as a copy.

        Args:
            x: [rows, S, D].
            borrowed: somebody else keeps it anyway, and does not write to it.
            beside: [rows, heads, S, features], of an x that is not borrowed.
        """
        self.beside = None if beside is None else beside.clone()
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
        if self.beside is not None:
            self.beside = self.beside.index_select(0, rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> States:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.put(copy.deepcopy(self.x, memo), self.beams)
        twin.beside = copy.deepcopy(self.beside, memo)
        return twin

    def own(self) -> States:
        """The same for one layer alone."""
        return copy.copy(self)

    def append(self, x: Tensor, beside: Tensor | None = None) -> None:
        """More rows [rows, t, D] behind those of each batch item, [rows, heads, t, features] beside
        them.
        """
        if beside is not None and self.beside is not None:
            self.beside = torch.cat([self._of_rows(self.beside), beside], 2)
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
        """Drop the last keys."""
        length = self.x.shape[1] - count
        self.put(self.x[:, :length], self.beams)
        self.beside = None if self.beside is None else self.beside[:, :, :length]

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
        w_k, b_k, w_v, b_v = maps.views()
        x = self.read()
        key, value = built(x, w_k, b_k), built(x, w_v, b_v)
        if maps.beside is not None and self.beside is not None:
            key = maps.beside.join(key, self.beside)
        return self._of_rows(key), self._of_rows(value)


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
