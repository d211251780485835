"""What a node of a host graph does to each token by itself: linear map, norm, dropout, view, sum.

    F.linear(x, w, b), torch.addmm(b, x.view(-1, D), w)    ->   LinearMap(x, "w", "b", ...)
    x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e)   ->   "rms" of x

All are known by what is called and what it is called with, never by names of modules or files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir import ops
from attn_compiler.ir.affine import LinearMap, affine

CASTS = frozenset({"to", "float", "half", "bfloat16", "double", "type_as", "type", "_to_copy"})
VIEWS = frozenset(
    {"view", "_unsafe_view", "reshape", "flatten", "unflatten", "contiguous", "clone", "unsqueeze"}
    | {"squeeze", "alias", "expand"}
)
MOVES = frozenset({"transpose", "permute", "swapaxes", "swapdims", "movedim", "t", "adjoint", "mT"})
_PRODUCTS = frozenset({"matmul", "__matmul__", "mm"})
_POINTWISE = frozenset({"add", "sub", "mul", "div", "pow", "square", "neg", "abs", "reciprocal"})
_NORMS = frozenset({"layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"})
_REDUCTIONS = frozenset({"mean", "var", "std", "norm", "linalg_vector_norm", "vector_norm", "sum"})
_ROOTS = frozenset({"sqrt", "rsqrt", "clamp", "clamp_min", "maximum"})
_FARTHEST = 32


def itself(node: fx.Node) -> fx.Node:
    """The node that first held the very same tensor: a cast to its own dtype hands it on, and who
    read the tensor then reads the cast.
    """
    while is_tensor(node) and node.all_input_nodes and not ops.written(node):
        source = node.all_input_nodes[0]
        if ops.value(source) is not ops.value(node):
            break
        node = source
    return node


def behind(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads; what an opaque object gave reads the call that gave it."""
    return [node.meta["opaque"]] if "opaque" in node.meta else node.all_input_nodes


def given_to(node: fx.Node) -> list[fx.Node]:
    """The same without nodes that only hand on what they read."""
    return list(dict.fromkeys(map(itself, behind(node))))


def is_tensor(node: fx.Node) -> bool:
    return isinstance(ops.value(node), torch.Tensor)


def is_parameter(node: fx.Node) -> bool:
    """Does it hold a tensor that the model owns?"""
    if not is_tensor(node):
        return False
    given = isinstance(ops.value(node), torch.nn.Parameter)
    return node.op == "get_attr" or (node.op == "placeholder" and given)


def last(node: fx.Node) -> ax.Size:
    """Size of the last dimension."""
    return ax.size_of(ops.value(node).shape[-1])


def keeps_features(node: fx.Node) -> bool:
    """Is it a view that leaves the tokens in order, and the last dimension alone?"""
    if ops.name(node) not in VIEWS or not node.all_input_nodes:
        return False
    source = node.all_input_nodes[0]
    if not (is_tensor(source) and is_tensor(node)) or not ops.value(source).dim():
        return False
    return bool(ops.value(node).dim()) and ax.equal(last(source), last(node))


def unviewed(node: fx.Node) -> fx.Node:
    """What a node is a view of, tokens and features in order."""
    node = itself(node)
    while keeps_features(node):
        node = itself(node.all_input_nodes[0])
    return node


def unmoved(node: fx.Node) -> fx.Node:
    """The same, past a change of the order of batch and tokens."""
    node = unviewed(node)
    while ops.name(node) in MOVES and ax.equal(last(node), last(node.all_input_nodes[0])):
        node = unviewed(node.all_input_nodes[0])
    return node


# ---------------------------------------------------------------- linear maps


def linear(node: fx.Node) -> LinearMap | None:
    """The linear map of parameters that a node is the result of; x as it is given to it."""
    called = ops.name(node)
    if node.op == "call_module":
        return _of_module(node)
    if called == "linear":
        return _made(
            ops.argument(node, 0, "input"), *(ops.argument(node, i, n) for i, n in _LINEAR)
        )
    if called == "addmm" and not node.kwargs:
        bias, x, weight = node.args[:3]
        found = _made(x, weight, bias)
    elif called in _PRODUCTS and len(node.args) == 2:
        found = _made(*node.args, None)
    else:
        return None
    # these take the matrix the other way round
    return None if found is None else _turned(found)


_LINEAR = ((1, "weight"), (2, "bias"))


def _made(x: Any, weight: Any, bias: Any) -> LinearMap | None:
    if not isinstance(x, fx.Node) or not is_tensor(x) or is_parameter(x):
        return None
    matrix, turned = _parameter(weight)
    vector, _ = _parameter(bias)
    if matrix is None or ops.value(matrix).dim() != 2 or (vector is None and bias is not None):
        return None
    return LinearMap(
        itself(x), str(matrix.target), None if vector is None else str(vector.target), turned, ""
    )


def _turned(found: LinearMap) -> LinearMap:
    return LinearMap(found.x, found.weight, found.bias, not found.transposed, found.module)


