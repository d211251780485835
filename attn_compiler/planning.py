"""What a variant would cost on a device, without a model and without the device.

    plan(SwitchHead(), Shape(1, 8192, 8192, 16, 64, width=1024), hardware="h200")
        ->   its open sizes, its time, what bounds it, and what else there is

A variant is compared with ordinary attention at its own scope: the core, the site with its
projections, or the block with its feed-forward net. `keep` says that it does not pay.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from attn_compiler.cost import cpu
from attn_compiler.cost.calibration import Calibration
from attn_compiler.cost.hardware import Hardware, resolve
from attn_compiler.cost.letters import Cost
from attn_compiler.cost.peers import peers
from attn_compiler.cost.points import Roofline, roofline
from attn_compiler.cost.problem import Problem, Template, TileConfig
from attn_compiler.cost.roofline import Time, time_of
from attn_compiler.cost.search import choose
from attn_compiler.crossing import crossing
from attn_compiler.errors import BadOption
from attn_compiler.variants import Flash, core_of, costed, ordinary
from attn_compiler.variants.base import Scope, Shape, VariantSpec

_SHOWN, _WIDTH = 5, 100
# forward and backward of a training, in forwards: seven products for two
_WITH_BACKWARD = 3.5
# how much of an ordinary product's rate is left where each expert has few columns, where chunks are
# small, where states are as wide as the model: assumed, to be measured
_EFFICIENCY = {
    "SwitchHead": 0.7, "GAU": 0.8, "ELAttention": 0.8, "SPION": 0.8, "Selective": 0.9,
    "LinearAttention": 0.5,
}  # fmt: skip
# of the core and of the rest, where that is not the rest alone; EL runs the ordinary attention but
# in steps
_RATES = {"SPION": (0.8, 1.0), "Selective": (0.9, 0.9), "ELAttention": (1.0, 1.0)}
# whose scores no kernel but a generated one computes
_OWN_KERNELS = ("SPION", "Selective")


@dataclass(frozen=True, slots=True)
class Plan:
    """What was planned.

    Attributes:
        name: who computes it: a variant, or an implementation of exact attention.
        spec: with numbers for every "auto".
        keep: leave the attention as it is, since this does not pay.
        tile: of the generated kernel, None where there is none.
        seconds: predicted for one layer.
        flops, bytes: operations of matrix products, bytes that cross the memory's bus.
        memory: bytes kept: for the backward in training, else the cache.
        limit: what bounds the time: "tensor", "special", "dram", "l2", "waves", "launch", ...
        hardware: name of the device.
        alternatives: other plans, the fastest first.
        assumed: what of this nobody has measured.
        crossing: from which length, density or budget on it pays.
        formulas: what it costs in the letters of `cost.letters`, simplified, by what is counted.
        roofline: the roofs of the device with this plan and its alternatives as points.
    """

    name: str
    spec: VariantSpec
    keep: bool
    tile: TileConfig | None
    seconds: float
    flops: float
    bytes: float
    memory: float
    limit: str
    hardware: str
    alternatives: tuple[Plan, ...] = ()
    assumed: str = ""
    crossing: str = ""
    formulas: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)
    roofline: Roofline | None = field(default=None, repr=False)

    def __str__(self) -> str:
        head = f"{self.spec} on {self.hardware}: {'keep it as it is' if self.keep else self.name}"
        rows: list[tuple[str, ...]] = [
            ("", "time", "limit", "GFLOP", "MB moved", "MB kept", "tile")
        ]
        rows += [_row(p, p is self) for p in (self, *self.alternatives[:_SHOWN])]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = [
            "  ".join(
                cell.ljust(w) if i in (0, 2, 6) else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines = [*textwrap.wrap(head, _WIDTH, break_on_hyphens=False), *table]
        lines += [self.crossing] if self.crossing else []
        if self.assumed:
            lines += textwrap.wrap(f"assumed: {self.assumed}", _WIDTH)
        return "\n".join(lines)


def _row(p: Plan, first: bool) -> tuple[str, ...]:
    t = p.tile
    tile = "" if t is None else f"{t.block_m}x{t.block_n} {t.warps} warps {t.stages} stages"
    if t is not None and t.splits > 1:
        tile += f" {t.splits} splits"
    return (
        f"{'>' if first else ' '} {p.name}",
        f"{p.seconds * 1e6:,.1f} us",
        p.limit,
        f"{p.flops / 1e9:,.1f}",
        f"{p.bytes / 1e6:,.1f}",
        f"{p.memory / 1e6:,.1f}",
        tile,
    )


def plan(
    spec: VariantSpec | Literal["fastest"],
    shape: Shape,
    *,
    hardware: str | Hardware | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Plan:
    """What a variant costs at a shape, whether it pays, and what else there is.

    Args:
        spec: a spec, or "fastest" for the best way to compute exact attention.
        shape: the sizes.
        hardware: a name, a Hardware, or None for the device at hand.
        dtype: of the tensors.

    Raises:
        BadOption: an unknown hardware, a spec of no known variant, or sizes that it cannot have.
    """
    machine = resolve(hardware)
    found = planned(spec, shape, machine, dtype)
    drawn = roofline(machine, dtype.itemsize)
    for p in (found, *found.alternatives):
        drawn = drawn.with_point(p.name, (p.flops, p.bytes), p.seconds, p.limit)
    turn, cost = "", ordinary(shape, Scope.CORE)
    if isinstance(spec, VariantSpec) and not isinstance(spec, Flash):
        turn = crossing(spec, shape, lambda s, sizes: not planned(s, sizes, machine, dtype).keep)
        cost = costed(spec, shape, gpu=machine.kind != "cpu")[1]
    return replace(found, roofline=drawn, crossing=turn, formulas=cost.texts())


def planned(
    spec: VariantSpec | Literal["fastest"], shape: Shape, machine: Hardware, dtype: torch.dtype
) -> Plan:
    """The same without what is only for people: the answer of one question."""
    exact = _exact(shape, machine, dtype)
    if spec == "fastest" or isinstance(spec, Flash):
        best = exact[0] if spec == "fastest" else _first(exact, "keep")
        rest = tuple(p for p in exact if p is not best)
        keep = exact[0].name == "keep"
        return replace(best, keep=keep, alternatives=rest, assumed=_unknown(exact, machine))
    if not isinstance(spec, VariantSpec):
        raise BadOption(f"spec is {spec!r}", do='give a spec such as Flash(), or "fastest"')
    return _variant(spec, shape, machine, dtype, exact[0])


def _unknown(exact: tuple[Plan, ...], hardware: Hardware) -> str:
    """What a comparison of exact ways had to leave out."""
    if hardware.kind == "cpu" or any(p.name == "triton" for p in exact):
        return ""
    return f"no generated kernel runs: none was compiled for {hardware.arch} at these sizes"


def _first(plans: tuple[Plan, ...], but: str) -> Plan:
    return next((p for p in plans if p.name != but), plans[0])


# ---------------------------------------------------------------- exact attention


def problem_of(shape: Shape, dtype: torch.dtype) -> Problem:
    """The core of a shape in the words of the kernels' cost model."""
    return Problem(
        batch=shape.batch * shape.beams,
        heads=shape.heads,
        kv_heads=shape.groups,
        rows=shape.query,
        keys=shape.key,
        head_dim=shape.head_dim,
        value_dim=shape.value_dim or shape.head_dim,
        itemsize=dtype.itemsize,
        right=0 if shape.causal and shape.query > 1 else None,
        shift=max(0, shape.key - shape.query) if shape.causal and shape.query > 1 else 0,
    )


