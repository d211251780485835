"""A cache of fixed size for transformers' `generate`, that drops the tokens most masked.

    cache = SelectiveCache(budgets=(64, 40, 40))
    keys, values = cache.update(keys, values, layer)     takes the new tokens over
    out, *_ = cache.layers[layer].attend(query, rule)    drops, attends, remembers what was masked

`update` only takes the new tokens over: which one goes, and what the new one masks, is known when
the query is there. A layer has K tokens at most, whatever the length, and its tensors keep their
place in memory. Positions go on counting, so rotations and masks are those of the whole sequence.
Padding stands in the first call, on the left: a later token always takes a slot.

transformers 5.23 is what this was written for.

Source: Selective Attention (arXiv 2410.02703).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers.cache_utils import Cache

from attn_compiler.cache.summed import SummedLayer
from attn_compiler.errors import BadOption, UnsupportedCall
from attn_compiler.kernels.slots import Rule, Slots, Token, prompt, step


class SelectiveLayer(SummedLayer):
    """The cache of one layer.

    Args:
        budget: tokens that stay, at least 2: the first and the newest always do.

    Attributes:
        windowed: does it stand in the place of a layer of a sliding window?

    Raises:
        BadOption: the budget is smaller.
    """

    what = "a selective cache"
    gone = "what they dropped is gone"

    def __init__(self, budget: int) -> None:
        super().__init__()
        if budget < 2:
            raise BadOption(
                f"a budget of {budget} tokens is too small",
                why=("the first token and the newest are never dropped",),
                do="give at least 2",
            )
        self.budget, self.seen, self.windowed = budget, 0, False
        self.slots: Slots | None = None
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._taken: tuple[Tensor, Tensor] | None = None

    # ---------------------------------------------------------------- what an attention calls

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take over the keys and values [B, G, T, d] of the next T tokens, and return them.

        Raises:
            UnsupportedCall: those taken over before never attended.
        """
        if isinstance(key_states, FakeTensor):
            return self._shown(key_states), self._shown(value_states)
        if self._taken is not None:
            raise UnsupportedCall(
                "a selective cache was updated twice without attending",
                why=("which token is dropped depends on the queries",),
                do="use it with a model that was rewritten to Selective attention",
            )
        self._taken = key_states, value_states
        self.is_initialized = True
        return key_states, value_states

    def attend(
        self, query: Tensor, rule: Rule, selector: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, ...]:
        """Attend with the tokens that `update` took over.

        Args:
            query: [B, H, T, d].
            rule: what the attention computes.
            selector: see `kernels.slots.Token`.

        Returns:
            out [B, H, T, dv], and that of a selecting head with values of its own.

        Raises:
            UnsupportedCall: nothing was taken over.
        """
        if self._taken is None:
            raise UnsupportedCall(
                "a selective cache has no new tokens to attend with",
                do="call update with their keys and values first",
            )
        token = Token(query, *self._taken, selector)
        self._taken, past, rows = None, self.seen, query.shape[2]
        self.seen += rows
        if self.slots is None:
            self.slots, outs = prompt(rule, token, self.budget)
            self.keys, self.values = self.slots.stored[:2]
            return outs
        parts = [step(self.slots, rule, token.row(i), past, i, rows) for i in range(rows)]
        return tuple(torch.cat(part, 2) for part in zip(*parts, strict=True))

    def shown(self, position: int) -> Tensor:
        """An empty tensor without memory in the shape of all keys (0) or values (1) so far."""
        if self._taken is None:
            raise UnsupportedCall("a selective cache has no new tokens to show", do="call update")
        return self._shown(self._taken[position].to("meta"))

    def _shown(self, new: Tensor) -> Tensor:
        """In analysis sizes alone count: those of all positions."""
        batch, groups, rows, dim = new.shape
        return new.new_empty(batch, groups, self.seen + rows, dim)

    # ---------------------------------------------------------------- what transformers asks

    def get_seq_length(self) -> int:
        """Tokens that went by, kept or not; those that `update` has taken over count."""
        return self.seen + (0 if self._taken is None else self._taken[0].shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, F and positions."""
        return 0 if self.slots is None else self.slots.nbytes

    def reset(self) -> None:
        self.slots, self._taken, self.seen = None, None, 0
        self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The samples that beams go on with, in place."""
        if self.slots is not None:
            for x in self.slots.tensors:
                x.copy_(x.index_select(0, beam_idx.to(x.device)))

    def change(self, make: Callable[[Tensor], Tensor]) -> None:
        """Other tensors, for another number of samples."""
        if self.slots is not None:
            *stored, amount, positions = (make(x) for x in self.slots.tensors)
            self.slots = Slots(tuple(stored), amount, positions)
            self.keys, self.values = stored[:2]


class SelectiveCache(Cache):
    """A layer for each budget.

    Args:
        budgets: tokens that each layer keeps, in order.
    """

    def __init__(self, budgets: Sequence[int]) -> None:
        super().__init__(layers=[SelectiveLayer(budget) for budget in budgets])

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self.layers)
