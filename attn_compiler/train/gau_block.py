"""A trained block as a pair of gated units needs it: its weights, what its branches computed.

    x -> q, k, v of the exact operator -> heads -> out map;   x -> gate, up -> activation -> down

Values are found among the columns of the linear maps by their numbers, so that it does not matter
how a model packs and orders them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from attn_compiler.errors import BadOption
from attn_compiler.installed import original
from attn_compiler.ir.block import HeldBlock, HeldMap
from attn_compiler.ir.feed_forward import activation
from attn_compiler.ir.site import AttentionSite
from attn_compiler.kernels.devices import full_precision
from attn_compiler.kernels.frame import Inputs, accumulator
from attn_compiler.kernels.gau_convert import mean_map
from attn_compiler.kernels.gau_layer import GauForm, GauParameters, gau_layer
from attn_compiler.kernels.gau_unit import NAMES, Call
from attn_compiler.kernels.library import attention
from attn_compiler.variants.conversion.gau import (
    Heads,
    Net,
    Taught,
    attention_start,
    judged,
    missed,
    net_start,
)

# relative square of values that are columns of linear maps
_COLUMN = 1e-2
# columns of a map that are looked at together
_COLUMNS = 128


def attended(given: Inputs, v: Tensor) -> Tensor:
    """[B, H, T, dv] of other values [B, G, S, dv], rows without keys 0."""
    out, _ = attention(
        given.q, given.k, v, list(given.reads), list(given.ints), None,
        program=given.program, scale=given.scale, dropout=0.0,
    )  # fmt: skip
    found: Tensor = out.nan_to_num(0.0)
    return found


def target(given: Inputs, valid: Tensor | None) -> Tensor:
    """[B, T, S] the mean map of its heads, some columns at a time; how large the values of a head
    are is asked of tokens that count, `valid` [B, T].
    """
    v = given.v.repeat_interleave(given.q.shape[1] // given.v.shape[1], 1)
    if valid is not None:
        v = v * valid[:, None, :, None]
    each = torch.eye(v.shape[2], dtype=v.dtype, device=v.device)
    parts = (x.expand(*given.k.shape[:2], -1, -1) for x in each.split(_COLUMNS, 1))
    return torch.cat([mean_map(attended(given, part), v) for part in parts], 2)


class TrainedBlock:
    """A pair of units, and what was read of the block that it replaced.

    Attributes:
        units: as they stand in the model.
        taught: calls of the two branches.
        forms: what the units compute.
        core: the attention of the call that is being read.
    """

    def __init__(self, owner: nn.Module, site: AttentionSite) -> None:
        self.site, held = site, site.decision.origin
        self.units = units_of(owner, site)
        with original(owner):
            maps = [_affine(owner, m) for m in held.projections]
            self.out = _affine(owner, held.out)
            self.net = _net(owner, held)
        self.activation = activation(held.activation)
        self.w = torch.cat([w for w, _ in maps], 1)
        self.b = torch.cat([w.new_zeros(w.shape[1]) if b is None else b for w, b in maps])
        self.taught: tuple[list[Taught], list[Taught]] = ([], [])
        self.forms: dict[int, GauForm] = {}
        self.core: Inputs | None = None
        self.values: list[int] = []
        self.sizes = (1, 1)

    def answer(self, call: Call) -> Tensor:
        """What the trained block computed in the place of a unit."""
        with full_precision(call.x.device.type):
            return self._answer(call, call.x.to(self.w.dtype)).to(call.x.dtype)

    def _answer(self, call: Call, x: Tensor) -> Tensor:
        wanted = None
        if call.number == 0:
            given = self._heard(x)
            heads = attended(given, given.v).transpose(1, 2).flatten(2).to(x.dtype)
            y, wanted = _through(heads, self.out), target(given, call.valid).to(x.dtype)
        else:
            y = self._net_of(x)
        self.forms[call.number] = replace(call.form, dropout=0.0)
        self.taught[call.number].append(Taught(x, y, (call.valid, call.documents), wanted))
        return y

    def _heard(self, x: Tensor) -> Inputs:
        core, self.core = self.core, None
        if core is None or core.v.shape[2] != x.shape[1]:
            raise unreadable(self.site.path, "its keys are not those of the same tokens")
        v = core.v.transpose(1, 2).flatten(2).flatten(0, 1).double()
        self.values = self.values or self._columns(x.flatten(0, 1), v)
        self.sizes = core.q.shape[1], core.v.shape[3]
        return core

    def _columns(self, x: Tensor, v: Tensor) -> list[int]:
        """Which columns of the linear maps the values [N, G dv] are."""
        made = (x @ self.w + self.b).double()
        far = made.square().sum(0)[:, None] - 2 * made.mT @ v + v.square().sum(0)
        least, found = far.min(0)
        if bool((least > _COLUMN * v.square().sum(0) + torch.finfo(x.dtype).eps).any()):
            raise unreadable(self.site.path, "its values are not made by a linear map alone")
        return [int(n) for n in found]

    def _net_of(self, x: Tensor) -> Tensor:
        net = self.net
        hidden = _through(x, (net.up, net.b_up))
        if net.gate is None:
            hidden = self.activation(hidden)
        else:
            hidden = self.activation(_through(x, (net.gate, net.b_gate))) * hidden
        return _through(hidden, (net.down, net.b_down))

    def heads(self) -> Heads:
        """Its weights, as the start of a unit wants them."""
        heads, width = self.sizes
        rest = sorted(set(range(self.w.shape[1])) - set(self.values))
        q_and_k = self.w[:, rest]
        w_v = self.w[:, self.values].unflatten(1, (-1, width))
        w_v = w_v.repeat_interleave(heads // w_v.shape[1], 1)
        product = torch.einsum("dhc,hce->de", w_v, self.out[0].unflatten(0, (heads, width)))
        # fewer columns than s: the others see nothing
        return Heads(pad(q_and_k, (0, max(0, self.units[0].sizes[2] - len(rest)))), product)

    def start(self) -> str:
        """Write the weights of the pair; what each branch misses before and after."""
        likes = [_wide(unit) for unit in self.units]
        forms = [self.forms[number] for number in (0, 1)]
        before = [self._missed(n, like) for n, like in enumerate(likes)]
        made = [
            attention_start(likes[0], forms[0], self.heads(), self.taught[0]),
            net_start(likes[1], self.net, self.taught[1]),
        ]
        after = [self._missed(n, unit) for n, unit in enumerate(made)]
        for old, new in zip(self.units, made, strict=True):
            for name in NAMES:
                if getattr(old, name) is not None:
                    getattr(old, name).copy_(getattr(new, name))
        both = (f"{b:.1%} before, {a:.1%} after" for b, a in zip(before, after, strict=True))
        return "missed of the squares of attention: {}, of the net: {}".format(*both)

    def _missed(self, number: int, unit: GauParameters) -> float:
        calls = judged(self.taught[number])
        form = self.forms[number]
        outputs = [gau_layer(c.x, unit, form, valid=c.seen[0], documents=c.seen[1]) for c in calls]
        return missed(calls, outputs)


def units_of(owner: nn.Module, site: AttentionSite) -> tuple[GauParameters, GauParameters]:
    """The two units of a rewritten block, as they stand in its module."""
    tensors = site.decision.tensors
    half = len(tensors) // 2
    names = [n for n in NAMES if n != "rel_bias" or site.decision.spec.relative_bias]
    nothing: dict[str, Any] = dict.fromkeys(NAMES)

    def unit(own: Sequence[Any]) -> GauParameters:
        held = [owner.get_parameter(tensor.path) for tensor in own]
        return GauParameters(**nothing | dict(zip(names, held, strict=True)))

    return unit(tensors[:half]), unit(tensors[half:])


def _wide(unit: GauParameters) -> GauParameters:
    """Its numbers, in float32 at least."""
    found: dict[str, Any] = {n: getattr(unit, n) for n in NAMES}
    for name, x in found.items():
        found[name] = None if x is None else x.detach().to(accumulator(x), copy=True)
    return GauParameters(**found)


def _affine(owner: nn.Module, held: HeldMap) -> tuple[Tensor, Tensor | None]:
    """[D, outputs] and [outputs] of a map, in float32 at least."""
    weight = owner.get_parameter(held.weight).detach()
    bias = None if held.bias is None else owner.get_parameter(held.bias).detach()
    wide = accumulator(weight)
    turned = weight if held.transposed else weight.mT
    return turned.to(wide), None if bias is None else bias.to(wide)


def _net(owner: nn.Module, held: HeldBlock) -> Net:
    (up, b_up), (down, b_down) = _affine(owner, held.up), _affine(owner, held.down)
    gate: Tensor | None = None
    b_gate: Tensor | None = None
    if held.packed:
        halves, first = up.chunk(2, 1), int(held.packed == "last")
        biases: Sequence[Tensor | None] = (None, None) if b_up is None else b_up.chunk(2)
        gate, up = halves[first], halves[1 - first]
        b_gate, b_up = biases[first], biases[1 - first]
    elif held.gate is not None:
        gate, b_gate = _affine(owner, held.gate)
    return Net(up, b_up, down, b_down, held.activation, gate, b_gate)


def _through(x: Tensor, layer: tuple[Tensor, Tensor | None]) -> Tensor:
    y = x @ layer[0]
    return y if layer[1] is None else y + layer[1]


def unreadable(path: str, why: str) -> BadOption:
    return BadOption(
        "a block cannot be read, so no units can be started from it",
        where=path or "the root",
        why=[why],
        do='give to= a GAU(init="fresh") for this path, or leave it out',
    )
