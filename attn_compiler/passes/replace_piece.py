"""A piece around a recognised attention becomes one call with parameters of its own.

    o_proj(attention(q_proj(x), k_proj(x), v_proj(x)))   ->   function(x, w_q, w_k, ..., k=2, ...)

The function is Python of torch operations and the package's operators: compilers and exporters
look through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from attn_compiler.ir import ops
from attn_compiler.ir.piece import Piece
from attn_compiler.ir.provenance import location
from attn_compiler.ir.region import FunctionalRegion
from attn_compiler.ir.soft import NotAttention
from attn_compiler.ir.trace import Region
from attn_compiler.passes.emit import MODAL, Emitter
from attn_compiler.passes.expand_composite import WHOLE
from attn_compiler.passes.rewrite_site import live_nodes, unread_numbers
from attn_compiler.variants.base import NewTensor, Replacement


def replace_piece(
    region: Region, functional: FunctionalRegion, piece: Piece, replacement: Replacement
) -> tuple[NewTensor, ...]:
    """Replace the piece's end; the caller removes what is dead afterwards.

    Returns:
        The tensors that the module has to get, under the names that the graph reads.

    Raises:
        NotAttention: `piece.read_elsewhere`, something outside reads what would no longer be made;
            the graph is as before.
    """
    check_unread(region, piece, {piece.end})
    emitter = Emitter(region, functional, piece.end)
    try:
        tensors, made = call_of(emitter, piece, piece.given, replacement)
    except Exception:
        emitter.undo()
        raise
    piece.end.replace_all_uses_with(made)
    return tensors


def call_of(
    emitter: Emitter, piece: Piece, given: Sequence[Any], replacement: Replacement
) -> tuple[tuple[NewTensor, ...], fx.Node]:
    """The call, and the tensors that it reads."""
    made = emitter.attributes(replacement.tensors, piece.taken)
    nodes = [node for _, node in made]
    call = emitter.call(replacement.function, *given, *nodes, **dict(replacement.options))
    mark(call, replacement)
    call = in_dtype(emitter, call, ops.value(piece.end).dtype)
    return tuple(tensor for tensor, _ in made), call


def mark(call: fx.Node, replacement: Replacement) -> None:
    """Say what this call is."""
    call.meta[WHOLE] = True
    if replacement.training:
        call.meta[MODAL] = True


def in_dtype(emitter: Emitter, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A cast, where it is one."""
    if ops.value(node).dtype == dtype:
        return node
    return emitter.call(torch.ops.aten.to.dtype, node, dtype)


def check_unread(region: Region, piece: Piece, removed: set[fx.Node]) -> None:
    """Nobody else may read what is replaced, or call the modules that leave.

    Raises:
        NotAttention: `piece.read_elsewhere`.
    """
    graph = piece.end.graph
    candidates = set(region.nodes) | piece.nodes
    candidates |= unread_numbers(graph, candidates)
    # a fused function whose operations stand in its place
    for node in graph.nodes:
        if ops.name(node) in ops.MHA and not any(user.users for user in node.users):
            candidates |= {node, *node.users}
    live = live_nodes(graph, candidates, removed)
    for node in graph.nodes:
        leaves = node.op in ("call_module", "get_attr") and str(node.target) in piece.taken
        if leaves and (node not in candidates or node in live):
            reader = next((location(u) for u in node.users if u not in candidates), "")
            text = f"{node.target}, which would be replaced, is read elsewhere"
            text += f" ({reader})" if reader else ""
            raise NotAttention("piece.read_elsewhere", text, node)