def _parameter(node: Any) -> tuple[fx.Node | None, bool]:
    """The parameter that a node is, and whether it was transposed an odd number of times."""
    turned = False
    while isinstance(node, fx.Node) and not is_parameter(node):
        called = ops.name(node)
        if called not in MOVES | CASTS or not node.all_input_nodes:
            return None, False
        turned ^= called in MOVES
        node = node.all_input_nodes[0]
    return (node if isinstance(node, fx.Node) else None), turned


def _of_module(node: fx.Node) -> LinearMap | None:
    if len(node.all_input_nodes) != 1 or not is_tensor(node.all_input_nodes[0]):
        return None
    path, names = str(node.target), affine(ops.called_module(node), node)
    if names is None:
        return None
    bias = f"{path}.{names[1]}" if names[1] else None
    return LinearMap(node.all_input_nodes[0], f"{path}.{names[0]}", bias, names[2], path)


# ---------------------------------------------------------------- norms and dropout


def norm_between(source: fx.Node, made: fx.Node) -> str:
    """ "layer" or "rms" if a node is a norm over the features of another one, "" if it is not."""
    seen, called = set[fx.Node](), set[str]()
    stack = [unviewed(made)]
    while stack:
        node = stack.pop()
        if node is source or node in seen:
            continue
        seen.add(node)
        name = ops.arithmetic(node)
        if len(seen) > _FARTHEST or not _norms(node, name):
            return ""
        called.add(name)
        stack += [a for a in given_to(node) if is_tensor(a) and not is_parameter(a)]
    if not called & (_NORMS | _REDUCTIONS):
        return ""
    return "layer" if called & {"layer_norm", "native_layer_norm", "sub", "var"} else "rms"


def _norms(node: fx.Node, called: str) -> bool:
    """Is it a step of a norm over the last dimension?"""
    given = [a for a in given_to(node) if is_tensor(a) and not is_parameter(a)]
    if not given or not is_tensor(node):
        return False
    if called in _REDUCTIONS:
        return _is_last(node)
    if called in _NORMS:
        return node.op == "call_module" or len(ops.argument(node, 1, "normalized_shape") or ()) == 1
    if called in _POINTWISE | _ROOTS:
        # a tensor and what was summed up of it; two whole tensors are a residual or a gate
        return len(given) == 1 or any(ax.equal(last(a), 1) for a in given)
    return called in CASTS or keeps_features(node)


def _is_last(node: fx.Node) -> bool:
    source = node.all_input_nodes[0]
    if not is_tensor(source):
        return False
    over = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    over = (
        node.args[2] if ops.name(node) in ("norm", "vector_norm") and len(node.args) > 2 else over
    )
    dims = list(over) if isinstance(over, tuple | list) else [over]
    return dims in ([-1], [ops.value(source).dim() - 1])


def dropout_of(node: fx.Node) -> float | None:
    """The rate of a dropout, 0 where it is off; None of anything else."""
    if ops.name(node) not in ("dropout", "dropout_"):
        return None
    rate, training = ops.argument(node, 1, "p"), ops.argument(node, 2, "training")
    training = node.kwargs.get("train", training)
    if ops.name(node) == "dropout" and training is None:
        training = True
    return float(0.5 if rate is None else rate) if training else 0.0


def undropped(node: fx.Node) -> tuple[fx.Node, tuple[float, ...]]:
    """What a node is without the dropouts upon it, and their rates."""
    rates: list[float] = []
    node = itself(node)
    while (rate := dropout_of(node)) is not None:
        rates.append(rate)
        node = itself(node.all_input_nodes[0])
    return node, tuple(rates)


# ---------------------------------------------------------------- graph


def live(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output or an effect needs."""
    stack = [
        n
        for n in graph.nodes
        if n.op == "output" or ops.written(n) or (ops.value(n) is None and n.op != "placeholder")
    ]
    found = set(stack)
    while stack:
        for node in behind(stack.pop()):
            if node not in found:
                found.add(node)
                stack.append(node)
    return found


def is_number(node: fx.Node) -> bool:
    value = ops.value(node)
    if value is None and node.op != "placeholder":
        return ops.name(node) in ("size", "dim", "sym_size")  # of what an opaque object gave
    leaves = value if isinstance(value, tuple | list) else (value,)
    return bool(leaves) and all(isinstance(n, int | torch.SymInt | float) for n in leaves)


def terms_of(node: fx.Node) -> list[fx.Node]:
    """The two tensors that an addition adds; fewer where it is no plain sum of activations."""
    given = [*node.args, *(v for k, v in node.kwargs.items() if k in ("input", "other"))]
    tensors = [n for n in given if isinstance(n, fx.Node) and is_tensor(n)]
    found = [itself(n) for n in tensors if not is_parameter(n)]
    return found if len(found) == len(given) and not node.kwargs.get("alpha") else []


def same_shape(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dim() == other.dim() and all(
        ax.equal(ax.size_of(a), ax.size_of(b)) for a, b in zip(one.shape, other.shape, strict=True)
    )
