"""What layers of caches have in common that sum up or drop tokens: none can be taken back.

    layer.crop(-1)   ->   UnsupportedCall        layer.reorder_cache(beams)   ->   layer.change(...)

transformers 5.23 is what this was written for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from attn_compiler.errors import UnsupportedCall


def check_forgets_nothing(what: str, why: str, tokens_to_remove: int) -> None:
    """Raise UnsupportedCall if a token is to be forgotten."""
    if tokens_to_remove:
        raise UnsupportedCall(
            f"{what} cannot forget its newest tokens", why=(why,), do="generate without assistants"
        )


class SummedLayer(CacheLayerMixin):
    """The cache of one layer, whose size does not tell how many tokens went by.

    Attributes:
        what, gone: for errors: what this is, and why tokens cannot be taken back.
    """

    what: ClassVar[str]
    gone: ClassVar[str]
    is_sliding = False
    # nothing is there to make early: what is held is known with the first tokens
    supports_early_init = False

    @abstractmethod
    def change(self, make: Callable[[Tensor], Tensor]) -> None:
        """Another batch: `make` for every tensor that has one."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first tokens make what is held."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are over positions, all of them."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """A sequence may have any length."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The samples that beams go on with."""
        self.change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.change(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.change(lambda x: x[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Only nothing can be taken back.

        Raises:
            UnsupportedCall: a token is to be forgotten.
        """
        check_forgets_nothing(self.what, self.gone, tokens_to_remove)

    def offload(self) -> None:
        """Nothing: a cache that is small is not worth the way."""

    def prefetch(self) -> None:
        """Nothing, see `offload`."""
