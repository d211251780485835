"""EL-attention's cache inside transformers' own: a layer that holds x and shows keys and values.

    keys, values = cache.update(k_proj(x), v_proj(x), 3)   ->   kept = keep(cache, 3, x, ...)
    softmax(q keys^T) values                               ->   attend(kept, q, ...)

The containers stay the library's (DynamicCache, EncoderDecoderCache); only their layers are ours.
`layer.keys` and `layer.values` are made of x when somebody asks, so that code which knows nothing
of this file reads what it expects; code that writes keys turns the layer back into an ordinary
one. What cannot hold x (static, quantised, sliding or offloaded caches) is updated as ever.

Source: EL-Attention (arXiv 2105.04779).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from attn_compiler.cache.states import Maps, Rows, States
from attn_compiler.kernels.el import built, el_attention
from attn_compiler.kernels.schema import attention


class Pair(NamedTuple):
    """Keys and values of an ordinary cache."""

    keys: Tensor
    values: Tensor


class StatesLayer(DynamicLayer):
    """One layer of a cache that holds x instead of keys and values.

    Attributes:
        states: x, perhaps shared with other layers.
        maps: how keys and values are made of it.
    """

    def __init__(self, states: States, maps: Maps) -> None:
        self.states = states
        self.maps = maps
        self.dtype, self.device = states.x.dtype, states.x.device
        self.is_initialized = True
        self._changes = states.changes

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
        """Bytes of the storage that holds x; layers that share it each name all of it."""
        return self.states.x.untyped_storage().nbytes()

    def get_seq_length(self) -> int:
        return int(self.states.x.shape[1])

    # ------------------------------------------------------------ what changes it

    def _ordinary(self) -> DynamicLayer:
        """Become the library's layer with the same keys and values."""
        keys, values = self.states.keys_and_values(self.maps)
        self.__dict__.clear()
        self.__class__ = DynamicLayer
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys, values
        return self

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of somebody who has no x."""
        return self._ordinary().update(*args, **kwargs)  # type: ignore[no-any-return]

    def append(self, x: Tensor) -> None:
        """More of x, [rows, t, D]."""
        self.states = self.states.own()
        self.states.append(x)

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

    def offload(self) -> None:
        self._ordinary().offload()

    def prefetch(self) -> None:
        return

    def __reduce_ex__(self, protocol: Any) -> Any:
        # another process has no such model: the library's layer goes there
        keys, values = self.states.keys_and_values(self.maps)
        state = {"dtype": keys.dtype, "device": keys.device, "is_initialized": True}
        return _ordinary_layer, ({**state, "keys": keys, "values": values},)

    def __deepcopy__(self, memo: dict[int, Any]) -> StatesLayer:
        twin = StatesLayer.__new__(StatesLayer)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def _ordinary_layer(state: dict[str, Any]) -> DynamicLayer:
    layer = DynamicLayer()
    layer.__dict__.update(state)
    return layer


# ---------------------------------------------------------------- what a rewritten module calls


def keep(
    cache: Any,
    index: int,
    x: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    rows: tuple[Rows, Rows],
    borrowed: bool,
) -> StatesLayer | Pair:
    """Instead of `cache.update(keys, values, index)`.

    Args:
        cache: transformers' cache.
        index: of the layer.
        x: [B, t, D], what keys and values are made of.
        weights: of keys and their bias, of values and their bias.
        rows: which outputs they are.
        borrowed: x is the output of an encoder, which is kept anyway.

    Returns:
        What `attend` reads.
    """
    maps = Maps(weights, rows)
    layer = _layer(cache, index)
    if type(layer) is StatesLayer and layer.maps.rows == rows:
        layer.append(x)
        return layer
    if type(layer) is DynamicLayer and layer.get_seq_length() == 0 and not cache.offloading:
        states = next((s for s in _states(cache) if borrowed and s.stands_for(x)), None)
        cache.layers[index] = StatesLayer(states or States(x, borrowed=borrowed), maps)
        return cache.layers[index]  # type: ignore[no-any-return]
    w_k, b_k, w_v, b_v = maps.views()
    return Pair(*cache.update(built(x, w_k, b_k), built(x, w_v, b_v), index))


def _layer(cache: Any, index: int) -> Any:
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[index]


def _states(cache: Any) -> Iterator[States]:
    return (layer.states for layer in cache.layers if type(layer) is StatesLayer)


def attend(
    kept: Any,
    q: Tensor,
    reads: Sequence[Tensor],
    ints: Sequence[int],
    *,
    program: str,
    scale: float,
    key_bias: bool,
) -> Tensor:
    """Attention of q [B, H, T, d] over what a cache holds: straight over x where few rows ask.

    Args:
        kept: what `keep` gave, or any layer of a cache.
        q, reads, ints, program, scale: as of the operators.
        key_bias: does the softmax see the keys' bias?

    Returns:
        [B, H, T, dv] in the dtype of q.
    """
    if type(kept) is StatesLayer and _pays(kept, q):
        w_k, b_k, w_v, b_v = kept.maps.views()
        sides = (w_k, b_k if key_bias else None, w_v, b_v)
        x = kept.states.read()
        out, _ = el_attention(q, x, *sides, reads, ints, program=program, scale=scale)
        return _like(out, q)
    if type(kept) is StatesLayer:
        keys, values = kept.states.keys_and_values(kept.maps)
    else:
        keys, values = kept.keys, kept.values
    keys, values = keys.to(q.dtype), values.to(q.dtype)
    out, _ = attention(
        q, keys, values, reads, ints, None, program=program, scale=scale, dropout=0.0
    )
    return _like(out, q)


def _like(out: Tensor, q: Tensor) -> Tensor:
    return out.to(q.dtype)


def _pays(kept: StatesLayer, q: Tensor) -> bool:
    """Fewer operations than building keys and values and then attending?

    H T (2 D - d - dv)  <  D G (d + dv),  for each key of each row; beams share what is built.
    """
    width, (key, value) = kept.states.x.shape[2], kept.maps.rows
    inner = key.features + value.features
    rows = q.shape[1] * q.shape[2] * kept.states.beams
    return bool(rows * (2 * width - inner) < width * key.heads * inner)


def nbytes(*caches: Any) -> int:
    """Bytes of all storages that the layers of some caches hold, each counted once."""
    found: dict[int, int] = {}
    for cache in caches:
        for part in (cache, *vars(cache).values()):
            for layer in getattr(part, "layers", ()):
                held = layer.states if type(layer) is StatesLayer else layer
                for tensor in vars(held).values():
                    if isinstance(tensor, Tensor):
                        storage = tensor.untyped_storage()
                        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
