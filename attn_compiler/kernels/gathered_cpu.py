"""Attention over the tiles that a map of blocks keeps: gather them, then PyTorch's flash kernel.

    a block of rows with c tiles   ->   softmax(q [R, d] gathered k [c C, d]^T) gathered v

One call for all blocks with equally many keys, so that work and memory are those of the kept tiles;
the gradients of keys and values are added back where they were gathered. Inputs are read and
results written as [batch, blocks, rows of a block, heads, features], which is how models lay out
their heads: a gather copies one dense piece for each tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from attn_compiler.ir.evaluate import evaluate
from attn_compiler.ir.expr import TRUE
from attn_compiler.kernels.frame import Frame, widened
from attn_compiler.kernels.plan import plan
from attn_compiler.kernels.tiles_cpu import Bucket, Lists, places

INF = float("inf")
FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
# gathered elements of keys and values in one call: four times as many were no faster
_BUDGET = 2**20

Triple = tuple[Tensor, Tensor, Tensor]


def forward(frame: Frame, lists: Lists, qkv: Triple) -> tuple[Tensor, Tensor]:
    """out and lse without the sink; rows without keys give 0 and -inf."""
    call = _Call(frame, lists, qkv)
    out = torch.zeros_like(call.query)
    lse = out.new_full((*out.shape[:-1], 1), -INF, dtype=frame.dtype)
    for part in call.parts():
        bias = call.bias(part)
        q, k, v = call.gathered(part)
        found, total = FORWARD(q, k, v, 0.0, False, attn_mask=bias, scale=frame.given.scale)
        # a sum of exponentials is one by accident or because there is none
        if bias is not None and bool((total == 0).any()):
            total.masked_fill_((bias == -INF).all(-1), -INF)
        out.index_copy_(1, part.rows, _split(found, out))
        lse.index_copy_(1, part.rows, _split(total.unsqueeze(-1), lse))
    heads, length = frame.grid.H, frame.grid.T
    return _joined(out, heads, length), _joined(lse, heads, length).squeeze(-1)


def backward(frame: Frame, lists: Lists, qkv: Triple, results: Triple) -> Triple:
    """Gradients of q, k and v, given that of out, out, and a finite lse."""
    call = _Call(frame, lists, qkv)
    grad, out, lse = results
    saved = [call.rows_of(x) for x in (grad, out, lse.unsqueeze(-1))]
    dq = torch.zeros_like(call.query)
    dk, dv = (torch.zeros_like(x, dtype=frame.dtype) for x in (call.key, call.value))
    for part in call.parts():
        g, o, total = (_taken(x, part.rows.unsqueeze(1)) for x in saved)
        args = (g, *call.gathered(part), o, total.squeeze(-1), 0.0, False)
        found = BACKWARD(*args, attn_mask=call.bias(part), scale=frame.given.scale)
        dq.index_copy_(1, part.rows, _split(found[0], dq))
        for target, piece in ((dk, found[1]), (dv, found[2])):
            over = part.tiles.shape[1] * lists.cut.keys - part.width
            piece = pad(piece, (0, 0, 0, over)) if over else piece
            target.index_add_(1, part.tiles.flatten(), _split(piece.to(target.dtype), target))
    grid, groups = frame.grid, qkv[1].shape[1]
    dk, dv = (_joined(x, groups, grid.S) for x in (dk, dv))
    return _joined(dq, grid.H, grid.T), dk, dv


class _Call:
    """Queries, keys and values by blocks, and what is added to their products."""

    def __init__(self, frame: Frame, lists: Lists, qkv: Triple) -> None:
        q, k, v = qkv
        self._frame, self._lists = frame, lists
        self.query = self.rows_of(q)
        self.key, self.value = (_blocks(x, lists.cut.keys, lists.folded) for x in (k, v))
        self._plan = plan(frame.given.program, sliced=False)
        self._reads = widened(frame.given.reads, frame.dtype)

    def rows_of(self, x: Tensor) -> Tensor:
        return _blocks(x, self._lists.cut.rows, self._lists.folded)

    def parts(self) -> Iterator[Bucket]:
        """Pieces of the buckets whose gathered keys and values fit the budget."""
        batch, _, keys, heads, width = self.key.shape
        for bucket in self._lists.buckets:
            each = 2 * batch * bucket.tiles.shape[1] * keys * heads * width
            yield from bucket.parts(max(1, _BUDGET // each))

    def gathered(self, part: Bucket) -> Triple:
        query = _taken(self.query, part.rows.unsqueeze(1))
        key, value = (_taken(x, part.tiles)[:, :, : part.width] for x in (self.key, self.value))
        return query, key, value

    def bias(self, part: Bucket) -> Tensor | None:
        """What is added to the products of a piece, -inf where a key is forbidden."""
        frame, found = self._frame, self._lists.cut
        expr = self._plan.program.mask if part.cut and part.mask is None else found.loose
        mask, bias = part.mask, None
        if expr != TRUE or self._plan.biased:
            env = places(frame.grid, self._lists, part)
            env["b"] = torch.arange(frame.grid.B).view(-1, 1, 1, 1, 1)
            if expr != TRUE:
                allowed = evaluate(expr, env, frame.given.reads, frame.grid.ints).bool()
                mask = allowed if mask is None else mask & allowed
            if self._plan.biased:
                bias = evaluate(
                    self._plan.bias, env, self._reads, frame.grid.ints, None, frame.dtype
                ).to(frame.dtype)
        if mask is not None:
            none = torch.zeros((), dtype=frame.dtype) if bias is None else bias
            bias = torch.where(mask, none, -INF)
        return None if bias is None else _four(bias, frame.grid.B, len(part.rows))


def _four(x: Tensor, batch: int, number: int) -> Tensor:
    """[batch, n, heads, rows, keys], or what broadcasts to it, as [batch * n, ...] or [1, ...]."""
    x = x[(None,) * (5 - x.dim())]
    if x.shape[0] == x.shape[1] == 1:
        return x[0]
    return x.expand(batch, number, *x.shape[2:]).flatten(0, 1)


def _blocks(x: Tensor, size: int, folded: bool) -> Tensor:
    """[B, heads, length, d] -> [B, blocks, size, heads, d]; folded [B, heads * blocks, size, 1, d].

    Zeros stand behind the end of the last block.
    """
    batch, heads, length, width = x.shape
    number = -(-length // size)
    x = pad(x, (0, 0, 0, number * size - length)) if length % size else x
    if folded:
        return x.reshape(batch, heads * number, size, 1, width)
    return x.transpose(1, 2).reshape(batch, number, size, heads, width)


def _joined(x: Tensor, heads: int, length: int) -> Tensor:
    """The opposite of `_blocks`: [B, heads, length, d]."""
    batch, width = x.shape[0], x.shape[-1]
    if x.shape[3] == heads:
        return x.view(batch, -1, heads, width)[:, :length].transpose(1, 2)
    return x.view(batch, heads, -1, width)[:, :, :length]


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """The blocks [n, c] of x, one behind the other: [B * n, heads, c * size, d]."""
    batch, _, size, heads, width = x.shape
    number, each = index.shape
    found = x.index_select(1, index.flatten())
    return found.view(batch * number, each * size, heads, width).transpose(1, 2)


def _split(x: Tensor, like: Tensor) -> Tensor:
    """[B * n, heads, c * size, d] -> [B, n * c, size, heads, d], sizes as in `like`."""
    batch, _, size, heads, width = like.shape
    return x.transpose(1, 2).reshape(batch, -1, size, heads, width)
