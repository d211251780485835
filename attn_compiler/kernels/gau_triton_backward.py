"""The backward pass of gated attention by generated Triton kernels, by recomputation.

    d = grad gate           dgate = grad mixed
    M_g, D_g                sums of keys and values, and the other way round of queries and d
    queries, keys, values   see templates/gau_backward.py.jinja

At most seven launches beside the two products; only what is asked for is launched. Nothing of size
T x T is kept, and results are the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attn_compiler.kernels.gau_reach import Direction
from attn_compiler.kernels.gau_schema import GauInputs
from attn_compiler.kernels.gau_triton import (
    GauTile,
    Setting,
    Sums,
    forward_sums,
    module,
    sums,
    tokens,
)
from attn_compiler.kernels.launch import Launch, power

_ADJOINT: dict[Direction, Direction] = {"before": "after", "after": "before", "all": "all"}


def tile(given: GauInputs, family: str = "") -> GauTile:
    """The tile of a call: without spills on sm_80, sm_90, sm_100 and gfx942, not yet measured.

    Args:
        family: of the device, as `gpu.family` names it.
    """
    if given.q.dtype.itemsize == 4:
        return GauTile(16, 32, 32, 64, 32)
    half = given.q.dtype is torch.float16
    rows = keys = 64
    channels = 128 if half else 256
    if given.documents is not None or given.drop.rate or given.inside:  # more for every token
        rows, keys, channels = 32, 32 if half else 64, 64
    if family == "amd":
        return GauTile(rows, keys, 64, 64, warps=4)
    return GauTile(rows, keys, channels)


def backward(
    given: GauInputs, tile: GauTile, grad: Tensor, mixed: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients that `needs` marks, which has an entry for each tensor of the call."""
    wanted, found = given.wanted(needs), {}
    if given.gate is not None:
        found["gate"] = (grad * mixed).to(given.gate.dtype).contiguous()
        grad = grad * given.gate
    launches, into = prepare(given, tile, grad.to(given.v.dtype), wanted)
    for launch in launches:
        launch.run()
    if given.bias is not None and "bias" in into:
        # each program has summed up its own
        into["bias"] = into["bias"].sum((0, 1)).to(given.bias.dtype)
    found |= into
    return [found[name] for name in wanted]


def prepare(
    given: GauInputs, tile: GauTile, grad: Tensor, wanted: Sequence[str]
) -> tuple[list[Launch], dict[str, Tensor]]:
    """The launches in order, and what they fill.

    Args:
        grad: of `mixed`.
        wanted: gradients, by name; others of the same launches come with them.
    """
    call = _Call(Setting.of(given, tile), grad, "bias" in wanted)
    launches: list[Launch] = []
    into: dict[str, Tensor] = {}
    queries, keys, values = (
        not set(names).isdisjoint(wanted)
        for names in (("q", "q_lin", "bias"), ("k", "k_lin"), ("v",))
    )
    if queries:
        found = call.forward_sums()
        launches += [*_launches(found), call.queries(found, into)]
    if keys or values:
        found = call.backward_sums()
        launches += _launches(found)
        launches += [call.keys(found, into)] if keys else []
        launches += [call.values(found, into)] if values else []
    return launches, into


def _launches(found: Sums | None) -> tuple[Launch, ...]:
    return () if found is None else found.launches


class _Call:
    """A call with the gradient of `mixed`."""

    def __init__(self, setting: Setting, grad: Tensor, summed: bool) -> None:
        self._setting, self._given, self._grad = setting, setting.given, grad
        self._sweep = sweep = setting.sweep
        self._write = None if sweep is None else sweep.write
        self._structure = setting.structure() | {
            "summed": summed,
            "written": self._write is not None,
        }

    def forward_sums(self) -> Sums | None:
        """Of keys and values, as the forward pass read them."""
        return None if self._sweep is None else forward_sums(self._setting, self._sweep)

    def backward_sums(self) -> Sums | None:
        """Of what read a chunk: its queries and their gradients."""
        sweep, queries = self._sweep, self._given.q_lin
        if sweep is None or queries is None:
            return None
        way = _ADJOINT[sweep.direction], sweep.carry
        return sums(self._setting, (queries, sweep.read), self._grad, way)

    def queries(self, found: Sums | None, into: dict[str, Tensor]) -> Launch:
        setting, given = self._setting, self._given
        args = self._narrow("q", found, into)
        if given.bias is not None and self._structure["summed"]:
            blocks, batch = setting.blocks(setting.tile.rows), given.size[0]
            distances = given.bias.shape[0]
            # two, as neighbouring tiles have distances in common
            part = given.q.new_zeros((blocks * batch, 2, distances), dtype=torch.float32)
            into["bias"] = part
            args += [part, distances]
        return self._launch("queries", args, setting.tile.rows)

    def keys(self, found: Sums | None, into: dict[str, Tensor]) -> Launch:
        return self._launch("keys", self._narrow("k", found, into), self._setting.tile.keys)

    def values(self, found: Sums | None, into: dict[str, Tensor]) -> Launch:
        setting, given = self._setting, self._given
        into["v"] = torch.empty(given.v.shape, dtype=given.v.dtype, device=given.v.device)
        args = [*tokens(given.q), *tokens(given.k), *tokens(self._grad), into["v"]]
        if found is not None and given.k_lin is not None:
            args += [*tokens(given.k_lin), *setting.vector(self._write)]
            args += [found.states, setting.chunks]
        return self._launch("values", args, setting.tile.keys)

    def _narrow(self, name: str, found: Sums | None, into: dict[str, Tensor]) -> list[Any]:
        """The arguments of what makes gradients of queries, or of keys."""
        setting, given = self._setting, self._given
        wide = (tokens(x) for x in (given.q, given.k, given.v, self._grad))
        into[name] = torch.empty(given.q.shape, dtype=given.q.dtype, device=given.q.device)
        args = [x for several in wide for x in several] + [into[name]]
        if found is not None and self._sweep is not None:
            factor = self._sweep.read if name == "q" else self._write
            linear = into[f"{name}_lin"] = torch.empty_like(into[name])
            args += [*setting.vector(factor), found.states, linear, setting.chunks]
        return args

    def _launch(self, name: str, args: list[Any], own: int) -> Launch:
        setting, batch = self._setting, self._given.size[0]
        slices, constants = 1, setting.constants(setting.tile.part, setting.tile.part)
        if name == "values":
            channels = setting.tile.channels
            slices = setting.slices(channels)
            constants = setting.constants(channels, power(self._given.size[2]))
        return Launch(
            getattr(module("gau_backward", self._structure), name),
            (setting.blocks(own), slices, batch),
            (*args, *setting.arguments()),
            constants,
        )
