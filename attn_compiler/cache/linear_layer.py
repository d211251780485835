"""A layer of transformers' caches whose size does not grow: a window, and a sum over what left it.

    layer.take(keys, values);   out = layer.attend((q, f), (keys, values, g), valid, ...)

    state  +=  g_j [v_j, 1]        for every key j that leaves the window

Positions go on counting. transformers 5.23 is what this was written for.

Source: LoLCATs (arXiv 2410.10254).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pad

from attn_compiler.cache.summed import SummedLayer
from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels.frame import accumulator
from attn_compiler.kernels.linear_attention import linear_attention

# keys, values and features of some keys, each [B, G, n, ...]
Kept = tuple[Tensor, Tensor, Tensor]


class LinearLayer(SummedLayer):
    """The cache of one layer.

    Attributes:
        length: tokens that went by, before those that were taken over.
        window: what is kept of the last tokens; of all, until somebody goes on.
        valid: [B, n] which of these count.
        state: [B, G, F, dv + 1] of all earlier ones; None before there are any.
    """

    what = "a cache of LinearAttention"
    gone = "what left the window for them is part of a sum"

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.window: Kept | None = None
        self.valid: Tensor | None = None
        self.state: Tensor | None = None
        self._taken: tuple[Tensor, Tensor] | None = None

    # ---------------------------------------------------------------- what an attention calls

    def take(self, keys: Tensor, values: Tensor) -> None:
        """Take over the keys and values of the next tokens.

        Raises:
            UnsupportedCall: those taken over before never attended.
        """
        if self._taken is not None:
            raise UnsupportedCall(
                "a cache of LinearAttention was updated twice without attending",
                do="use it with the model that made it",
            )
        self._taken, self.is_initialized = (keys, values), True

    def taken(self) -> tuple[Tensor, Tensor]:
        """What was taken over last.

        Raises:
            UnsupportedCall: nothing was.
        """
        if self._taken is None:
            raise UnsupportedCall(
                "a cache of LinearAttention has no new tokens",
                do="use it with the model that made it",
            )
        return self._taken

    def attend(
        self,
        rows: tuple[Tensor, Tensor],
        new: Kept,
        valid: Tensor | None,
        *,
        window: int,
        scale: float,
    ) -> Tensor:
        """Attend with the tokens that were taken over.

        Args:
            rows: queries [B, H, T, d] and their features [B, H, T, F].
            new: keys, values and features of the new tokens.
            valid: [B, all tokens]; of those before, what was said of them then goes on to hold.
            window: keys that a row sees by softmax.
            scale: of q k^T.

        Returns:
            [B, H, T, dv].
        """
        count, first = new[0].shape[2], self.window is None
        own = new[0].new_ones((new[0].shape[0], count), dtype=torch.bool)
        own = own if valid is None else valid[:, -count:]
        if not first:
            self._leave(window)
        kept, counts = self._with(new, own)
        ignored = None if first and valid is None else counts
        out: Tensor = linear_attention(
            rows[0], *kept[:2], rows[1], kept[2], ignored, self.state, window=window, scale=scale
        )[0]
        key, value, features = (x.detach() for x in kept)
        self.window = key, value, features
        self.valid, self._taken, self.length = counts, None, self.length + count
        return out

    def _with(self, new: Kept, own: Tensor) -> tuple[Kept, Tensor]:
        """What is kept, and the new tokens."""
        if self.window is None or self.valid is None:
            return new, own
        key, value, features = (torch.cat(pair, 2) for pair in zip(self.window, new, strict=True))
        return (key, value, features), torch.cat((self.valid, own), 1)

    def _leave(self, window: int) -> None:
        """Add up what no further row sees by softmax."""
        assert self.window is not None and self.valid is not None
        key, value, features = self.window
        count = max(0, key.shape[2] - (window - 1))
        dtype = accumulator(key, value, features)
        g = features[:, :, :count].to(dtype) * self.valid[:, None, :count, None]
        found = g.mT @ pad(value[:, :, :count].to(dtype), (0, 1), value=1.0)
        self.state = found if self.state is None else self.state + found
        # copies: a view would hold all that it is cut from
        key, value, features = (x[:, :, count:].clone() for x in self.window)
        self.window = key, value, features
        self.valid = self.valid[:, count:]

    def shown(self, position: int) -> Tensor:
        """An empty tensor without memory in the shape of all keys (0) or values (1) so far."""
        return self._shown(self.taken()[position].to("meta"))

    def _shown(self, new: Tensor) -> Tensor:
        batch, groups, rows, dim = new.shape
        return new.new_empty(batch, groups, self.length + rows, dim)

    # ---------------------------------------------------------------- what transformers asks

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values are not kept; a call that is analysed is told how many there would be.

        Raises:
            UnsupportedCall: there are numbers in them.
        """
        if isinstance(key_states, FakeTensor):
            return self._shown(key_states), self._shown(value_states)
        raise UnsupportedCall(
            "a cache of LinearAttention was given keys and values",
            do="use it with the model that made it",
        )

    def get_seq_length(self) -> int:
        """Tokens that went by."""
        return self.length

    @property
    def nbytes(self) -> int:
        """Bytes of the window and the state."""
        return sum(x.nbytes for x in self.ordinary_tensors())

    def ordinary_tensors(self) -> tuple[Tensor, ...]:
        """What it holds: a rewritten module is compared by it."""
        held: Sequence[Tensor | None] = (*(self.window or ()), self.valid, self.state)
        return tuple(x for x in held if x is not None)

    def change(self, make: Callable[[Tensor], Tensor]) -> None:
        """Another batch."""
        if self.window is not None and self.valid is not None:
            key, value, features = map(make, self.window)
            self.window, self.valid = (key, value, features), make(self.valid)
        if self.state is not None:
            self.state = make(self.state)

    def reset(self) -> None:
        self.length, self.window, self.valid, self.state = 0, None, None, None
        self._taken, self.is_initialized = None, False
