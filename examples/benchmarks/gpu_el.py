"""EL-attention on a GPU: a step over hidden states beside one over keys and values.

    x [B, S, H d], T beams of each sample    |    keys and values [B T, H, S, d], one for each beam

Both compute the same function. "el" is the whole operator, with the products by W_k and W_v, "el
kernel" the part that reads x, which the bandwidth is claimed for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_cases import Case
from gpu_timing import Machine, NotHere, Way
from torch import Tensor

from attn_compiler.ir.score import Program
from attn_compiler.kernels import el_triton, gpu
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.el import built, el_attention
from attn_compiler.kernels.frame import Frame, Inputs
from attn_compiler.kernels.schema import attention

OPTIONS = {"program": str(Program()), "scale": 0.125}


class Step:
    """One step of generation: H heads of d features over S tokens, T beams of B samples."""

    def __init__(self, case: Case, machine: Machine) -> None:
        s = case.sizes
        self.width, self.beams = s.H * s.d, s.T
        draw = partial(torch.randn, device=machine.device, dtype=machine.dtype)
        self.x = draw(s.B, s.S, self.width)
        self.w_k, self.w_v = (draw(s.H, s.d, self.width) / self.width**0.5 for _ in range(2))
        self.q = draw(s.B * s.T, 1, s.H, s.d).transpose(1, 2)
        size = self.x.element_size()
        self.states = {"bytes": self.x.numel() * size, "flops": 4.0 * s.H * s.T * self.x.numel()}
        known = gpu.hardware(machine.device) if self.x.is_cuda else None
        self.peak = known.peak16 if known is not None else 0.0
        self.cache = {
            "bytes": 2 * s.T * self.x.numel() * size,
            "flops": 4.0 * s.T * self.x.numel(),
        }

    def ways(self) -> dict[str, Callable[[], Way]]:
        """By name, ours first."""
        return {"el": self._operator, "el kernel": self._kernel, "own decode": self._decode}

    def _operator(self) -> Way:
        args = (self.q, self.x, self.w_k, None, self.w_v, None, [], [])
        return Way(lambda: el_attention(*args, **OPTIONS)[0], self.states)

    def _kernel(self) -> Way:
        if not self.x.is_cuda:
            raise NotHere("needs a GPU")
        states = self.x[:, None]
        given = Inputs(self.q, states, states, [], [], Drop(None, 0.0), *OPTIONS.values())
        machine = gpu.hardware(self.q.device)
        if machine is None:
            raise NotHere("a device that is not in the table")
        tile = el_triton.tile(given, machine.processors, machine.arch)
        wide: Tensor = torch.randn(
            *self.q.shape[:3], self.width, device=self.x.device, dtype=torch.float32
        )
        run = partial(el_triton.forward, Frame(given), tile, wide, None)
        facts = {"rows": tile.rows, "keys": tile.keys, "splits": tile.splits}
        return Way(run, {**self.states, "tile": facts}, compared=False)

    def _decode(self) -> Way:
        beams = self.beams
        keys, values = (built(self.x, w, None) for w in (self.w_k, self.w_v))
        keys, values = (t.repeat_interleave(beams, 0).contiguous() for t in (keys, values))
        args = (self.q, keys, values, [], [], None)
        return Way(lambda: attention(*args, dropout=0.0, **OPTIONS)[0], self.cache)


def step(case: Case, machine: Machine) -> tuple[dict[str, Any], dict[str, Callable[[], Way]]]:
    """What a case is about in numbers, and its ways."""
    found = Step(case, machine)
    ways = found.ways()
    return {**found.states, "peak": found.peak}, {name: ways[name] for name in case.ways}
