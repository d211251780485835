"""What a module rewritten to LinearAttention calls, and the layer of a cache that it fills.

    keys, values = cache.update(key, value, 3)   ->   kept = take(cache, (maps, key), value, 3)
    softmax(q keys^T) values                     ->   attend(maps, kept, q, ...)

A layer holds the keys and values of the window, with the features of these keys, and one sum over
all earlier keys: its size does not grow with the sequence. Without a cache the keys and values
themselves stand for `kept`.

    layer.state                  [B, G, F, dv + 1]   sum of g [v, 1] over what has left the window
    layer.window                 the last w - 1 keys, values, features, and which of them count

The first tokens are computed as without a cache, and differentiable; what follows is made of them
when somebody goes on. transformers 5.23 is what the layer was written for.

Source: LoLCATs (arXiv 2410.10254).
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from attn_compiler.errors import UnsupportedCall, require
from attn_compiler.kernels.feature_maps import FeatureMaps
from attn_compiler.kernels.linear_attention import linear_attention
from attn_compiler.kernels.linear_masks import counted
from attn_compiler.passes.rewrite_states import CacheCalls


def take(cache: Any, made: tuple[FeatureMaps, Tensor], values: Tensor, index: int, *_: Any) -> Any:
    """Instead of `cache.update(keys, values, index)`.

    Args:
        cache: one of transformers.
        made: the maps of the site, and the keys of the new tokens.
        values: of the new tokens.
        index: of the layer.

    Returns:
        What `attend` and `shown` read.

    Raises:
        UnsupportedCall: the cache is none that can hold a sum of keys; one with an `update` of its
            own is none.
    """
    require("transformers" in sys.modules, "a cache of transformers for LinearAttention")
    from attn_compiler.cache.linear_layer import LinearLayer
    from attn_compiler.cache.place import placed

    layer = placed(cache, index, LinearLayer, "the sums of LinearAttention")
    layer.take(made[1], values)
    return layer


def attend(
    maps: FeatureMaps,
    kept: Any,
    q: Tensor,
    rest: tuple[Any, ...],
    own: tuple[Any, ...] = (),
    **options: Any,
) -> Tensor:
    """Linear attention beyond a window, of q [B, H, T, d].

    Args:
        maps: makes the features.
        kept: keys [B, G, T, d] and values [B, G, T, dv], or a layer of a cache.
        rest: what the program reads: tensors, integers; no seed.
        own: nothing.
        options: program, scale, window; dropout is 0, and `causal` is not asked for.

    Returns:
        [B, H, T, dv].

    Raises:
        UnsupportedCall: the rows are not those of the keys, or the mask lets them see others than
            the keys up to their own.
    """
    reads, ints, *_ = rest
    program, scale, window = (options[name] for name in ("program", "scale", "window"))
    layered = not isinstance(kept, tuple)
    before = kept.length if layered else 0
    keys, values = kept.taken() if layered else kept
    if q.shape[2] != keys.shape[2]:
        raise UnsupportedCall(
            f"{q.shape[2]} rows attend to {keys.shape[2]} keys",
            why=("which of them are the rows' own is known with caches of transformers alone",),
            do="give all tokens at once, or use such a cache",
        )
    shape = (q.shape[0], q.shape[2], before + q.shape[2])
    valid = counted(program, reads, ints, shape)
    f, g = maps.queries(q), maps.keys(keys)
    if layered:
        found: Tensor = kept.attend((q, f), (keys, values, g), valid, window=window, scale=scale)
        return found
    sizes = {"window": window, "scale": scale}
    out: Tensor = linear_attention(q, keys, values, f, g, valid, None, **sizes)[0]
    return out


def shown(kept: Any, position: int) -> Tensor:
    """Something of the shape of all keys (0) or values (1)."""
    found: Tensor = kept[position] if isinstance(kept, tuple) else kept.shown(position)
    return found


LINEAR = CacheCalls(keep=take, attend=attend, shown=shown)
