"""The contract of a variant: a frozen value made of functions, one file for each."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from attn_compiler.ir.site import AttentionSite, Reason


class Scope(enum.Enum):
    """How much of the model a variant replaces."""

    CORE = "core"  # softmax and its two products
    SITE = "site"  # with projections, rotation and cache
    BLOCK = "block"  # with the feed-forward net


class Fidelity(enum.Enum):
    """What happens to the function the model computes."""

    EXACT = "exact"
    CALIBRATED = "calibrated"
    RETRAINED = "retrained"


@dataclass(frozen=True)
class VariantSpec:
    """What a user may ask for; the fields are the options."""


@dataclass(frozen=True)
class Variant:
    """One way to attend.

    Attributes:
        name: as the report spells it.
        spec: its options.
        scope, fidelity: see there.
        legality: yields every reason why it may not replace a site; none means it may.
    """

    name: str
    spec: type[VariantSpec]
    scope: Scope
    fidelity: Fidelity
    legality: Callable[[AttentionSite, Any], Iterator[Reason]]
