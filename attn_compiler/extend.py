"""Calls of a rewritten module that no variant covers: another length, another mode.

extend(owner, values)   ->   a further Variant, or None and why not in the log
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from attn_compiler.cache.expansion import materialised
from attn_compiler.installed import Variant, as_before, base_of, is_exact
from attn_compiler.ir.site import AttentionSite
from attn_compiler.report import Report
from attn_compiler.specialise import Plan, specialise
from attn_compiler.symbols import CaptureError
from attn_compiler.variants.base import NewTensor
from attn_compiler.watch import copied, tensors_of

log = logging.getLogger("attn_compiler")
# kinds of calls that one owner is specialised for, and failures after which it is left alone
_MOST_VARIANTS = 12
_MOST_FAILURES = 4


def extend(owner: Any, values: tuple[Any, ...]) -> Variant | None:
    """Analyse a call that no variant covers; None if the original code is to run."""
    if torch.is_inference_mode_enabled():
        # what is made in it has no version, which an analysis asks for
        with torch.inference_mode(False):
            return extend(owner, copied(materialised(values)))
    plan: Plan = owner._attn_plan
    values = materialised(values)
    where = plan.prefix or "the root"
    exact = is_exact(owner._attn_sites)
    full = len(owner._attn_variants) >= _MOST_VARIANTS
    if (full and exact) or len(owner._attn_failures) >= _MOST_FAILURES or _hopeless(values, exact):
        return None
    try:
        with as_before(owner):
            variant, report = specialise(owner, base_of(owner), values, plan)
            if not report.rewritten and plan.config.exact() != plan.config:
                # what keeps no cache, or drops weights, runs the ordinary attention
                plan = replace(plan, config=plan.config.exact())
                variant, report = specialise(owner, base_of(owner), values, plan)
    except CaptureError as refusal:
        problem = f"{refusal.code}: {refusal.text}"
    else:
        problem = "" if report.rewritten else _why(report)
        sites = [s for s in report.sites if s.decision.accepted]
        if list(map(_swapped, sites)) != list(map(_swapped, owner._attn_sites)):
            problem = problem or "it needs other tensors than the module has"
    if problem:
        owner.__dict__["_attn_failures"] += (problem,)
        done = "runs the original code" if exact else "cannot be analysed"
        log.warning("%s: a call unlike the example %s: %s", where, done, problem)
        return None
    log.info("%s: a call unlike the example was analysed", where)
    if full:  # no original could run in its place: the oldest is analysed again if it returns
        del owner._attn_variants[0]
    owner._attn_variants.append(variant)
    return variant


def _hopeless(values: tuple[Any, ...], exact: bool) -> bool:
    """Is there no use in an analysis, now or of such arguments?"""
    if _get_current_dispatch_mode() is not None or torch._C._get_tracing_state():
        return True
    # PyTorch's encoder packs padded batches for a native call of its own
    return exact and any(t.is_nested for t in tensors_of(values, 0))


def _why(report: Report) -> str:
    """Why nothing of a call was rewritten."""
    kept = (str(reason) for site in report.sites for reason in site.decision.reasons)
    missed = (f"{m.code}: {m.text}" for m in report.missed)
    return next(iter((*kept, *missed)), "no attention was found in it")


def _swapped(site: AttentionSite) -> Any:
    """What a site puts into its module and takes out of it; how it starts, in which dtype and
    where do not matter: a model moves.
    """
    new = [
        (t.path, t.shape, t.trained) if isinstance(t, NewTensor) else t
        for t in site.decision.tensors
    ]
    return new, site.decision.taken
