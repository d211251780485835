"""Attention that is one call already: scaled_dot_product_attention, and what translates to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir import roles as role
from attn_compiler.ir.axes import Index, along
from attn_compiler.ir.core import Core, Found, Operand, Scaling, assemble, operand, program_of
from attn_compiler.ir.expr import DOT, TRUE, Expr, call
from attn_compiler.ir.mask import normalise
from attn_compiler.ir.no_attention import NotAttention
from attn_compiler.ir.pull import (
    Coordinates,
    Puller,
    arguments,
    broadcast,
    indices,
    shape,
    to_expr,
    val,
)
from attn_compiler.ir.roles import Naming
from attn_compiler.ir.soft import Softmax


def from_sdpa(
    puller: Puller, end: fx.Node, where: Coordinates, node: fx.Node, at: Coordinates
) -> Core:
    args = arguments(node)
    query, key_, value = args["query"], args["key"], args["value"]
    masked: Expr = TRUE
    logits: Expr = DOT
    batch, row = at[:-2], at[-2]
    keys = puller.new_axis(shape(key_)[-2])
    if args["is_causal"]:
        masked = call("le", to_expr(along(keys)), to_expr(row))
    if args["attn_mask"] is not None:
        given = args["attn_mask"]
        element = puller.operand(given, node, (*batch, row, along(keys)))
        if val(given).dtype is torch.bool:
            masked = element
        else:
            logits = call("add", DOT, element)
    scale = args["scale"] if args["scale"] is not None else _usual_scale(query)
    operands = (query, key_, value)
    fused = Fused(
        node,
        operands,
        keys,
        bool(args["enable_gqa"]),
        scale,
        logits,
        masked,
        float(args["dropout_p"]),
    )
    return from_fused(puller, Operand(end, indices(where)), at, fused)


def _usual_scale(query: fx.Node) -> float:
    features = shape(query)[-1]
    if not isinstance(features, int):
        raise NotAttention(
            "attention.scale",
            "no scale is given, and the head dim, which makes it, differs from call to call: mark "
            "it as static, or hand the scale over",
        )
    return 1 / math.sqrt(features)


@dataclass(frozen=True)
class Fused:
    """An attention that is one call already.

    Attributes:
        call: the node whose dtype tells what it computes in.
        operands: q, k and v, each [..., rows, features].
        keys: axis of the keys.
        grouped: fewer heads in k and v than in q.
        scale: number, or node of a number.
        logits, mask: score over `dot`, and where a key may be seen.
        dropout: probability.
    """

    call: fx.Node
    operands: tuple[fx.Node, fx.Node, fx.Node]
    keys: ax.Axis
    grouped: bool
    scale: Any
    logits: Expr
    mask: Expr
    dropout: float = 0.0


def from_fused(puller: Puller, end: Operand, at: Coordinates, fused: Fused) -> Core:
    """The core of a fused call whose result is read at `at`."""
    query, key_, value = fused.operands
    batch, row, column = at[:-2], at[-2], at[-1]
    reduced = puller.new_axis(shape(query)[-1])
    kv_batch = _grouped(batch, shape(query), shape(key_)) if fused.grouped else batch
    scaling = Scaling()
    if not scaling.take("mul", fused.scale):
        raise NotAttention(
            "attention.scale", "the scale is neither a number nor known when the model runs"
        )
    features, keys = along(reduced), along(fused.keys)
    q = operand(puller, query, (*broadcast(batch, shape(query)[:-2]), row, features), scaling)
    k = operand(puller, key_, (*broadcast(kv_batch, shape(key_)[:-2]), keys, features), scaling)
    v = operand(puller, value, (*broadcast(kv_batch, shape(value)[:-2]), keys, column), None)
    told, read = role.told(puller, v.node, v.where, keys), (q.where, k.where, v.where)
    roles = role.assign(end.where, (*batch, row), keys, (reduced,), *read, told)
    naming = Naming(puller, roles)
    soft = Softmax(query, (), 0, dropout=fused.dropout, safe=True)
    score = naming(scaling.fold(fused.logits))
    program, dropout = program_of(
        naming, score, None, soft, val(query).dtype, normalise(naming(fused.mask))
    )
    return assemble(end, (q, k, v), Found(naming, scaling, program, dropout, fused.call))


def _grouped(
    batch: Coordinates, query: tuple[ax.Size, ...], keys: tuple[ax.Size, ...]
) -> Coordinates:
    repeat = ax.quotient(query[-3], keys[-3])
    head = batch[-1]
    assert isinstance(head, Index) and repeat is not None
    return (*batch[:-1], head if repeat == 1 else ax.divide(head, repeat)[0])
