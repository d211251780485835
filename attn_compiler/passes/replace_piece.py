"""What all passes share that put one call in the place of a piece around an attention.

    o_proj(attention(q_proj(x), k_proj(x), v_proj(x)))   ->   function(x, w_q, w_k, ..., k=2, ...)

The function is Python of torch operations and the package's operators: compilers and exporters
look through it.
"""

from __future__ import annotations

import torch
from torch import fx

from attn_compiler.ir import ops
from attn_compiler.ir.no_attention import NotAttention
from attn_compiler.ir.piece import Piece
from attn_compiler.ir.provenance import location
from attn_compiler.ir.trace import Region
from attn_compiler.passes.emit import MODAL, Emitter
from attn_compiler.passes.rewrite_site import live_nodes, unread
from attn_compiler.variants.base import Replacement


def mark(call: fx.Node, replacement: Replacement) -> None:
    """Say what this call is."""
    if replacement.training:
        call.meta[MODAL] = True


def in_dtype(emitter: Emitter, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A cast, where it is one."""
    if ops.value(node).dtype == dtype:
        return node
    return emitter.call(torch.ops.aten.to.dtype, node, dtype)


def _leaves(node: fx.Node, taken: tuple[str, ...]) -> bool:
    """Is it a call of a module that leaves, or a parameter that does, by itself or in a module?"""
    path = str(node.target)
    inside = any(path == t or path.startswith(f"{t}.") for t in taken)
    return inside and node.op in ("call_module", "get_attr")


def check_unread(region: Region, piece: Piece, removed: set[fx.Node]) -> None:
    """Nobody else may read what is replaced, or call the modules that leave.

    Raises:
        NotAttention: `piece.read_elsewhere`.
    """
    graph = piece.end.graph
    candidates = set(region.nodes) | piece.nodes
    candidates |= unread(graph, candidates)
    # a fused function whose operations stand in its place
    for node in graph.nodes:
        if ops.name(node) in ops.MHA and not any(user.users for user in node.users):
            candidates |= {node, *node.users}
    live = live_nodes(graph, candidates, removed)
    for node in graph.nodes:
        if _leaves(node, piece.taken) and (node not in candidates or node in live):
            reader = next((location(u) for u in node.users if u not in candidates), "")
            text = f"{node.target}, which would be replaced, is read elsewhere"
            text += f" ({reader})" if reader else ""
            raise NotAttention("piece.read_elsewhere", text, node)
