"""What a GPU runs: for each call the first of its candidates that can express it.

    score: dot; mask: k <= q     ->   cudnn, flash, triton, composite
    score: 30 * tanh(dot / 30)   ->   triton, composite

PyTorch's own kernels come first where they express a call, since nobody shall get something
slower than before; which is faster has not been measured yet. Everything else is generated. What
no kernel can be generated for runs the composite ones.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from attn_compiler.cost.hardware import Hardware
from attn_compiler.errors import BadOption
from attn_compiler.kernels import attention as composite
from attn_compiler.kernels import flash_triton, flash_triton_backward, sdpa_gpu
from attn_compiler.kernels.frame import Frame, Inputs, in_heads_layout
from attn_compiler.kernels.gpu_tiles import SHORT, backward_tiles, forward_tile

log = logging.getLogger("attn_compiler")
Name = Literal["cudnn", "flash", "triton", "composite"]


def forward(given: Inputs) -> tuple[Tensor, Tensor]:
    """out and lse."""
    name = next(candidates(given))
    if name == "composite":
        return composite.forward(given)
    if name == "triton":
        device = given.q.device
        tile = forward_tile(given, family(device), hardware(device))
        return flash_triton.forward(Frame(given), tile)
    try:
        return sdpa_gpu.forward(name, given)
    except RuntimeError as error:  # torch refuses some calls only when they are made
        _give_up(name, given, error)
        return forward(given)


def backward(
    given: Inputs, grad: Tensor, saved: tuple[Tensor, Tensor], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of q, k, v and of the reads that `needs` marks."""
    name = next(candidates(given))
    # gradients of tensors are added up in no fixed order
    if name == "composite" or (any(needs) and torch.are_deterministic_algorithms_enabled()):
        return composite.backward(given, grad, saved, needs)
    into = {
        i: torch.zeros(given.reads[i].shape, dtype=given.dtype, device=given.q.device)
        for i, need in enumerate(needs)
        if need
    }
    if name == "triton":
        device = given.q.device
        tiles = backward_tiles(given, family(device), hardware(device))
        found = flash_triton_backward.backward(Frame(given), grad, saved, into, tiles)
    else:
        try:
            found = sdpa_gpu.backward(name, given, grad, saved)
        except RuntimeError as error:
            _give_up(name, given, error)
            return backward(given, grad, saved, needs)
    dq, dk, dv = (in_heads_layout(g, x.dtype) for g, x in zip(found, given.qkv, strict=True))
    return dq, dk, dv, [grad.to(given.reads[i].dtype) for i, grad in into.items()]


def candidates(given: Inputs) -> Iterator[Name]:
    """What can run a call on its device, the best first."""
    if all(x.numel() for x in given.qkv):
        if given.q.shape[2] > SHORT:  # a short query wants its keys divided among programs
            for backend in backends(given.q.device):
                known = _kind(backend, given) not in _given_up and sdpa_gpu.available(backend)
                if known and not sdpa_gpu.refusal(backend, given):
                    yield backend
        if generates(given):
            yield "triton"
    yield "composite"


_given_up: set[tuple[Any, ...]] = set()


def _kind(name: Name, given: Inputs) -> tuple[Any, ...]:
    """Calls that a backend takes or refuses together."""
    sizes = (given.q.shape[1:], given.k.shape[1:])
    return name, given.q.dtype, given.q.device, given.program, sizes


def _give_up(name: Name, given: Inputs, error: RuntimeError) -> None:
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
