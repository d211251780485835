"""`rewrite(model, args, to=SwitchHead(init="convert"), calibration=batches)`, behind the door.

    a copy of the model, with an ear beside every layer that could be replaced
        --calibration-->   what went into each layer, and its maps
        --convert-->       parameters for each
    the model, rewritten, gets these; the report says how far each layer is from what it was

Source: the steps are those of `variants.switchhead_convert`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attn_compiler.config import CompileConfig, Target
from attn_compiler.errors import BadOption
from attn_compiler.install import rewrite_module
from attn_compiler.installed import rewritten
from attn_compiler.ir.site import AttentionSite, Reason
from attn_compiler.kernels.switchhead import Mixture, Weights
from attn_compiler.report import Report
from attn_compiler.snapshot import twin
from attn_compiler.train.progress import bar
from attn_compiler.train.spion import call_of
from attn_compiler.variants import switchhead_convert
from attn_compiler.variants.conversion.ear import Ear
from attn_compiler.variants.conversion.ordinary import Batches, seen
from attn_compiler.variants.conversion.reading import Read, Unreadable, ask, given
from attn_compiler.variants.sites.listening import Listening, Unfit
from attn_compiler.variants.sites.switchhead import Prepared, converts
from attn_compiler.watch import copied

_NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Heard:
    """A layer that can be converted: its maps, and what went into it."""

    read: Read
    batches: Batches


@dataclass(frozen=True, slots=True)
class Conversions:
    """What is going to be converted.

    Attributes:
        layers: by path and place in the code, in order.
        config: of the run, with what was learnt of each layer.
    """

    layers: dict[tuple[str, str], list[Heard]]
    config: CompileConfig

    def put(self, model: nn.Module, report: Report) -> Report:
        """Fill a rewritten model; the report says what it gained."""
        left = {at: list(found) for at, found in self.layers.items()}
        facts: dict[tuple[str, str], list[str]] = {}
        sites = [(o, s) for _, o, s in rewritten(model) if (s.path, s.location) in left]
        with bar("conversion", len(sites), shown=bool(sites)) as advance:
            for owner, site in sites:
                at = site.path, site.location
                facts.setdefault(at, []).append(_put(owner, site, left[at].pop(0)))
                advance()
        return replace(report, sites=tuple(_described(s, facts) for s in report.sites))


def _described(site: AttentionSite, facts: Mapping[tuple[str, str], list[str]]) -> AttentionSite:
    words = facts.get((site.path, site.location), [])
    if not words or not site.decision.accepted:
        return site
    first = words.pop(0)
    told = {"switchhead": f"{site.facts['switchhead']}; {first}", "calibration": first}
    return replace(site, facts={**site.facts, **told})


# ---------------------------------------------------------------- before the rewrite


def conversions(
    model: nn.Module,
    example: tuple[tuple[Any, ...], dict[str, Any]],
    config: CompileConfig,
    data: Iterable[Any],
) -> Conversions:
    """Hear the layers of a model that are going to be converted.

    Args:
        model: as it is; it is not changed.
        example: args and kwargs of a call.
        config: of the run.
        data: pairs of args and kwargs, gone through once.

    Raises:
        BadOption: there is no batch, or one is no such pair, or none ran through a layer.
    """
    to = tuple((glob, _heard_instead(target)) for glob, target in config.to)
    listener = twin(model).eval()
    narrow = any(p.dtype in _NARROW for p in listener.parameters())
    if narrow:  # rounding would hide what turns slowly
        listener = listener.float()
    calls = _widened(example, narrow)
    rewrite_module(listener, *calls, replace(config, to=to), True, lambda report: report)
    ears = _ears(listener)
    if not ears:
        return Conversions({}, replace(config, to=_rest(config)))
    with torch.no_grad():
        first = _listen(listener, [ear for _, ear in ears], data, narrow)
        readings = ask([ear for _, ear in ears], lambda: listener(*first[0], **first[1]))
    return _learnt(config, ears, readings)


def _heard_instead(target: Target) -> Target:
    """What the copy gets where the model gets `target`: an ear, or nothing."""
    if converts(target):
        return Listening(target)
    return Unfit(None, _unheard())


def _unheard() -> Reason:
    return Reason("switchhead.convert_unheard", "what it computes could not be listened to")


def _widened(call: tuple[Any, Any], narrow: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments that nothing changes, of a copy in float32 in it."""

    def change(x: Tensor) -> Tensor:
        return x.float() if narrow and x.dtype in _NARROW else x.clone()

    args, kwargs = copied(tuple(call), change)
    return tuple(args), dict(kwargs or {})


def _ears(model: nn.Module) -> list[tuple[AttentionSite, Ear]]:
    found = []
    for _, owner, site in rewritten(model):
        (new,) = site.decision.tensors
        ear = getattr(owner, new.name)
        ear.forget()  # what the search for layers has run
        found.append((site, ear))
    return found


