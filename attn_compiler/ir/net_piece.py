"""The layers of all attentions of a block, and its feed-forward net: all are replaced or none.

q_proj, k_proj, v_proj, attention, o_proj   and   up, activation, down     residuals and norms stay

    h = x + A(norm x);                        y = h + F(norm h)     one attention
    h = x + A(norm x);  g = h + C(norm h, e); y = g + F(norm g)     C reads what A was added to
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx

from attn_compiler.ir import ops
from attn_compiler.ir.affine import Blocked
from attn_compiler.ir.block import Branch
from attn_compiler.ir.block_piece import home_of, leaving
from attn_compiler.ir.feed_forward import FeedForward
from attn_compiler.ir.layer import Layer
from attn_compiler.ir.piece import Piece
from attn_compiler.ir.residuals import Residuals
from attn_compiler.ir.token_wise import is_parameter, norm_between, unmoved


@dataclass(frozen=True)
class Net:
    """A feed-forward net that can be replaced.

    Attributes:
        branch: where it stands.
        home: path of the module that gets the new parameters, below the owner of the graph.
        width: D.
        parameters: how many numbers it holds, of which `dtype` and `device`.
        up, down: paths of its weights.
        hidden: features that `down` reads.
        dropout: rate on them.
    """

    branch: Branch
    home: str
    width: int
    parameters: int
    dtype: torch.dtype
    device: torch.device
    up: str
    down: str
    hidden: int
    dropout: float


@dataclass(frozen=True)
class Added:
    """Where the result of an attention is added to a residual.

    Attributes:
        end: host node of the attention's end.
        upon: the attention's term, dropouts included.
        total: the sum.
        terms: all terms, `upon` among them.
    """

    end: fx.Node
    upon: fx.Node
    total: fx.Node
    terms: tuple[fx.Node, ...]

    def behind(self, other: Added) -> fx.Node | None:
        """The residual of this attention, if it is what another one was added to, or that normed:
        both are of one block.
        """
        rest = (t for t in self.terms if t is not self.upon)
        return next((t for t in rest if t is other.total or norm_between(other.total, t)), None)


def added(end: fx.Node) -> Added:
    """Where the result of an attention is added.

    Raises:
        Blocked: it is not, or not after one linear map.
    """
    around = Residuals(end)
    upon, _ = around.projected()
    total, terms = around.sum_of(upon)
    return Added(end, upon, total, tuple(terms))


def net_of(where: Added, layer: Layer) -> Net:
    """The feed-forward net that follows the layer of an attention in its block.

    Raises:
        Blocked: none follows, or another attention first; `feed_forward.shared`, it is not the
            net's alone.
    """
    x, norm = Residuals(where.end).residual(unmoved(layer.query.x), list(where.terms))
    return net_behind(where, x, bool(norm))


def net_behind(where: Added, x: fx.Node, normed: bool) -> Net:
    """The same, where the residual is known, and whether the attention reads it `normed`.

    Raises:
        Blocked: see `net_of`.
    """
    around = Residuals(where.end)
    others = [t for t in where.terms if t is not x and t is not where.upon]
    y = where.total
    if others:
        branch, net = around.parallel(x, "normed" if normed else "", others)
    elif normed:
        y, branch, net = around.following(y, y)
    else:
        y, branch, net = around.following(y, around.norm_after(y)[1])
    around.check_writes((branch,), (x, y))
    _check_alone(branch, net)
    weights = {n: ops.value(n) for n in where.end.graph.nodes if _is_of(n, branch)}
    held = list({str(n.target): p for n, p in weights.items()}.values())
    return Net(
        branch=branch,
        home=home_of(branch),
        width=ops.value(branch.made).shape[-1],
        parameters=sum(p.numel() for p in held),
        dtype=held[0].dtype,
        device=held[0].device,
        up=net.up.weight,
        down=net.down.weight,
        hidden=net.width,
        dropout=net.dropout,
    )


def _check_alone(branch: Branch, net: FeedForward) -> None:
    held = {net.gate or net.up, net.up, net.down}
    weights = {path for m in held for path in (m.weight, m.bias) if path is not None}
    if weights != set(branch.parameters):
        text = "its weights are read elsewhere, too, or in a module that is not looked into"
        raise Blocked(branch.made, ("feed_forward.shared", text))
    if any(ops.value(node).dim() != 3 for node in (branch.given, branch.made)):
        text = "the feed-forward net does not take and give [batch, tokens, features]"
        raise Blocked(branch.made, ("block.layout", text))


def with_net(piece: Piece, net: Net | None) -> Piece:
    """The layer of an attention and a net that is replaced with it, None where it is replaced with
    another layer. Facts: those of `find_layer`, and the `net`.
    """
    graph = piece.end.graph
    owner = graph.owning_module
    assert owner is not None
    nodes, parameters, homes = piece.nodes, tuple(_parameters(owner, piece.taken)), [piece.home]
    if net is not None:
        weights = {n for n in graph.nodes if _is_of(n, net.branch) and n.op == "get_attr"}
        nodes |= net.branch.nodes | weights
        parameters += net.branch.parameters
        homes.append(net.home)
    taken = tuple(leaving(owner, parameters, homes))
    return replace(piece, nodes=nodes, taken=taken, facts={**piece.facts, "net": net})


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
