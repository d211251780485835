"""Compiling a launch for a GPU that is not there, and reading what came out.

compiled = compile_for("sm_90", launch);   compiled.spilled, compiled.shared, compiled.text
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from attn_compiler.kernels.launch import Launch

TARGETS = {
    **{f"sm_{cc}": GPUTarget("cuda", cc, 32) for cc in (80, 89, 90, 100)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# bytes of shared memory that one program may have
SHARED = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says about one kernel.

    Attributes:
        spilled: bytes (NVIDIA) or registers (AMD) that did not fit into registers.
        shared: bytes of shared memory.
        text: assembly.
    """

    spilled: int
    shared: int
    text: str


class _Driver:
    """Stands in for a device, so that the JIT specialises as a launch would."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return list(TARGETS.values()).index(self.target)  # compiled kernels are kept by device

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def compile_for(name: str, launch: Launch) -> Compiled:
    triton.runtime.driver.set_active(_Driver(TARGETS[name]))
    kernel = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants)
    if name == "gfx942":
        text = kernel.asm["amdgcn"]
        spilled = int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)[0])
        return Compiled(spilled, kernel.metadata.shared, text)
    return Compiled(_stack(kernel.asm["cubin"]), kernel.metadata.shared, kernel.asm["ptx"])


def _stack(cubin: bytes) -> int:
    """Bytes of stack: where the registers alone would lie, this is where spilled values live."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return int(re.findall(r"STACK:(\d+)", usage)[0])
