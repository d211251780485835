"""What would run a core on a device, at the sizes of the example.

core with sizes s0, s1   --hints of the example-->   a call without data   -->   Shown
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch

from attn_compiler.cost.hardware import Hardware
from attn_compiler.ir import axes as ax
from attn_compiler.ir import ops
from attn_compiler.ir.core import Core
from attn_compiler.ir.pull import val
from attn_compiler.ir.roles import extent
from attn_compiler.ir.trace import Region
from attn_compiler.kernels import gpu
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.frame import Inputs
from attn_compiler.kernels.measure import measure
from attn_compiler.kernels.shown import Shown, meta, shown


def show_kernels(
    region: Region, core: Core, hardware: Hardware | None, measure_top: int = 0
) -> Shown | None:
    """What runs the exact operator.

    Args:
        hardware: None for the GPU of the tensors; for a CPU nothing is shown unasked, since times
            on it say little.
        measure_top: so many candidates are timed on the device of the tensors.

    Returns:
        None where a size of the example is not known, or the device is not.
    """
    device = ops.value(region.end).device
    machine = hardware or (None if device.type == "cpu" else gpu.hardware(device))
    if machine is None and not measure_top:
        return None
    given = _call(region, core)
    if given is None:
        return None
    found = shown(given, machine) if machine is not None else None
    training = torch.is_grad_enabled()
    choice = measure(given, device, measure_top, training) if measure_top else None
    if choice is None:
        return found
    tile = choice.tiles[0] if choice.tiles else None
    return replace(found or Shown(""), name=f"{choice.name} (measured)", why="", tile=tile)


def _call(region: Region, core: Core) -> Inputs | None:
    known, roles = sizes_of_example(region), core.roles
    sizes = [number(core.sizes[name], known) for name in "BHTS"]
    more = [extent(roles.heads), extent(roles.feature), extent(roles.value), *core.ints]
    numbers = [number(size, known) for size in more]
    reads = [_without_data(val(node), known) for node in core.reads]
    if None in (*sizes, *numbers) or any(read is None for read in reads):
        return None
    (batch, heads, rows, keys), (groups, width, value_width, *ints) = sizes, numbers
    seed = torch.empty(1, dtype=torch.int64, device="meta") if core.dropout else None
    return Inputs(
        meta((batch, heads, rows, width), core.dtype),
        meta((batch, groups, keys, width), core.dtype),
        meta((batch, groups, keys, value_width), core.dtype),
        [read for read in reads if read is not None],
        ints,
        Drop(seed, core.dropout),
        str(core.program),
        core.scale,
    )


def sizes_of_example(region: Region) -> dict[sympy.Basic, sympy.Basic]:
    """The sizes that the example gives to symbols."""
    found: dict[sympy.Basic, sympy.Basic] = {}
    for node in (*region.inputs, *region.nodes):
        value = ops.value(node)
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        for size in sizes:
            if isinstance(size, torch.SymInt) and isinstance(ax.size_of(size), sympy.Symbol):
                found[ax.size_of(size)] = sympy.Integer(ax.hint(size))
    return found


def number(size: Any, known: dict[sympy.Basic, sympy.Basic]) -> Any:
    """A size as a number, None where a symbol in it is not known."""
    if isinstance(size, int):
        return size
    if isinstance(size, torch.SymInt):
        return ax.hint(size)
    filled = sympy.sympify(size).xreplace(known) if isinstance(size, sympy.Basic) else None
    return int(filled) if filled is not None and filled.is_Integer else None


def _without_data(value: Any, known: dict[sympy.Basic, sympy.Basic]) -> torch.Tensor | None:
    if not isinstance(value, torch.Tensor):
        return torch.empty((), dtype=torch.float64, device="meta")
    shape = [number(ax.size_of(size), known) for size in value.shape]
    return None if None in shape else torch.empty(shape, dtype=value.dtype, device="meta")
