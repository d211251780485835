"""What fits: shared memory, registers and spills of a kernel, programs that live on a processor.

    128 x 64 tile, head dim 128, 8 warps, 3 stages on sm_90:  131072 bytes, 176 registers, 1 program

What the compiler said of a tile is kept in `compiled.json`, by Triton version; rows of "tma" are
tiles near the limit of registers again, as Hopper and Blackwell launch them where tensors allow:
with descriptors, which take up to 1088 bytes of shared memory more. For other tiles of
the forward kernel there are formulas: of shared memory exact wherever both exist, of registers an
estimate (constants in `registers.json`). Where neither is known the answer is None: ask the
compiler.

Source: NVIDIA's cuda_occupancy.h; AMD's instruction set manuals (waves of a SIMD); the buffers that
Triton's pipeliner allocates.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.problem import Problem, Template, TileConfig

THREADS_OF_A_BLOCK = 1024
_REGISTERS_OF_A_THREAD = {"nvidia": 255, "amd": 512}
# an estimate above this is taken to spill
_FULL = 250
_ROWS_OF_WGMMA = 64
# the same instructions, and the same code but for its schedule: that takes some registers more
_MORE_REGISTERS = 24
_COMPILED_AS = dict.fromkeys(("sm_86", "sm_87", "sm_89", "sm_120"), "sm_80")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a tile takes.

    Attributes:
        shared: bytes of shared memory of a program.
        registers: of a thread.
        spilled: whether some values do not fit into registers.
        compiled: the compiler said so; otherwise it is an estimate.
    """

    shared: int
    registers: int
    spilled: bool
    compiled: bool


# ---------------------------------------------------------------- programs of a processor


