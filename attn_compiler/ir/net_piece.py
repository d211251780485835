"""The layer of an attention, and the feed-forward net of its block, as one piece: both or neither.

q_proj, k_proj, v_proj, attention, o_proj   and   up, activation, down     residuals and norms stay
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attn_compiler.ir import ops
from attn_compiler.ir.affine import Blocked
from attn_compiler.ir.block import Branch
from attn_compiler.ir.block_piece import home_of, leaving
from attn_compiler.ir.blocks import find_net
from attn_compiler.ir.core import Core
from attn_compiler.ir.layer import find_layer
from attn_compiler.ir.piece import Sought
from attn_compiler.ir.region import FunctionalRegion
from attn_compiler.ir.token_wise import is_parameter
from attn_compiler.ir.trace import Region

State = Mapping[fx.Node, tuple[Any, ...]]


@dataclass(frozen=True)
class Net:
    """A feed-forward net that can be replaced.

    Attributes:
        branch: where it stands.
        home: path of the module that gets the new parameters, below the owner of the graph.
        width: D.
        parameters: how many numbers it holds, of which `dtype` and `device`.
        dropout: rate on its hidden features.
    """

    branch: Branch
    home: str
    width: int
    parameters: int
    dtype: torch.dtype
    device: torch.device
    dropout: float


def find_layer_and_net(
    region: Region, functional: FunctionalRegion, core: Core, state: State
) -> Sought:
    """The layer around an attention and the feed-forward net of the same block, or what stands in
    the way of one of them. Facts: those of `find_layer`, and the `net`.
    """
    found = find_layer(region, functional, core, state)
    piece = found.piece
    if piece is None:
        return found
    try:
        branch, net = find_net(region.end, core)
    except Blocked as blocked:
        return Sought(None, blocked.reasons)
    graph = region.end.graph
    owner = graph.owning_module
    assert owner is not None
    weights = {n: ops.value(n) for n in graph.nodes if _is_of(n, branch)}
    held = list({str(n.target): p for n, p in weights.items()}.values())
    made = Net(
        branch=branch,
        home=home_of(branch),
        width=ops.value(branch.made).shape[-1],
        parameters=sum(p.numel() for p in held),
        dtype=held[0].dtype,
        device=held[0].device,
        dropout=net.dropout,
    )
    layers = tuple(_parameters(owner, piece.taken))
    taken = leaving(owner, (*layers, *branch.parameters), (piece.home, made.home))
    nodes = piece.nodes | branch.nodes | {n for n in weights if n.op == "get_attr"}
    return Sought(
        replace(piece, nodes=nodes, taken=tuple(taken), facts={**piece.facts, "net": made})
    )


def _is_of(node: fx.Node, branch: Branch) -> bool:
    return is_parameter(node) and str(node.target) in branch.parameters


def _parameters(owner: fx.GraphModule, paths: Iterable[str]) -> Iterable[str]:
    """Paths of parameters for paths of modules and parameters."""
    for path in paths:
        home, _, name = path.rpartition(".")
        value = getattr(owner.get_submodule(home), name)
        if isinstance(value, torch.nn.Module):
            yield from (f"{path}.{n}" for n, _ in value.named_parameters())
        else:
            yield path
