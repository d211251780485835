"""Seconds of one call on a device.

    clock(device)(lambda: flash_triton.forward(frame, tile))   ->   0.00042

Before each measured call of a GPU 256 MiB are written several times: that empties the last cache,
and keeps the device busy for so long that the host has launched the call before it begins. So the
events around the call see the device's time and not the host's. A CPU has neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

SCRATCH = 2**28
# writes of the scratch before a call: about two milliseconds at four terabytes a second
WRITES = 32

Call = Callable[[], Any]
Clock = Callable[[Call], float]


def seconds(call: Call, scratch: Tensor | None = None) -> float:
    """Of one call.

    Args:
        scratch: a large tensor of the GPU that runs it; None for a CPU.
    """
    if scratch is None:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(WRITES):
        scratch.zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(scratch.device)
    return float(start.elapsed_time(end)) / 1e3


def own_seconds(call: Call) -> float:
    """Of one call on the thread that makes it, without what others had of the core: for a busy
    machine, where PyTorch has one thread.
    """
    began = time.thread_time()
    call()
    return time.thread_time() - began


def clock(device: torch.device) -> Clock:
    """The clock of a device; on a GPU it holds 256 MiB."""
    if device.type == "cpu":
        return seconds
    return partial(seconds, scratch=torch.empty(SCRATCH, dtype=torch.int8, device=device))


def alternated(calls: Mapping[Any, Call], rounds: int, clock: Clock) -> dict[Any, list[float]]:
    """Seconds of each call in every round. In a round each runs once, and the order turns around,
    so that a busy moment of the machine hits all of them; a first round is not counted.
    """
    found: dict[Any, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
            taken = clock(calls[name])
            if turn:
                found[name].append(taken)
    return found
