"""Plans for the attentions of a model, at the sizes of its example.

model, example, h200   ->   layers.0 ... layers.5 (6 alike), file.py:88   ->   a table of ways

A site is planned as the core that was recognised in it: causal or not, its heads and lengths. What
else its score or mask does is not in the times; `explain` says who would run it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.problem import Problem
from attn_compiler.ir.site import AttentionSite
from attn_compiler.kernels.shown import Call
from attn_compiler.planning import Plan, plan
from attn_compiler.report import Report, alike
from attn_compiler.variants.base import Shape, VariantSpec

_TYPES = {2: torch.bfloat16, 4: torch.float32}


@dataclass(frozen=True, slots=True)
class SitePlan:
    """One site, or several alike.

    Attributes:
        site: module path, how many are alike, and the line of code.
        plan: None where the example does not tell the sizes.
    """

    site: str
    plan: Plan | None

    def __str__(self) -> str:
        return f"{self.site}\n{self.plan or 'its sizes are not known'}"


def site_plans(
    report: Report, spec: VariantSpec | Literal["fastest"], hardware: Hardware
) -> Iterator[SitePlan]:
    """A plan for each group of sites that are alike.

    Args:
        report: of `explain` with the same hardware.
        spec: a spec, or "fastest".
        hardware: to plan for.

    Raises:
        BadOption: the spec cannot have the sizes of a site.
    """
    for sites in alike(report.sites):
        first, call = sites[0], sites[0].decision.call
        path = first.path or "the root"
        many = f" ... {sites[-1].path} ({len(sites)} alike)" if len(sites) > 1 else ""
        where = f"{path}{many}, {first.location or 'no source line'}"
        found = None
        if isinstance(call, Call):
            dtype = _TYPES[call.problem.itemsize]
            found = plan(spec, _shape(first, call.problem), hardware=hardware, dtype=dtype)
        yield SitePlan(where, found)


def _shape(site: AttentionSite, problem: Problem) -> Shape:
    return Shape(
        batch=problem.batch,
        query=problem.rows,
        key=problem.keys,
        heads=problem.heads,
        head_dim=problem.head_dim,
        kv_heads=problem.kv_heads,
        value_dim=problem.value_dim,
        width=site.width,
        causal="causal" in str(site.mask),
    )
