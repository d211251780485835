"""All variants; the only place that names them together."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from attn_compiler.errors import BadOption
from attn_compiler.variants import el, flash, gau, linear_attention, selective, spion, switchhead
from attn_compiler.variants.base import Scope, Shape, VariantSpec
from attn_compiler.variants.blocks.switchhead import SWITCHALL
from attn_compiler.variants.el import EL, ELAttention
from attn_compiler.variants.flash import FLASH, Flash
from attn_compiler.variants.linear_attention import LINEAR, LinearAttention
from attn_compiler.variants.selective import Selective
from attn_compiler.variants.sites.gau import GAU_
from attn_compiler.variants.sites.switchhead import SWITCHHEAD
from attn_compiler.variants.spion import SPION, Pattern

if TYPE_CHECKING:
    from attn_compiler.cost.letters import Cost

VARIANTS = (FLASH, EL, spion.SPION_, selective.SELECTIVE, SWITCHHEAD, SWITCHALL, GAU_, LINEAR)
# of which the report says, where there is data, what the change of function costs a model
MEASURED = (selective.SELECTIVE, LINEAR)

__all__ = [
    "MEASURED",
    "SPION",
    "VARIANTS",
    "ELAttention",
    "Flash",
    "LinearAttention",
    "Pattern",
    "Selective",
    "core_of",
    "costed",
    "is_measured",
    "needs_data",
    "ordinary",
]


def needs_data(spec: VariantSpec) -> bool:
    """Has it to see a model's attention before it can take its place?"""
    if isinstance(spec, gau.GAU | switchhead.SwitchHead):
        return spec.init == "convert"
    return isinstance(spec, spion.SPION) and spec.pattern is None


def is_measured(spec: object) -> bool:
    """Is it one of `MEASURED`?"""
    return any(isinstance(spec, variant.spec) for variant in MEASURED)


def ordinary(shape: Shape, scope: Scope) -> Cost:
    """What attention costs that is left as it is, at a scope."""
    return flash.cost(Flash(), shape.work, causal=shape.causal, cross=_is_cross(shape), scope=scope)


def _is_cross(shape: Shape) -> bool:
    """Do keys come from another sequence?"""
    return not shape.causal and shape.query != shape.key


def core_of(spec: VariantSpec, shape: Shape, letters: dict[str, float]) -> Shape | None:
    """The core that a variant runs, as sizes of exact attention; None if it runs none.

    Args:
        spec: with numbers, as `costed` gives it.
        shape: what it replaces.
        letters: its own, of `costed`.
    """
    if isinstance(spec, switchhead.SwitchHead):
        heads, width = int(spec.heads), int(spec.head_dim)
        return replace(
            shape, heads=heads, kv_heads=heads, head_dim=width, value_dim=None, width=shape.channels
        )
    if isinstance(spec, spion.SPION):
        # as many pairs, nothing of which a mask cuts away
        return replace(shape, key=max(1, math.ceil(letters["rho"] * shape.key)), causal=False)
    if isinstance(spec, selective.Selective):
        return replace(shape, key=max(shape.query, math.ceil(letters["S"])))
    return shape if isinstance(spec, el.ELAttention) else None


def costed(
    spec: VariantSpec, shape: Shape, *, gpu: bool = False
) -> tuple[VariantSpec, Cost, Scope, dict[str, float]]:
    """The spec with numbers, its formula, its scope, and letters that are its own.

    Args:
        gpu: as a GPU runs it: experts by `kernels.experts_triton`, or all of them for every row
            (`kernels.expert_forms`), Selective's F as a tensor (`kernels.selective_paths`),
            gated units by `kernels.gau_triton`.
    """
    work, causal, width = shape.work, shape.causal, shape.channels
    cross = _is_cross(shape)
    if isinstance(spec, el.ELAttention):
        heads = shape.rotated_heads or shape.groups
        beside = el.Beside(shape.rotated or 0, heads, shape.norms or 0)
        found = el.cost(spec, work, causal=causal, cross=cross, beside=beside)
        return spec, found, Scope.SITE, {}
    if isinstance(spec, selective.Selective):
        # in a step the keys are those that are kept; a whole sequence sees them all
        kept = selective.kept_tokens(spec, shape.key) if work == "decode" else float(shape.key)
        return spec, selective.cost(spec, work, materialise=gpu), Scope.CORE, {"S": kept}
    if isinstance(spec, LinearAttention):
        window = min(spec.window, shape.key)
        return spec, linear_attention.cost(spec, work), Scope.CORE, {"C": float(window)}
    if isinstance(spec, spion.SPION):
        filled = spion.filled(spec, shape.key)
        made = filled.pattern
        density = made.density if isinstance(made, spion.Pattern) else filled.density
        return filled, spion.cost(filled, work), Scope.CORE, {"rho": float(density)}
    if isinstance(spec, switchhead.SwitchHead):
        made = switchhead.filled(
            spec,
            width=width,
            heads=shape.heads,
            head_dim=shape.head_dim,
            kv_heads=shape.groups,
        )
        strategy: Literal["grouped", "masked", "sorted"] = "grouped"
        if gpu:
            from attn_compiler.kernels import experts_triton

            sparse = int(made.experts) > experts_triton.WORTH_SORTING * int(made.k)
            strategy = "sorted" if sparse else "masked"
        own = switchhead.cost(made, work, causal=causal, strategy=strategy)
        if spec.feed_forward is None:
            return made, own, Scope.SITE, {}
        sizes = switchhead.net_sizes(width, 8 * width**2)
        return made, own + switchhead.net_cost(sizes, work, strategy), Scope.BLOCK, {}
    if isinstance(spec, gau.GAU):
        unit = gau.filled(
            spec, width=width, replaced=12 * width**2, length=shape.key, causal=causal
        )
        return unit, gau.cost(unit, work, causal=causal, gpu=gpu), Scope.BLOCK, {}
    raise BadOption(
        f"no costs are known of {type(spec).__name__}", do="give a spec of this package"
    )