def _exact(shape: Shape, hardware: Hardware, dtype: torch.dtype) -> tuple[Plan, ...]:
    """Ways to compute the core, the fastest first."""
    problem = problem_of(shape, dtype)
    # "keep" is PyTorch's code as most models spell it: scores through memory
    factor = _WITH_BACKWARD if shape.training else 1.0
    written = summed(cpu.ways(problem)["keep"])
    times: list[tuple[str, Time, TileConfig | None]] = []
    if hardware.kind == "cpu":
        times = [(name, _scaled(t, factor), None) for name, t in cpu.ranked(hardware, problem)]
    else:
        keep = time_of(written, hardware, problem.itemsize)
        times.append(("keep", _scaled(keep, factor), None))
        times += _generated(hardware, problem, shape.training)
        back = peers(hardware, problem, backward=True) if shape.training else {}
        for name, time in peers(hardware, problem).items():
            times.append((name, _sum(time, back[name]) if back else time, None))
    cost = _numbers(ordinary(shape, Scope.CORE), shape, dtype)
    plans = [
        _plan(
            name, Flash(), time, written.times(factor) if name == "keep" else cost, hardware, tile
        )
        for name, time, tile in times
    ]
    return tuple(sorted(plans, key=lambda p: p.seconds))


def summed(phases: cpu.Phases) -> Cost:
    return Cost(
        flops=sum(p.flops for p in phases),
        exps=sum(p.exps for p in phases),
        other=sum(p.other for p in phases),
        read=sum(p.moved for p in phases),
        launches=len(phases),
    )


