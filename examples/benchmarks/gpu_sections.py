"""From a case to its row of the result: seconds of every round for every way, and what they did.

run(case, machine, rounds=11)   ->   {"name": ..., "flops": ..., "ways": {"triton": {...}}}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_cases import Case
from gpu_el import step
from gpu_experts import block, products
from gpu_gau import blocks, mixing
from gpu_selective import passes, steps
from gpu_summaries import summaries
from gpu_timing import Machine, Makers, Note, NotHere, Way, measure, tensors_of
from gpu_ways import TILED, Call, makers
from torch import Tensor

from attn_compiler.ir.score import Program
from attn_compiler.kernels.attention import reference
from attn_compiler.kernels.library import attention

# elements of the tensor that is read and copied for the bandwidth: a gigabyte
_STREAMED = 2**28
# runs of seconds need few rounds, as do many tiles
_FEW, _FEW_OF_TILES = 3, 5
# heads of the first sequence that are computed in float64
_JUDGED = 2
Row = dict[str, Any]


def run(
    case: Case,
    machine: Machine,
    rounds: int,
    note: Note = lambda way: None,
    lost: Mapping[str, str] | None = None,
) -> Row:
    """Measure one case.

    Args:
        note: told which way is next.
        lost: ways that must not be tried, with the reason.

    Raises:
        gpu_timing.DeviceLost: the device is of no use any more.
    """
    torch.manual_seed(0)
    torch.compiler.reset()  # or Dynamo stops compiling after some shapes
    found = _SECTIONS.get(case.section, _compared)(case, machine, rounds, note, lost or {})
    row = {"name": case.name, "section": case.section, "rule": case.rule, "density": case.density}
    return {**row, "sizes": asdict(case.sizes), **found}


def _kept(made: Makers, lost: Mapping[str, str]) -> Makers:
    """Ways that killed a process fail at once, with what they did."""

    def dead(reason: str) -> Way:
        raise NotHere(reason)

    return {name: partial(dead, lost[name]) if name in lost else m for name, m in made.items()}


def _compared(
    case: Case, machine: Machine, rounds: int, note: Note, lost: Mapping[str, str]
) -> Row:
    call = Call.of(case, machine)
    s = case.sizes
    share = case.plan.share(s, call.reads)
    products = 2.5 if case.section.endswith("backward") else 1.0
    tensors = (call.q, call.k, call.v, call.grad)  # out has the shape of its gradient
    rounds = min(rounds, _FEW_OF_TILES) if case.section in TILED else rounds
    return {
        "share": share,
        "flops": products * 4 * s.B * s.H * s.T * s.S * s.d * share,
        "bytes": sum(x.numel() * x.element_size() for x in tensors),
        "problem": None if call.problem is None else asdict(call.problem),
        "ways": measure(machine, _kept(makers(call), lost), rounds, machine.seconds, note),
    }


# ---------------------------------------------------------------- ceilings


def _ceilings(
    case: Case, machine: Machine, rounds: int, note: Note, lost: Mapping[str, str]
) -> Row:
    """How fast this device reads, copies and multiplies."""
    n = case.sizes.T
    x = torch.randn(_STREAMED if machine.cuda else 2**16, device=machine.device)
    into = torch.empty_like(x)
    a, b = (torch.randn(n, n, device=machine.device, dtype=machine.dtype) for _ in range(2))
    size = x.numel() * x.element_size()
    calls: dict[str, tuple[Callable[[], Any], dict[str, float]]] = {
        "sum": (x.sum, {"bytes": size}),
        "largest": (x.amax, {"bytes": size}),
        "copy": (lambda: into.copy_(x), {"bytes": 2 * size}),
        "product": (lambda: a @ b, {"flops": 2.0 * n**3}),
    }
    made = {
        name: partial(Way, call, facts, compared=False) for name, (call, facts) in calls.items()
    }
    return {"ways": measure(machine, _kept(made, lost), rounds, machine.seconds, note)}


# ---------------------------------------------------------------- numerics


def _numerics(
    case: Case, machine: Machine, rounds: int, note: Note, lost: Mapping[str, str]
) -> Row:
    """Distance of out and of the gradients from float64, |a - b| / |b|, on some heads."""
    call = Call.of(case, machine)
    exact = _exact(call)
    found: dict[str, dict[str, Any]] = {name: {} for name in case.ways}
    for section, names, right in (
        ("forward", ("out",), exact[:1]),
        ("backward", ("dq", "dk", "dv"), exact[1:]),
    ):
        ways = tuple(w for w in case.ways if section == "forward" or w != "gluon")
        part = replace(call, case=replace(case, section=section, ways=ways))  # type: ignore[arg-type]
        made: dict[str, Callable[[], Way]] = {"exact": partial(Way, lambda right=right: right)}
        made |= {name: partial(_sliced, make) for name, make in _kept(makers(part), lost).items()}
        measured = measure(machine, made, 0, machine.seconds, lambda w, s=section: note(w))
        for name in ways:
            if "error" in measured[name]:
                found[name].setdefault("error", f"{section}: {measured[name]['error']}")
            else:
                errors = dict(zip(names, measured[name]["differences"], strict=True))
                found[name].setdefault("errors", {}).update(errors)
    return {"ways": found}


def _exact(call: Call) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of the first heads in float64."""
    given = call.given
    q, k, v = leaves = [_slice(x).double().requires_grad_() for x in given.qkv]
    program = Program.parse(given.program)
    out, _ = reference(q, k, v, given.reads, given.ints, program, given.scale)
    grads = torch.autograd.grad(out, leaves, _slice(call.grad).double())
    return tuple(x.detach() for x in (out, *grads))


