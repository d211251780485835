"""One linear map at each end of an attention, in a host graph.

    rotate(q_proj(x).view(...).transpose(1, 2), cos, sin)   ->   x, q_proj, rotated
    o_proj(out.transpose(1, 2).flatten(2))                  ->   o_proj

A map is a module that is one, or a function of torch with a parameter: linear, matmul, einsum.
Between it and the attention may stand views, casts, a number that multiplies, the map's own bias,
and a rotation by tensors that are no parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attn_compiler.ir import ops
from attn_compiler.ir.affine import affine

_PRODUCTS = frozenset(n.strip("_") for n in ops.CONTRACTION) | {"linear", "addmm"}
# names are bare: without the underlines of operators and of calls in place
VIEWS = frozenset(
    {
        "view", "unsafe_view", "reshape", "t", "mT", "T", "transpose", "permute", "swapaxes",
        "swapdims", "movedim", "moveaxis", "expand", "expand_as", "view_as", "flatten", "unflatten",
        "squeeze", "unsqueeze", "contiguous", "clone", "split", "split_with_sizes", "chunk",
        "tensor_split", "unbind", "getitem", "select", "slice", "narrow", "repeat_interleave",
        "repeat", "getattr", "alias", "to", "type_as", "float", "half", "bfloat16", "double",
        "type", "to_copy",
    }
)  # fmt: skip
_SUMS = frozenset({"add", "radd", "iadd"})
_SCALES = frozenset({"mul", "rmul", "imul", "div", "truediv", "itruediv", "true_divide"})
_NORMS = frozenset(
    {
        "rsqrt", "sqrt", "var_mean", "var", "std", "norm", "linalg_vector_norm", "vector_norm",
        "layer_norm", "rms_norm", "native_layer_norm", "normalize", "group_norm", "batch_norm",
        "instance_norm",
    }
)  # fmt: skip
_ROTATES = tuple(
    map(
        frozenset,
        (
            ("neg", "cat"), ("neg", "stack"), ("sub", "cat"), ("sub", "stack"),
            ("view_as_complex", "view_as_real"),
        ),
    )
)  # fmt: skip
# what a rotation, and the tables of its angles, are written with
_ANGLES = frozenset(
    {
        "neg", "cat", "concat", "stack", "sub", "rsub", "view_as_complex", "view_as_real", "cos",
        "sin", "polar", "complex", "arange", "outer", "einsum", "matmul", "pow", "rpow", "exp",
        "log", "reciprocal", "rtruediv", "floordiv", "empty_like", "ones_like", "ones", "full",
        "index", "index_select", "gather", "addcmul", "cumsum",
    }
)  # fmt: skip


class Strange(Exception):
    """The graph around an attention is no layer; `inside` is the path of a module that hides it."""

    def __init__(self, at: fx.Node, code: str, text: str, inside: str = "") -> None:
        super().__init__(text)
        self.at = at
        self.code = code
        self.text = text
        self.inside = inside


@dataclass(frozen=True)
class Made:
    """A linear map, and what lies between it and the attention.

    Attributes:
        node: of the map.
        x: its input, [B, T, D].
        taken: the module that it is, or its parameters, by path.
        turned: does a rotation stand between?
        nodes: all that may be dead without it.
    """

    node: fx.Node
    x: fx.Node
    taken: tuple[str, ...]
    turned: bool
    nodes: frozenset[fx.Node]


@dataclass(frozen=True)
class _Map:
    node: fx.Node
    x: fx.Node
    taken: tuple[str, ...]
    nodes: frozenset[fx.Node]


# ---------------------------------------------------------------- back


def made_by(start: fx.Node, name: str) -> Made:
    """The one linear map that `start` is made by.

    Raises:
        Strange: no_projection, qk_norm, between, hidden.
    """
    found: dict[fx.Node, _Map] = {}
    others: list[fx.Node] = []
    biases: list[fx.Node] = []
    called: set[str] = set()
    nodes: set[fx.Node] = set()
    stack = [start]
    while stack:
        node = stack.pop()
        if node in nodes or not _is_tensor(node):
            continue
        nodes.add(node)
        linear = _map(node)
        if linear is not None:
            found[node] = linear
        elif node.op == "get_attr" and is_parameter(node):
            (biases if _is_bias(node) else others).append(node)
        elif node.op in ("placeholder", "get_attr", "call_module"):
            others.append(node)
        else:
            called.add(_name(node))
            stack += node.all_input_nodes
    turned = any(signs <= called for signs in _ROTATES)
    _check_between(start, name, (called, others, turned), list(found.values()))
    (linear,) = found.values()
    taken = (*linear.taken, *(str(n.target) for n in biases))
    return Made(linear.node, linear.x, taken, turned, frozenset(nodes) | linear.nodes)


def _check_between(
    start: fx.Node,
    name: str,
    found: tuple[set[str], list[fx.Node], bool],
    maps: list[_Map],
) -> None:
    called, others, turned = found
    modules = [n for n in others if n.op == "call_module"]
    if called & _NORMS or any(map(_is_norm, modules)):
        text = f"a normalisation stands between the linear map and the {name}"
        raise Strange(start, "qk_norm", text)
    if len(maps) != 1:
        hidden = modules[0] if not maps and len(modules) == 1 else None
        if hidden is not None and list(ops.called_module(hidden).children()):
            text = f"the {name} are made in a {type(ops.called_module(hidden)).__name__}"
            raise Strange(hidden, "hidden", text, str(hidden.target))
        text = f"the {name} are not made by one linear map of parameters"
        raise Strange(start, "no_projection", text)
    trained = [n for n in others if is_parameter(n) or any(True for _ in _trained(n))]
    allowed = VIEWS | _SCALES | _SUMS | (_ANGLES if turned else frozenset())
    if called - allowed or trained or (others and not turned):
        odd = ", ".join(sorted(called - allowed)) or "another tensor"
        text = f"{odd} stands between the linear map and the {name}"
        raise Strange(start, "between", text)


def _trained(node: fx.Node) -> Any:
    return ops.called_module(node).parameters() if node.op == "call_module" else iter(())


def _is_norm(node: fx.Node) -> bool:
    """torch's own, or a module with vectors for parameters."""
    weights = list(ops.called_module(node).parameters())
    return ops.name(node) in _NORMS or (bool(weights) and all(p.dim() == 1 for p in weights))


