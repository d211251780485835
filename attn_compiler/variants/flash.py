"""Exact attention without a T x S tensor (FlashAttention, arXiv 2205.14135): the same function,
tile by tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attn_compiler.ir.site import AttentionSite, Reason
from attn_compiler.variants.base import Fidelity, Scope, Variant, VariantSpec


@dataclass(frozen=True)
class Flash(VariantSpec):
    """Exact flash attention; there is nothing to set."""


def legality(site: AttentionSite, spec: Flash) -> Iterator[Reason]:
    # whatever was raised to a site can be computed exactly: its program says it all
    return iter(())


FLASH = Variant(
    name="flash", spec=Flash, scope=Scope.CORE, fidelity=Fidelity.EXACT, legality=legality
)
