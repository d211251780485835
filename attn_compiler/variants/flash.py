"""Exact attention without a T x S tensor (FlashAttention, arXiv 2205.14135): the same function,
tile by tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attn_compiler.ir.site import AttentionSite, Reason
from attn_compiler.variants.base import Fidelity, Scope, Variant, VariantSpec, Work

if TYPE_CHECKING:
    from attn_compiler.cost.letters import Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Flash(VariantSpec):
    """Exact flash attention; there is nothing to set."""


def legality(site: AttentionSite, spec: Flash) -> Iterator[Reason]:
    # whatever was raised to a site can be computed exactly: its program says it all
    return iter(())


def cost(
    spec: Flash,
    work: Work,
    *,
    causal: bool = False,
    cross: bool = False,
    scope: Scope = Scope.CORE,
) -> Cost:
    """What one layer costs, in the letters of `cost.letters`: the ordinary attention that the
    other variants are compared with, at their scope.
    """
    from attn_compiler.variants.costs import flash, parts

    share = parts.visited(work, causal)
    if scope is Scope.CORE:
        return flash.core(work, share=share)
    if scope is Scope.SITE:
        return flash.site(work, share=share, cross=cross)
    return flash.block(work, share=share)


FLASH = Variant(
    name="flash", spec=Flash, scope=Scope.CORE, fidelity=Fidelity.EXACT, legality=legality
)