def _name(node: fx.Node) -> str:
    return ops.name(node).strip("_")


def _is_tensor(node: fx.Node) -> bool:
    value = ops.value(node)
    held = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(item, torch.Tensor) for item in held)


def is_parameter(node: fx.Node) -> bool:
    """Does it read a parameter of the graph's module?"""
    owner = node.graph.owning_module
    if node.op != "get_attr" or owner is None:
        return False
    home, _, name = str(node.target).rpartition(".")
    return name in owner.get_submodule(home)._parameters


def _is_bias(node: fx.Node) -> bool:
    """Is it added, and nothing else?"""
    return all(
        _name(user) in _SUMS or (_name(user) in VIEWS and _is_bias(user)) for user in node.users
    )


# ---------------------------------------------------------------- maps


def _map(node: fx.Node) -> _Map | None:
    """The linear map that a node is."""
    if node.op == "call_module":
        given = node.all_input_nodes
        names = affine(ops.called_module(node), node) if len(given) == 1 else None
        if names is None or _rank(given[0]) != 3:
            return None
        return _Map(node, given[0], (str(node.target),), frozenset({node}))
    if _name(node) not in _PRODUCTS:
        return None
    tensors = [n for n in node.all_input_nodes if _is_tensor(n)]
    weights = {n: _leaves(n) for n in tensors}
    trained = [n for n in tensors if weights[n] and all(map(is_parameter, weights[n]))]
    given = [n for n in tensors if n not in trained]
    if len(given) != 1 or not trained:
        return None
    x, between = _input(given[0])
    taken = tuple(dict.fromkeys(str(leaf.target) for n in trained for leaf in weights[n]))
    inside = {m for n in trained for m in _above(n)}
    if x is None:
        return None
    return _Map(node, x, taken, frozenset({node, *between, *inside}))