def _listen(
    model: nn.Module, ears: Sequence[Ear], data: Iterable[Any], narrow: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run the model on all batches; the first of them."""
    first = None
    number = len(data) if isinstance(data, Sized) else None
    with bar("calibration", number) as advance:
        for batch in data:
            args, kwargs = _widened(call_of(batch), narrow)
            first = first or _widened((args, kwargs), False)
            model(*args, **kwargs)
            advance()
    if first is None or not all(ear.calls for ear in ears):
        why = ["no batch ran through it" if first else "there are no batches"]
        raise BadOption(
            "calibration shows nothing of a layer that is to be converted",
            where="option calibration",
            why=why,
            do="give batches like the example, as pairs (args, kwargs)",
        )
    return first


# ---------------------------------------------------------------- what was learnt


def _rest(config: CompileConfig) -> tuple[tuple[str, Target], ...]:
    """What is wanted of layers that were not heard."""
    return tuple(
        (glob, Unfit(target, _unheard())) if converts(target) else (glob, target)
        for glob, target in config.to
    )


def _learnt(
    config: CompileConfig,
    ears: Sequence[tuple[AttentionSite, Ear]],
    readings: Sequence[Read | Unreadable],
) -> Conversions:
    targets: dict[str, Target] = {}
    layers: dict[tuple[str, str], list[Heard]] = {}
    known: list[tuple[float, ...]] = []
    for (site, ear), reading in zip(ears, readings, strict=True):
        spec = config.wanted(site.path)
        assert converts(spec)  # only these were listened to
        found = _target(spec, site, reading, known)
        before = targets.setdefault(site.path, found)
        if isinstance(before, Prepared) and isinstance(found, Prepared):
            both = replace(found, bias=before.bias or found.bias)
            text = "attentions of one module turn at different speeds"
            odd = Unfit(spec, Reason("switchhead.convert_rotation", text))
            targets[site.path] = both if before.speeds == found.speeds else odd
        elif isinstance(found, Unfit):
            targets[site.path] = found
        if isinstance(found, Prepared) and isinstance(reading, Read):
            batches = seen(reading.layer, [given(call, ear) for call in ear.calls])
            heard = Heard(reading, batches)
            layers.setdefault((site.path, site.location), []).append(heard)
    return Conversions(layers, replace(config, to=(*targets.items(), *_rest(config))))


def _target(
    spec: Any,
    site: AttentionSite,
    reading: Read | Unreadable,
    known: list[tuple[float, ...]],
) -> Target:
    """What is asked for at a layer, now that it is known."""
    if isinstance(reading, Unreadable):
        return Unfit(spec, reading.reason)
    layer = reading.layer
    exact = spec.heads == layer.heads
    least = max(layer.head_dim, layer.w_v.shape[2]) if exact else layer.head_dim
    fixed = exact or bool(reading.speeds)
    if fixed and isinstance(spec.head_dim, int) and spec.head_dim < least:
        text = f"turned or copied heads need {least} channels, and {spec.head_dim} were asked for"
        return Unfit(spec, Reason("switchhead.convert_width", text))
    speeds = next((s for s in known if _same(s, reading.speeds)), reading.speeds)
    known.append(speeds)
    return Prepared.of(spec, speeds, layer.bias is not None)


def _same(a: Sequence[float], b: Sequence[float]) -> bool:
    """Equal but for how exactly they were measured: layers that are equal share their code."""
    close = (abs(x - y) <= 1e-5 * y + 1e-7 for x, y in zip(a, b, strict=False))
    return len(a) == len(b) and all(close)


# ---------------------------------------------------------------- after the rewrite


def _put(owner: nn.Module, site: AttentionSite, heard: Heard) -> str:
    """Fill the parameters of a layer; in words, what that changed."""
    spec, layer = site.decision.spec, heard.read.layer
    mixture = Mixture(spec.heads, spec.experts, spec.k, spec.experts_on, spec.shared_selection)
    held = {_bare(t.name): owner.get_parameter(t.path) for t in site.decision.tensors}
    before = switchhead_convert.missed(layer, _as_it_is(held), mixture, heard.batches)
    how = switchhead_convert.convert
    if spec.heads == layer.heads:
        how = switchhead_convert.embedded
    found = how(layer, mixture, spec.head_dim, heard.batches)
    made = {name: getattr(found.weights, name) for name in Weights.__slots__}
    made["b_o"] = found.bias
    with torch.no_grad():
        for name, parameter in held.items():
            if made[name] is None:
                parameter.zero_()
            else:
                parameter.copy_(made[name])
    after = switchhead_convert.missed(layer, _as_it_is(held), mixture, heard.batches)
    return f"output error {before:.3g} as drawn, {after:.3g} converted"


def _bare(name: str) -> str:
    return "_".join(name.split("_")[:2])


def _as_it_is(held: Mapping[str, Tensor]) -> switchhead_convert.Converted:
    weights = {name: held[name].detach() if name in held else None for name in Weights.__slots__}
    bias = held["b_o"].detach() if "b_o" in held else None
    return switchhead_convert.Converted(Weights(**weights), bias, ())  # type: ignore[arg-type]
