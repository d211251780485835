"""What a step of generation would take with hidden states in its cache, at the example's sizes.

core, a cache that holds x   --sizes of the example-->   "pays: 31 us instead of 52 us a step, ..."
"""

from __future__ import annotations

import torch

from attn_compiler.cost.hardware import Hardware, resolve
from attn_compiler.errors import BadOption
from attn_compiler.ir import ops
from attn_compiler.ir.core import Core
from attn_compiler.ir.roles import extent
from attn_compiler.ir.states import Kept
from attn_compiler.ir.trace import Region
from attn_compiler.passes.show_kernels import number, sizes_of_example
from attn_compiler.planning import planned
from attn_compiler.variants import ELAttention
from attn_compiler.variants.base import Shape


def show_states(
    region: Region, core: Core, kept: Kept, hardware: Hardware | None, beams: int
) -> str | None:
    """Does EL-attention pay in a step behind the example, and by how much?

    Args:
        hardware: None for the device of the tensors.
        beams: that a generation would have for each row of the example.

    Returns:
        A sentence; None where a size of the example is not known, or the device is not.
    """
    shape = _step(region, core, kept, beams)
    device = ops.value(region.end).device
    try:
        machine = resolve(hardware, device)
    except BadOption:
        return None
    if shape is None:
        return None
    return verdict(shape, machine, core.dtype)


def verdict(shape: Shape, hardware: Hardware, dtype: torch.dtype) -> str:
    """The prediction in words."""
    found = planned(ELAttention(), shape, hardware, dtype)
    plain = found.alternatives[0]
    keys = f"{shape.batch} x {shape.key} keys"
    beams = f"{shape.beams} beam{'s' if shape.beams > 1 else ''} each"
    answer = "does not pay" if found.keep else "pays"
    return (
        f"{answer} in time: {found.seconds * 1e6:,.0f} us and not "
        f"{plain.seconds * 1e6:,.0f} us for a step over {keys} for {beams}, predicted for "
        f"{hardware.name}; a cache of {found.memory / 1e3:,.1f} kB and not "
        f"{plain.memory / 1e3:,.1f} kB"
    )


def _step(region: Region, core: Core, kept: Kept, beams: int) -> Shape | None:
    """One more token for each beam of each row, over as many keys."""
    known, roles = sizes_of_example(region), core.roles
    asked = [core.sizes[name] for name in "BHS"]
    asked += [extent(roles.heads), extent(roles.feature), extent(roles.value)]
    numbers = [number(size, known) for size in asked]
    if None in numbers or 0 in numbers:
        return None
    batch, heads, keys, groups, features, value_features = numbers
    width, beside, norm = None, None, None
    if kept.key is not None:
        width, beside = number(ops.value(kept.key.map.x).shape[-1], known), kept.key.beside
        norm = kept.key.norm
    return Shape(
        batch,
        1,
        max(keys, 2),
        heads,
        features,
        groups,
        value_features,
        width,
        causal=not kept.cross,
        beams=beams,
        rotated=None if beside is None else beside.features,
        rotated_heads=None if beside is None else beside.heads,
        norms=None if norm is None else norm.rows[2],
    )
