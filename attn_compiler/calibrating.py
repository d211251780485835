"""The constants of the cost model, fitted to the device at hand.

    calibrate()   ->   Hardware(name="h200", ..., constants=(("forward", Calibration(...)), ...))

Seconds of at most twenty calls for each kernel, then the constants that explain them best. What is
found is kept in the cache folder and answers every later question about this device, until the
model or the templates change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from attn_compiler.cost import cpu
from attn_compiler.cost.at_hand import keep, plain
from attn_compiler.cost.fit import fit_cpu
from attn_compiler.cost.hardware import Hardware, resolve
from attn_compiler.cost.problem import Problem
from attn_compiler.errors import BadOption
from attn_compiler.kernels import cpu_ways, gpu
from attn_compiler.kernels.calibrate_gpu import on_a_gpu
from attn_compiler.kernels.timing import Call, Clock, alternated, clock
from attn_compiler.planning import cost_of_a_layer
from attn_compiler.variants import ELAttention
from attn_compiler.variants.base import Shape

_ROUNDS = 3
# batch, heads, kv heads, rows, keys, head dim, window (0: none, -1: causal), density of a map
_CORES: tuple[tuple[int, int, int, int, int, int, int, float | None], ...] = (
    (1, 6, 6, 160, 160, 64, 0, None),
    (1, 6, 6, 640, 640, 64, 0, None),
    (1, 3, 3, 768, 768, 128, 0, None),
    (1, 6, 6, 1280, 1280, 64, -1, None),
    (2, 6, 2, 1, 1536, 64, 0, None),
    (1, 12, 12, 1, 3072, 64, 0, None),
    (2, 6, 6, 384, 384, 64, 192, None),
    (1, 6, 6, 640, 640, 64, 100, None),
    (1, 3, 3, 1536, 1536, 64, 300, None),
    (1, 6, 6, 1536, 1536, 64, 64, None),
    (1, 6, 6, 768, 768, 64, 0, 0.15),
    (1, 3, 3, 1536, 1536, 64, 0, 0.06),
    (1, 3, 3, 1536, 1536, 64, 0, 0.2),
)
# batch, beams, keys, heads, head dim
_STEPS = (
    (1, 1, 2048, 4, 64), (1, 1, 512, 8, 64), (2, 1, 1024, 6, 64), (1, 4, 2048, 4, 64),
    (8, 4, 1500, 6, 64), (8, 4, 512, 16, 64),
)  # fmt: skip


def calibrate(hardware: str | Hardware | None = None) -> Hardware:
    """Fit the few constants of the cost model to the device at hand, and keep them.

    Under a minute on a CPU. Nothing else should run meanwhile.

    Args:
        hardware: None for the GPU, or the CPU where there is none; "cpu"; the name of the GPU
            that is here.

    Returns:
        The device with its constants: what `resolve(None)` says from now on.

    Raises:
        BadOption: an unknown hardware, or one that is not here.
    """
    device = _device(hardware)
    row, time = plain(device), clock(device)
    with torch.no_grad():
        found = on_a_cpu(row, time) if device.type == "cpu" else on_a_gpu(row, device, time)
    keep(found, device)
    gpu.hardware.cache_clear()
    return found


def _device(hardware: str | Hardware | None) -> torch.device:
    """Where a hardware is."""
    gpu_here = torch.cuda.is_available()
    if hardware is None:
        return torch.device("cuda" if gpu_here else "cpu")
    wanted = resolve(hardware)
    if wanted.kind == "cpu":
        return torch.device("cpu")
    here = plain(torch.device("cuda")).name if gpu_here else ""
    if here == wanted.name:
        return torch.device("cuda")
    raise BadOption(
        f"there is no {wanted.name} here to calibrate",
        where="option hardware",
        why=[f"the GPU at hand is {here}" if here else "PyTorch sees no GPU"],
        do="run this on the machine that has it, or leave hardware out",
    )


# ---------------------------------------------------------------- a CPU


def on_a_cpu(row: Hardware, time: Clock) -> Hardware:
    """The rates of a CPU and the constants of its ways."""
    machine = _with_rates(row, time)
    seen: dict[str, list[tuple[cpu.Phases, float]]] = {}
    for way, phases, seconds in _measured(time):
        seen.setdefault(way, []).append((phases, seconds))
    constants = [(way, fit_cpu(machine, way, found)) for way, found in sorted(seen.items())]
    return replace(machine, constants=tuple(constants), mark="measured")


def _with_rates(row: Hardware, time: Clock) -> Hardware:
    """The rates of large products, of softmax, of a copy in memory and of one in the cache."""
    n, far, near = 768, 2**25, int(row.l2 / 16)
    a, b, wide = torch.randn(n, n), torch.randn(n, n), torch.randn(256, 1024)
    half_a, half_b = a.bfloat16(), b.bfloat16()
    source, target = torch.randn(far), torch.empty(far)
    seconds = _least(
        {
            "product": lambda: a @ b,
            "half": lambda: half_a @ half_b,
            "softmax": lambda: wide.softmax(-1),
            "far": lambda: target.copy_(source),
            "near": lambda: torch.mul(source[:near], 2.0, out=target[:near]),
        },
        2 * _ROUNDS,
        time,
    )
    clocks = row.clock * row.processors
    return replace(
        row,
        sustained=1.0,
        flops32=2.0 * n**3 / seconds["product"] / clocks,
        flops16=2.0 * n**3 / seconds["half"] / clocks,
        exps=wide.numel() / seconds["softmax"] / clocks,
        dram_rate=8.0 * far / seconds["far"],
        l2_rate=8.0 * near / seconds["near"] / row.clock,
    )


def _least(calls: Mapping[Any, Call], rounds: int, time: Clock) -> dict[Any, float]:
    """Of each call the least seconds: what else the machine does only ever adds some."""
    return {name: min(found) for name, found in alternated(calls, rounds, time).items()}


def _measured(time: Clock) -> Iterator[tuple[str, cpu.Phases, float]]:
    """Way, what it does, and its seconds."""
    for *sizes, window, density in _CORES:
        batch, heads, kv_heads, rows, keys, width = (int(n) for n in sizes if n is not None)
        problem = Problem(
            batch, heads, kv_heads, rows, keys, width, width, 4,
            left=int(window) - 1 if window and window > 0 else None,
            right=0 if window else None,
        )  # fmt: skip
        done: dict[Any, cpu.Phases] = dict(cpu.ways(problem, density))
        for way, seconds in _least(cpu_ways.cores(problem, density), _ROUNDS, time).items():
            yield way, done[way], seconds
    for batch, beams, keys, heads, width in _STEPS:
        shape = Shape(
            batch, 1, keys, heads, width, width=heads * width, beams=beams, causal=beams == 1
        )
        ways = cpu_ways.steps(batch, beams, keys, heads, width)
        for way, seconds in _least(ways, 3 * _ROUNDS, time).items():
            spec = ELAttention() if way == "states" else None
            cost = cost_of_a_layer(spec, shape, torch.float32)
            yield way, (cpu.phase_of(cost),), seconds
