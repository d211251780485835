"""A layer of transformers' caches that holds the states of the two gated units of a block.

    cache.layers[3] = GauLayer();   layer.step(0, x, ...)   layer.step(1, x, ...)

Its size does not grow with the sequence where the units have chunks. The first tokens are computed
as without a cache, and differentiable; what follows is made of them when somebody goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pad

from attn_compiler.cache.place import placed
from attn_compiler.cache.summed import SummedLayer
from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels.gau_layer import GauForm, GauParameters, gau_layer
from attn_compiler.kernels.gau_state import GauState, empty_state, gau_keep, gau_step

Unit = tuple[GauParameters, GauForm]
_ROOM = 64


class GauLayer(SummedLayer):
    """The cache of one block.

    Attributes:
        length: tokens that went by.
    """

    what = "a state of gated attention units"
    gone = "they are added up with the others"

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True
        self._read = [0, 0]
        # of each unit: its state, and tokens with their validity that are not in it yet
        self._states: list[GauState | None] = [None, None]
        self._first: list[tuple[Tensor, Tensor | None] | None] = [None, None]

    # ---------------------------------------------------------------- what a unit calls

    @property
    def length(self) -> int:
        """Tokens before those that are being read."""
        return min(self._read)

    def step(
        self, number: int, x: Tensor, unit: Unit, valid: Tensor | None, seed: Tensor | None
    ) -> Tensor:
        """Unit `number` on the next tokens x [B, T, D]."""
        weights, form = unit
        if self._read[number] == 0:
            y = gau_layer(x, weights, form, valid=valid, seed=seed)
            self._first[number] = (x.detach(), valid)
        else:
            state = self._state(number, unit, x.shape[1])
            y, self._states[number] = gau_step(x, weights, form, state, valid=valid)
        self._read[number] += x.shape[1]
        return y

    def counted(self, number: int) -> Tensor | None:
        """[B] tokens that are no padding; None before the first."""
        state, first = self._states[number], self._first[number]
        if first is not None:
            x, valid = first
            return torch.full_like(x[:, 0, 0], x.shape[1]) if valid is None else valid.sum(1)
        if state is None:
            return None
        return state.seen + state.valid[:, : state.filled].sum(1)

    def _state(self, number: int, unit: Unit, more: int) -> GauState:
        weights, form = unit
        state, first = self._states[number], self._first[number]
        if first is not None:
            x, valid = first
            room = None if form.chunk is not None else x.shape[1] + max(more, _ROOM)
            state = empty_state(x.shape[0], weights, form, capacity=room)
            state = gau_keep(x, weights, form, state, valid=valid)
            self._first[number] = None
        assert state is not None
        if form.chunk is None and state.length + more > state.k.shape[1]:
            state = _roomier(state, max(state.length + more, 2 * state.k.shape[1]))
        return state

    # ---------------------------------------------------------------- what transformers asks

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values have no place here; a call that is analysed is told how many there would
        be.

        Raises:
            UnsupportedCall: there are numbers in them.
        """
        if isinstance(key_states, FakeTensor):
            keys, values = (_longer(x, self.length) for x in (key_states, value_states))
            return keys, values
        raise UnsupportedCall(
            "a cache of gated attention units was given keys and values",
            do="use it with the model that made it",
        )

    def get_seq_length(self) -> int:
        return self.length

    @property
    def nbytes(self) -> int:
        """Bytes of all that it holds."""
        return sum(t.nbytes for t in self._tensors())

    def ordinary_tensors(self) -> tuple[Tensor, ...]:
        """What it holds: a rewritten module is compared by it."""
        return tuple(self._tensors())

    def _tensors(self) -> list[Tensor]:
        held = [getattr(s, f.name) for s in self._states if s is not None for f in fields(s)]
        held += [t for first in self._first if first is not None for t in first]
        return [t for t in held if isinstance(t, Tensor)]

    def change(self, make: Callable[[Tensor], Tensor]) -> None:
        """Another batch."""
        for number, (state, first) in enumerate(zip(self._states, self._first, strict=True)):
            if state is not None:
                parts = {f.name: getattr(state, f.name) for f in fields(state)}
                changed: dict[str, Any] = {n: make(t) for n, t in parts.items() if _has_batch(t)}
                self._states[number] = replace(state, **changed)
            if first is not None:
                x, valid = first
                self._first[number] = (make(x), None if valid is None else make(valid))

    def reset(self) -> None:
        self._read, self._states, self._first = [0, 0], [None, None], [None, None]


def _longer(x: Tensor, more: int) -> Tensor:
    """Something of the shape of all keys or values."""
    sizes = list(x.shape)
    sizes[-2] += more
    return x.new_empty(sizes)


def _has_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 0


def _roomier(state: GauState, rows: int) -> GauState:
    """The same with more rows set aside."""
    more = rows - state.k.shape[1]
    longer = {"k": state.k, "v": state.v}
    wide: dict[str, Any] = {name: pad(x, (0, 0, 0, more)) for name, x in longer.items()}
    return replace(state, **wide, valid=pad(state.valid, (0, more)))


def hold(
    cache: Any, keys: None, values: None, index: int, *more: Any
) -> tuple[None, None, GauLayer]:
    """Instead of `cache.update(keys, values, index, *more)`.

    Returns:
        In the third place what the units of this block read and write.

    Raises:
        UnsupportedCall: the cache is none that can hold their states: it is static or quantised,
            not of the library, has an `update` of its own, or is filled by another model.
    """
    return None, None, placed(cache, index, GauLayer, "the states of gated attention units")