def _leaves(node: fx.Node) -> list[fx.Node]:
    """What a tensor is a view of; nothing where it is none."""
    while node.op not in ("placeholder", "get_attr", "call_module"):
        inputs = [n for n in node.all_input_nodes if _is_tensor(n)]
        if _name(node) not in VIEWS or len(inputs) != 1:
            return []
        node = inputs[0]
    return [node]


def _above(node: fx.Node) -> list[fx.Node]:
    found = [node]
    while found[-1].op not in ("placeholder", "get_attr", "call_module"):
        inputs = [n for n in found[-1].all_input_nodes if _is_tensor(n)]
        if len(inputs) != 1:
            break
        found.append(inputs[0])
    return found


def _input(node: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
    """The tensor [B, T, D] that a product reads, and the views of it on the way."""
    between: list[fx.Node] = []
    while _rank(node) != 3:
        inputs = [n for n in node.all_input_nodes if _is_tensor(n)]
        if _name(node) not in VIEWS or len(inputs) != 1 or node.op == "call_module":
            return None, []
        between.append(node)
        node = inputs[0]
    return node, between


def _rank(node: fx.Node) -> int:
    value = ops.value(node)
    return value.dim() if isinstance(value, torch.Tensor) else -1


# ---------------------------------------------------------------- forward


def read_by(end: fx.Node) -> Made:
    """The one linear map that reads the result of an attention.

    Raises:
        Strange: no_output, hidden.
    """
    nodes: set[fx.Node] = set()
    node = end
    while True:
        readers = _readers(node)
        if len(readers) != 1:
            text = "the result of the attention is read by no linear map, or by several operations"
            raise Strange(node, "no_output", text)
        (reader,) = readers
        linear = _map_of(reader, node)
        if linear is not None:
            break
        if reader.op == "call_module" and list(ops.called_module(reader).children()):
            text = f"the result goes into a {type(ops.called_module(reader)).__name__}"
            raise Strange(reader, "hidden", text, str(reader.target))
        if reader.op == "call_module" or _name(reader) not in VIEWS:
            what = ops.name(reader) or reader.op
            text = f"the result of the attention goes through {what} before a linear map takes it"
            raise Strange(reader, "no_output", text)
        nodes.add(node)
        node = reader
    last, biases = _with_bias(linear.node)
    taken = (*linear.taken, *(str(n.target) for n in biases))
    return Made(last, node, taken, False, frozenset(nodes | {node}) | linear.nodes | {last})


def _readers(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if _is_tensor(user) or user.op == "output"]


def _map_of(reader: fx.Node, given: fx.Node) -> _Map | None:
    """The linear map that a reader is; of a product the other side is a parameter."""
    if reader.op == "call_module":
        names = affine(ops.called_module(reader), reader)
        if names is None or reader.all_input_nodes != [given] or _rank(reader) != 3:
            return None
        return _Map(reader, given, (str(reader.target),), frozenset({reader}))
    if reader.op != "call_function" and reader.op != "call_method":
        return None
    if _name(reader) not in _PRODUCTS:
        return None
    others = [n for n in reader.all_input_nodes if _is_tensor(n) and n is not given]
    leaves = [leaf for n in others for leaf in _leaves(n)]
    if not others or len(leaves) != len(others) or not all(map(is_parameter, leaves)):
        return None
    made = reader
    nodes = {reader, *(m for n in others for m in _above(n))}
    while _rank(made) != 3:
        readers = _readers(made)
        if len(readers) != 1 or _name(readers[0]) not in VIEWS:
            return None
        made = readers[0]
        nodes.add(made)
    taken = tuple(dict.fromkeys(str(leaf.target) for leaf in leaves))
    return _Map(made, given, taken, frozenset(nodes))


def _with_bias(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The sum of a product and a parameter, if nothing else reads the product."""
    readers = _readers(node)
    if len(readers) == 1 and _name(readers[0]) in _SUMS:
        others = [n for n in readers[0].all_input_nodes if n is not node]
        leaves = [leaf for n in others for leaf in _leaves(n)]
        bias = len(leaves) == len(others) == 1 and is_parameter(leaves[0])
        if bias and ops.value(others[0]).dim() == 1:
            return readers[0], leaves
    return node, []
