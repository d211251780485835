"""All variants; the only place that names them together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attn_compiler.errors import BadOption
from attn_compiler.variants import el, flash, gau, selective, spion, switchhead
from attn_compiler.variants.base import Scope, Shape, VariantSpec
from attn_compiler.variants.el import EL, ELAttention
from attn_compiler.variants.flash import FLASH, Flash
from attn_compiler.variants.sites.gau import GAU_
from attn_compiler.variants.sites.switchhead import SWITCHHEAD

if TYPE_CHECKING:
    from attn_compiler.cost.letters import Cost

VARIANTS = (FLASH, EL, spion.SPION_, selective.SELECTIVE, SWITCHHEAD, GAU_)

__all__ = ["VARIANTS", "ELAttention", "Flash", "costed", "needs_data", "ordinary"]


def needs_data(spec: VariantSpec) -> bool:
    """Has it to see a model's attention before it can take its place?"""
    if isinstance(spec, switchhead.SwitchHead):
        return spec.init == "convert"
    return isinstance(spec, spion.SPION) and spec.pattern is None


def ordinary(shape: Shape, scope: Scope) -> Cost:
    """What attention costs that is left as it is, at a scope."""
    return flash.cost(Flash(), shape.work, causal=shape.causal, cross=_is_cross(shape), scope=scope)


def _is_cross(shape: Shape) -> bool:
    """Do keys come from another sequence?"""
    return not shape.causal and shape.query != shape.key


def costed(spec: VariantSpec, shape: Shape) -> tuple[VariantSpec, Cost, Scope, dict[str, float]]:
    """The spec with numbers, its formula, its scope, and letters that are its own."""
    work, causal, width = shape.work, shape.causal, shape.channels
    cross = _is_cross(shape)
    if isinstance(spec, el.ELAttention):
        return spec, el.cost(spec, work, causal=causal, cross=cross), Scope.SITE, {}
    if isinstance(spec, selective.Selective):
        kept = spec.budgets if isinstance(spec.budgets, tuple) else ()
        length = sum(kept) / len(kept) if kept else float(shape.key)
        return spec, selective.cost(spec, work), Scope.CORE, {"C": length}
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
        return made, switchhead.cost(made, work, causal=causal), Scope.SITE, {}
    if isinstance(spec, gau.GAU):
        unit = gau.filled(
            spec, width=width, replaced=12 * width**2, length=shape.key, causal=causal
        )
        return unit, gau.cost(unit, work, causal=causal), Scope.BLOCK, {}
    raise BadOption(
        f"no costs are known of {type(spec).__name__}", do="give a spec of this package"
    )
