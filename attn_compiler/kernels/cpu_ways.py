"""The ways of `cost.cpu` as callables on random numbers, float32: what a measurement runs.

    cores(problem)   ->   {"keep": ..., "sdpa": ..., "blocked": ...}
    steps(...)       ->   {"layer": ..., "states": ...}

A step is one new token of each beam through a whole layer: over cached keys and values, or over
what they are made of (EL-attention). Beams share the memory that they attend to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_compiler.cost.problem import Problem
from attn_compiler.ir.expr import parse
from attn_compiler.ir.score import Program
from attn_compiler.kernels.el import el_attention
from attn_compiler.kernels.library import attention
from attn_compiler.kernels.sparse import sparse

Ways = dict[str, Callable[[], Tensor]]


def cores(problem: Problem, density: float | None = None, side: int = 64) -> Ways:
    """The ways to attend.

    Args:
        problem: sizes; a causal mask, a causal window, or none.
        density: share of the blocks that a random map keeps, None for no map.
        side: rows and keys of such a block.
    """
    draw = torch.Generator().manual_seed(problem.keys)
    q, k, v = _drawn(problem, draw)
    causal = problem.right == 0 and problem.left is None
    program, reads, mask = _masked(problem, density, side, draw)
    sdpa = partial(
        F.scaled_dot_product_attention, q, k, v, is_causal=causal, enable_gqa=problem.group > 1,
        attn_mask=None if causal else mask,
    )  # fmt: skip
    found: Ways = {"keep": partial(_written, q, k, v, mask), "sdpa": sdpa}
    ours = "gathered" if density is not None else "blocked" if problem.left is not None else ""
    if ours:
        found[ours] = lambda: attention(
            q, k, v, reads, [], None, program=program, scale=q.shape[-1] ** -0.5, dropout=0.0
        )[0]
    return found


def _drawn(problem: Problem, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """As a model lays them out: heads beside features."""
    p = problem
    q, k, v = (
        torch.randn(p.batch, length, heads, width, generator=draw).transpose(1, 2)
        for length, heads, width in (
            (p.rows, p.heads, p.head_dim),
            (p.keys, p.kv_heads, p.head_dim),
            (p.keys, p.kv_heads, p.value_dim),
        )
    )
    return q, k, v


def _masked(
    problem: Problem, density: float | None, side: int, draw: torch.Generator
) -> tuple[str, list[Tensor], Tensor | None]:
    """The program, its tensors, and the mask as a tensor."""
    rows, keys = problem.rows, problem.keys
    if density is not None:
        number = -(-keys // side)
        kept = torch.rand(number, number, generator=draw)
        kept.diagonal().fill_(2.0)
        most = max(number, round(density * number**2))
        blocks = torch.zeros(number**2, dtype=torch.bool)
        blocks[kept.flatten().topk(most).indices] = True
        blocks = blocks.view(number, number)
        program, reads = sparse(Program(), blocks, block=side, length=keys, slot=0)
        mask = blocks.repeat_interleave(side, 0).repeat_interleave(side, 1)
        return str(program), reads, mask[:rows, :keys].contiguous()
    if problem.right is None:
        return str(Program()), [], None
    mask, text = torch.ones(rows, keys, dtype=torch.bool).tril(), "k <= q"
    if problem.left is not None:
        mask, text = mask.triu(-problem.left), f"(k <= q) & (k > q - {problem.left + 1})"
    return str(Program(mask=parse(text), empty="any")), [], mask


def _written(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As most models spell it."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k, v))
    scores = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.matmul(scores.softmax(-1), v)


def steps(batch: int, beams: int, keys: int, heads: int, head_dim: int) -> Ways:
    """The ways of a step of generation, with its projections; several beams share a memory that
    another sequence made, one beam has its own.
    """
    width, rows, draw = heads * head_dim, batch * beams, torch.Generator().manual_seed(keys)
    x = torch.randn(batch, keys, width, generator=draw)
    new = torch.randn(rows, 1, width, generator=draw)
    w_q, w_k, w_v, w_o = (torch.randn(width, width, generator=draw) / width**0.5 for _ in range(4))

    def split(y: Tensor) -> Tensor:
        apart: Tensor = y.unflatten(-1, (heads, head_dim))
        return apart.transpose(1, 2)

    k, v = (split(F.linear(x, w)).repeat_interleave(beams, 0) for w in (w_k, w_v))
    both = [w.view(heads, head_dim, width) for w in (w_k, w_v)]

    def layer() -> Tensor:
        if beams == 1:
            for kept, w in ((k, w_k), (v, w_v)):
                kept[:, :, -1:] = split(F.linear(new, w))
        out = F.scaled_dot_product_attention(split(F.linear(new, w_q)), k, v)
        return F.linear(out.transpose(1, 2).flatten(2), w_o)

    def states() -> Tensor:
        if beams == 1:
            x[:, -1:] = new
        out, _ = el_attention(
            split(F.linear(new, w_q)), x, both[0], None, both[1], None, [], [],
            program=str(Program()), scale=head_dim**-0.5,
        )  # fmt: skip
        return F.linear(out.transpose(1, 2).flatten(2), w_o)

    return {"layer": layer, "states": states}
