"""A layer of transformers' caches that holds x and shows keys and values.

    cache.layers[3] = StatesLayer(x, W_k, W_v);     cache.layers[3].keys == W_k(x)

The containers stay the library's (DynamicCache, StaticCache, EncoderDecoderCache). `keys` and
`values` are made of x when somebody asks, so that code which knows nothing of this file reads what
it expects; code that writes keys turns the layer back into an ordinary one.

Source: EL-Attention (arXiv 2105.04779).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from attn_compiler.cache.maps import Maps
from attn_compiler.cache.place import layer_for, own_update, unfit
from attn_compiler.cache.states import Reserved, States


class _Holder(CacheLayerMixin):
    """One layer of a cache that holds x instead of keys and values.

    Attributes:
        states: x, perhaps shared with other layers.
        maps: how keys and values are made of it.
    """

    library: ClassVar[type[CacheLayerMixin]]
    states: States
    maps: Maps

    # ------------------------------------------------------------ what it shows

    @property
    def keys(self) -> Tensor:
        return self.states.keys_and_values(self.maps)[0]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._ordinary().keys = value

    @property
    def values(self) -> Tensor:
        return self.states.keys_and_values(self.maps)[1]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._ordinary().values = value

    @property
    def nbytes(self) -> int:
        """Bytes of the storages that hold x and what stands beside it; layers that share x each
        name all of it.
        """
        held = (self.states.x, *self.states.beside)
        return sum(t.untyped_storage().nbytes() for t in held)

    def ordinary_tensors(self) -> tuple[Tensor, ...]:
        """What an ordinary layer would hold: a rewritten module is compared by it."""
        return self.states.keys_and_values(self.maps)

    # ------------------------------------------------------------ what changes it

    def _shown(self) -> dict[str, Any]:
        """The attributes of the library's layer with the same keys and values."""
        keys, values = self.states.keys_and_values(self.maps)
        found = {"dtype": keys.dtype, "device": keys.device, "is_initialized": True}
        return {**found, "keys": keys, "values": values}

    def _ordinary(self) -> CacheLayerMixin:
        """Become the library's layer."""
        shown = self._shown()
        self.__dict__.clear()
        self.__class__ = self.library
        self.__dict__.update(shown)
        return self

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first tokens made what is held."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of somebody who has no x."""
        return self._ordinary().update(*args, **kwargs)  # type: ignore[no-any-return]

    def offload(self) -> None:
        self._ordinary().offload()

    def prefetch(self) -> None:
        return

    def __reduce_ex__(self, protocol: Any) -> Any:
        # another process has no such model: the library's layer goes there
        return _library_layer, (self.library, self._shown())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def _library_layer(kind: type[CacheLayerMixin], state: dict[str, Any]) -> CacheLayerMixin:
    layer = object.__new__(kind)
    layer.__dict__.update(state)
    return layer


