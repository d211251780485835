"""Compiles tiles for GPUs that are not there, and writes down what the compiler says of them.

    python tests/compiling.py 600 sm_90 gfx942:forward   ->   more rows of cost/compiled.json
    python tests/compiling.py 600 sm_90:tma              ->   tight tiles with descriptors

A row is block_m, block_n, warps, stages, bytes of shared memory, registers, spilled bytes or
registers; rows are kept by target, template, head dim and bytes of an element. The program is
causal; a tile of fewer than 64 rows is compiled as a short query is launched, with packed heads.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from ahead import SHARED, TARGETS, _Driver
from attention_cases import CAUSAL, text
from triton.backends.compiler import GPUTarget

import attn_compiler.cost
from attn_compiler.cost.problem import TEMPLATES
from attn_compiler.kernels import flash_triton, flash_triton_backward
from attn_compiler.kernels.frame import Frame, Inputs
from attn_compiler.kernels.launch import Launch, Tile

TABLE = Path(attn_compiler.cost.__file__).parent / "compiled.json"
TARGETS |= {"sm_120": GPUTarget("cuda", 120, 32)} | {
    arch: GPUTarget("hip", arch, 64) for arch in ("gfx90a", "gfx950")
}
LENGTH = 1024
Row = list[int]


def launch(
    template: str, width: int, itemsize: int, tile: Tile, program: str = "", reads: Any = ()
) -> Launch:
    """The launch of a kernel with this tile, on tensors that hold nothing."""
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    short = template == "forward" and tile.rows < 64 and not tile.descriptors

    def made(length: int, heads: int) -> torch.Tensor:
        return torch.empty(2, length, heads, width, dtype=dtype).transpose(1, 2)

    q, k, v = made(1 if short else LENGTH, 8), *(made(LENGTH, 2 if short else 8) for _ in "kv")
    given = Inputs.of(
        *(q, k, v, list(reads), [], None),
        program=program or text(mask=CAUSAL),
        scale=0.1,
        dropout=0.0,
    )
    if template == "forward":
        if short:
            tile = Tile(tile.rows, tile.keys, tile.warps, tile.stages, 4, 4)
        out = torch.empty(tile.splits, *q.shape, dtype=torch.float32 if short else dtype)
        lse = torch.empty(tile.splits, *q.shape[:3])
        return flash_triton.prepare(Frame(given), tile, out, lse)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    results = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    launches = flash_triton_backward.prepare_backward(
        Frame(given), out, (out, lse), {}, (tile, tile), results
    )
    return launches[{"queries": 1, "keys_and_values": 2}[template]]


def facts_of(target: str, found: Launch) -> tuple[int, int, int]:
    """Bytes of shared memory, registers of a thread, and what did not fit into them.

    A tile that asks for more than the 512 columns of Blackwell's tensor memory does not fit either.
    """
    triton.runtime.driver.set_active(_Driver(TARGETS[target]))
    kernel = found.kernel.warmup(*found.args, grid=found.grid, **found.constants)
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        used, spilled = (
            int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        return kernel.metadata.shared, used, spilled
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used, spilled = (int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK"))
    too_much = max(0, (kernel.metadata.tmem_size or 0) - 512)
    return kernel.metadata.shared, used, spilled + too_much


def lattice(template: str, width: int, itemsize: int) -> Iterator[tuple[int, int, int, int]]:
    """Tiles that are worth a compilation: fewer than some 200 registers for what is added up."""
    if itemsize == 4:
        # without matrix units a product takes a register for every number it multiplies
        deep = 1 if width == 256 and template != "forward" else 2
        yield from ((m, n, 4 if width == 64 else 8, deep) for m in (16, 32) for n in (16, 32))
        return
    for m, n, warps, stages in itertools.product(_SIDES, _SIDES, (4, 8), (2, 3, 4)):
        if template == "forward":
            values = m * width + 1.5 * m * n
            odd = _odd_forward(m, n, warps, stages, width)
        else:
            values = (m if template == "queries" else 2 * n) * width + 3 * m * n
            odd = stages == 4 or _odd_backward(m, n, stages, width)
        if not (odd or (m * n < 512 and warps == 8)) and values / (32 * warps) <= 190:
            yield m, n, warps, stages


_SIDES = (16, 32, 64, 128)


def _odd_forward(m: int, n: int, warps: int, stages: int, width: int) -> bool:
    """A short query wants deep pipelines; many rows have other programs to wait for."""
    if m >= 64:
        return n < 32 or stages == 4
    return n < 32 or warps == 8 or stages == 2 or (n == 32 and width < 256)


def _odd_backward(m: int, n: int, stages: int, width: int) -> bool:
    if max(m, n) > 2 * min(m, n):
        return True
    return m * n < 512 or stages == 3 if width == 256 else m * n < 2048


def main(seconds: float, targets: list[str]) -> None:
    until = time.monotonic() + seconds
    table: dict[str, Any] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    here = table.setdefault(triton.__version__, {})
    described = [t.partition(":")[0] for t in targets if t.endswith(":tma")]
    for target in described:
        _tight(here[target], target, until, table)
    targets = [t for t in targets if not t.endswith(":tma")]
    jobs = [
        (target.partition(":")[0], template, width, itemsize, tile)
        for target in targets
        for template in ([target.partition(":")[2]] if ":" in target else TEMPLATES)
        for width in (64, 128, 256)
        for itemsize in (2, 4)
        for tile in lattice(template, width, itemsize)
    ]
    jobs.sort(key=lambda job: job[3])
    for target, template, width, itemsize, tile in jobs:
        rows: list[Row] = here.setdefault(target, {}).setdefault(
            f"{template} {width} {itemsize}", []
        )
        if any(tuple(row[:4]) == tile for row in rows):
            continue
        if time.monotonic() > until:
            break
        found = facts_of(target, launch(template, width, itemsize, Tile(*tile)))
        rows.append([*tile, *found])
        rows.sort()
        TABLE.write_text(as_text(table))


def _tight(found: dict[str, list[Row]], target: str, until: float, table: Any) -> None:
    """Tiles of 16-bit numbers that nearly fill the registers or the shared memory."""
    for name in [n for n in found if n.endswith(" 2")]:
        template, width, itemsize = name.split()
        rows = found.setdefault(f"{name} tma", [])
        for *tile, shared, registers, spilled in found[name]:
            tight = registers >= 200 or 210_000 < shared <= SHARED[target]
            if spilled or not tight or any(row[:4] == tile for row in rows):
                continue
            if time.monotonic() > until:
                return
            launched = launch(template, int(width), int(itemsize), Tile(*tile, descriptors=True))
            rows.append([*tile, *facts_of(target, launched)])
            rows.sort()
            TABLE.write_text(as_text(table))


def as_text(table: dict[str, Any]) -> str:
    """JSON with one row of facts a line."""
    rough = json.dumps(table, indent=1, sort_keys=True)
    return re.sub(r"\[\s+([\d.,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", rough) + "\n"


if __name__ == "__main__":
    os.environ.setdefault("ATTN_COMPILER_CACHE", tempfile.mkdtemp())
    main(float(sys.argv[1]), sys.argv[2:])
