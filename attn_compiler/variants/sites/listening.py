"""What is asked for at a layer before it is converted: an ear, or that it stays.

    Listening(spec)          hear the layer that `spec` is going to replace
    Unfit(spec, reason)      leave it: it was heard, and cannot be converted

Both are specs, so that the same search finds the same layers; no user asks for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from attn_compiler.ir.site import AttentionSite, Reason
from attn_compiler.variants.base import (
    Fidelity,
    Replacement,
    Scope,
    Variant,
    VariantSpec,
)
from attn_compiler.variants.conversion import ear
from attn_compiler.variants.sites.switchhead import converts, legality


@dataclass(frozen=True, slots=True)
class Listening(VariantSpec):
    """An ear where `to` could be."""

    to: VariantSpec

    def variant(self) -> Variant:
        return _LISTENING


@dataclass(frozen=True, slots=True)
class Unfit(VariantSpec):
    """No conversion, for reasons that the layer itself does not show.

    Attributes:
        to: what was asked for; None for nothing.
        reason: why not, where nothing else stands in the way.
    """

    to: VariantSpec | None
    reason: Reason

    def variant(self) -> Variant:
        return _UNFIT


def _replacement(site: AttentionSite, piece: Any, spec: Listening) -> Replacement:
    return Replacement(ear.heard, (), (), spec, listens=True)


def _listened(site: AttentionSite, spec: Listening) -> Iterator[Reason]:
    if converts(spec.to):
        yield from legality(site, spec.to)


def _unfit(site: AttentionSite, spec: Unfit) -> Iterator[Reason]:
    found = list(legality(site, spec.to)) if converts(spec.to) else []
    yield from found or [replace(spec.reason, location=site.location)]


_LISTENING = Variant(
    name="listening",
    spec=Listening,
    scope=Scope.SITE,
    fidelity=Fidelity.EXACT,
    legality=_listened,
    replace=_replacement,
)
# it never replaces anything, and finds layers as the others do
_UNFIT = replace(_LISTENING, name="switchhead", spec=Unfit, legality=_unfit)
