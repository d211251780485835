"""Compiles the kernels of the tile cases before they are measured, by several processes at once.

    together(commands, 60.0)   ->   each process calls its share of the ways once

What one process compiles, another finds in Triton's cache on disk. A way that fails here fails
again where it is measured, and is reported there.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence

from gpu_cases import KERNELS, Case, kinds
from gpu_timing import Machine, said
from gpu_ways import Call, makers

PROCESSES = min(8, os.cpu_count() or 1)


def together(commands: Sequence[Sequence[str]], seconds: float) -> None:
    """Run all commands at once, and end those that are not done after so many seconds."""
    end = time.monotonic() + seconds
    started = [subprocess.Popen(command) for command in commands]
    for process in started:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def call_once(cases: Sequence[Case], machine: Machine, number: int, of: int) -> None:
    """Call each of our ways once, those of one process among so many."""
    for case in kinds(cases):
        made = makers(Call.of(case, machine))
        ours = [name for name in made if name.partition(" ")[0] in ("triton", *KERNELS)]
        for name in ours[number::of]:
            try:
                made[name]().call()
                machine.wait()
            except Exception as error:
                print(f"{case.name}, {name}: {said(error)}", flush=True)
