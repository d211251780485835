"""PyTorch's own fused attention on a GPU, where it can express a call: cuDNN, FlashAttention, and
the memory-efficient one ("efficient").

    score: dot; mask: True   or   k <= q with T == S   ->   out, lse   and the gradients of q, k, v

They are called below `scaled_dot_product_attention`, since the operator needs the logarithm of the
denominator. What a user has switched off in `torch.backends.cuda` is not used.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from attn_compiler.ir.expr import DOT, TRUE
from attn_compiler.ir.score import Program
from attn_compiler.kernels.frame import Inputs, in_heads_layout
from attn_compiler.kernels.grid import Grid, is_causal
from attn_compiler.kernels.plan import plan

aten = torch.ops.aten
Backend = Literal["cudnn", "flash", "efficient"]
_WIDEST: dict[Backend, int] = {"cudnn": 128, "flash": 256, "efficient": 1024}
# the efficient kernel keeps the logarithms of so many rows together
_ROWS_OF_LSE = 32


def refusal(backend: Backend, given: Inputs) -> str:
    """Why a backend cannot express a call; empty if it can."""
    program = Program.parse(given.program)
    if given.reads or program.score != DOT or program.sink is not None:
        return "a score that is more than the product"
    if program.mask != TRUE and not _causal(given):
        return "a mask that is not causal, or causal with other numbers of rows and keys"
    if given.drop.rate:
        return "dropout, which has to be the same on every device"
    if any(x.numel() == 0 or x.stride(3) != 1 for x in given.qkv):
        return "features that do not lie side by side"
    if not given.scale > 0:
        return f"the scale {given.scale} is not positive"
    return _other_tensors(backend, *given.qkv)


def _other_tensors(backend: Backend, q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why a backend does not take such tensors."""
    efficient = backend == "efficient"
    dtypes = {torch.float16, torch.bfloat16} | ({torch.float32} if efficient else set())
    if q.dtype not in dtypes or not q.dtype == k.dtype == v.dtype:
        return f"numbers in {q.dtype}, {k.dtype} and {v.dtype}"
    widths, unit = (q.shape[3], v.shape[3]), 16 // q.element_size()
    if any(n % unit or n > _WIDEST[backend] for n in widths):
        return f"head dims {widths[0]} and {widths[1]}"
    if not efficient and widths[0] != widths[1]:
        return f"head dims {widths[0]} and {widths[1]}"
    return "heads that share keys" if efficient and q.shape[1] != k.shape[1] else ""


def _causal(given: Inputs) -> bool:
    (batch, heads, rows, _), keys = given.q.shape, given.k.shape[2]
    grid = Grid(given.program, batch, heads, rows, keys, tuple(given.ints))
    return rows == keys and plan(given.program).loose == TRUE and is_causal(grid)


def available(backend: Backend) -> bool:
    """Is it built in, switched on, and allowed to add in any order?"""
    cuda = torch.backends.cuda
    if torch.version.hip:
        return False
    if backend == "flash":
        return cuda.is_flash_attention_available() and cuda.flash_sdp_enabled()
    exact = torch.are_deterministic_algorithms_enabled()
    if backend == "efficient":
        return cuda.mem_efficient_sdp_enabled() and not exact
    version = torch.backends.cudnn.version() or 0
    return cuda.cudnn_sdp_enabled() and version >= 90000 and not exact


def forward(backend: Backend, given: Inputs) -> tuple[Tensor, Tensor]:
    """out [B, H, T, d] and lse [B, H, T], for a call that the backend does not refuse."""
    (q, k, v), causal = given.qkv, Program.parse(given.program).mask != TRUE
    if backend == "cudnn":
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention.default(
            q, k, v, None, True, 0.0, causal, False, scale=given.scale
        )
    elif backend == "flash":
        out, lse, *_ = aten._scaled_dot_product_flash_attention.default(
            q, k, v, 0.0, causal, False, scale=given.scale
        )
    else:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention.default(
            q, k, v, None, True, 0.0, causal, scale=given.scale
        )
        lse = lse.narrow(2, 0, q.shape[2])
    return in_heads_layout(out, v.dtype), lse.reshape(q.shape[:3]).contiguous()


def backward(
    backend: Backend, given: Inputs, grad: Tensor, saved: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from out and lse of any forward."""
    (q, k, v), (out, lse) = given.qkv, saved
    causal = Program.parse(given.program).mask != TRUE
    # what only dropout and packed batches read
    seed, offset = (torch.empty((), dtype=torch.int64, device=q.device) for _ in range(2))
    lengths = q.shape[2], k.shape[2]
    grad, lse = grad.to(q.dtype), lse.contiguous()
    if backend == "cudnn":
        found = aten._scaled_dot_product_cudnn_attention_backward.default(
            grad, q, k, v, out, lse.unsqueeze(-1), seed, offset, None, None, None,
            *lengths, 0.0, causal, scale=given.scale,
        )  # fmt: skip
    elif backend == "flash":
        found = aten._scaled_dot_product_flash_attention_backward.default(
            grad, q, k, v, out, lse, None, None, *lengths, 0.0, causal, seed, offset,
            scale=given.scale,
        )  # fmt: skip
    else:
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % _ROWS_OF_LSE), value=float("inf"))
        found = aten._scaled_dot_product_efficient_attention_backward.default(
            grad, q, k, v, None, out, lse, seed, offset, 0.0, [True, True, True, False],
            causal, scale=given.scale,
        )  # fmt: skip
    return found[0], found[1], found[2]
