"""attn_compiler::gau_attention, complete: import this file to have it.

reference   the T x T matrices of `gau_schema`, differentiable: the specification
kernels     `gau_cpu`: squares of A one after the other, states from chunk to chunk;
            `gau_triton`, `gau_triton_backward`: the same on a GPU
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attn_compiler.kernels import gau_cpu, gau_triton, gau_triton_backward, gpu
from attn_compiler.kernels.derivatives import derive
from attn_compiler.kernels.devices import full_precision
from attn_compiler.kernels.gau_schema import (
    GauInputs,
    check_gau,
    gau_attention,
    gau_attention_backward,
)
from attn_compiler.kernels.schema import LIBRARY

__all__ = ["gau_attention", "gau_attention_backward", "reference", "samples"]


# ---------------------------------------------------------------- the specification


def reference(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The operator in plain PyTorch, differentiable to any order."""
    given = GauInputs.of(*args, **kwargs)
    check_gau(given)
    with full_precision(given.q.device.type):
        mixed = _near(given) @ given.v.to(given.dtype)
        if given.chunk and given.q_lin is not None and given.k_lin is not None:
            mixed = mixed + _far(given, given.q_lin, given.k_lin, given.chunk) @ given.v.to(
                given.dtype
            )
        if given.gate is None:
            return mixed.to(given.v.dtype), given.v.new_empty(0)
        return (mixed * given.gate).to(given.v.dtype), mixed.to(given.v.dtype)