def resident(hardware: Hardware, warps: int, registers: int, shared: int) -> int:
    """Programs that live on one processor at once; 0 where not even one fits.

    Args:
        warps: of a program, of 32 threads on NVIDIA and of 64 on AMD.
        registers: 32-bit registers of a thread.
        shared: bytes of a program.
    """
    if hardware.kind == "cpu" or warps * hardware.warp > THREADS_OF_A_BLOCK:
        return 0
    if registers > _REGISTERS_OF_A_THREAD[hardware.kind] or shared > hardware.shared_block:
        return 0
    taken = _up(shared + hardware.shared_reserved, hardware.shared_step)
    by_shared = hardware.shared // taken if taken else hardware.blocks
    by_registers = _by_registers(hardware, warps, registers)
    return min(hardware.blocks, hardware.warps // warps, by_shared, by_registers)


def _by_registers(hardware: Hardware, warps: int, registers: int) -> int:
    """Warps live on one of four parts of a processor, each with a quarter of the registers."""
    if registers == 0:
        return hardware.blocks
    of_a_warp = _up(registers * hardware.warp, hardware.registers_step)
    if _up(warps, 4) * of_a_warp > hardware.registers:
        return 0
    of_a_part = hardware.registers // 4 // of_a_warp
    return 4 * of_a_part // warps


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


# ---------------------------------------------------------------- what a tile takes


def facts(
    hardware: Hardware, template: Template, width: int, itemsize: int, tile: TileConfig
) -> Facts | None:
    """What a tile takes on a device; None where neither the compiler nor a formula has said.

    Args:
        width: the larger of the padded head dims of keys and values.
        itemsize: bytes of an element.
    """
    key = template, width, itemsize, tile.block_m, tile.block_n, tile.warps, tile.stages
    arch = _COMPILED_AS.get(hardware.arch, hardware.arch)
    found = _compiled(arch).get(key)
    if found is not None:
        shared, registers, spilled = found
        more = _MORE_REGISTERS if hardware.arch in _COMPILED_AS else 0
        spilled = max(spilled, _compiled(arch, ("tma",)).get(key, found)[2])
        return Facts(shared, registers + more, spilled > 0, True)
    # of short tiles the compiler keeps some on the stack for reasons that no formula sees
    if template != "forward" or tile.block_m < _ROWS_OF_WGMMA:
        return None
    exact = shared_bytes(hardware.arch, width, itemsize, tile)
    guess = registers_of(hardware.arch, width, itemsize, tile)
    if exact is None or guess is None:
        return None
    return Facts(exact, guess[0], guess[1], False)


def living(hardware: Hardware, problem: Problem, template: Template, tile: TileConfig) -> int:
    """Programs of a call that live on one processor; 0 where that is not known, or it spills."""
    width = max(problem.width, problem.value_width)
    known = facts(hardware, template, width, problem.itemsize, tile)
    if known is None or known.spilled:
        return 0
    return resident(hardware, tile.warps, known.registers, known.shared)


def shared_bytes(arch: str, width: int, itemsize: int, tile: TileConfig) -> int | None:
    """Bytes of shared memory of the forward kernel, 16-bit numbers, a score that reads no tensors.

    sm_90, 64 rows or more      q + 2 stages kv:  operands are read asynchronously
    sm_8x, sm_120, sm_90 below  q + 2 (stages - 1) kv, + p where it changes its layout
    AMD                         max(q, 2 (stages - 1) kv + p), two or three stages

    Returns:
        None where this is not known to be what the compiler allocates.
    """
    if itemsize != 2 or arch not in _LAYOUTS:
        return None
    m, n, warps, stages = tile.block_m, tile.block_n, tile.warps, tile.stages
    query, keys, weights = (2 * size for size in (m * width, n * width, m * n))
    if _LAYOUTS[arch] == "mfma":
        if stages not in (2, 3):
            return None
        moved = weights if 64 <= m < 32 * warps else 0
        return max(query, 2 * (stages - 1) * keys + moved)
    if stages == 1:
        return None
    if _LAYOUTS[arch] == "wgmma" and m >= _ROWS_OF_WGMMA:
        return query + 2 * stages * keys
    # warps lie along the rows if there are as many of them as features, and p stays where it is
    return query + 2 * (stages - 1) * keys + (weights if width > m else 0)


_LAYOUTS = {
    "sm_80": "mma", "sm_86": "mma", "sm_87": "mma", "sm_89": "mma", "sm_120": "mma",
    "sm_90": "wgmma",
    "gfx90a": "mfma", "gfx942": "mfma", "gfx950": "mfma",
}  # fmt: skip


def registers_of(arch: str, width: int, itemsize: int, tile: TileConfig) -> tuple[int, bool] | None:
    """Registers of a thread of the forward kernel, and whether they overflow: an estimate.

    base + a acc + b s,   acc = rows x width / threads,   s = rows x keys / threads that share them

    A warp multiplies 16 rows or more, so more warps than that hold the same s again. Fitted to what
    the compiler said; off by less than 17 registers on average. Of fifty tiles it lets one pass
    that keeps some bytes on the stack: what is chosen was compiled.
    """
    fits = _table("registers.json").get(_COMPILED_AS.get(arch, arch))
    if itemsize != 2 or fits is None:
        return None
    base, by_acc, by_s = fits["long" if tile.block_m >= _ROWS_OF_WGMMA else "short"]
    sharing = min(tile.warps, max(1, tile.block_m // 16))
    acc = tile.block_m * width / (32 * tile.warps)
    guess = base + by_acc * acc + by_s * tile.block_m * tile.block_n / (32 * sharing)
    return min(_REGISTERS_OF_A_THREAD["nvidia"], round(guess)), guess > _FULL


# ---------------------------------------------------------------- the table

_Key = tuple[str, int, int, int, int, int, int]


@lru_cache(maxsize=2)
def _table(name: str) -> dict[str, Any]:
    """Of the Triton that is installed; of the newest known one where that is another or none."""
    text = (files("attn_compiler.cost") / name).read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)
    try:
        own = version("triton")
    except PackageNotFoundError:
        own = ""
    newest = max(found, key=lambda name: [int(part) for part in name.split(".")])
    return found.get(own, found[newest])


@lru_cache(maxsize=16)
def _compiled(arch: str, form: tuple[str, ...] = ()) -> dict[_Key, tuple[int, int, int]]:
    """Shared bytes, registers, spilled; `form` is () or ("tma",)."""
    found = {}
    for name, rows in _table("compiled.json").get(arch, {}).items():
        template, width, itemsize, *own = name.split()
        if tuple(own) != form:
            continue
        for m, n, warps, stages, *rest in rows:
            found[template, int(width), int(itemsize), m, n, warps, stages] = tuple(rest)
    return found


def compiled_tiles(arch: str, template: Template, width: int, itemsize: int) -> list[TileConfig]:
    """Tiles that the compiler has been asked about."""
    return [
        TileConfig(*key[3:])
        for key in _compiled(_COMPILED_AS.get(arch, arch))
        if key[:3] == (template, width, itemsize)
    ]
