"""The device at hand as a row of numbers: by what the driver or Linux says of it, and by what was
fitted for it.

    hardware_of("cuda")   ->   the row of an H200, with the constants that `calibrate` kept here
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from attn_compiler.cost import store
from attn_compiler.cost.hardware import Hardware, of_properties
from attn_compiler.errors import BadOption

log = logging.getLogger("attn_compiler")


def hardware_of(device: Any = None) -> Hardware:
    """See `Hardware.from_device`."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return _calibrated(plain(device), name_of(device))


def plain(device: torch.device) -> Hardware:
    """The row of a device as if nothing had been measured.

    Raises:
        BadOption: a device of a kind or an architecture that the table does not know.
    """
    if device.type not in ("cpu", "cuda"):
        raise BadOption(f"no hardware numbers for a {device.type} device", do="name a hardware")
    return _cpu_here() if device.type == "cpu" else _gpu_here(device)


def name_of(device: torch.device) -> str:
    """What a device at hand is known by: its own name and what of it may be used."""
    if device.type == "cpu":
        model = _cpuinfo().get("model name", "CPU")
        return f"{model}, {_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.multi_processor_count} processors"


def _gpu_here(device: torch.device) -> Hardware:
    properties = torch.cuda.get_device_properties(device)
    arch = getattr(properties, "gcnArchName", "").split(":")[0]
    if not (torch.version.hip and arch):
        arch = f"sm_{properties.major}{properties.minor}"
    return of_properties(
        properties.name, arch, properties.multi_processor_count, properties.total_memory
    )


def keep(hardware: Hardware, device: torch.device) -> None:
    """Keep what was fitted for a device, for every later `from_device`."""
    name = name_of(device)
    about = {"device": name, "hardware": json.loads(hardware.to_json())}
    store.put(store.place("hardware", name), json.dumps(about, indent=1))


def _calibrated(row: Hardware, name: str) -> Hardware:
    """What was fitted for the device on this machine, else the row."""
    path = store.place("hardware", name)
    about = store.read(path)
    if not about:
        return row
    try:
        found = Hardware.from_json(json.dumps(about.get("hardware")))
    except BadOption as error:
        log.warning("%s is ignored, calibrate again: %s", path, error)
        return row
    same = (found.arch, found.processors) == (row.arch, row.processors)
    return found if same else row


# ---------------------------------------------------------------- the CPU at hand

# flop per clock of one core in 32 bits: two units of fused multiply-add, where the widest is there
_SIMD = (("avx512f", 64.0), ("avx2", 32.0), ("asimd", 16.0), ("neon", 16.0))
# how much faster 16-bit products are; nominal rates are higher, real kernels do not get there
_HALVES = (("amx_bf16", 4.0), ("avx512_bf16", 2.0), ("bf16", 2.0))

# bytes a second that one core reads; what few cores reach together, and each further one adds
_OF_A_CORE, _OF_A_CHIP, _OF_A_SHARE = 15e9, 50e9, 2.5e9


def _cpu_here() -> Hardware:
    """This machine, from what Linux says of it; elsewhere the table's row with its own cores."""
    return of_cpuinfo(_cpuinfo_text(), _threads())


def _threads() -> int:
    """Cores that PyTorch may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, torch.get_num_threads())


def _cpuinfo_text() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


def _cpuinfo(text: str | None = None) -> dict[str, str]:
    """Of the first core."""
    found: dict[str, str] = {}
    for line in (_cpuinfo_text() if text is None else text).splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found


def of_cpuinfo(text: str, cores: int) -> Hardware:
    """A CPU by the text of /proc/cpuinfo and the number of cores it may use."""
    row = Hardware.named("cpu")
    found = _cpuinfo(text)
    flags = set((found.get("flags") or found.get("Features") or "").split())
    flops = next((rate for flag, rate in _SIMD if flag in flags), row.flops32)
    half = next((factor for flag, factor in _HALVES if flag in flags), 0.5)
    clock = float(found.get("cpu MHz", row.clock / 1e6)) * 1e6
    # a virtual machine is told the whole chip's cache
    cache = float((found.get("cache size") or "0").split()[0]) * 1024 or row.l2
    return replace(
        row,
        processors=cores,
        clock=clock,
        flops32=flops,
        flops16=flops * half,
        exps=flops / 64,
        l2=min(cache, 2.0**21 * cores),
        l2_rate=16.0 * cores,
        dram_rate=min(_OF_A_CORE * cores, _OF_A_CHIP + _OF_A_SHARE * cores),
    )
