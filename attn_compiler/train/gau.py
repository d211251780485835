"""Pairs of gated units that are started from the blocks which they replace.

    teacher's block on calibration  ->  inputs and outputs of its branches, maps of its heads
                                    ->  weights of the pair (`variants.gau_convert`)

A block is read through two forwards of its module: the exact rewriting says q, k, v and what comes
out of the heads, and the rewritten one, with the teacher's answers in place of its units, what the
branches were given. That both together are the trained block is checked by its output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

from attn_compiler.call import as_call
from attn_compiler.config import CompileConfig
from attn_compiler.errors import BadOption
from attn_compiler.installed import Variant, base_of, names_of, original, rewritten
from attn_compiler.ir.block import HeldBlock, HeldMap
from attn_compiler.ir.feed_forward import activation
from attn_compiler.ir.site import AttentionSite
from attn_compiler.kernels.frame import accumulator
from attn_compiler.kernels.gau_convert import mean_map
from attn_compiler.kernels.gau_layer import GauForm, GauParameters, gau_layer
from attn_compiler.kernels.gau_unit import NAMES, Call, answered
from attn_compiler.kernels.library import attention
from attn_compiler.listen import calls_through
from attn_compiler.report import Report
from attn_compiler.specialise import Plan, specialise
from attn_compiler.train.distill import first_tensor, relative
from attn_compiler.variants import Flash
from attn_compiler.variants.gau import GAU
from attn_compiler.variants.gau_convert import (
    Heads,
    Net,
    Taught,
    attention_start,
    kept_back,
    missed,
    net_start,
)
from attn_compiler.watch import Recorded, autocast, bound, copied

_EXACT = CompileConfig(to=(("*", Flash()),))
# relative squares: outputs of a block that is read rightly; values that are columns of its maps
_SAME = 1e-3
_COLUMN = 1e-2
# columns of a map that are looked at together
_COLUMNS = 128


def converts(spec: Any) -> bool:
    """Does a spec ask for units that start from a block?"""
    return isinstance(spec, GAU) and spec.init == "convert"


def convert(model: nn.Module, report: Report, data: Iterable[Any]) -> Report:
    """Start the pairs of a rewritten model from the blocks that they replaced.

    Args:
        model: rewritten, and not settled: its modules still hold what was taken out.
        report: of that.
        data: pairs (args, kwargs).

    Returns:
        The report, which says what each branch misses of the block's before and after.

    Raises:
        BadOption: there is no data, none of it reaches a block, or a block cannot be read.
    """
    batches = list(data)
    found = [item for item in rewritten(model) if converts(item[2].decision.spec)]
    owners = {path: owner for path, owner, _ in found}
    words: dict[str, str] = {}
    with torch.no_grad(), _evaluating(model):
        for path, owner in owners.items():
            with ExitStack() as stack:
                for other in owners.values():
                    stack.enter_context(original(other))
                calls = _calls(model, path, owner, batches)
            reader = _Reader(path, owner, [site for at, _, site in found if at == path])
            for given, output in calls:
                reader.read(given, output)
            words |= reader.start(calls)
    sites = (
        replace(s, facts={**s.facts, "calibration": words[s.path]}) if s.path in words else s
        for s in report.sites
    )
    return replace(report, sites=tuple(sites))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# ---------------------------------------------------------------- what a block was given


def _calls(
    model: nn.Module, path: str, owner: nn.Module, batches: Sequence[Any]
) -> list[tuple[Recorded, Tensor]]:
    """Calls of an owner in the trained model, and what it put out first."""
    found: list[tuple[Recorded, Tensor]] = []

    def hear(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if module is not owner:
            return module._call_impl(*args, **kwargs)
        given = Recorded(copied(bound(base_of(owner), args, kwargs)), tuple(autocast()))
        output = module._call_impl(*args, **kwargs)
        found.append((given, first_tensor(output).clone()))
        return output

    with calls_through(hear):
        for args, kwargs in batches:
            model(*copied(args), **copied(dict(kwargs or {})))
    if not found:
        raise BadOption(
            "calibration shows nothing of a block",
            where=path or "the root",
            why=["there are no batches, or the model does not run it on them"],
            do="give batches, pairs (args, kwargs), that run through all that is rewritten",
        )
    return found


# ---------------------------------------------------------------- reading a block


@dataclass(slots=True)
class _Core:
    """One attention as its operator was called: [B, H, T, d], and what came out."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    rest: tuple[Any, ...]
    options: dict[str, Any]

    def target(self) -> Tensor:
        """[B, T, S] the mean map of its heads, some columns at a time."""
        keys, heads = self.k.shape[2], self.q.shape[1]
        v = self.v.repeat_interleave(heads // self.v.shape[1], 1)
        each = torch.eye(keys, dtype=v.dtype, device=v.device)
        columns = []
        for part in each.split(_COLUMNS, 1):
            unit = part.expand(*self.k.shape[:2], -1, -1)
            found, _ = attention(self.q, self.k, unit, *self.rest, **self.options)
            columns.append(mean_map(found.nan_to_num(0.0), v))
        return torch.cat(columns, 2)


class _Heard(TorchDispatchMode):
    """Calls of the operator of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.cores: list[_Core] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.attn_compiler.attention.default:
            q, k, v, *rest = args
            self.cores.append(_Core(q, k, v, result[0], tuple(rest), dict(kwargs or {})))
        return result


class _Block:
    """A pair of units, and what was read of the block that it replaced.

    Attributes:
        units: as they stand in the model.
        taught: calls of the two branches.
        forms: what the units compute.
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
        self.core: _Core | None = None
        self.values: list[int] = []
        self.sizes = (1, 1)

    def answer(self, call: Call) -> Tensor:
        """What the trained block computed in the place of a unit."""
        x = call.x.to(self.w.dtype)
        target = None
        if call.number == 0:
            core = self._heard(x)
            heads = core.out.transpose(1, 2).flatten(2).to(x.dtype).nan_to_num(0.0)
            y, target = _through(heads, self.out), core.target().to(x.dtype)
        else:
            y = self._net_of(x)
        self.forms[call.number] = replace(call.form, dropout=0.0)
        self.taught[call.number].append(Taught(x, y, (call.valid, call.documents), target))
        return y.to(call.x.dtype)

    def _heard(self, x: Tensor) -> _Core:
        core, self.core = self.core, None
        if core is None or core.v.shape[2] != x.shape[1]:
            raise _unreadable(self.site.path, "its keys are not those of the same tokens")
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
            raise _unreadable(self.site.path, "its values are not made by a linear map alone")
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
        calls = _judged(self.taught[number])
        form = self.forms[number]
        outputs = [gau_layer(c.x, unit, form, valid=c.seen[0], documents=c.seen[1]) for c in calls]
        return missed(calls, outputs)


def _judged(calls: Sequence[Any]) -> Sequence[Any]:
    """Those that were kept back, if any were."""
    return kept_back(calls)[1] or calls


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
    found = {n: getattr(unit, n) for n in NAMES}
    return GauParameters(
        **{
            n: None if x is None else x.detach().to(accumulator(x), copy=True)
            for n, x in found.items()
        }
    )


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
        halves = [up.chunk(2, 1), (None, None) if b_up is None else b_up.chunk(2)]
        first = 0 if held.packed == "first" else 1
        (gate, up), (b_gate, b_up) = ((h[first], h[1 - first]) for h in halves)  # type: ignore[misc]
    elif held.gate is not None:
        gate, b_gate = _affine(owner, held.gate)
    return Net(up, b_up, down, b_down, held.activation, gate, b_gate)


def _through(x: Tensor, layer: tuple[Tensor, Tensor | None]) -> Tensor:
    y = x @ layer[0]
    return y if layer[1] is None else y + layer[1]


def _unreadable(path: str, why: str) -> BadOption:
    return BadOption(
        "a block cannot be read, so no units can be started from it",
        where=path or "the root",
        why=[why],
        do='give to= a GAU(init="fresh") for this path, or leave it out',
    )


# ---------------------------------------------------------------- a module


class _Reader:
    """Reads the blocks of one module."""

    def __init__(self, path: str, owner: nn.Module, sites: Sequence[AttentionSite]) -> None:
        self.path, self.owner, self.base = path, owner, base_of(owner)
        self.blocks = [_Block(owner, site) for site in sites]
        plan: Plan = owner._attn_plan  # type: ignore[assignment]
        self.plan = replace(plan, config=_EXACT)
        self.variants: list[tuple[Variant, Report]] = []

    def read(self, given: Recorded, output: Tensor) -> None:
        """What one call of the module shows, and what it put out."""
        with given.state():
            with original(self.owner):
                variant, report = self._exact(given.values)
                with _Heard() as heard:
                    variant.run(self.owner, *copied(given.values))
            paths = [s.path for s in report.sites if s.decision.accepted]
            cores = list(zip(paths, heard.cores, strict=False))
            for block in self.blocks:
                found = next((c for c in cores if c[0] == block.site.path), None)
                if found is None:
                    raise _unreadable(block.site.path, "its attention is not one of its own")
                cores.remove(found)
                block.core = found[1]
            with answered(self._answer):
                ours = self._run(given)
        if float(relative(ours, output)) > _SAME:
            raise _unreadable(self.path, "its maps and its net do not add up to what it computes")

    def _exact(self, values: tuple[Any, ...]) -> tuple[Variant, Report]:
        for variant, report in self.variants:
            if variant.covers(self.owner, *values):
                return variant, report
        self.variants.append(specialise(self.owner, self.base, copied(values), self.plan))
        return self.variants[-1]

    def _answer(self, call: Call) -> Tensor:
        block = next(b for b in self.blocks if b.units[call.number].w_o is call.weights.w_o)
        return block.answer(call)

    def _run(self, given: Recorded) -> Tensor:
        values = dict(zip(names_of(self.base.forward), copied(given.values), strict=True))
        args, kwargs = as_call(self.base, values)
        return first_tensor(self.owner(*args, **kwargs))

    def start(self, calls: Sequence[tuple[Recorded, Tensor]]) -> dict[str, str]:
        """Write the weights of all pairs; words for the report, by the path of the attention."""
        before = self._missed(calls)
        words = {block.site.path: block.start() for block in self.blocks}
        whole = f"{before:.1%} before, {self._missed(calls):.1%} after"
        return {
            path: f"{text}, of what the block puts out: {whole}" for path, text in words.items()
        }

    def _missed(self, calls: Sequence[tuple[Recorded, Tensor]]) -> float:
        found = []
        for given, output in _judged(calls):
            with given.state():
                found.append(float(relative(self._run(given), output)))
        return sum(found) / len(found)
