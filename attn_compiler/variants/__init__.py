"""All variants; the only place that names them together."""

from attn_compiler.variants.flash import FLASH, Flash

VARIANTS = (FLASH,)

__all__ = ["VARIANTS", "Flash"]
