"""Attention as people write it: all rows, by name.

cores      product, scale, sum over the values, heads
products   products that hold more than a product
softmax    in one call or by hand, shifted, with an extra column
masks      how a condition is made and how it reaches the scores
vmap       conditions written for one element
scores     biases, caps, sinks; caches
modules    the styles of well-known code bases
library    nn.MultiheadAttention, nn.Transformer, scaled_dot_product_attention
flex       flex_attention
regions    inside checkpoints, branches, autocast; in-place writes; odd strides
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import claims
import torch

from zoo import (
    written_cores,
    written_flex,
    written_library,
    written_masks,
    written_modules,
    written_products,
    written_regions,
    written_scores,
    written_softmax,
    written_vmap,
)
from zoo.entry import Entry
from zoo.library import BACKEND, compiled

PARTS = (
    written_cores,
    written_products,
    written_softmax,
    written_masks,
    written_vmap,
    written_scores,
    written_modules,
    written_library,
    written_flex,
    written_regions,
)
ENTRIES: dict[str, Entry] = {entry.name: entry for part in PARTS for entry in part.ENTRIES}

_OFFSET = re.compile(r"(?<=causal\()\+\d+")


@dataclass
class Outcome:
    """What came of one row."""

    gaps: list[claims.Gap]
    report: Any


def check(
    entry: Entry, *, training: bool = False, dynamic: bool = False, backend: str = BACKEND
) -> Outcome:
    """Compile, run, compare.

    Raises:
        AssertionError: an output or a gradient is beyond the float64 budget.
    """
    module = entry.module().train(training)
    fast = compiled(module, dynamic=dynamic, backend=backend)
    gaps = claims.same_numbers(module, fast, entry.arguments(), training=training)
    if backend != BACKEND:
        return Outcome(gaps, None)
    import attn_compiler

    return Outcome(gaps, attn_compiler.last_report())


def expect(entry: Entry, report: Any, *, dynamic: bool = False) -> None:
    """The sites, their shape and their mask are as the row says, sizes as far as they are known.

    Raises:
        AssertionError: says what is different.
    """
    told = claims.decisions(report)
    refusals = claims.refusals(report)
    if entry.refused and refusals:
        assert "" in entry.refused or set(refusals) <= set(entry.refused), told
        return
    assert not refusals, f"refused:\n{told}"
    claims.accepted(report)
    assert len(report.sites) == entry.sites, (
        f"{len(report.sites)} sites instead of {entry.sites}:\n{told}"
    )
    for site in report.sites:
        shape = {"heads": site.query_heads, "kv_heads": site.kv_heads, "head_dim": site.head_dim}
        wanted = {k: getattr(entry, k) for k in shape}
        wrong = {
            k: v
            for k, v in shape.items()
            if wanted[k] is not None and v != wanted[k] and not (dynamic and v is None)
        }
        assert not wrong, f"found {wrong}, expected {wanted}:\n{told}"
        mask = str(site.mask)
        symbolic = dynamic and entry.mask is not None and _OFFSET.sub("S - T", entry.mask)
        mask_ok = entry.mask is None or mask.startswith((entry.mask, symbolic or entry.mask))
        assert mask_ok, f"mask {site.mask}, expected {entry.mask}:\n{told}"


def low_precision(entry: Entry, dtype: torch.dtype) -> Entry:
    """The same row with parameters and inputs in another type."""

    def convert(x: Any) -> Any:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            return x.detach().to(dtype).requires_grad_(x.requires_grad)
        return x

    return Entry(
        f"{entry.name}_{str(dtype).removeprefix('torch.')}",
        lambda: entry.build().to(dtype),
        lambda g: tuple(convert(x) for x in entry.inputs(g)),
        entry.mask,
        entry.heads,
        entry.kv_heads,
        entry.head_dim,
        entry.sites,
        entry.training,
    )
