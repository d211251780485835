"""Keys that a norm makes of a linear image of x.

    norm(k_proj(x).view(B, S, G, d))   ->   k = gain * (z - mean z) / size(z) + bias,  z linear in x

For all queries the scores of a key are divided by its one size: what is divided is linear in x. A
norm is found as a module: torch's own, or one whose forward is x * rsqrt(mean(x^2) + eps) * gain.

Source: EL-Attention (arXiv 2105.04779), its equations for keys with a norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from attn_compiler.ir import ops
from attn_compiler.ir.affine import inside, is_listened_to

_SAME = frozenset({"_to_copy", "to", "clone", "detach", "alias", "float", "type_as"})


@dataclass(frozen=True)
class Norm:
    """A norm over the last dimension.

    Attributes:
        x: host node of what is normalised.
        centred: is the mean taken off?
        eps: is added to the mean of squares.
        weight, bias: paths of the parameters in the module that owns the graph, or None.
        module: path of the norm.
    """

    x: fx.Node
    centred: bool
    eps: float
    weight: str | None
    bias: str | None
    module: str


def norm_of(made: fx.Node) -> Norm | None:
    """The norm whose result a host node is, None if it is none that is understood."""
    if made.op != "call_module" or len(made.all_input_nodes) != 1:
        return None
    module, path, x = ops.called_module(made), str(made.target), made.all_input_nodes[0]
    found = None if is_listened_to(module) else _read(module, made)
    if found is None:
        return None
    centred, eps, weight, bias = found
    names = [None if name is None else f"{path}.{name}" for name in (weight, bias)]
    return Norm(x, centred, eps, names[0], names[1], path)


def _read(module: nn.Module, call: fx.Node) -> tuple[bool, float, str | None, str | None] | None:
    """Is the mean taken off, eps, and the names of the parameters."""
    names = {name for name, p in module._parameters.items() if p is not None}
    weight = "weight" if "weight" in names else None
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and type(module).__module__.startswith(
        "torch.nn"
    ):
        if len(module.normalized_shape) != 1:
            return None
        eps = module.eps if module.eps is not None else torch.finfo(ops.value(call).dtype).eps
        bias = "bias" if "bias" in names else None
        return isinstance(module, nn.LayerNorm), float(eps), weight, bias
    if module._modules or module._buffers or len(names) != 1:
        return None
    own = _eps_of(inside(module, call))
    return None if own is None else (False, own, next(iter(names)), None)


def _eps_of(nodes: list[fx.Node]) -> float | None:
    """eps, if these are  gain * (x * rsqrt(mean(x^2) + eps))  and nothing else."""
    if not nodes:
        return None
    graph = nodes[0].graph
    x, gain = graph.find_nodes(op="placeholder")
    end = next(iter(graph.find_nodes(op="output"))).args[0]
    scaled = _other(_plain(end), "mul", gain)
    root = None if scaled is None else _other(scaled, "mul", x)
    if root is None or ops.name(root) != "rsqrt":
        return None
    total = _plain(root.args[0])
    if ops.name(total) != "add" or not isinstance(total.args[1], float | int):
        return None
    mean = _plain(total.args[0])
    over = list(mean.args[1]) if ops.name(mean) == "mean" and len(mean.args) == 3 else []
    square = _plain(mean.args[0]) if over == [-1] and mean.args[2] is True else None
    return float(total.args[1]) if square is not None and _is_square(square, x) else None


def _is_square(node: fx.Node, x: fx.Node) -> bool:
    if ops.name(node) == "pow":
        return bool(node.args[1] == 2) and _plain(node.args[0]) is x
    return ops.name(node) == "mul" and all(_plain(a) is x for a in node.args)


def _plain(node: Any) -> Any:
    """What a cast is a cast of."""
    while isinstance(node, fx.Node) and ops.name(node) in _SAME:
        node = node.args[0]
    return node


def _other(node: Any, name: str, one: fx.Node) -> Any:
    """The other operand of a product with `one`, None if it is no such product."""
    if not isinstance(node, fx.Node) or ops.name(node) != name or len(node.args) != 2:
        return None
    left, right = map(_plain, node.args)
    if left is one:
        return right
    return left if right is one else None
