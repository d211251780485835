"""May a layer of a cache become one of another kind? One answer for every variant that asks.

    cache.layers[3]: an empty DynamicLayer   ->   placed(cache, 3, LinearLayer, ...)

Users subclass the library's caches and write an `update` of their own, which logs, moves or changes
keys. A variant that would not call it, or would not read what it gives, cannot serve such a cache:
EL-attention leaves it as it is, others refuse it. transformers 5.23 is what this was written for.
"""

from __future__ import annotations

from typing import Any, TypeVar

from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from attn_compiler.errors import UnsupportedCall

L = TypeVar("L", bound=CacheLayerMixin)


def own_update(cache: Any) -> bool:
    """Is the `update` of a cache one that the library did not write?"""
    # of the class: what a method of an object is, Dynamo answers otherwise
    written = getattr(type(cache), "update", None)
    return written is not Cache.update or "update" in getattr(cache, "__dict__", {})


def layer_for(cache: Any, index: int) -> Any:
    """The layer of a cache, made as `update` makes it; None for any other object."""
    if not isinstance(cache, Cache):
        return None
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[index]


def unfit(
    cache: Any, index: int, kinds: tuple[type, ...] = (DynamicLayer,), *, calls: bool = False
) -> str:
    """Why a layer of a cache cannot become another one; "" if it can.

    Args:
        cache, index: which layer.
        kinds: of layers that can; they have to be empty.
        calls: would the `update` of the cache still be called, and what it gives be read?
    """
    layer = layer_for(cache, index)
    if layer is None:
        return "it is no cache of transformers"
    if not calls and own_update(cache):
        return "it has an `update` of its own, whose keys and values would not be read"
    # a layer with an `update` of its own is of another class, or got it afterwards
    if type(layer) not in kinds or "update" in vars(layer):
        return f"layer {index} is a {type(layer).__name__}, which has a way of its own to keep keys"
    if layer.get_seq_length():
        return f"layer {index} holds {layer.get_seq_length()} tokens that another model put there"
    return ""


def placed(cache: Any, index: int, kind: type[L], what: str) -> L:
    """The layer of a cache, of a kind that holds something else than keys and values; an empty
    ordinary one becomes such a layer.

    Args:
        cache, index: which layer.
        kind: made without arguments.
        what: it holds, for the error.

    Raises:
        UnsupportedCall: it is no such layer and cannot become one.
    """
    layer = layer_for(cache, index)
    if isinstance(layer, kind) and not own_update(cache):
        return layer
    why = unfit(cache, index)
    if why:
        raise UnsupportedCall(
            f"a {type(cache).__name__} cannot hold {what}",
            why=(why,),
            do="give an empty DynamicCache of transformers, or none",
        )
    made: L = kind()
    cache.layers[index] = made
    return made
