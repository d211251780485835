"""A layer of transformers' caches that keeps beside keys and values how much each is masked.

    layer.keys, layer.values    as in the library's layer, all tokens
    layer.amount                F of the next row, [B, S]: one number for each key

So a step of generation goes on where the pass over the prompt ended. With a budget the layer is one
of fixed size instead (`cache.selective`). A layer of a sliding window becomes one that holds all
tokens too, and its mask forbids those outside: the library makes masks as long as layers say.

transformers 5.23 is what this was written for.

Source: Selective Attention (arXiv 2410.02703).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from attn_compiler.cache.place import layer_for, own_update, unfit
from attn_compiler.cache.selective import SelectiveLayer
from attn_compiler.cache.summed import check_forgets_nothing
from attn_compiler.errors import UnsupportedCall


class MaskedLayer(DynamicLayer):
    """One layer that holds all keys and values, and F of them.

    Attributes:
        amount: [B, S], below 0 where a token is protected; None before the first pass.
        selector: keys and values of a selecting head of its own, [B, 1, S, e] and [B, 1, S, f].
        windowed: does it stand in the place of a layer of a sliding window?
    """

    def __init__(self) -> None:
        super().__init__()
        self.windowed = False
        self.amount: Tensor | None = None
        self.selector: tuple[Tensor, ...] = ()

    def carried(self, past: int) -> Tensor | None:
        """F of the keys before the rows of this call.

        Raises:
            UnsupportedCall: keys were put in or taken away by somebody who does not keep F.
        """
        known = 0 if self.amount is None else self.amount.shape[1]
        if known != past:
            raise UnsupportedCall(
                f"a cache holds {past} earlier tokens and knows what masks {known} of them",
                do="let models that were rewritten to Selective attention fill it",
            )
        return self.amount

    def check_held(self, given: int) -> None:
        """The `update` of a cache may be somebody's own: changes of the batch reach what this layer
        holds, so that all tokens have to be here.

        Args:
            given: tokens that `update` gave.

        Raises:
            UnsupportedCall: this layer holds others.
        """
        if self.get_seq_length() != given:
            raise UnsupportedCall(
                f"an `update` gives {given} tokens, and its layer holds {self.get_seq_length()}",
                why=("how much tokens are masked is kept in the layer, beside all of them",),
                do="let such an `update` call that of the library's cache, or give a DynamicCache",
            )

    def remember(self, amount: Tensor, selector: tuple[Tensor, ...]) -> None:
        """F after the rows of this call, and all keys and values of a selecting head."""
        self.amount, self.selector = amount.detach(), selector

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and F."""
        held = (self.keys, self.values, self.amount, *self.selector)
        return sum(x.nbytes for x in held if x is not None)

    # ------------------------------------------------------------ what changes it

    def _change(self, make: Callable[[Tensor], Tensor]) -> None:
        if self.amount is not None:
            self.amount = make(self.amount)
            self.selector = tuple(make(x) for x in self.selector)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._change(lambda x: x[indices])

    def reset(self) -> None:
        super().reset()
        self.amount, self.selector = None, ()

    def crop(self, tokens_to_remove: int) -> None:
        """Only nothing can be taken back.

        Raises:
            UnsupportedCall: a token is to be forgotten.
        """
        text = "what they masked is part of a sum"
        check_forgets_nothing("a cache of Selective attention", text, tokens_to_remove)


def hold(cache: Any, index: int, budget: int | None) -> SelectiveLayer | MaskedLayer | None:
    """The layer of a cache that remembers what is masked: an empty one is replaced.

    Args:
        cache: any object.
        index: of the layer.
        budget: tokens that stay, None for all.

    Returns:
        None where it is no cache of transformers.

    Raises:
        UnsupportedCall: the layer is of another kind, or holds keys already; the cache has an
            `update` of its own, and a budget drops tokens; or it goes on in the place of one of a
            window, and another one keeps its own.
    """
    layer = layer_for(cache, index)
    if layer is None:
        return None
    own = own_update(cache)
    if type(layer) is MaskedLayer or (isinstance(layer, SelectiveLayer) and not own):
        if layer.windowed and layer.get_seq_length():
            _check_windows(cache.layers)
        return layer
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    why = unfit(cache, index, kinds, calls=budget is None)
    if why:
        raise UnsupportedCall(
            f"a {type(cache).__name__} cannot hold how much its tokens are masked",
            why=(why,),
            do="give an empty DynamicCache, a SelectiveCache, or none",
        )
    cache.layers[index] = made = MaskedLayer() if budget is None else SelectiveLayer(budget)
    made.windowed = type(layer) is DynamicSlidingWindowLayer
    return made


def _check_windows(layers: Sequence[Any]) -> None:
    """Layers of windows have masks of the same length: one that keeps its window alone would
    shorten those of the others. Masks of other layers, and of a first pass, are as long as ever.

    Raises:
        UnsupportedCall: a layer keeps a window already.
    """
    for number, layer in enumerate(layers):
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.get_seq_length():
            raise UnsupportedCall(
                f"layer {number} keeps a window, and others all tokens for Selective attention",
                why=("masks are as long as one of the layers says",),
                do="rewrite all layers of a model with sliding windows, or generate without cache",
            )


def joined(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Keys and values of a selecting head with those of new tokens."""
    return tuple(torch.cat(pair, 2) for pair in zip(old, new, strict=True)) if old else new