class StatesLayer(_Holder, DynamicLayer):
    """One that grows, or shares what an encoder gave."""

    library = DynamicLayer

    def __init__(self, states: States, maps: Maps) -> None:
        self.states = states
        self.maps = maps
        self.dtype, self.device = states.x.dtype, states.x.device
        self.is_initialized = True
        self._changes = states.changes

    def get_seq_length(self) -> int:
        return int(self.states.x.shape[1])

    def append(self, x: Tensor, beside: Sequence[Tensor] = ()) -> None:
        """More of x, [rows, t, D], and of what stands beside it, [rows, heads, t, features]."""
        self.states = self.states.own()
        self.states.append(x, beside)

    def _change(self, make: Callable[[States], None]) -> None:
        """A change of the batch: who shares x is told of it as well, and makes it once."""
        self._changes += 1
        if self.states.changes < self._changes:
            make(self.states)
            self.states.changes = self._changes

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda states: states.select(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        if indices.dtype is torch.bool:
            indices = indices.nonzero().squeeze(1)
        self._change(lambda states: states.select(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda states: states.repeat(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError("give the number of tokens to remove as a negative number")
        if tokens_to_remove:
            self._change(lambda states: states.shorten(-tokens_to_remove))

    def reset(self) -> None:
        self._ordinary().reset()


class StaticStatesLayer(_Holder, StaticLayer):
    """One of a fixed length, whose tensors keep their place in memory: a compiled step writes to
    them, and a reset empties them.
    """

    library = StaticLayer
    states: Reserved

    def __init__(self, states: Reserved, maps: Maps) -> None:
        self.states = states
        self.maps = maps
        self.dtype, self.device = states.x.dtype, states.x.device
        self.is_initialized = True
        self.max_cache_len, self.cumulative_length = states.x.shape[1], states.written
        if not torch.compiler.is_dynamo_compiling():
            for tensor in states.tensors:
                torch._dynamo.mark_static_address(tensor)

    def ordinary_tensors(self) -> tuple[Tensor, ...]:
        return (*super().ordinary_tensors(), self.cumulative_length)

    def append(self, x: Tensor, beside: Sequence[Tensor] = ()) -> None:
        """See `StatesLayer`."""
        self.states.append(x, beside)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.states.select(beam_idx)

    def reset(self) -> None:
        self.states.clear()

    def _shown(self) -> dict[str, Any]:
        found = super()._shown()
        key, value = found["keys"].shape, found["values"].shape
        sizes = {"batch_size": key[0], "num_heads": key[1], "k_head_dim": key[3]}
        lengths = {"max_cache_len": key[2], "cumulative_length": self.cumulative_length}
        return {**found, **sizes, "v_head_dim": value[3], **lengths}


def hold(
    cache: Any,
    index: int,
    given: tuple[Tensor, Sequence[Tensor]],
    maps: Maps,
    borrowed: bool,
    pays: Callable[[States, Maps], bool] | None = None,
) -> StatesLayer | StaticStatesLayer | None:
    """Put x into an empty layer of a cache, or behind what it holds.

    Args:
        cache, index: which layer.
        given: x [rows, t, D], and what stands beside it, each [rows, heads, t, features].
        maps: how keys and values are made of it.
        borrowed: somebody else keeps x anyway.
        pays: is asked once, about an empty layer; None is yes.

    Returns:
        The layer; None where it cannot hold x: it is quantised, sliding or offloaded, holds keys
        already, or what another model makes its keys of, is filled by an `update` of somebody's
        own, or it does not pay.
    """
    if own_update(cache) or cache.offloading:
        return None  # it may do more than to fill a layer
    layer, (x, beside) = layer_for(cache, index), given
    if type(layer) in (StatesLayer, StaticStatesLayer) and layer.maps.same(maps):
        layer.append(x, beside)
        return layer  # type: ignore[no-any-return]
    static = type(layer) is StaticLayer
    if unfit(cache, index, (DynamicLayer, StaticLayer)) or (
        static and borrowed and not _at_once(layer, x)
    ):
        return None
    shared = (other.states for other in cache.layers if type(other) is StatesLayer)
    states = next((s for s in shared if borrowed and s.stands_for(x)), None)
    if states is None and static and not borrowed:
        states = Reserved(x, beside, layer.max_cache_len)
    states = states or States(x, borrowed=borrowed, beside=beside)
    if pays is not None and not pays(states, maps):
        return None
    kind: Any = StaticStatesLayer if type(states) is Reserved else StatesLayer
    cache.layers[index] = made = kind(states, maps)
    return made  # type: ignore[no-any-return]


def _at_once(layer: Any, x: Tensor) -> bool:
    """Is it a static layer without tensors yet, that x fills to the last key? That of
    cross-attention is, and nothing is written to it afterwards.
    """
    fresh = type(layer) is StaticLayer and not layer.is_initialized
    return fresh and bool(x.shape[1] == layer.max_cache_len)
