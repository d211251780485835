"""Which cache a generation gets: hidden states, or keys and values as ever.

    H D / e  <  F n / (2 BW)      is when attention over x is done before keys and values are read

Asked once for each layer of a generation, when its cache is empty, and answered once for each class
of shapes; where compute and memory overlap the cost model knows better than the break-even point.

Source: EL-Attention (arXiv 2105.04779); the break-even point follows from its two columns of
operations and bytes, F operations and BW bytes a second, n bytes an element, e = kv heads times d.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from attn_compiler.cache.maps import Maps
from attn_compiler.cache.states import States
from attn_compiler.cost.hardware import resolve
from attn_compiler.errors import BadOption
from attn_compiler.planning import planned
from attn_compiler.variants import ELAttention
from attn_compiler.variants.base import Shape


def choice(heads: int) -> Callable[[States, Maps], bool]:
    """For queries of so many heads: does a step over such states pay?"""

    def pays(states: States, maps: Maps) -> bool:
        batch, length, width = states.x.shape
        (key, value), beside = maps.rows, maps.beside
        shape = Shape(
            batch=batch,
            query=1,
            # a generation makes it longer: sizes of one class are answered alike
            key=max(2, 1 << (length - 1).bit_length()),
            heads=heads,
            head_dim=maps.features[0],
            kv_heads=key.heads,
            value_dim=value.features,
            width=width,
            rotated=None if beside is None else beside.features,
            rotated_heads=None if beside is None else beside.heads,
            norms=None if maps.norm is None else maps.norm.rows.heads,
            beams=states.beams,
            causal=not states.borrowed,
        )
        return faster(shape, states.x.device, states.x.dtype)

    return pays


@lru_cache(maxsize=256)
def faster(shape: Shape, device: torch.device, dtype: torch.dtype) -> bool:
    """Is a step of generation predicted to be faster straight from x, on the device at hand?

    Args:
        shape: of a step; not causal is cross-attention, whose beams share x.

    Returns:
        True also where the device is not known.
    """
    try:
        hardware = resolve(None, device)
    except BadOption:
        return True
    return not planned(ELAttention(), shape, hardware, dtype).keep
