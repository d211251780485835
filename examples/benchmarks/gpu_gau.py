"""Gated attention units on a GPU: what mixes tokens, and whole blocks, beside dense attention.

    two units' attention in chunks            |    dense attention of the same width
    x + unit(norm x), twice                   |    x + attention(norm x), x + net(norm x)

Widths are H heads of d features. A unit has s = d, an expanded width of 2 H d, and chunks of 256
tokens; in whole blocks s is 128. "plain" is PyTorch's own operators in the same order, in float32:
what the kernels' numbers are compared with. "chunk kernel" is the launch that computes a chunk and
reads the state, by itself: operations a second are claimed for it. Operations of a unit for a
token, causal: C (s + e) inside of its chunk, 2 s e to read the state, 2 s e to add to it; backward
C (4 s + 3 e) and 8 s e.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from gau_cpu import CHUNK, Block, Pair
from gpu_cases import Case
from gpu_timing import Machine, NotHere, Way
from gpu_ways import SDPA, Call, makers
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from attn_compiler.kernels import gau_cpu as plain
from attn_compiler.kernels import gau_triton, gau_triton_backward
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.gau_schema import GRADIENTS, GauInputs
from attn_compiler.kernels.library import attention

# of a machine without a GPU
_SHORT_CHUNK = 16


def mixing(case: Case, machine: Machine) -> tuple[dict[str, float], dict[str, Callable[[], Way]]]:
    """Operations of dense attention, and the ways to mix tokens, forward or backward."""
    s, backward = case.sizes, case.section.endswith("backward")
    call = Call.of(case, machine)
    first, second = (_mixed_backward, _plain_backward) if backward else (_mixed, _plain)
    made = {"gau": partial(first, call), "plain": partial(second, call)}
    made |= {} if backward else {"chunk kernel": partial(_chunk_kernel, call)}
    dense = replace(case, ways=tuple(name for name in case.ways if name not in made))
    others = makers(replace(call, case=dense))
    made |= {name: partial(_other, make) for name, make in others.items()}
    products = 2.5 if backward else 1.0
    return {"flops": products * 2.0 * s.B * s.H * s.T * s.T * s.d}, made


def _other(make: Callable[[], Way]) -> Way:
    """A way to another result."""
    way = make()
    return Way(way.call, way.facts, way.compiled, compared=False)


# of the last call alone: its ways share it
@lru_cache(maxsize=1)
def _inputs(call: Call) -> GauInputs:
    """Of one unit in the place of the heads of a case."""
    s, machine = call.case.sizes, call.machine
    draw = partial(torch.randn, device=machine.device, dtype=machine.dtype)
    chunk, expanded = CHUNK if machine.cuda else _SHORT_CHUNK, 2 * s.H * s.d
    q, k, q_lin, k_lin = (draw(s.B, s.T, s.d) for _ in range(4))
    v, gate = (draw(s.B, s.T, expanded) for _ in range(2))
    given = GauInputs(
        q, k, v, q_lin, k_lin, gate, draw(2 * chunk - 1), None, None, Drop(None, 0.0),
        chunk=chunk, causal=True, scale=call.scale, scale_mode="rowcount", inside=False,
    )  # fmt: skip
    if reason := gau_triton.refusal(given):
        raise NotHere(reason)
    return given


@lru_cache(maxsize=1)
def _before_backward(call: Call) -> tuple[GauInputs, Tensor, Tensor, list[bool]]:
    """Inputs, a gradient, what the forward pass has kept, and that all gradients are asked for."""
    given = _inputs(call)
    _, mixed = plain.forward(given)
    return given, torch.randn_like(mixed), mixed, [True] * len(GRADIENTS)


def _work(given: GauInputs) -> tuple[float, float]:
    """Operations inside of chunks with what is read of the state, and of adding to it."""
    batch, length, s, e = given.size
    tokens = float(batch * length)
    return tokens * (given.span * (s + e) + 2 * s * e), tokens * 2 * s * e


def _twice(run: Callable[[], Any], facts: Mapping[str, Any]) -> Way:
    """Of two units, which stand for one attention."""

    def both() -> Any:
        run()
        return run()

    return Way(both, facts)


def _mixed(call: Call) -> Way:
    given = _inputs(call)
    tile = gau_triton.tile(given, call.machine.family)
    return _twice(partial(gau_triton.forward, given, tile), {"flops": 2 * sum(_work(given))})


def _plain(call: Call) -> Way:
    return _twice(partial(plain.forward, _inputs(call)), {})


def _mixed_backward(call: Call) -> Way:
    given, *rest = _before_backward(call)
    tile = gau_triton_backward.tile(given, call.machine.family)
    batch, length, s, e = given.size
    work = batch * length * (given.span * (4 * s + 3 * e) + 8 * s * e)
    run = partial(gau_triton_backward.backward, given, tile, *rest)
    return _twice(run, {"flops": 2.0 * work})


def _plain_backward(call: Call) -> Way:
    return _twice(partial(plain.backward, *_before_backward(call)), {})


def _chunk_kernel(call: Call) -> Way:
    given = _inputs(call)
    tile = gau_triton.tile(given, call.machine.family)
    out, mixed = torch.empty_like(given.v), torch.empty_like(given.v)
    *first, last = gau_triton.prepare(given, tile, (out, mixed))
    for launch in first:
        launch.run()
    return Way(last.run, {"flops": _work(given)[0]}, compared=False)


# ---------------------------------------------------------------- whole blocks


def blocks(case: Case, machine: Machine) -> tuple[dict[str, float], dict[str, Callable[[], Way]]]:
    """A pair of units, and the dense block by who attends; all compiled on a GPU."""
    s, width = case.sizes, case.sizes.H * case.sizes.d
    small = {} if machine.cuda else {"s": s.d, "chunk": _SHORT_CHUNK}
    plain, own = (partial(Block, width, head=s.d, **more) for more in ({}, {"attend": _own(case)}))
    found: dict[str, Callable[[], Way]] = {
        "pair": partial(_way, case, machine, partial(Pair, width, **small), nullcontext),
        "own": partial(_way, case, machine, own, nullcontext),
    }
    found |= {
        name: partial(_way, case, machine, plain, partial(sdpa_kernel, backend))
        for name, backend in SDPA.items()
    }
    return {}, {name: found[name] for name in case.ways}


def _way(
    case: Case,
    machine: Machine,
    make: Callable[[], torch.nn.Module],
    within: Callable[[], AbstractContextManager[Any]],
) -> Way:
    """Forward passes of a module, or forward and backward, whose weights and inputs are those of
    all dense ones.
    """
    s = case.sizes
    torch.manual_seed(0)
    with machine.device:
        module: Any = make().to(machine.dtype)
        x, grad = (torch.randn(s.B, s.T, s.H * s.d, dtype=machine.dtype) for _ in range(2))
    training = case.section.endswith("training")
    module.train(training)
    leaves = [x.requires_grad_(), *module.parameters()] if training else []
    forward = torch.compile(module, dynamic=False) if machine.cuda else module

    def run() -> Any:
        with torch.set_grad_enabled(training), within():
            found: Tensor = forward(x)
            return torch.autograd.grad(found, leaves, grad) if training else found

    compared = isinstance(module, Block)
    return Way(run, compiled=partial(_peak, machine, run), compared=compared)


def _peak(machine: Machine, run: Callable[[], Any]) -> Mapping[str, Any]:
    """Bytes that a call holds at most beyond what was there."""
    torch.cuda.reset_peak_memory_stats(machine.device)
    before = torch.cuda.memory_allocated(machine.device)
    run()
    machine.wait()
    return {"memory": torch.cuda.max_memory_allocated(machine.device) - before}


def _own(case: Case) -> Callable[..., Tensor]:
    """The package's operator, by whichever kernel it chooses."""
    options = {"program": case.plan.program, "scale": case.sizes.d**-0.5, "dropout": 0.0}
    return lambda q, k, v: attention(q, k, v, [], [], None, **options)[0]
