"""Gated attention in chunks by generated Triton kernels: a forward pass of three launches.

    states, prefix, mix      see templates/gau.py.jinja

States are float32, [B, chunks, s, e]. Without chunks, with dropout, and for documents in both
directions there is no kernel: `gau_cpu` runs on any device, and so do all backward passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attn_compiler.kernels.gau_reach import Reach, Sweep
from attn_compiler.kernels.gau_schema import GauInputs
from attn_compiler.kernels.launch import Launch, dense, power, precision
from attn_compiler.kernels.template import load, render

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WIDEST = 128
_SCAN = 1024
# features of a state that are read at once
_STEP = 32


@dataclass(frozen=True, slots=True)
class GauTile:
    """What is chosen for the launches: rows, keys and channels of a program, warps, stages."""

    rows: int = 64
    keys: int = 64
    channels: int = 128
    warps: int = 8
    stages: int = 2


def refusal(given: GauInputs) -> str:
    """Why no kernel can be generated for this call; empty if one can."""
    named = (given.q, given.k, given.v, given.q_lin, given.k_lin, given.gate)
    dtypes = {x.dtype for x in named if x is not None}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        return f"the tensors are {', '.join(sorted(str(d) for d in dtypes))}"
    if given.chunk is None:
        return "there are no chunks"
    if given.drop.rate:
        return "weights are dropped"
    if given.documents is not None and not given.causal:
        return "documents in both directions"
    if given.q.shape[2] > _WIDEST:
        return f"s is above {_WIDEST}"
    return ""


def tile(given: GauInputs) -> GauTile:
    """The tile of a call: without spills on sm_80 and sm_90, not yet measured on a GPU."""
    return GauTile(32, 32, 64) if given.q.dtype.itemsize == 4 else GauTile()


def forward(given: GauInputs, tile: GauTile) -> tuple[Tensor, Tensor]:
    """out and mixed, which is empty without a gate."""
    out = torch.empty(given.v.shape, dtype=given.v.dtype, device=given.v.device)
    mixed = given.v.new_empty(0) if given.gate is None else torch.empty_like(out)
    for launch in prepare(given, tile, (out, mixed)):
        launch.run()
    return out, mixed


def prepare(given: GauInputs, tile: GauTile, into: tuple[Tensor, Tensor]) -> list[Launch]:
    """The launches of a forward pass, in order."""
    batch, length, s, e = given.size
    reach, chunk = Reach(given), given.chunk or length
    (sweep,) = reach.sweeps()
    chunks = -(-length // chunk)
    states = torch.empty((batch, chunks, s, e), dtype=torch.float32, device=given.v.device)
    module = load("gau", _source(_structure(given, sweep)))
    wide = given.q.dtype is torch.float32
    allowed = precision() if wide else "tf32"
    constants: dict[str, Any] = {"S": s, "E": e, "BLOCK_S": power(s), "BLOCK_E": tile.channels}
    constants |= {"BLOCK_N": tile.keys, "PRECISION": allowed}
    constants |= {"num_warps": tile.warps, "num_stages": tile.stages}
    slices, sizes = -(-e // tile.channels), (length, chunk, chunks)
    k_lin, v = dense(_given(given.k_lin)), dense(given.v)
    return [
        Launch(
            module.states,
            (chunks, slices, batch),
            (
                *(k_lin, v, states, *_vector(sweep.write, batch)),
                *(*k_lin.stride()[:2], *v.stride()[:2], *sizes),
            ),
            constants,
        ),
        Launch(
            module.prefix,
            (-(-s * e // _SCAN), batch, 1),
            (states, *(() if sweep.carry is None else (_carry(sweep.carry, batch),)), chunks),
            {"SIZE": s * e, "BLOCK": _SCAN, "num_warps": 4},
        ),
        Launch(
            module.mix,
            (chunks * -(-chunk // tile.rows), slices, batch),
            (*_mixed(given, reach, (sweep, states), into), *sizes, given.scale),
            constants | {"BLOCK_M": tile.rows, "STATES": allowed, "STEP": min(_STEP, power(s))},
        ),
    ]


def _mixed(
    given: GauInputs, reach: Reach, linear: tuple[Sweep, Tensor], into: tuple[Tensor, Tensor]
) -> list[Any]:
    """The tensors of `mix` and their strides."""
    batch, (sweep, states), (out, mixed) = given.size[0], linear, into
    q, k, v, q_lin = (dense(x) for x in (given.q, given.k, given.v, _given(given.q_lin)))
    # relu(a S + b)^2 = a^2 relu(S + b / a)^2
    outer = reach.rows(reach.near.square()) if given.inside else reach.outer
    (outer, outer_sb), (read, read_sb) = _vector(outer, batch), _vector(sweep.read, batch)
    args: list[Any] = [q, k, v, q_lin, states, outer, read, out]
    if given.gate is not None:
        gate = dense(given.gate)
        args += [gate, mixed, *gate.stride()[:2]]
    if given.bias is not None:
        args += [given.bias.contiguous(), given.bias.shape[0] // 2]
        if given.inside:
            args += _vector(torch.where(reach.near > 0, 1 / reach.near, 0.0), batch)
    if given.documents is not None:
        args += [x.expand(batch, -1).int().contiguous() for x in (reach.lo, reach.hi)]
    if given.valid is not None:
        args.append(given.valid.to(torch.int8).contiguous())
    return [*args, *(n for x in (q, k, v, q_lin) for n in x.stride()[:2]), outer_sb, read_sb]


def _given(x: Tensor | None) -> Tensor:
    if x is None:
        raise ValueError("a call without chunks has no kernel: ask `refusal` first")
    return x


def _vector(x: Tensor | None, batch: int) -> tuple[Any, ...]:
    """A vector [b, T] and its stride of the batch; nothing for none."""
    return () if x is None else (x.contiguous(), x.shape[1] if x.shape[0] == batch > 1 else 0)


def _carry(carry: Tensor, batch: int) -> Tensor:
    return carry.flatten(1).expand(batch, -1).contiguous()


def _structure(given: GauInputs, sweep: Sweep) -> tuple[tuple[str, bool], ...]:
    """What decides the text of the kernels."""
    biased = given.bias is not None
    return (
        ("causal", given.causal),
        ("gated", given.gate is not None),
        ("biased", biased),
        ("spread", biased and given.inside),
        ("documents", given.documents is not None),
        ("valid", given.valid is not None),
        ("weighted", sweep.write is not None),
        ("carried", sweep.carry is not None),
        ("half", given.q.dtype is torch.float16),
    )


@lru_cache(maxsize=128)
def _source(structure: tuple[tuple[str, bool], ...]) -> str:
    found = dict(structure)
    title = ", ".join(name for name, holds in found.items() if holds)
    return render("gau", title=title or "both directions", **found)