def _generated(
    hardware: Hardware, problem: Problem, training: bool
) -> list[tuple[str, Time, TileConfig | None]]:
    """The kernels of this package, with the two best tiles."""
    found = choose(hardware, problem, "forward")
    backward: tuple[Template, ...] = ("queries", "keys_and_values") if training else ()
    for template in backward:
        rest = choose(hardware, problem, template)
        if not rest:
            return []
        found = tuple((tile, _sum(time, rest[0][1])) for tile, time in found)
    return [("triton", time, tile) for tile, time in found[:2]]


def _sum(a: Time, b: Time) -> Time:
    return Time(a.seconds + b.seconds, max((a, b), key=lambda t: t.seconds).limit, a.parts)


def _scaled(time: Time, factor: float) -> Time:
    return Time(time.seconds * factor, time.limit, time.parts)


def _plan(
    name: str,
    spec: VariantSpec,
    time: Time,
    cost: Cost,
    hardware: Hardware,
    tile: TileConfig | None = None,
) -> Plan:
    return Plan(
        name=name,
        spec=spec,
        keep=name == "keep",
        tile=tile,
        seconds=time.seconds,
        flops=cost.flops,
        bytes=cost.read + cost.written,
        memory=cost.saved or cost.cache,
        limit=time.limit,
        hardware=hardware.name,
    )


# ---------------------------------------------------------------- the other variants


def _variant(
    spec: VariantSpec, shape: Shape, hardware: Hardware, dtype: torch.dtype, exact: Plan
) -> Plan:
    """A variant against ordinary attention at its scope, both with the core as fast as it gets."""
    spec, cost, scope, extra = costed(spec, shape, gpu=hardware.kind != "cpu")
    numbers = _numbers(cost, shape, dtype, **extra)
    dense = _numbers(ordinary(shape, scope), shape, dtype)
    name, theirs = type(spec).__name__, _time(dense, hardware, dtype)
    if hardware.kind == "cpu" and (name == "SPION" or _over_states(name, shape)):
        ours = _on_a_cpu(name, numbers, shape, hardware, dtype, extra)
        theirs = replace(theirs, seconds=exact.seconds) if scope is Scope.CORE else theirs
    elif _over_states(name, shape):
        # neither step is taken apart: no kernel's time is known for heads as wide as the model
        ours = _time(numbers, hardware, dtype, _EFFICIENCY[name])
    else:
        theirs = _with_core(dense, shape, exact, hardware, dtype, (1.0, 1.0))
        inner = core_of(spec, shape, extra)
        if inner is None:
            ours = _time(numbers, hardware, dtype, _EFFICIENCY[name])
        else:
            ways = _exact(inner, hardware, dtype)
            generated = (p for p in ways if p.name == "triton" and name in _OWN_KERNELS)
            fastest = next(generated, ways[0])
            rates = _RATES.get(name, (1.0, _EFFICIENCY[name]))
            ours = _with_core(numbers, inner, fastest, hardware, dtype, rates)
    kept = replace(_plan("ordinary attention", Flash(), theirs, dense, hardware), keep=True)
    return replace(
        _plan(name, spec, ours, numbers, hardware),
        keep=ours.seconds >= theirs.seconds,
        alternatives=(kept,),
        assumed=_assumed(spec, hardware),
    )


