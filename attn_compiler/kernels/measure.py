"""Time the best candidates of a call on its device, and keep the fastest for its class of shapes.

    measure(call, cuda, top=3)   ->   cudnn 410 us, triton 128x64 395 us, triton 128x32 430 us: kept

Candidates come in the order of the cost model, the first `top` are timed on random data. It happens
when a graph is compiled, once for a device, template, program and class of shapes: not at a call,
so never while a CUDA graph is captured. Not measured on a GPU yet.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from attn_compiler.kernels import attention, gpu, measured, tiles_cpu
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.frame import Frame, Inputs
from attn_compiler.kernels.measured import Choice
from attn_compiler.kernels.timing import Clock, alternated, clock

log = logging.getLogger("attn_compiler")
_ROUNDS = 5
Calls = dict[Choice, Callable[[], Any]]


def measure(
    given: Inputs,
    device: torch.device,
    top: int,
    training: bool = False,
    time: Clock | None = None,
) -> Choice | None:
    """The fastest way of the forward; measured now if that was never done.

    Args:
        given: the call; its tensors need no data.
        device: where it is to run.
        top: how many candidates are timed.
        training: measure the backward too.
        time: seconds of a call, by default those of the device.

    Returns:
        None where there is nothing to choose among, or it could not be measured.
    """
    templates: tuple[gpu.Work, ...] = (
        ("forward", "backward") if training and device.type == "cuda" else ("forward",)
    )
    chosen = [_measured(given, device, top, template, time) for template in templates]
    return chosen[0]


def _measured(
    given: Inputs, device: torch.device, top: int, template: gpu.Work, time: Clock | None
) -> Choice | None:
    path = measured.place(given, template, device)
    known = measured.known(path)
    if known is not None or _capturing(device) or not _by_sizes(given):
        return known
    # the graph around it is traced with fake tensors
    with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng():
        try:
            calls = dict(_first(candidates(_filled(given, device), template), top))
            if len(calls) < 2:
                return None
            seconds = _timed(calls, time or clock(device))
        except (RuntimeError, IndexError, ValueError) as error:
            log.warning("a call of %s is not measured: %s", template, error)
            return None
    best = min(seconds, key=lambda way: seconds[way])
    log.info("%s on %s: %s", template, device, {str(w): s for w, s in seconds.items()})
    measured.keep(path, best, seconds)
    return best


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _by_sizes(given: Inputs) -> bool:
    """Do sizes say what there is to do? A map of blocks says it by its contents."""
    return tiles_cpu.cut(given.program) is None and all(x.numel() for x in given.qkv)


def _first(calls: Iterator[tuple[Choice, Callable[[], Any]]], top: int) -> Calls:
    found: Calls = {}
    for choice, call in calls:
        if len(found) < top:
            found[choice] = call
    return found


def _timed(calls: Calls, time: Clock) -> dict[Choice, float]:
    works = {}
    for choice, call in calls.items():
        try:
            call()
            works[choice] = call
        except RuntimeError as error:  # this one does not run here
            log.info("%s is not measured: %s", choice, error)
    found = alternated(works, _ROUNDS, time)
    return {choice: statistics.median(each) for choice, each in found.items()}


def _filled(given: Inputs, device: torch.device) -> Inputs:
    """The same call with random numbers; whole numbers are 0, which every index may be."""

    def drawn(x: Tensor) -> Tensor:
        if x.dtype == torch.bool:
            return torch.rand(x.shape, device=device) < 0.9
        if not x.is_floating_point():
            return torch.zeros(x.shape, dtype=x.dtype, device=device)
        found = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        return found.normal_()

    seed = given.drop.seed
    drop = Drop(None if seed is None else drawn(seed), given.drop.rate)
    q, k, v = (drawn(x) for x in given.qkv)
    return replace(given, q=q, k=k, v=v, reads=[drawn(x) for x in given.reads], drop=drop)


# ---------------------------------------------------------------- candidates


def candidates(given: Inputs, template: gpu.Work) -> Iterator[tuple[Choice, Callable[[], Any]]]:
    """The ways that a call can take on its device, the best by the cost model first."""
    if given.q.device.type == "cpu":
        for way in attention.ways(Frame(given)):
            yield Choice(way), _bound(attention.by, given, way)
        return
    run = gpu.forward_by if template == "forward" else _backward_of(given)
    for choice in gpu.choices(given, template):
        yield choice, _bound(run, given, choice)


def _bound(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: function(*args)


def _backward_of(given: Inputs) -> Callable[[Inputs, Choice], Any]:
    saved = gpu.forward(given)
    grad = torch.randn_like(saved[0])

    def run(given: Inputs, choice: Choice) -> Any:
        return gpu.backward_by(given, choice, grad, saved, {})

    return run
