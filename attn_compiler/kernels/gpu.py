"""What a GPU runs: for each call the first of its candidates that can express it.

    score: dot; mask: k <= q     ->   cudnn, flash, triton, composite
    score: 30 * tanh(dot / 30)   ->   triton, composite

The cost model orders PyTorch's own kernels, where they express a call, and the generated one (see
`cost.peers.order`). What was measured comes before any prediction; what nothing predicts, PyTorch's
memory-efficient kernel and ours in Gluon, runs only where it was measured as the fastest. What no
kernel can be generated for runs the composite ones.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.peers import order, predicted
from attn_compiler.cost.problem import SHORT
from attn_compiler.errors import BadOption
from attn_compiler.kernels import attention as composite
from attn_compiler.kernels import (
    flash_gluon,
    flash_triton,
    flash_triton_backward,
    measured,
    sdpa_gpu,
)
from attn_compiler.kernels.frame import Frame, Inputs, in_heads_layout
from attn_compiler.kernels.gpu_tiles import (
    backward_tiles,
    forward_tile,
    problem_of,
    ranked_tiles,
)
from attn_compiler.kernels.measured import Choice

log = logging.getLogger("attn_compiler")
Work = Literal["forward", "backward"]


def forward(given: Inputs) -> tuple[Tensor, Tensor]:
    """out and lse; by the next candidate where one refuses a call only when it is made."""
    choice = chosen(given, "forward")
    try:
        return forward_by(given, choice)
    except RuntimeError as error:
        if choice.name in ("triton", "composite"):
            raise
        _give_up(choice.name, given, error)
        return forward(given)


def forward_by(given: Inputs, choice: Choice) -> tuple[Tensor, Tensor]:
    """The same by one way.

    Raises:
        RuntimeError: it does not run here.
    """
    if choice.name == "composite":
        return composite.forward(given)
    if choice.name == "triton":
        device = given.q.device
        tiles = choice.tiles or (forward_tile(given, family(device), hardware(device)),)
        return flash_triton.forward(Frame(given), tiles[0])
    if choice.name == "gluon":
        return _by_gluon(given, choice)
    return sdpa_gpu.forward(backend_of(choice), given)


def _by_gluon(given: Inputs, choice: Choice) -> tuple[Tensor, Tensor]:
    try:
        return flash_gluon.forward(Frame(given), choice.tiles[0])
    except Exception as error:  # its names move between releases, and its errors are of any kind
        raise RuntimeError(f"the kernel in Gluon: {error!r}") from error


def backward(
    given: Inputs, grad: Tensor, saved: tuple[Tensor, Tensor], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of q, k, v and of the reads that `needs` marks."""
    choice = chosen(given, "backward")
    # gradients of tensors are added up in no fixed order
    if choice.name == "composite" or (any(needs) and torch.are_deterministic_algorithms_enabled()):
        return composite.backward(given, grad, saved, needs)
    into = {
        i: torch.zeros(given.reads[i].shape, dtype=given.dtype, device=given.q.device)
        for i, need in enumerate(needs)
        if need
    }
    try:
        found = backward_by(given, choice, grad, saved, into)
    except RuntimeError as error:
        if choice.name == "triton":
            raise
        _give_up(choice.name, given, error)
        return backward(given, grad, saved, needs)
    dq, dk, dv = (in_heads_layout(g, x.dtype) for g, x in zip(found, given.qkv, strict=True))
    return dq, dk, dv, [grad.to(given.reads[i].dtype) for i, grad in into.items()]


