"""What a module rewritten to EL-attention calls in place of its cache and its attention.

    keys, values = cache.update(k_proj(x), v_proj(x), 3)   ->   kept = keep(cache, (x, ...), ..., 3)
    softmax(q keys^T) values                               ->   attend(kept, q, ...)

Which of the two attentions a call runs depends on its query rows. A cache that cannot hold x is
updated as ever.

Source: EL-Attention (arXiv 2105.04779).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from attn_compiler.cache.choice import choice
from attn_compiler.cache.maps import Beside, Maps, Norm, Rows
from attn_compiler.cache.parts import split_call
from attn_compiler.cache.states import States
from attn_compiler.errors import require
from attn_compiler.kernels.el import built, el_attention
from attn_compiler.kernels.schema import attention
from attn_compiler.passes.rewrite_states import CacheCalls

Weights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
Normed = tuple[tuple[Tensor | None, Tensor | None], tuple[bool, float, Sequence[Any], int, int]]


class Pair(NamedTuple):
    """Keys and values of an ordinary cache."""

    keys: Tensor
    values: Tensor


def keep(
    cache: Any,
    made: tuple[Tensor, Weights, bool, int, tuple[Tensor, Sequence[int]] | None, Normed | None],
    rows: tuple[Sequence[Any], Sequence[Any]],
    index: int,
    *more: Any,
) -> Any:
    """Instead of `cache.update(keys, values, index, *more)`.

    Args:
        cache: any object with such a method.
        made: x [B, t, D]; the weights of keys and their bias, of values and their bias; whether x
            is the output of an encoder, which is kept anyway; heads of the queries where keys and
            values are held if that is faster, else 0; the keys and which features of them are held
            besides x, see `Beside`, or None; gain and bias of a norm and what else it is, see
            `Norm`, or None.
        rows: which outputs of the weights are whose features, see `Rows`.
        index: of the layer.
        more: further arguments.

    Returns:
        What `attend` and `shown` read.
    """
    x, weights, borrowed, heads, part, normed = made
    keys = None if part is None else part[0]
    maps = _maps(weights, rows, None if part is None else Beside(*part[1]), normed)
    if "transformers" in sys.modules:
        from attn_compiler.cache.layer import hold

        pays = choice(heads) if heads else None
        layer = hold(cache, index, (x, maps.kept(x, keys)), maps, borrowed, pays)
        if layer is not None:
            return layer
    _, _, w_v, b_v = maps.views()
    keys = maps.keys(x) if keys is None else keys
    return Pair(*cache.update(keys, built(x, w_v, b_v), index, *more))


def _maps(
    weights: Weights,
    rows: tuple[Sequence[Any], Sequence[Any]],
    beside: Beside | None,
    normed: Normed | None,
) -> Maps:
    both = (Rows(*rows[0]), Rows(*rows[1]))
    if normed is None:
        return Maps(weights, both, beside)
    centred, eps, whole, offset, step = normed[1]
    norm = Norm(centred, eps, Rows(*whole), offset, step)
    return Maps((*weights, *normed[0]), both, beside, norm)


def attend(
    kept: Any,
    q: Tensor,
    reads: Sequence[Tensor],
    ints: Sequence[int],
    length: int | None = None,
    *,
    program: str,
    scale: float,
    key_bias: bool,
) -> Tensor:
    """Attention of q [B, H, T, d] over what a cache holds: straight over x where few rows ask.

    Args:
        kept: what `keep` gave, or any layer of a cache.
        q, reads, ints, program, scale: as of the operators.
        length: how many keys are there, the first that are held; None for all.
        key_bias: does the softmax see the keys' bias?

    Returns:
        [B, H, T, dv] in the dtype of q.
    """
    states = getattr(kept, "states", None)
    if isinstance(states, States) and length is not None:
        states = states.first(length)
    if isinstance(states, States) and _pays(states, kept.maps, q):
        w_k, b_k, w_v, b_v = kept.maps.views()
        x, call = states.read(), (q, w_k, b_k if key_bias else None, tuple(reads), program)
        if states.beside:
            call = split_call(states, kept.maps, call, scale, key_bias)
        queries, w_k, b_k, reads, program = call
        sides = (w_k, b_k, w_v, b_v)
        out, _ = el_attention(queries, x, *sides, reads, ints, program=program, scale=scale)
        return _like(out, q)
    if isinstance(states, States):
        keys, values = states.keys_and_values(kept.maps)
    else:
        keys, values = (t[:, :, :length] for t in (kept.keys, kept.values))
    keys, values = keys.to(q.dtype), values.to(q.dtype)
    out, _ = attention(
        q, keys, values, reads, ints, None, program=program, scale=scale, dropout=0.0
    )
    return _like(out, q)


def _like(out: Tensor, q: Tensor) -> Tensor:
    return out.to(q.dtype)


def _pays(states: States, maps: Maps, q: Tensor) -> bool:
    """Fewer operations than building keys and values and then attending?

    H T (2 D - d - dv)  <  D G (d + dv),  for each key of each row; beams share what is built.
    """
    width, (key, value) = states.x.shape[2], maps.rows
    inner = key.features + value.features
    rows = q.shape[1] * q.shape[2] * states.beams
    return bool(rows * (2 * width - inner) < width * key.heads * inner)


def shown(kept: Any, position: int) -> Tensor:
    """Something of the shape of all keys (0) or values (1): nothing is built for it."""
    states = getattr(kept, "states", None)
    if isinstance(states, States):
        return states.shape_of(kept.maps, position)
    found: Tensor = kept.values if position else kept.keys
    return found


def hold(cache: Any, *given: Any) -> Any:
    """See `cache.gau`, which needs the library whose caches it serves."""
    require("transformers" in sys.modules, "a cache of transformers for gated attention units")
    from attn_compiler.cache import gau

    return gau.hold(cache, *given)


CALLS = CacheCalls(keep=keep, attend=attend, shown=shown, hold=hold)


def nbytes(*caches: Any) -> int:
    """Bytes of all storages that the layers of some caches hold, each counted once."""
    found: dict[int, int] = {}
    for cache in caches:
        for part in (cache, *vars(cache).values()):
            for layer in getattr(part, "layers", ()):
                held = getattr(layer, "states", layer)
                for tensor in (*vars(held).values(), *getattr(held, "beside", ())):
                    if isinstance(tensor, Tensor):
                        storage = tensor.untyped_storage()
                        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
