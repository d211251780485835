"""Experts on a GPU: their projections beside plain products, and a block of SwitchHead beside a
dense one.

    project    x [T, D] -> [T, H, c]        merge    o [T, H, c] -> [T, D]        2 of G experts

"triton" is the whole operator, the sort of the routes included, "kernel" its product alone,
"cublas" one plain product of as many rows and operations; "grouped mm" gathers and sorts rows,
multiplies them by PyTorch's grouped product and adds them up. Blocks run forward, or forward and
backward with the gradients of all weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_cases import EXPERTS_ACTIVE, Case
from gpu_timing import Machine, NotHere, Way
from switchhead_cpu import CAUSAL, Dense, Ordinary, Switched
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_compiler.kernels import expert_forms, experts_triton
from attn_compiler.kernels.expert_forms import Routed
from attn_compiler.kernels.experts import expert_merge, expert_project
from attn_compiler.kernels.library import attention
from attn_compiler.planning import planned
from attn_compiler.variants.base import Shape
from attn_compiler.variants.switchhead import SwitchHead

Makers = dict[str, Callable[[], Way]]
WIDTH = 1024


class Products:
    """Projections into or out of H heads d wide, with G experts each."""

    def __init__(self, case: Case, machine: Machine) -> None:
        s, self.machine = case.sizes, machine
        self.merge = case.section == "expert merge"
        width = WIDTH if machine.cuda else 3 * s.d
        ins, outs = (s.d, width) if self.merge else (width, s.d)
        draw = partial(torch.randn, device=machine.device)
        self.x = draw(*((1, s.T, s.H, ins) if self.merge else (1, s.T, ins))).to(machine.dtype)
        self.w = (draw(s.H * s.G, ins, outs) / ins**0.5).to(machine.dtype)
        scores = torch.rand(1, s.T, s.H, s.G, device=machine.device)
        self.index = scores.topk(EXPERTS_ACTIVE, -1).indices.int()
        self.gate = torch.rand(self.index.shape, device=machine.device)
        rows = self.x.flatten(0, -2)
        self.call = Routed(rows, self.w, self.index[0], self.gate[0], s.G, self.merge)
        self.flops = 2.0 * self.index.numel() * ins * outs

    def ways(self) -> Makers:
        """By name, ours first."""
        return {
            "triton": self._operator,
            "kernel": self._kernel,
            "masked": lambda: Way(lambda: expert_forms._masked(self.call)),
            "cublas": self._plain,
            "grouped mm": lambda: Way(self._composed),
        }

    def _operator(self) -> Way:
        x = self.x.transpose(1, 2) if self.merge else self.x
        run = expert_merge if self.merge else expert_project

        def call() -> Tensor:
            y: Tensor = run(x, self.w, self.index, self.gate, experts=self.call.experts)
            return (y if self.merge else y.transpose(1, 2)).reshape(self.call.rows, -1)

        return Way(call)

    def _kernel(self) -> Way:
        if not self.machine.family:
            raise NotHere("Triton uses no matrix units here")
        if reason := experts_triton.refusal(self.call):
            raise NotHere(reason)
        into = torch.zeros(self.call.rows, self.w.shape[2], device=self.x.device)
        tile = experts_triton.tile(self.call)
        launch = experts_triton.prepare_forward(self.call, tile, into)
        facts = {"rows": tile.rows, "columns": tile.columns, "step": tile.step}
        # it adds to what is there
        return Way(launch.run, {"tile": facts}, compared=False)

    def _plain(self) -> Way:
        x = self.x.new_empty(self.index.numel(), self.w.shape[1]).normal_()
        return Way(lambda: x @ self.w[0], compared=False)

    def _composed(self) -> Tensor:
        heads, k = self.index.shape[2:]
        first = torch.arange(0, self.w.shape[0], self.call.experts, device=self.x.device)
        ids = (self.index[0] + first[:, None]).flatten().int()
        found = ids.sort(stable=True)
        numbers = torch.arange(self.w.shape[0], device=self.x.device, dtype=torch.int32)
        ends = torch.searchsorted(found.values, numbers, right=True, out_int32=True)
        token, slot = found.indices // (heads * k), found.indices // k
        source, target = (slot, token) if self.merge else (token, slot)
        rows = self.call.a.index_select(0, source)
        each = F.grouped_mm(rows, self.w, offs=ends)
        each = each * self.gate.flatten()[found.indices, None].to(each.dtype)
        out = each.new_zeros(self.call.rows, self.w.shape[2])
        return out.index_add_(0, target, each)


def products(case: Case, machine: Machine) -> tuple[dict[str, Any], Makers]:
    """What a case is about in numbers, and its ways."""
    found = Products(case, machine)
    ways = found.ways()
    s = case.sizes
    facts = {"flops": found.flops, "routes": s.T * EXPERTS_ACTIVE / s.G}
    return facts, {name: ways[name] for name in case.ways}


# ---------------------------------------------------------------- a block


class Own(Ordinary):
    """An ordinary layer around this package's attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        program, scale = CAUSAL.program, q.shape[-1] ** -0.5
        return attention(q, k, v, [], [], None, program=program, scale=scale, dropout=0.0)[0]


class Block(nn.Module):
    """Norm, attention, norm, a net four times as wide; both added to what came in."""

    def __init__(self, attention: nn.Module, width: int) -> None:
        super().__init__()
        self.attention = attention
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.down(F.gelu(self.up(self.second(x))))


_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}


def block(case: Case, machine: Machine) -> tuple[dict[str, Any], Makers]:
    """Whether the planner would keep the dense block, and the ways: forward passes, or whole steps
    without an optimiser.
    """
    s, training = case.sizes, case.section.endswith("training")
    sizes = Dense(s.H * s.d, s.H, s.d)
    x = torch.randn(s.B, s.T, sizes.width, device=machine.device, dtype=machine.dtype)
    x, above = x.requires_grad_(training), torch.randn_like(x)

    def way(layer: nn.Module, backend: SDPBackend | None = None) -> Way:
        made = Block(layer, sizes.width).to(machine.device, machine.dtype)
        learnt = [x, *made.parameters()]

        def call() -> Any:
            with torch.set_grad_enabled(training), _within(backend):
                y = made(x)
                return torch.autograd.grad(y, learnt, above) if training else y

        return Way(call, compared=False)

    made: Makers = {
        "switchhead": lambda: way(Switched(sizes, None)),
        "own": lambda: way(Own(sizes)),
    }
    for name, backend in _BACKENDS.items():
        made[name] = lambda b=backend: way(Ordinary(sizes), b)
    facts: dict[str, Any] = {}
    if machine.hardware is not None:
        shape = Shape(s.B, s.T, s.S, s.H, s.d, causal=True, training=training)
        facts["declined"] = planned(SwitchHead(), shape, machine.hardware, machine.dtype).keep
    return facts, {name: made[name] for name in case.ways}


def _within(backend: SDPBackend | None) -> AbstractContextManager[object]:
    return nullcontext() if backend is None else sdpa_kernel(backend)