def _slice(x: Tensor) -> Tensor:
    return x[:1, :_JUDGED]


def _sliced(make: Callable[[], Way]) -> Way:
    way = make()

    def call() -> tuple[Tensor, ...]:
        # lse, where there is one, has no counterpart
        return tuple(_slice(x) for x in tensors_of(way.call()) if x.dim() == 4)

    return Way(call, way.facts)


# ---------------------------------------------------------------- launches


def _launches(
    case: Case, machine: Machine, rounds: int, note: Note, lost: Mapping[str, str]
) -> Row:
    """Seconds of the host per call: the tensors are so small that the device waits for it."""
    call = Call.of(case, machine)
    given, leaves = call.given, call.leaves()
    causal = {"is_causal": True, "scale": call.scale}

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = attention(
            q, k, v, given.reads, given.ints, None,
            program=given.program, scale=given.scale, dropout=0.0,
        )  # fmt: skip
        return out

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **causal)

    made: dict[str, Callable[[], Way]] = {}
    for name, attend in (("ours", ours), ("SDPA", theirs)):
        plain = partial(attend, *given.qkv)
        tracked = partial(attend, *leaves)
        made[f"{name}, no grad"] = partial(Way, plain, compared=False)
        made[f"{name}, grad"] = partial(Way, tracked, compared=False)
        made[f"{name}, forward and backward"] = partial(
            Way,
            lambda run=tracked: torch.autograd.grad(run(), leaves, call.grad),
            compared=False,
        )
    made["ours, CUDA graph"] = partial(_graph, machine, partial(ours, *given.qkv))
    made = {name: made[name] for name in case.ways}
    calls = 100 if machine.cuda else 2
    seconds = partial(machine.host_seconds, calls=calls)
    return {"ways": measure(machine, _kept(made, lost), rounds, seconds, note)}


def _graph(machine: Machine, call: Callable[[], Tensor]) -> Way:
    if not machine.cuda:
        raise NotHere("needs a GPU")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compilation must not be captured
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return Way(graph.replay, compared=False)


def _made(
    make: Callable[[Case, Machine], tuple[dict[str, Any], Mapping[str, Callable[[], Way]]]],
    case: Case,
    machine: Machine,
    rounds: int,
    note: Note,
    lost: Mapping[str, str],
) -> Row:
    """What makes its own numbers and ways."""
    numbers, made = make(case, machine)
    ways = measure(machine, _kept(made, lost), rounds, machine.seconds, note)
    return {**numbers, "ways": ways}


def _summaries(
    case: Case, machine: Machine, rounds: int, note: Note, lost: Mapping[str, str]
) -> Row:
    """Whole generations with beams, each way at its largest batch."""
    made = _kept(summaries(case, machine), lost)
    return {"ways": measure(machine, made, min(rounds, _FEW), machine.seconds, note)}


def _selective(
    case: Case, machine: Machine, rounds: int, note: Note, lost: Mapping[str, str]
) -> Row:
    """Passes with F and without, or steps over caches of several budgets."""
    made = (steps if case.section == "selective decode" else passes)(case, machine)
    return {"ways": measure(machine, _kept(made, lost), rounds, machine.seconds, note)}


_SECTIONS: dict[str, Callable[..., Row]] = {
    "selective": _selective,
    "selective training": _selective,
    "selective decode": _selective,
    "el": partial(_made, step),
    "expert project": partial(_made, products),
    "expert merge": partial(_made, products),
    "switchhead": partial(_made, block),
    "switchhead training": partial(_made, block),
    "gau": partial(_made, mixing),
    "gau backward": partial(_made, mixing),
    "gau block": partial(_made, blocks),
    "gau block training": partial(_made, blocks),
    "summaries": _summaries,
    "ceilings": _ceilings,
    "numerics": _numerics,
    "launch": _launches,
}
