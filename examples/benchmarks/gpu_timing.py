"""Seconds of several ways to do one thing, alternated in one process.

    warm-up of each way, its compilation included   ->   rounds: a b c, c b a, a b c, ...

How one call is timed stands in `attn_compiler.kernels.timing`. On a CPU the same code is run, to
know that it runs.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attn_compiler.cost.hardware import Hardware
from attn_compiler.kernels import gpu, timing

_WARM_UP = 2
_SAID = 400
METHOD = (
    f"CUDA events. Before each call {timing.SCRATCH >> 20} MiB are written {timing.WRITES} times, "
    "so the last cache holds nothing of it and the host is ahead. Compilation and two calls come "
    "before the first round, and the order of the ways turns around in each. Random data."
)


class NotHere(Exception):
    """A way that this machine cannot take, or not for this call."""


class DeviceLost(Exception):
    """After this error the device answers nothing more in this process."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What is measured on.

    Attributes:
        device, dtype: of the tensors.
        family, hardware: as `kernels.gpu` and `kernels.gpu_tiles` name them.
        scratch: what is written between calls; None on a CPU.
    """

    device: torch.device
    dtype: torch.dtype
    family: str
    hardware: Hardware | None
    scratch: Tensor | None = None

    @staticmethod
    def of(name: str) -> Machine:
        """The GPU in bfloat16; or the CPU, in float32, as if it were a small GPU."""
        if name == "cpu":
            return Machine(torch.device("cpu"), torch.float32, "ampere", None)
        device = torch.device("cuda", torch.cuda.current_device())
        return Machine(
            device,
            torch.bfloat16,
            gpu.family(device),
            gpu.hardware(device),
            torch.empty(timing.SCRATCH, dtype=torch.int8, device=device),
        )

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any]) -> float:
        """Of one call on the device."""
        return timing.seconds(call, self.scratch)

    def host_seconds(self, call: Callable[[], Any], calls: int = 100) -> float:
        """Of one call among many in a row: what the host needs, where the device needs less."""
        self.wait()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        self.wait()
        return (time.perf_counter() - began) / calls


@dataclass(frozen=True, slots=True)
class Way:
    """One way to do it.

    Attributes:
        call: does it once; its tensors are compared with those of the first way.
        facts: what belongs beside its seconds, as the tile.
        compiled: asks the compiled kernel for more facts, once it has run on a GPU.
        compared: False where the result is another than that of the first way.
    """

    call: Callable[[], Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    compiled: Callable[[], Mapping[str, Any]] | None = None
    compared: bool = True


Makers = Mapping[str, Callable[[], Way]]
Note = Callable[[str], None]


def measure(
    machine: Machine,
    makers: Makers,
    rounds: int,
    seconds: Callable[[Callable[[], Any]], float],
    note: Note,
) -> dict[str, dict[str, Any]]:
    """For each way its seconds in every round and its facts, or an error's text.

    Args:
        makers: make a way; what fails here or later costs this way and no other.
        seconds: of one call, as `Machine.seconds`.
        note: told which way is next, in each round too.

    Raises:
        DeviceLost: the device is of no use any more.
    """
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, Way] = {}
    first: tuple[Tensor, ...] = ()
    for name, make in makers.items():
        note(name)
        try:
            way, facts, result = _warmed_up(machine, make)
            if way.compared and result:
                first = first or result
                facts["differences"] = differences(result, first)
            found[name], ready[name] = {"seconds": [], **facts}, way
        except Exception as error:
            found[name] = failure(machine, error)
    for turn in range(rounds):
        for name in list(ready)[:: 1 if turn % 2 == 0 else -1]:
            note(name)
            try:
                found[name]["seconds"].append(seconds(ready[name].call))
            except Exception as error:
                found[name] = failure(machine, error)
                del ready[name]
    return found


def _warmed_up(
    machine: Machine, make: Callable[[], Way]
) -> tuple[Way, dict[str, Any], tuple[Tensor, ...]]:
    # PyTorch says in warnings why none of its kernels takes a call
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            way = make()
            began = time.perf_counter()
            result = way.call()
            machine.wait()
            facts = {**way.facts, "first_call": time.perf_counter() - began}
        except RuntimeError as error:
            why = " | ".join(str(w.message) for w in heard if issubclass(w.category, UserWarning))
            if why:
                error.add_note(why)
            raise
    for _ in range(_WARM_UP if machine.cuda else 0):
        way.call()
    machine.wait()
    if way.compiled is not None and machine.cuda:
        facts.update(way.compiled())
        machine.wait()
    return way, facts, tensors_of(result)


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    found = result if isinstance(result, tuple | list) else (result,)
    return tuple(x.detach() for x in found if isinstance(x, Tensor))


def differences(result: tuple[Tensor, ...], first: tuple[Tensor, ...]) -> list[float]:
    """|a - b| / |b| (2-norms) of each tensor that both have; NaN stays NaN."""
    found = []
    for a, b in zip(result, first, strict=False):
        far = torch.linalg.vector_norm(a.double() - b.double())
        size = torch.linalg.vector_norm(b.double())
        found.append(float(far / size if size else far))
    return found


def failure(machine: Machine, error: Exception) -> dict[str, Any]:
    """What a row says instead of seconds.

    Raises:
        DeviceLost: the device is of no use any more.
    """
    text = said(error)
    try:
        machine.wait()
    except Exception:
        raise DeviceLost(text) from error
    return {"error": text}


def said(error: BaseException) -> str:
    """One line about an error."""
    text = " ".join([str(error), *getattr(error, "__notes__", [])])
    kind = "" if isinstance(error, NotHere) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(text.split())}"[:_SAID]