def _with_core(
    whole: Cost,
    shape: Shape,
    core: Plan,
    hardware: Hardware,
    dtype: torch.dtype,
    rates: tuple[float, float],
) -> Time:
    """A core by the fastest kernel, and what is around it by its formula.

    Args:
        whole: numbers of both.
        shape: of the core.
        core: the fastest way to compute it.
        rates: share of the ordinary rate of the core, and of the rest.
    """
    inner = _numbers(ordinary(shape, Scope.CORE), shape, dtype)
    rest = _time(whole.beyond(inner), hardware, dtype, rates[1])
    seconds = core.seconds / rates[0]
    limit = core.limit if seconds >= rest.seconds else rest.limit
    return Time(seconds + rest.seconds, limit, (("core", seconds), ("rest", rest.seconds)))


def _over_states(name: str, shape: Shape) -> bool:
    return name == "ELAttention" and shape.work == "decode"


def _on_a_cpu(
    name: str,
    numbers: Cost,
    shape: Shape,
    hardware: Hardware,
    dtype: torch.dtype,
    extra: dict[str, float],
) -> Time:
    """Of variants that have constants of their own there."""
    if name == "ELAttention":
        # it multiplies in float32 whatever it is given, see kernels/el
        return cpu.time_of_cost(numbers, hardware, torch.float32.itemsize, "states")
    ways = cpu.ways(problem_of(shape, dtype), extra["rho"])["gathered"]
    found = cpu.time_of(ways, hardware, dtype.itemsize, hardware.constants_of("gathered"))
    return _scaled(found, _WITH_BACKWARD if shape.training else 1.0)


def _assumed(spec: VariantSpec, hardware: Hardware) -> str:
    """What of a prediction nobody has measured."""
    if hardware.kind == "cpu":
        return "" if hardware.mark == "measured" else "the constants of this CPU: see calibrate()"
    name = type(spec).__name__
    return f"{name} computes at {_EFFICIENCY[name]:.0%} of the rate of an ordinary product"


def cost_of_a_layer(spec: VariantSpec | None, shape: Shape, dtype: torch.dtype) -> Cost:
    """The numbers of a variant with its projections, None for ordinary attention."""
    if spec is None:
        return _numbers(ordinary(shape, Scope.SITE), shape, dtype)
    _, cost, _, extra = costed(spec, shape)
    return _numbers(cost, shape, dtype, **extra)


def _time(cost: Cost, hardware: Hardware, dtype: torch.dtype, efficiency: float = 1.0) -> Time:
    """Of operators of which no more than the cost is known."""
    if hardware.kind == "cpu":
        return cpu.time_of_cost(cost, hardware, dtype.itemsize)
    return time_of(cost, hardware, dtype.itemsize, calibration=Calibration(clock=efficiency))


def _numbers(cost: Cost, shape: Shape, dtype: torch.dtype, **extra: Any) -> Cost:
    sizes = {
        "B": shape.batch, "T": shape.query, "S": shape.key, "H": shape.heads, "G": shape.groups,
        "d": shape.head_dim, "e": shape.value_dim or shape.head_dim, "D": shape.channels,
        "L": shape.layers, "K": shape.beams, "n": dtype.itemsize,
    }  # fmt: skip
    return cost.numbers(**(sizes | extra))


def advice(spec: VariantSpec, shape: Shape, hardware: Hardware | None, dtype: torch.dtype) -> str:
    """Whether a variant pays at a shape, in words; "" where nothing is known."""
    try:
        found = planned(spec, shape, resolve(hardware), dtype)
    except BadOption:
        return ""
    if not found.keep:
        return f"{found.seconds * 1e6:,.0f} us predicted on {found.hardware}"
    return f"does not pay at {shape.key} tokens on {found.hardware}: ordinary attention is faster"
