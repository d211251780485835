"""`rewrite(model)`: find who owns each attention, specialise its forward, swap its class, verify.

The owner is the lowest module out of which no score and no probability escapes:
`LlamaDecoderLayer`, whose attention module returns the weights as well, but
`nn.MultiheadAttention` itself where `need_weights=False`. Owners are found by running the example
once: modules are known by their calls, not by their names.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from attn_compiler.call import as_call
from attn_compiler.config import CompileConfig
from attn_compiler.errors import UnsupportedCall
from attn_compiler.installed import (
    Variant,
    base_of,
    install,
    is_exact,
    names_of,
    restore,
    settle,
)
from attn_compiler.ir.site import AttentionSite, Missed
from attn_compiler.report import Report
from attn_compiler.specialise import Plan, specialise
from attn_compiler.swap import obstacle
from attn_compiler.symbols import CaptureError
from attn_compiler.variants.base import NewTensor
from attn_compiler.verify import kept, refused, verify_owner
from attn_compiler.watch import Example, Recorded, bound, copied, piecewise, untouched, watch

log = logging.getLogger("attn_compiler")
# how far above the attention its owner may stand, and how many attentions one owner may hold
_HIGHEST = 5
_MOST_ANCHORS = 64
# modules beside an attention that are looked into, because they hold a part of its layer
_MOST_OPENED = 3
# the name under which generate() hands over a cache
_CACHE = "past_key_values"
# codes of reasons that no wider module cures, but for these ends
_INSIDE = ("el.", "switchhead.", "switchall.", "gau.", "block.", "feed_forward.", "config.")
_OUTSIDE = (".outside", ".no_projection", ".no_output", ".hidden", ".score")


# ---------------------------------------------------------------- finding owners


@dataclass
class _Search:
    """The state of one `rewrite`; without `change` it only says what it would do."""

    model: nn.Module
    config: CompileConfig
    verify: bool
    example: Example
    change: bool = True
    owners: list[str] = field(default_factory=list)
    levels: dict[type, int] = field(default_factory=dict)
    tried: dict[str, _Attempt | CaptureError] = field(default_factory=dict)
    reports: list[Report] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)

    def run(self) -> Report:
        for anchor in self.example.stacks:
            if not any(_within(anchor, owner) for owner in (*self.owners, *self.refused)):
                self._place(anchor)
        return sum(self.reports, Report())

    def _place(self, anchor: str) -> None:
        """Install at the lowest module that keeps the inner tensors to itself."""
        best: tuple[int, _Attempt] | None = None
        refusal: CaptureError | None = None
        wider: CaptureError | None = None
        for level, path in self._candidates(anchor):
            try:
                attempt = self._attempt(path)
            except CaptureError as error:
                refusal = refusal or error
                wider = wider or (error if best is not None else None)
                continue
            gain = self._gain(attempt, anchor)
            more = best is None or gain > self._gain(best[1], anchor) or best[1].narrow
            if more or attempt.complete:
                best = level, attempt
            if attempt.complete:
                break
        if best is not None and best[1].narrow and wider is not None:
            report = kept(best[1].report, wider.text, wider.code)
            self.tried[best[1].path] = attempt = replace(best[1], report=report)
            best = best[0], attempt
        if best is not None and self._gain(best[1], anchor):
            self.levels[type(self.model.get_submodule(anchor))] = best[0]
            self._install(best[1])
        elif best is not None:
            self._refuse(best[1].report)
        elif refusal is not None:
            log.info("%s: %s: %s", anchor, refusal.code, refusal.text)
            missed = Missed("", refusal.code, refusal.text, anchor)
            self.reports.append(Report(missed=(missed,)))

    def _refuse(self, report: Report) -> None:
        """Say why of what no other report tells of: a wider module holds several attentions, and
        those that could be rewritten are others'.
        """
        told = {site.path for earlier in self.reports for site in earlier.sites}
        own = (site for site in report.sites if not site.decision.accepted)
        sites = tuple(site for site in own if site.path not in told)
        if sites or not report.sites:
            self.reports.append(replace(report, sites=sites))

    def _gain(self, attempt: _Attempt, anchor: str) -> int:
        """How many attentions in or around this module it rewrites, or in a module that multiplies
        alone; others find their own owner.
        """
        accepted = [s.path for s in attempt.report.sites if s.decision.accepted]
        others = [a for a in self.example.stacks if a != anchor]
        own = (p for p in accepted if _near(p, anchor) or not any(_near(p, a) for a in others))
        return sum(not any(_within(path, owner) for owner in self.owners) for path in own)

    def _candidates(self, anchor: str) -> list[tuple[int, str]]:
        stack = self.example.stacks[anchor][::-1][:_HIGHEST]
        found = [
            (level, path)
            for level, path in enumerate(stack)
            if path in self.example.calls
            and not self._passed_over(path)
            and sum(_within(a, path) for a in self.example.stacks) <= _MOST_ANCHORS
        ]
        first = self.levels.get(type(self.model.get_submodule(anchor)))
        return sorted(found, key=lambda pair: (pair[0] != first, pair[0]))

    def _passed_over(self, path: str) -> bool:
        """Does PyTorch's encoder layer compute it in a native call of its own in inference?"""
        above = self.model.get_submodule(path.rpartition(".")[0])
        return path != "" and type(above).forward is nn.TransformerEncoderLayer.forward

    def _attempt(self, path: str) -> _Attempt:
        if path not in self.tried:
            try:
                self.tried[path] = self._specialise(path)
            except CaptureError as refusal:
                self.tried[path] = refusal
        found = self.tried[path]
        if isinstance(found, CaptureError):
            raise found
        return found

    def _specialise(self, path: str) -> _Attempt:
        owner = self.model.get_submodule(path)
        if isinstance(owner, torch.jit.ScriptModule) or "forward" in owner.__dict__:
            raise CaptureError("owner.instance_forward", f"{path} has a forward of its own")
        inner = [s[s.index(path) + 1 :] for s in self.example.stacks.values() if path in s]
        spine = {_relative(p, path) for stack in inner for p in stack}
        plan = Plan(path, frozenset(spine), self.config)
        call = self.example.calls[path]
        try:
            with call.state():
                plan, (variant, report) = _looking_around(owner, call, plan)
        except CaptureError as refusal:
            given = _with_a_cache(owner, call) if refusal.code == "owner.value" else None
            if given is None or not self.config.beyond_cores:
                raise
            self.example.calls[path] = call = given
            with call.state():
                plan, (variant, report) = _looking_around(owner, call, plan)
        with call.state():
            for _ in range(_MOST_OPENED):
                hidden = {r.inside for s in report.sites for r in s.decision.reasons if r.inside}
                if hidden <= plan.spine:
                    break
                opened = replace(plan, spine=plan.spine | hidden)
                with suppress(CaptureError):
                    variant, report = specialise(owner, base_of(owner), call.values, opened)
                    plan = opened
        return _Attempt(path, owner, plan, variant, report)

    def _install(self, attempt: _Attempt) -> None:
        owner, path, report = attempt.owner, attempt.path, attempt.report
        accepted = tuple(s for s in report.sites if s.decision.accepted)
        blocked = self._blocked(owner, accepted)
        if blocked is not None or not self.change:
            (self.owners.append if blocked is None else self.refused.add)(path)
            self.reports.append(report if blocked is None else refused(report, *blocked))
            return
        base, call = base_of(owner), self.example.calls[path]
        variants = [attempt.variant]
        exact = is_exact(accepted)
        if attempt.variant.asks_training:
            with call.state(), _other_mode(owner), suppress(CaptureError):
                other, found = specialise(owner, base, call.values, attempt.plan)
                # where nothing may replace it in that mode, only the same function goes on
                if exact or found.rewritten == report.rewritten:
                    variants.append(other)
        install(owner, variants, attempt.plan, accepted)
        try:
            problem = verify_owner(owner, call, exact) if self.verify else None
        except UnsupportedCall as error:
            problem = "; ".join(error.why) or str(error)
        except Exception as error:  # runs the user's code, without what was taken
            problem = f"it does not run: {type(error).__name__}: {error}"
        if problem is not None:
            restore(owner)
            self.refused.add(path)
            report = refused(report, problem)
        else:
            self.owners.append(path)
        self.reports.append(report)

    def whole(self, report: Report, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Report:
        """Does the model still run, where another function took a place? Its own code may read
        parameters that only an owner was thought to, or call the module in two ways.
        """
        if is_exact(site for site in report.sites if site.decision.accepted):
            return report
        try:
            with untouched(self.model), piecewise():
                self.model(*copied(args), **copied(kwargs))
        except Exception as error:  # runs the user's code
            for path in reversed(self.owners):
                restore(self.model.get_submodule(path))
            self.owners.clear()
            code, text = (
                "rewrite.read_outside",
                f"the model needs what would be replaced: {error!r}",
            )
            return refused(report, text, code)
        return report

    def _blocked(
        self, owner: nn.Module, sites: tuple[AttentionSite, ...]
    ) -> tuple[str, str] | None:
        """Why its parameters cannot be swapped: a text and a code."""
        taken = [path for site in sites for path in site.decision.taken]
        new = [t for site in sites for t in site.decision.tensors]
        tensors = [t for t in new if isinstance(t, NewTensor) and t.home is not None]
        found = obstacle(self.model, owner, taken, tensors) if taken or tensors else None
        return None if found is None else (found[1], found[0])


def _with_a_cache(owner: nn.Module, call: Recorded) -> Recorded | None:
    """The call as generate() makes it, with an empty cache, where a module that was given none
    makes one itself: no graph can hold that.
    """
    library = sys.modules.get("transformers.cache_utils")
    base = base_of(owner)
    names = list(inspect.signature(base.forward).parameters)[1:]
    if library is None or _CACHE not in names:
        return None
    at, values = names.index(_CACHE), dict(zip(names_of(base.forward), call.values, strict=True))
    args, kwargs = as_call(base, values)
    if (args[at] if at < len(args) else kwargs.get(_CACHE)) is not None:
        return None
    if at < len(args):
        args = (*args[:at], library.DynamicCache(), *args[at + 1 :])
    else:
        kwargs[_CACHE] = library.DynamicCache()
    return replace(call, values=bound(base, args, kwargs))


@dataclass(frozen=True)
class _Attempt:
    path: str
    owner: nn.Module
    plan: Plan
    variant: Variant
    report: Report

    @property
    def narrow(self) -> bool:
        """Was nothing learnt but that the module is too small?"""
        codes = {r.code for s in self.report.sites for r in s.decision.reasons}
        return codes == {"block.outside"}

    @property
    def complete(self) -> bool:
        return bool(self.report.sites) and all(map(_settled, self.report.sites))


def _looking_around(
    owner: nn.Module, call: Recorded, plan: Plan
) -> tuple[Plan, tuple[Variant, Report]]:
    """A first trace, through all modules where what stands beside an attention matters."""
    if plan.config.looks_around:
        whole = replace(plan, spine=frozenset(path for path, _ in owner.named_modules()))
        with suppress(CaptureError):
            return whole, specialise(owner, base_of(owner), call.values, whole)
    return plan, specialise(owner, base_of(owner), call.values, plan)


def _settled(site: AttentionSite) -> bool:
    """Is it rewritten, or refused for what it is and not for what lies outside of this module?"""
    reasons = [reason.code for reason in site.decision.reasons]
    inside = all(code.startswith(_INSIDE) and not code.endswith(_OUTSIDE) for code in reasons)
    return site.decision.accepted or (bool(reasons) and inside)


def rewrite_module(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: CompileConfig,
    verify: bool,
    finish: Callable[[Report], Report],
) -> Report:
    """Rewrite the attention of a living model in place.

    Args:
        finish: checks and completes the report; if it raises, the model is as before.
    """
    # a refusal at one module is no refusal: its parent may do
    search = _Search(model, replace(config, on_reject="keep"), verify, watch(model, args, kwargs))
    try:
        report = finish(search.whole(search.run(), args, kwargs))
    except Exception:
        for path in reversed(search.owners):
            restore(model.get_submodule(path))
        raise
    for path in search.owners:
        settle(model.get_submodule(path))
    _keep_padded(model, search.owners)
    return report


def _keep_padded(model: nn.Module, owners: list[str]) -> None:
    """Another function than the original's runs on padded batches: PyTorch's encoder packs them
    in inference for its native call, which such a layer no longer is.
    """
    found: dict[str, Any] = {path: model.get_submodule(path) for path in owners}
    others = [path for path, owner in found.items() if not is_exact(owner._attn_sites)]
    for path, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoder) and any(_within(p, path) for p in others):
            module.use_nested_tensor = False


def explain_module(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], config: CompileConfig
) -> Report:
    """What `rewrite_module` would do, without the check by numbers; the model stays as it is."""
    return _Search(model, config, False, watch(model, args, kwargs), change=False).run()


def _within(path: str, owner: str) -> bool:
    return path == owner or not owner or path.startswith(f"{owner}.")


def _near(path: str, other: str) -> bool:
    return _within(path, other) or _within(other, path)


def _relative(path: str, owner: str) -> str:
    return path[len(owner) :].lstrip(".") if owner else path


@contextmanager
def _other_mode(owner: nn.Module) -> Iterator[None]:
    """The owner in training mode if it is in evaluation mode, and the other way round."""
    modes = [(module, module.training) for module in owner.modules()]
    other = not owner.training
    try:
        for module, _ in modes:
            module.training = other
        yield
    finally:
        for module, mode in modes:
            module.training = mode
