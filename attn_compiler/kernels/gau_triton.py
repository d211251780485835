"""Gated attention by generated Triton kernels: a forward pass of three launches, or one.

    states, prefix     in chunks, see templates/gau_states.py.jinja
    mix                see templates/gau.py.jinja

Without chunks one square holds all tokens. States are float32, [B, chunks, s, e]. For documents in
both directions in chunks there is no kernel: `gau_cpu` runs on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attn_compiler.ir.lasting import on_device, recorded
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.gau_reach import Direction, Reach, Sweep
from attn_compiler.kernels.gau_schema import GauInputs
from attn_compiler.kernels.launch import (
    MOST_OF_AN_AXIS,
    Launch,
    dense,
    drop_arguments,
    power,
    precision,
)
from attn_compiler.kernels.template import load, render

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WIDEST = 128
_SCAN = 1024
# a part of a state that is read at once
_STEP = 32


@dataclass(frozen=True, slots=True)
class GauTile:
    """What is chosen for the launches.

    Attributes:
        rows, keys: of a square, rows no more than keys.
        channels: of the expanded width, of which a program has the result.
        states: those of which a program adds up a state.
        part: those that are multiplied at once where a program needs all of them.
        warps, stages: of a program.
    """

    rows: int = 64
    keys: int = 64
    channels: int = 256
    states: int = 128
    part: int = 64
    warps: int = 8
    stages: int = 2


def refusal(given: GauInputs) -> str:
    """Why no kernel can be generated for this call; empty if one can."""
    named = (given.q, given.k, given.v, given.q_lin, given.k_lin, given.gate)
    dtypes = {x.dtype for x in named if x is not None}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        return f"the tensors are {', '.join(sorted(str(d) for d in dtypes))}"
    if given.documents is not None and not given.causal and given.chunk is not None:
        return "documents in both directions, in chunks"
    if given.q.shape[2] > _WIDEST:
        return f"s is above {_WIDEST}"
    if given.q.shape[0] > MOST_OF_AN_AXIS:
        return f"there are more than {MOST_OF_AN_AXIS} sequences"
    return ""


def tile(given: GauInputs, family: str = "") -> GauTile:
    """The tile of a call: without spills on sm_80, sm_90, sm_100 and gfx942, not yet measured.

    Args:
        family: of the device, as `gpu.family` names it.
    """
    if given.q.dtype.itemsize == 4:
        return GauTile(32, 32, 64, 64)
    if family == "amd":
        return GauTile(channels=64, states=64, warps=4)
    if given.drop.rate:
        return GauTile(channels=64)
    narrow = given.q.dtype is torch.float16 or given.documents is not None
    return GauTile(channels=128 if narrow else 256)


def forward(given: GauInputs, tile: GauTile) -> tuple[Tensor, Tensor]:
    """out and mixed, which is empty without a gate."""
    out = torch.empty(given.v.shape, dtype=given.v.dtype, device=given.v.device)
    mixed = given.v.new_empty(0) if given.gate is None else torch.empty_like(out)
    for launch in prepare(given, tile, (out, mixed)):
        launch.run()
    return out, mixed


def prepare(given: GauInputs, tile: GauTile, into: tuple[Tensor, Tensor]) -> list[Launch]:
    """The launches of a forward pass, in order."""
    setting, (out, mixed) = Setting.of(given, tile), into
    sums = None if setting.sweep is None else forward_sums(setting, setting.sweep)
    args: list[Any] = [*tokens(given.q), *tokens(given.k), *tokens(given.v), out]
    if given.gate is not None:
        args += [*tokens(given.gate), mixed]
    if given.q_lin is not None and setting.sweep is not None and sums is not None:
        args += [*tokens(given.q_lin), *setting.vector(setting.sweep.read)]
        args += [sums.states, setting.chunks]
    structure = {**setting.structure(), "gated": given.gate is not None}
    mix = Launch(
        module("gau", structure).mix,
        (setting.blocks(tile.rows), setting.slices(tile.channels), given.size[0]),
        (*args, *setting.arguments()),
        setting.constants(tile.channels, power(given.size[2])),
    )
    return [*(() if sums is None else sums.launches), mix]


# ---------------------------------------------------------------- vectors over the tokens


@dataclass(frozen=True, slots=True)
class Vectors:
    """What is the same for all features, [b, T].

    Attributes:
        outer: factors of the rows of A, that of dropout included.
        spread: what a bias is multiplied by where scores are divided, else None.
        ends: first key and the one after the last that a row sees, None without documents.
        sweep: the way of the states, None without chunks.
    """

    outer: Tensor
    spread: Tensor | None
    ends: tuple[Tensor, Tensor] | None
    sweep: Sweep | None


def vectors(given: GauInputs) -> Vectors:
    """Of a call; those that only its sizes decide are made once and stay on the device."""
    if given.valid is not None or given.documents is not None:
        return _vectors(given)
    options = given.chunk, given.causal, given.scale_mode, given.inside, given.drop.rate
    found = _lasting(given.q.device, given.size[1], given.dtype, options)
    sweep = None if found.sweep is None else found.sweep.read
    recorded(*(x for x in (found.outer, found.spread, sweep) if x is not None))
    return found


@lru_cache(maxsize=64)
def _lasting(
    device: torch.device,
    length: int,
    dtype: torch.dtype,
    options: tuple[int | None, bool, str, bool, float],
) -> Vectors:
    """Of a call of any tensors, for chunk, causal, scale_mode, inside and the rate of dropout."""
    chunk, causal, scale_mode, inside, rate = options
    x = torch.empty((), dtype=dtype, device="cpu").expand(1, length, 1)
    found = _vectors(
        GauInputs(
            x, x, x, None, None, None, None, None, None, Drop(None, rate),
            chunk=chunk, causal=causal, scale=1.0, scale_mode=scale_mode, inside=inside,
        )
    )  # fmt: skip
    spread = None if found.spread is None else on_device(found.spread, device)
    sweep = found.sweep
    sweep = None if sweep is None else replace(sweep, read=on_device(sweep.read, device))
    return replace(found, outer=on_device(found.outer, device), spread=spread, sweep=sweep)


def _vectors(given: GauInputs) -> Vectors:
    reach = Reach(given)
    # relu(a S + b)^2 = a^2 relu(S + b / a)^2
    outer = reach.rows(reach.near.square()) if given.inside else reach.outer
    spread = torch.where(reach.near > 0, 1 / reach.near, 0.0) if given.inside else None
    ends = None
    if given.documents is not None:
        lo, hi = (x.expand(given.size[:2]).int().contiguous() for x in (reach.lo, reach.hi))
        ends = lo, hi
    return Vectors(outer * given.drop.gain, spread, ends, next(reach.sweeps(), None))


# ---------------------------------------------------------------- what all launches of a call share


@dataclass(frozen=True, slots=True)
class Setting:
    """A call with its vectors."""

    given: GauInputs
    tile: GauTile
    vectors: Vectors

    @staticmethod
    def of(given: GauInputs, tile: GauTile) -> Setting:
        return Setting(given, tile, vectors(given))

    @property
    def sweep(self) -> Sweep | None:
        """The way of its states, None without chunks."""
        return self.vectors.sweep

    @property
    def chunks(self) -> int:
        return -(-self.given.size[1] // self.given.span)

    def slices(self, channels: int) -> int:
        """Programs that share the expanded width."""
        return -(-self.given.size[3] // channels)

    def blocks(self, size: int) -> int:
        """Programs that have so many tokens of their own."""
        return self.chunks * -(-self.given.span // size)

    def structure(self) -> dict[str, Any]:
        """What decides the text of the kernels."""
        given = self.given
        return {
            "causal": given.causal,
            "chunked": given.chunk is not None,
            "biased": given.bias is not None,
            "spread": given.bias is not None and given.inside,
            "documents": given.documents is not None,
            "valid": given.valid is not None,
            "dropout": given.drop.rate > 0,
            "half": given.q.dtype is torch.float16,
        }

    def arguments(self) -> list[Any]:
        """What tells how scores become weights: see `arguments` of templates/gau_parts.jinja."""
        given, vectors = self.given, self.vectors
        found = [*self.vector(vectors.outer)]
        if given.bias is not None:
            found += [given.bias.contiguous(), given.bias.shape[0] // 2]
            found += self.vector(vectors.spread)
        if vectors.ends is not None:
            found += vectors.ends
        if given.valid is not None:
            found.append(given.valid.to(torch.int8).contiguous())
        if given.drop.rate > 0:
            found += drop_arguments(given.drop)
        return [*found, given.size[1], self.given.span, given.scale]

    def vector(self, x: Tensor | None) -> tuple[Any, ...]:
        """A vector [b, T] and its stride of the batch; nothing for none."""
        if x is None:
            return ()
        several = x.shape[0] == self.given.size[0] > 1
        return x.contiguous(), x.shape[1] if several else 0

    def widths(self, channels: int) -> dict[str, Any]:
        """Constants of every launch."""
        _, _, s, e = self.given.size
        found = {"S": s, "E": e, "BLOCK_S": power(s), "BLOCK_E": channels}
        return found | {"num_warps": self.tile.warps, "num_stages": self.tile.stages}

    def constants(self, channels: int, read: int) -> dict[str, Any]:
        """Of launches that compute squares.

        Args:
            channels: that a program has, or multiplies, at once.
            read: the width of a state along which it is read.
        """
        tile = self.tile
        found = {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "STEP": min(_STEP, read)}
        return (
            self.widths(channels) | found | {"PRECISION": self.precision, "STATES": self.precision}
        )

    @property
    def precision(self) -> str:
        """Of float32."""
        return precision() if self.given.q.dtype is torch.float32 else "tf32"


@dataclass(frozen=True, slots=True)
class Sums:
    """States [B, chunks, s, e], float32, which the launches fill."""

    states: Tensor
    launches: tuple[Launch, Launch]


def forward_sums(setting: Setting, sweep: Sweep) -> Sums:
    """Of keys and values."""
    keys = _given(setting.given.k_lin), sweep.write
    return sums(setting, keys, setting.given.v, (sweep.direction, sweep.carry))


def sums(
    setting: Setting,
    left: tuple[Tensor, Tensor | None],
    right: Tensor,
    way: tuple[Direction, Tensor | None],
) -> Sums:
    """Of left^T right over chunks.

    Args:
        left: tokens and their factors.
        way: which chunks a chunk has the sum of, and what a sum survives.
    """
    batch, length, s, e = setting.given.size
    (x, write), (direction, carry), chunks = left, way, setting.chunks
    states = torch.empty((batch, chunks, s, e), dtype=torch.float32, device=x.device)
    found = module(
        "gau_states",
        {
            "direction": direction,
            "weighted": write is not None,
            "carried": carry is not None,
            "half": x.dtype is torch.float16,
        },
    )
    args = (*tokens(x), *tokens(right), states, *setting.vector(write))
    tile = setting.tile
    constants = {"BLOCK_N": tile.keys, "PRECISION": setting.precision}
    one = Launch(
        found.states,
        (chunks, setting.slices(tile.states), batch),
        (*args, length, setting.given.span, chunks),
        setting.widths(tile.states) | constants,
    )
    carried = () if carry is None else (carry.flatten(1).expand(batch, -1).contiguous(),)
    other = Launch(
        found.prefix,
        (-(-s * e // _SCAN), batch, 1),
        (states, *carried, chunks),
        {"SIZE": s * e, "BLOCK": _SCAN, "num_warps": 4},
    )
    return Sums(states, (one, other))


def tokens(x: Tensor) -> Iterator[Any]:
    """A tensor [B, T, width] and its strides."""
    x = dense(x)
    yield from (x, *x.stride()[:2])


def module(name: str, structure: dict[str, Any]) -> Any:
    """The kernels of a structure."""
    return load(name, _source(name, tuple(structure.items())))


def _given(x: Tensor | None) -> Tensor:
    if x is None:
        raise ValueError("chunks have linear keys")
    return x


@lru_cache(maxsize=256)
def _source(name: str, structure: tuple[tuple[str, Any], ...]) -> str:
    title = ", ".join(word for word, holds in structure if holds is True)
    return render(name, title=title or "both directions", **dict(structure))
