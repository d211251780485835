"""All operators of the package: import this file to have them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attn_compiler.kernels import (
    el,
    eviction,
    experts,
    gau,
    library,
    linear_attention,
    selective,
    selective_need,
)


def op_samples() -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(operator, args, kwargs) for every public operator, small, on the CPU: for `opcheck`."""
    homes = (library, el, experts, gau, selective, selective_need, eviction, linear_attention)
    for home in homes:
        yield from home.samples()
