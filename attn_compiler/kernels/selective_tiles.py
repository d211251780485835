"""Tiles of Selective attention that need not be visited: everything in them is masked away.

    scale max|q_i| max|k_j| - min F_tile  <  min z_ii - margin     ->     the tile is left out

z_ii is what a row gives to its own token, from which nothing is ever subtracted. So a key that is
left out weighs less than e^-margin beside it, and S of them together less than one rounding of the
output: margin = log(S / eps). F only grows from row to row, so its smallest value in a tile stands
in the first row. The kernels that visit lists of blocks do the rest.

Source: the bound is ours; that F grows until distant tokens are gone is Selective Attention
(arXiv 2410.02703).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attn_compiler.ir.evaluate import evaluate
from attn_compiler.ir.expr import DOT, TRUE, Read, Var, call
from attn_compiler.ir.score import Program
from attn_compiler.kernels import blocks
from attn_compiler.kernels.frame import Frame, Inputs

# rows and keys of a tile that is left out as a whole
SIDE = 128


def left_out(read: Inputs, given: Inputs, first: Tensor, past: int, gate: Tensor | None) -> Inputs:
    """An attention that reads F, without the tiles that F has masked away.

    Args:
        read: the attention with F.
        given: the same without.
        first: F in the first row of every SIDE, [B, row tiles, S]; no later row has a smaller one.
        past: keys before row 0.
        gate: what F is multiplied with; where it is negative nothing is left out.

    Returns:
        `read` itself where the bound does not hold, or lists of blocks do not pay.
    """
    program = Program.parse(read.program)
    if Program.parse(given.program).score != DOT or given.k.shape[2] < past + given.q.shape[2]:
        return read
    kept = _kept(given, _smallest(first), past, gate)
    index = (Var("b"), Var("h"), *(call("floordiv", Var(x), SIDE) for x in "qk"))
    near = Read(len(read.reads), index)
    mask = near if program.mask == TRUE else call("and", near, program.mask)
    found = replace(read, reads=[*read.reads, kept], program=str(replace(program, mask=mask)))
    return found if blocks.wanted(Frame(found)) else read


def _kept(given: Inputs, least: Tensor, past: int, gate: Tensor | None) -> Tensor:
    """Which tiles are visited, boolean [B, H, row tiles, key tiles]."""
    q, k, scale = given.q, given.k, given.scale
    heads, rows, keys = q.shape[1], q.shape[2], k.shape[2]
    group = heads // k.shape[1]
    own = k[:, :, past : past + rows].repeat_interleave(group, 1)
    own_logit = (q.float() * own.float()).sum(-1) * scale
    own_logit = own_logit.masked_fill(~_sees_itself(given, past), -torch.inf)
    floor = -_largest(-own_logit)
    q_norm, k_norm = (_largest(torch.linalg.vector_norm(x.float(), dim=-1)) for x in (q, k))
    bound = abs(scale) * q_norm.unsqueeze(-1) * k_norm.repeat_interleave(group, 1).unsqueeze(-2)
    if gate is not None:
        factor = gate.reshape(()).float()
        least = torch.where(factor < 0, -torch.inf, least * factor)
    margin = math.log(keys / torch.finfo(q.dtype).eps)
    return ~(bound - least.unsqueeze(1) < floor.unsqueeze(-1) - margin)


def _sees_itself(given: Inputs, past: int) -> Tensor:
    """[B or 1, H or 1, T]"""
    (batch, heads, rows, _), device = given.q.shape, given.q.device
    place = torch.arange(rows, device=device)
    env: dict[str, Any] = {"B": batch, "H": heads, "T": rows, "S": given.k.shape[2]}
    env |= {"q": place, "k": place + past}
    env["b"] = torch.arange(batch, device=device).view(-1, 1, 1)
    env["h"] = torch.arange(heads, device=device).view(-1, 1)
    allowed = evaluate(Program.parse(given.program).mask, env, given.reads, given.ints)
    return allowed.to(device).bool().expand(batch, heads, rows)


def _largest(x: Tensor) -> Tensor:
    """[B, H, n] -> [B, H, tiles]; a tile that reaches over the end has its last element again."""
    over = -x.shape[-1] % SIDE
    found: Tensor = pad(x, (0, over), mode="replicate").unflatten(-1, (-1, SIDE)).amax(-1)
    return found


def _smallest(first: Tensor) -> Tensor:
    """Of F in each tile, [B, row tiles, key tiles]; see `left_out`."""
    first = pad(first, (0, -first.shape[2] % SIDE), value=torch.inf)
    found: Tensor = first.unflatten(2, (-1, SIDE)).amin(3)
    return found
