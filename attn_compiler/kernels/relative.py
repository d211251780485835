"""Relative positions of Transformer-XL: queries times projected distances, added to the scores.

    dot[q, k] + table[q, k - q + T - 1],   table = scale * q offsets^T [T, T + S - 1]

Shifted row by row, the table is a bias: a view of the same memory, one element further per row.
Long sequences go by blocks of rows, so that the table of all of them is never there at once; with
gradients, blocks are computed again in the backward.

Source: Transformer-XL (arXiv 1901.02860) less its two biases, which SwitchHead leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attn_compiler.ir.expr import DOT, INDICES, Expr, Int, Read, Var, call, substitute
from attn_compiler.ir.score import Program
from attn_compiler.kernels.library import attention

# elements of a table: what a CPU's cache holds some times over, and what fills a GPU
_ELEMENTS = {"cpu": 2**22}
_MOST = 2**28


@dataclass(frozen=True, slots=True)
class Relative:
    """What is between the products.

    Attributes:
        program, later: see `programs`; without `later` there is one block.
        reads, ints: those of the rest of the scores.
        scale: of all products.
        dropout: of the weights of attention.
    """

    program: str
    later: str
    reads: Sequence[Tensor]
    ints: Sequence[int]
    scale: float
    dropout: float


def relative_positions(w_p: Tensor, queries: int, keys: int, start: int | Tensor = 0) -> Tensor:
    """Projected sinusoids of the distances from each query to each key, the largest first:
    [H, T + S - 1, c].

    Args:
        w_p: [H, D, c].
        queries, keys: T and S.
        start: the place of the first query among the keys.
    """
    width = w_p.shape[1]
    dtype = torch.promote_types(w_p.dtype, torch.float32)
    distances = torch.arange(queries - 1, -keys, -1, device=w_p.device) + start
    exponents = torch.arange(0, width, 2, device=w_p.device, dtype=dtype) / width
    angles = distances.to(dtype).unsqueeze(-1) * 10000.0**-exponents
    # an odd width has one cosine less
    table = torch.cat([angles.sin(), angles.cos()], -1)[:, :width]
    return torch.einsum("nd,hdc->hnc", table.to(w_p.dtype), w_p)


def attend_by_distance(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, given: Relative, seed: Tensor | None
) -> Tensor:
    """Attention with products of queries and distances beside those with keys: [B, H, T, c].

    Args:
        q: [B, H, T, c].
        k, v: [B, H, S, c].
        offsets: see `relative_positions`.
        given: what is between the products.
        seed: of the dropout; None iff there is none.
    """
    rows, keys = q.shape[2], k.shape[2]
    step = _step(q, keys)
    if step >= rows or not given.later:
        return _attend(q, k, v, offsets, given, seed)
    parts = []
    for first in range(0, rows, step):
        last = min(first + step, rows)
        near = offsets[:, rows - last : rows - first + keys - 1]
        part = replace(given, program=given.later, ints=[*given.ints, first, rows])
        # another draw for every block
        own = None if seed is None else seed + first
        args = (q[:, :, first:last], k, v, near, part, own)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_attend, *args, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_attend(*args))
    return torch.cat(parts, 2)


def _step(q: Tensor, keys: int) -> int:
    """Rows of a block; all where sizes are symbols, for which no loop can be written."""
    batch, heads, rows, _ = q.shape
    if not all(isinstance(n, int) for n in (batch, heads, rows, keys)):
        return rows
    most = _ELEMENTS.get(q.device.type, _MOST)
    return max(16, most // max(1, batch * heads * keys) // 16 * 16)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, given: Relative, seed: Tensor | None
) -> Tensor:
    bias = _shifted((given.scale * q) @ offsets.mT.to(q.dtype), k.shape[2])
    out: Tensor = attention(
        q, k, v, [*given.reads, bias], list(given.ints), seed,
        program=given.program, scale=given.scale, dropout=given.dropout,
    )[0]  # fmt: skip
    return out


def _shifted(table: Tensor, keys: int) -> Tensor:
    """[B, H, T, S] of [B, H, T, T + S - 1]: element k - q + T - 1 of row q becomes element k. It is
    a view of the same memory, from T - 1 on, with rows that are shorter by one.
    """
    rows, width = table.shape[2:]
    if rows == 1:
        return table
    flat = table.flatten(2).narrow(2, rows - 1, rows * (width - 1))
    shifted: Tensor = flat.unflatten(2, (rows, width - 1))[..., :keys]
    return shifted


# ---------------------------------------------------------------- programs


def programs(program: Program, reads: int, ints: int) -> tuple[str, str]:
    """The program with such a bias beside its own tensors and integers, and the same for rows from
    n<ints> on, of n<ints + 1> in all.
    """
    bias = Read(reads, tuple(map(Var, INDICES)))
    row = call("add", Var("q"), Int(ints))
    later = _changed(program, {Var("q"): row, Var("T"): Int(ints + 1)})
    whole, part = (_changed(p, {DOT: call("add", DOT, bias)}) for p in (program, later))
    return str(whole), str(part)


def _changed(program: Program, table: dict[Expr, Expr]) -> Program:
    score, mask = (substitute(expr, table) for expr in (program.score, program.mask))
    sink = None if program.sink is None else substitute(program.sink, table)
    return replace(program, score=score, mask=mask, sink=sink)
