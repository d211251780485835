"""Sums of attention maps over batch and heads, for a calibration; nothing of size T x S per sample.

    map[q, k] += sum_{b, h} softmax(s)[b, h, q, k]

block of rows by block of rows, into a map of the whole sequence or into sums by blocks. Rows
without a key add nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attn_compiler.errors import BadOption
from attn_compiler.kernels import rows
from attn_compiler.kernels.devices import full_precision
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.frame import Frame, Inputs
from attn_compiler.kernels.grid import Span
from attn_compiler.kernels.pooled import BlockMap


@torch.no_grad()
def add_map(
    q: Tensor,
    k: Tensor,
    reads: Sequence[Tensor],
    ints: Sequence[int],
    *,
    program: str,
    scale: float,
    into: Tensor,
) -> None:
    """Add the probabilities of one call to a map.

    Args:
        q, k, reads, ints, program, scale: as attn_compiler::attention takes them.
        into: [T, S] sums over batch and heads, [H, T, S] over the batch; at least float32.

    Raises:
        BadOption: `into` has another shape.
    """
    _demand(into, q, q.shape[2], k.shape[2])
    for span, p in _sums(Inputs(q, k, k, reads, ints, Drop(None, 0.0), program, scale), into):
        into[..., span.r0 : span.r1, span.lo : span.hi] += p


@torch.no_grad()
def add_blocks(
    q: Tensor,
    k: Tensor,
    reads: Sequence[Tensor],
    ints: Sequence[int],
    *,
    program: str,
    scale: float,
    into: BlockMap,
) -> None:
    """Add the probabilities of one call to sums by blocks, for sequences whose map is too large.

    Args:
        q, k, reads, ints, program, scale: as attn_compiler::attention takes them.
        into: of all heads together, or of each.

    Raises:
        BadOption: the call has another length than `into`, or queries and keys differ in number.
    """
    if {q.shape[2], k.shape[2]} != {into.length}:
        raise BadOption(
            f"{q.shape[2]} queries and {k.shape[2]} keys do not fit maps of {into.length} tokens",
            where="option calibration",
            do="calibrate with sequences of one length",
        )
    _demand(into.plain, q, *into.plain.shape[-2:])
    given = Inputs(q, k, k, reads, ints, Drop(None, 0.0), program, scale)
    for span, p in _sums(given, into.plain):
        into.add(p, span.r0, span.lo)


def _demand(into: Tensor, q: Tensor, queries: int, keys: int) -> None:
    if into.shape not in ((queries, keys), (q.shape[1], queries, keys)):
        raise BadOption(
            f"sums of shape {tuple(into.shape)} do not fit the map of {tuple(q.shape)} queries",
            where="option into",
            do=f"give [{queries}, {keys}], or one such for each of the {q.shape[1]} heads",
        )


def _sums(given: Inputs, into: Tensor) -> Iterator[tuple[Span, Tensor]]:
    """Blocks of rows and their sums, [rows, keys], or [H, rows, keys] where `into` has heads."""
    axes = (0,) if into.dim() == 3 else (0, 1)
    with full_precision(given.q.device.type):
        for span, p in rows.probabilities(Frame(given)):
            yield span, p.sum(axes).to(into.device)
