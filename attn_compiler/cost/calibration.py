"""The constants of the model that only a measurement knows, at most six for a device and a kernel.

    Calibration(hidden=0.2)   ->   a compiler's pipeline hides a fifth of the shorter unit's work

The defaults are the middles of documented ranges; for a CPU they were read off one machine with
AVX-512 and are assumed elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, slots=True)
class Calibration:
    """What is fitted for a hardware and a template.

    Attributes:
        hidden: share of the shorter of tensor and special work that the longer one hides. Compilers
            reach 0.1 to 0.3, kernels that schedule two groups by hand 0.75 to 0.85.
        clock: factor of the sustained clock; on a CPU share of the rate of a large product.
        dram: share of memory's rate; streaming kernels reach 0.88 to 0.92.
        l2: share of the last cache's rate; kernels reach 0.55 to 0.75.
        launch: seconds for each kernel on the device, 2 to 3 microseconds; on a CPU for each call
            of PyTorch.
        prologue: clocks for which a program runs beside its tiles; on a CPU those of a page of
            memory that is new to the process.
    """

    hidden: float = 0.2
    clock: float = 1.0
    dram: float = 0.9
    l2: float = 0.65
    launch: float = 3e-6
    prologue: float = 3000.0


NAMES = tuple(f.name for f in fields(Calibration))
# least and greatest value of each, in their order; a CPU's caches overlap with its memory
BOUNDS = ((0.0, 1.0), (0.05, 1.5), (0.1, 2.0), (0.1, 2.0), (1e-7, 1e-4), (0.0, 1e5))

_PLAIN = Calibration()
# of a CPU, by the way that attention is computed: products of few rows reach less
_OF_A_CPU = {
    name: Calibration(hidden=0.5, clock=clock, dram=1.0, l2=1.0, launch=6e-6, prologue=4000.0)
    for name, clock in (
        ("keep", 0.85), ("sdpa", 0.9), ("blocked", 0.65), ("gathered", 0.65), ("rows", 0.85),
        ("layer", 0.85),
    )
}  # fmt: skip
# one of its launches is a dozen calls of PyTorch
_OF_A_CPU["states"] = replace(_OF_A_CPU["layer"], clock=0.65, launch=8e-5)
# a row of queries at a time reads its keys at less than memory's rate
_OF_A_CPU["layer"] = replace(_OF_A_CPU["layer"], dram=0.7)


def default(template: str) -> Calibration:
    """What is assumed where nothing was measured."""
    return _OF_A_CPU.get(template, _PLAIN)
