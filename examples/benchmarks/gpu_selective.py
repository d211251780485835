"""Selective attention on a GPU: a pass and a training step beside our own dense kernels, and a step
of generation at several budgets.

    "selective"         nobody masks more than a thousandth, so that no tile may be left out
    "masks much"        random logits, which mask away what is far
    "dense"             our own kernels, causal, without F
    "budget", "half of it", ...   the kernel that attends over the slots of a cache
    "whole step"        eviction, attention over the largest budget, what the new token masks
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from gpu_cases import BUDGETS, Case
from gpu_timing import Machine, NotHere, Way
from gpu_ways import Call, picked
from torch import Tensor

from attn_compiler.kernels import flash_triton, flash_triton_backward
from attn_compiler.kernels.frame import Frame
from attn_compiler.kernels.gpu_tiles import backward_tiles
from attn_compiler.kernels.selective import selective_attention
from attn_compiler.kernels.slots import Rule, Slots, Token, attend, step

_WEAK = 1e-3
Makers = dict[str, Callable[[], Way]]


def passes(case: Case, machine: Machine) -> Makers:
    """A forward, or a forward and its backward where the section is that of a training."""
    call = Call.of(case, machine)
    weak = call.q.clone(memory_format=torch.preserve_format)
    weak[:, 0] *= _WEAK  # the head that selects
    few, training = replace(call, q=weak), case.section == "selective training"
    makers: Makers = {
        "selective": partial(_selective, few, training),
        "dense": partial(_dense, few, training),
        "masks much": partial(_selective, call, training),
    }
    return {name: makers[name] for name in case.ways}


def _selective(call: Call, training: bool) -> Way:
    program = call.given.program

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _, _ = selective_attention(
            q, k, v, [], [], None, [], None, None, program=program, scale=call.scale,
            dropout=0.0, head=0, select_from="qk",
        )  # fmt: skip
        return out

    if not training:
        return Way(partial(run, call.q, call.k, call.v), compared=False)
    leaves = call.leaves()
    return Way(lambda: torch.autograd.grad(run(*leaves), leaves, call.grad), compared=False)


def _dense(call: Call, training: bool) -> Way:
    if not call.machine.family:
        raise NotHere("Triton uses no matrix units here")
    given, tile = call.given, picked(call)
    if not training:
        return Way(lambda: flash_triton.forward(Frame(given), tile), compared=False)
    tiles = backward_tiles(given, call.machine.family, call.machine.hardware)

    def step() -> Any:
        saved = flash_triton.forward(Frame(given), tile)
        return flash_triton_backward.backward(Frame(given), call.grad, saved, {}, tiles)

    return Way(step, compared=False)


# ---------------------------------------------------------------- generation


@dataclass(frozen=True, slots=True)
class _Cache:
    """A full cache of one budget, and the token that comes."""

    slots: Slots
    token: Token

    @staticmethod
    def of(case: Case, machine: Machine, budget: int) -> _Cache:
        s, draw = case.sizes, partial(torch.randn, device=machine.device, dtype=machine.dtype)
        q, k, v = (draw(s.B, heads, 1, s.d) for heads in (s.H, s.G, s.G))
        token = Token(q, k, v)
        slots = Slots.empty(token, budget)
        for stored in slots.stored:
            stored.normal_()
        slots.amount.uniform_()
        slots.positions.copy_(torch.arange(budget, device=machine.device))
        return _Cache(slots, token)


def steps(case: Case, machine: Machine) -> Makers:
    """One token over caches of several budgets, and what a step takes as a whole."""
    rule = Rule("score: dot; mask: (k <= q + (S - T)); empty: any", float(case.sizes.d**-0.5))
    return {way: partial(_step, case, machine, rule, way) for way in case.ways}


def _step(case: Case, machine: Machine, rule: Rule, way: str) -> Way:
    budget = case.sizes.S // BUDGETS.get(way, 1)
    cache = _Cache.of(case, machine, budget)
    slots, token = cache.slots, cache.token
    facts = {"bytes": float(sum(x.nbytes for x in slots.stored))}
    if way not in BUDGETS:
        return Way(lambda: step(slots, rule, token, budget), facts, compared=False)
    ints, kept = [0, 1, budget], slots.stored
    return Way(lambda: attend(slots, rule, ints, token.q, *kept), facts, compared=False)