def backward_by(
    given: Inputs,
    choice: Choice,
    grad: Tensor,
    saved: tuple[Tensor, Tensor],
    into: dict[int, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v by a candidate with kernels; those of the reads are added to `into`."""
    if choice.name != "triton":
        return sdpa_gpu.backward(backend_of(choice), given, grad, saved)
    device = given.q.device
    tiles = choice.tiles or backward_tiles(given, family(device), hardware(device))
    return flash_triton_backward.backward(
        Frame(given), grad, saved, into, (tiles[0], tiles[1])
    )  # fmt: skip


def backend_of(choice: Choice) -> sdpa_gpu.Backend:
    """The one of PyTorch's that has this name."""
    return next(name for name in get_args(sdpa_gpu.Backend) if name == choice.name)


# ---------------------------------------------------------------- who


def chosen(given: Inputs, work: Work) -> Choice:
    """What was measured for a call like this one, else the first candidate."""
    found = measured.fastest(given, work)
    if found is not None and found.name in (*candidates(given, work), *_unpredicted(given, work)):
        return found
    return Choice(next(candidates(given, work)))


def candidates(given: Inputs, work: Work = "forward") -> Iterator[str]:
    """What can run a call on its device, the best first."""
    names: list[str] = []
    if all(x.numel() for x in given.qkv):
        if given.q.shape[2] > SHORT:  # a short query wants its keys divided among programs
            for backend in backends(given.q.device):
                if _takes(backend, given):
                    names.append(backend)
        if generates(given):
            names.append("triton")
    row = hardware(given.q.device) if len(names) > 1 else None
    if row is not None:
        names = list(order(row, problem_of(given).bucketed(), tuple(names), work))
    yield from (*names, "composite")


def _takes(backend: sdpa_gpu.Backend, given: Inputs) -> bool:
    if _kind(backend, given) in _given_up or not sdpa_gpu.available(backend):
        return False
    return not sdpa_gpu.refusal(backend, given)


def _unpredicted(given: Inputs, work: Work) -> dict[str, Choice]:
    """What runs a call only where it was measured, by name."""
    found: dict[str, Choice] = {}
    device = given.q.device
    if given.q.shape[2] <= SHORT or not family(device):
        return found
    if warp_specialises(device) and work == "forward" and not flash_gluon.refusal(given):
        found["gluon"] = Choice("gluon", (flash_gluon.usual_tile(given),))
    if _takes("efficient", given):
        found["efficient"] = Choice("efficient")
    return {name: way for name, way in found.items() if _kind(name, given) not in _given_up}


def choices(given: Inputs, work: Work) -> Iterator[Choice]:
    """All ways of a call with their tiles, the best by the cost model first; what it knows nothing
    about comes beside the best generated kernel.
    """
    device = given.q.device
    row, problem = hardware(device), problem_of(given)
    found: list[tuple[float, Choice]] = []
    seconds = predicted(row, problem, work) if row is not None else {}
    for name in candidates(given, work):
        if name == "triton":
            for guess, tiles in ranked_tiles(given, family(device), row, work):
                found.append((guess, Choice(name, tiles)))
        elif name != "composite":
            found.append((seconds.get(name, 0.0), Choice(name)))
    ours = min((guess for guess, choice in found if choice.name == "triton"), default=0.0)
    found += [(ours, choice) for choice in _unpredicted(given, work).values()]
    yield from (choice for _, choice in sorted(found, key=lambda pair: pair[0]))


_given_up: set[tuple[Any, ...]] = set()


def _kind(name: str, given: Inputs) -> tuple[Any, ...]:
    """Calls that a backend takes or refuses together."""
    sizes = (given.q.shape[1:], given.k.shape[1:])
    return name, given.q.dtype, given.q.device, given.program, sizes


def _give_up(name: str, given: Inputs, error: RuntimeError) -> None:
    """Ask this backend no more for calls like this one."""
    log.warning("%s does not take a call that it should take: %s", name, error)
    _given_up.add(_kind(name, given))


def generates(given: Inputs) -> bool:
    """Is there a generated kernel for this call on its device?"""
    if any(x.numel() == 0 for x in given.qkv) or flash_triton.refusal(given):
        return False
    return bool(family(given.q.device))


@lru_cache(maxsize=64)
def backends(device: torch.device) -> tuple[sdpa_gpu.Backend, ...]:
    """PyTorch's own kernels that suit the device."""
    if not family(device):
        return ()
    # cuDNN's is written for the matrix units of these, FlashAttention's for those of capability 8
    major, _ = torch.cuda.get_device_capability(device)
    return ("cudnn", "flash") if major in (9, 10) else ("flash",)


@lru_cache(maxsize=64)
def warp_specialises(device: torch.device) -> bool:
    """Is it what the kernel in Gluon is written for?"""
    return not torch.version.hip and torch.cuda.get_device_capability(device) == (9, 0)


@lru_cache(maxsize=64)
def family(device: torch.device) -> str:
    """Which tiles suit the device; empty where Triton uses no matrix units (below capability 8)."""
    if find_spec("triton") is None:
        return ""
    if torch.version.hip:
        return "amd"
    major, _ = torch.cuda.get_device_capability(device)
    # consumer Blackwell (12) has the shared memory and the matrix instructions of Ampere
    return "hopper" if major in (9, 10, 11) else "ampere" if major >= 8 else ""


@lru_cache(maxsize=64)
def hardware(device: torch.device) -> Hardware | None:
    """The numbers of the device, None where they are not known."""
    try:
        return Hardware.from_device(device)
    except BadOption:
        return None