def _near(given: GauInputs) -> Tensor:
    """A, [B, T, T]."""
    i, j, own = _places(given)
    if given.chunk is not None:
        own = own & (i // given.chunk == j // given.chunk)
    seen = own & (j <= i) if given.causal else own
    by = _divisor(given, own if given.scale_mode == "valid" else seen, given.chunk)
    scores = given.q.to(given.dtype) @ given.k.to(given.dtype).mT * given.scale
    if given.inside:
        scores, by = scores / by, torch.ones_like(by)
    if given.bias is not None:
        last = given.bias.shape[0] - 1  # what is further away is masked
        scores = scores + given.bias.to(given.dtype)[(j - i + last // 2).clamp(0, last)]
    weights = torch.where(seen, scores.relu().square() / by, 0.0)
    batch, length, _, _ = given.size
    dropped = given.drop.dropped((1, length), (0, batch), (0, length), (0, length))
    return weights if dropped is None else weights * ~dropped[:, 0] * given.drop.gain


def _far(given: GauInputs, q: Tensor, k: Tensor, chunk: int) -> Tensor:
    """Weights of the linear attention, [B, T, T]."""
    i, j, document = _places(given)
    seen = document & (j // chunk < i // chunk) if given.causal else document
    mode, length = given.scale_mode, given.size[1]
    by = _divisor(given, document if mode == "valid" else seen, chunk if given.causal else length)
    return torch.where(seen, q.to(given.dtype) @ k.to(given.dtype).mT / by, 0.0)


def _places(given: GauInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [T, 1], keys [T], and which of them are valid and of one document, [B, T, T]."""
    batch, length, _, _ = given.size
    index = torch.arange(length, device=given.q.device)
    same = torch.ones(batch, length, length, dtype=torch.bool, device=index.device)
    if given.documents is not None:
        number = pad((given.documents.diff() != 0).long(), (1, 0)).cumsum(1)
        same = number[:, :, None] == number[:, None, :]
    if given.valid is not None:
        same = same & given.valid[:, :, None] & given.valid[:, None, :]
    return index[:, None], index, same


def _divisor(given: GauInputs, counted: Tensor, chunk: int | None) -> Tensor:
    """[B, T, 1]; 1 where nothing counts."""
    by = {"chunk": chunk, "seqlen": given.size[1]}.get(given.scale_mode, given.fixed)
    number = counted.sum(-1, keepdim=True).to(given.dtype).clamp(min=1)
    return number if by is None else torch.full_like(number, by)


# ---------------------------------------------------------------- the operator


def _forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """attn_compiler::gau_attention, without derivatives."""
    given = GauInputs.of(*args, **kwargs)
    check_gau(given)
    with full_precision(given.q.device.type):
        if runs_triton(given):
            tile = gau_triton.tile(given, gpu.family(given.q.device))
            return gau_triton.forward(given, tile)
        return gau_cpu.forward(given)


def runs_triton(given: GauInputs) -> bool:
    """Is there a generated kernel for this call on its device?"""
    device = given.q.device
    if device.type != "cuda" or not given.q.numel() or not given.v.numel():
        return False
    return not gau_triton.refusal(given) and bool(gpu.family(device))


def _backward(grad_out: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
    """attn_compiler::gau_attention_backward, without derivatives."""
    *forward_args, _, mixed, needs = args
    given = GauInputs.of(*forward_args, **kwargs)
    with full_precision(given.q.device.type):
        if runs_triton(given):
            tile = gau_triton_backward.tile(given, gpu.family(given.q.device))
            return gau_triton_backward.backward(given, tile, grad_out, mixed, needs)
        return gau_cpu.backward(given, grad_out, mixed, needs)


@torch.library.register_fake("attn_compiler::gau_attention", lib=LIBRARY)
def _fake(*args: Any, **_: Any) -> tuple[Tensor, Tensor]:
    v, gate = args[2], args[5]
    return v.new_empty(v.shape), v.new_empty(0 if gate is None else v.shape)


@torch.library.register_fake("attn_compiler::gau_attention_backward", lib=LIBRARY)
def _fake_backward(grad_out: Tensor, *args: Any, **_: Any) -> list[Tensor]:
    tensors = [x for x in args[:10] if x is not None]
    return [x.new_empty(x.shape) for x, need in zip(tensors, args[-1], strict=True) if need]


LIBRARY.impl("gau_attention", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("gau_attention_backward", _backward, "CompositeExplicitAutograd")
derive(gau_attention, gau_attention_backward, reference=reference, kernels=(_forward, _backward))


# ---------------------------------------------------------------- samples


def samples() -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(operator, args, kwargs) for every kind of call and its backward, small, on the CPU."""
    documents = torch.tensor([[4] * 5 + [2] * 8, [1] * 2 + [7] * 9 + [1] * 2])
    valid = torch.arange(13) < torch.tensor([[13], [9]])
    kinds: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"chunk": None}),
        ({"gate": None, "bias": None}, {"chunk": None, "causal": False}),
        ({"valid": valid}, {}),
        ({"valid": valid, "documents": documents}, {}),
        ({"documents": documents}, {"causal": False}),
        ({"gate": None}, {"causal": False, "scale_mode": "seqlen", "inside": True}),
        ({"seed": torch.tensor([5])}, {"dropout": 0.25}),
        ({"dtype": torch.bfloat16}, {"scale_mode": "fixed(64)"}),
    ]
    for tensors, options in kinds:
        args, kwargs = _sample(tensors, options)
        yield gau_attention, args, kwargs
        with torch.no_grad():
            results = gau_attention(*args, **kwargs)
        plain = tuple(x if x is None else x.detach() for x in args)
        needs = [x.is_floating_point() for x in args if x is not None]
        yield gau_attention_backward, (torch.ones_like(results[0]), *plain, *results, needs), kwargs


def _sample(
    tensors: dict[str, Any], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    chosen = {"chunk": 5, "causal": True, "scale": 0.5, "scale_mode": "rowcount", "inside": False}
    chosen |= {"dropout": 0.0} | options
    linear = 4 if chosen["chunk"] is not None else None
    widths: dict[str, int | None] = {"q": 4, "k": 4, "v": 7, "q_lin": linear, "k_lin": linear}
    draw, dtype = torch.Generator().manual_seed(0), tensors.get("dtype", torch.float32)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype).requires_grad_()

    found = {n: None if width is None else drawn(2, 13, width) for n, width in widths.items()}
    found |= {"gate": drawn(2, 13, 7), "bias": drawn(25)}
    found |= dict.fromkeys(("valid", "documents", "seed"))
    found |= {name: x for name, x in tensors.items() if name != "dtype"}
    return tuple(found.values()), chosen
