"""What a module calls whose attention remembers: each kind of memory has calls of its own.

attend(self.attn_memory_0, kept, q, ...)   ->   cache.masked      Selective attention
attend(self.attn_far_0, kept, q, ...)      ->   cache.linear      LinearAttention
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attn_compiler.cache.linear import LINEAR
from attn_compiler.cache.masked import MASKED
from attn_compiler.kernels.feature_maps import FeatureMaps
from attn_compiler.passes.rewrite_states import CacheCalls


def _calls(memory: nn.Module) -> CacheCalls:
    return LINEAR if isinstance(memory, FeatureMaps) else MASKED


def take(cache: Any, made: tuple[Any, Tensor], values: Tensor, index: int, *more: Any) -> Any:
    """Instead of `cache.update(keys, values, index, *more)`; `made` is the memory and the keys."""
    return _calls(made[0]).keep(cache, made, values, index, *more)


def attend(memory: Any, kept: Any, *rest: Any, **options: Any) -> Tensor:
    """The attention of `rest[0]`, queries [B, H, T, d], over what `take` gave, or over keys and
    values.
    """
    found: Tensor = _calls(memory).attend(memory, kept, *rest, **options)
    return found


def shown(kept: Any, position: int) -> Tensor:
    """Something of the shape of all keys (0) or values (1)."""
    own = hasattr(kept, "shown")
    found: Tensor = kept.shown(position) if own else MASKED.shown(kept, position)
    return found


MEMORY = CacheCalls(keep=take, attend=attend, shown=shown)
