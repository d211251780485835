"""One recognised attention becomes one that remembers: a call with a memory of the module's own.

    softmax(q @ k.T * scale + mask) @ v    ->    attend(self.memory, (k, v), q, ...)

    k, v = cache.update(key, value, 3)     ->    kept = take(cache, (self.memory, key), value, 3)
    softmax(q @ k.T * scale + mask) @ v          attend(self.memory, kept, q, ...)

Source: Selective Attention (arXiv 2410.02703), whose layers remember what their tokens mask.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from attn_compiler.ir import ops
from attn_compiler.ir.core import Core
from attn_compiler.ir.mask import Causal, classify
from attn_compiler.ir.region import FunctionalRegion
from attn_compiler.ir.states import Kept, single_source
from attn_compiler.ir.trace import Region
from attn_compiler.kernels.frame import empty_heads
from attn_compiler.passes.emit import Emitter
from attn_compiler.passes.rewrite_site import (
    Added,
    check_readers,
    dropout_seed,
    finish,
    keys_and_values,
    operands,
)
from attn_compiler.passes.rewrite_states import CacheCalls, check_kept, replace_cache
from attn_compiler.variants.base import Lowering, NewModule, NewTensor


def rewrite_memory(
    region: Region,
    functional: FunctionalRegion,
    core: Core,
    lowering: Lowering,
    kept: Kept | None,
    calls: CacheCalls,
    variant: str,
) -> tuple[NewTensor | NewModule, ...]:
    """Replace the attention, and the call of its cache where there is one.

    Args:
        lowering: with a memory.
        kept: the call of a cache.
        calls: `keep` takes the place of `update`, `attend` that of the attention.
        variant: its name, the family of its codes.

    Returns:
        What the module has to get, under the names that the graph reads.

    Raises:
        NotAttention: `attention.second_reader`, `<variant>.kv_read_elsewhere`; the graph is as
            before.
        RegionError: an operand cannot be laid out; the graph is as before.
    """
    check_readers(region, functional, core)
    if kept is not None:
        check_kept(region, kept, variant)
    emitter = Emitter(region, functional)
    try:
        added = Added(emitter, lowering)
        result = _emit(emitter, core, added, kept, calls)
    except Exception:
        emitter.undo()
        raise
    region.end.replace_all_uses_with(result)
    if kept is not None:
        replace_cache(emitter, kept, calls)
    return tuple(added.new)


def _emit(
    emitter: Emitter, core: Core, added: Added, kept: Kept | None, calls: CacheCalls
) -> fx.Node:
    lowering = added.lowering
    assert lowering.memory is not None
    memory = added.module(lowering.memory)
    own = _own(emitter, core, added)
    q, reads, ints = operands(emitter, core)
    handle: Any
    if kept is None:
        handle = keys_and_values(emitter, core)
        width = ops.value(handle[1]).shape[3]
    else:
        assert kept.update is not None
        handle, width = kept.update, ops.value(kept.places[1]).shape[3]
    seed = dropout_seed(emitter, core, q)
    added.check_length(core)
    value = ops.value(q)
    with emitter.mode, torch.no_grad():
        like = empty_heads(value, (*value.shape[:3], width))
    rest = ([*reads, *added.reads], ints, seed, *added.extra)
    kwargs = {
        "program": str(lowering.program),
        "scale": core.scale,
        "dropout": core.dropout,
        "causal": any(isinstance(t, Causal) for t in classify(lowering.program.mask).terms),
        **dict(lowering.options),
    }
    out = emitter.opaque(calls.attend, (memory, handle, q, rest, own), kwargs, like)
    result = finish(emitter, core, out)
    if kept is not None and kept.update is not None:
        _become_take(kept.update, memory, calls)
    return result


def _own(emitter: Emitter, core: Core, added: Added) -> tuple[fx.Node, ...]:
    """What a head of its own reads, and its weights."""
    if not added.lowering.own:
        return ()
    x = single_source(emitter.functional, core)
    assert x is not None  # the site has a width
    dtype = ops.value(x).dtype
    return (x, *added.tensors([replace(weight, dtype=dtype) for weight in added.lowering.own]))


def _become_take(update: fx.Node, memory: fx.Node, calls: CacheCalls) -> None:
    """In place, with as many arguments as before: the layers of a model share this graph, and the
    number of the layer is patched by the name and position that it has here.
    """
    update.prepend(memory)
    cache, keys, *rest = update.args
    update.op, update.target = "call_function", calls.keep
    update.args = (cache, (memory, keys), *rest)
