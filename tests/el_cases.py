"""Inputs of attn_compiler::el_attention, and what a model writes down in its place."""

from __future__ import annotations

from typing import Any

import torch
from attention_cases import B, Shape, draw, eager
from torch import Tensor

from attn_compiler.ir.score import Program
from attn_compiler.kernels.el import built


def arguments(s: Shape, width: int, dtype: torch.dtype, beams: int = 1) -> list[Tensor]:
    """q, x, w_k, b_k, w_v, b_v; the scores have a standard deviation of about one."""
    q = draw(B, s.T, s.H, s.d).to(dtype).transpose(1, 2)
    x = draw(B // beams, s.S, width)
    w_k, w_v = draw(s.G, s.d, width) / width**0.5, draw(s.G, s.dv, width) / width**0.5
    return [q, *(t.to(dtype) for t in (x, w_k, draw(s.G, s.d), w_v, draw(s.G, s.dv)))]


def plain(given: list[Tensor], reads: Any, ints: Any, program: Program) -> Tensor:
    """What a model writes down: keys and values in the dtype of the inputs, then attention."""
    q, x, w_k, b_k, w_v, b_v = given
    beams = q.shape[0] // x.shape[0]
    k, v = (built(x, w, b).repeat_interleave(beams, 0) for w, b in ((w_k, b_k), (w_v, b_v)))
    return eager(q, k, v, reads, ints, program)
