"""Groups of operations: what a call in a host graph does, by its target and never by the names
around it.

A host graph may speak Dynamo's Python functions (`F.softmax`, `Tensor.softmax`), leaf modules
(`nn.Softmax`) or ATen;
`kind(node)` reduces them to the few questions that finding and cutting a region has to ask.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax", "softmin"})
# spelled by hand: exp(x) / sum(exp(x))
EXPONENTIAL = frozenset({"exp", "exp2"})
SDPA = frozenset({"scaled_dot_product_attention"})
MHA = frozenset({"multi_head_attention_forward"})
# fused further than this package looks: an encoder layer or attention with its projections in one
# native call
NATIVE = frozenset({"_transformer_encoder_layer_fwd", "_native_multi_head_attention"})
FLEX = frozenset({"flex_attention"})
CONTRACTION = frozenset(
    {"matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "einsum", "tensordot", "inner"}
)
# a region never reaches behind these: they make the activations and parameters it starts from
BOUNDARY = frozenset(
    {
        "linear", "addmm", "bilinear", "embedding", "embedding_bag", "conv1d", "conv2d", "conv3d",
        "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "layer_norm",
        "rms_norm", "group_norm", "batch_norm", "instance_norm", "native_layer_norm",
        "native_group_norm", "gru", "lstm", "rnn_tanh", "rnn_relu", "item",
        *NATIVE, "nonzero", "unique", "topk", "sort",
        "rand", "randn", "randint", "rand_like", "randn_like", "bernoulli", "multinomial",
        "argmax", "argmin",
    }
)  # fmt: skip
# second names of one operation
ALIASES = {
    "multiply": "mul", "subtract": "sub", "divide": "div", "true_divide": "div",
    "negative": "neg", "absolute": "abs", "greater": "gt", "greater_equal": "ge", "less": "lt",
    "less_equal": "le", "not_equal": "ne",
}  # fmt: skip
_INPLACE_OPERATORS = frozenset(
    {
        operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv,
        operator.ifloordiv, operator.iand, operator.ior, operator.ixor, operator.ipow,
        operator.imod, operator.imatmul,
    }
)  # fmt: skip


def name(node: fx.Node) -> str:
    """The bare name of what is called: `softmax` for F.softmax, Tensor.softmax, aten.softmax.int
    and nn.Softmax.
    """
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_module":
        return _MODULES.get(type(called_module(node)), "")
    if node.op != "call_function":
        return ""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    return getattr(target, "__name__", "")


def arithmetic(node: fx.Node) -> str:
    """`div` for `/`, `div_`, `torch.divide` and `Tensor.true_divide`."""
    plain = name(node).strip("_")
    return _OPERATORS.get(plain) or ALIASES.get(plain, plain)


_OPERATORS = {"truediv": "div", "itruediv": "div", "iadd": "add", "imul": "mul"}
# where F.name takes its `inplace` flag
_INPLACE_POSITION = {
    "dropout": 3,
    "relu": 1,
    "silu": 1,
    "hardswish": 1,
    "leaky_relu": 2,
    "elu": 2,
    "threshold": 3,
}
# functions that return tensors and draw random numbers
_RANDOM = frozenset(
    {
        "bernoulli", "multinomial", "normal", "poisson", "binomial", "rrelu", "gumbel_softmax",
        *SDPA, *MHA,
    }
)  # fmt: skip
_PURE_MODULES = frozenset(
    {
        "torch", "torch.functional", "torch.nn.functional", "torch._C._nn", "torch._C._linalg",
        "_operator",
    }
)  # fmt: skip
_MODULES: dict[type[nn.Module], str] = {
    nn.Softmax: "softmax",
    nn.Linear: "linear",
    nn.Embedding: "embedding",
    nn.LayerNorm: "layer_norm",
    nn.MultiheadAttention: "multi_head_attention_forward",
}


def is_contraction(node: fx.Node) -> bool:
    """Does it multiply two activations? A linear map does if its weight is computed."""
    if name(node) == "linear" and node.op == "call_function":
        weight = argument(node, 1, "weight")
        return isinstance(weight, fx.Node) and weight.op not in ("placeholder", "get_attr")
    return name(node) in CONTRACTION


def called_module(node: fx.Node) -> nn.Module:
    """The leaf module of a call_module node."""
    owner = node.graph.owning_module
    assert owner is not None
    return owner.get_submodule(str(node.target))


def argument(node: fx.Node, position: int, keyword: str) -> Any:
    """An argument of a call, by its position or its name; None where it is not given."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(keyword)


def value(node: fx.Node) -> Any:
    """The fake value the capture recorded for this node: a FakeTensor, a SymInt, a tuple of them,
    or None.
    """
    meta = node.meta
    return meta["example_value"] if "example_value" in meta else meta.get("val")


def storages(node: fx.Node) -> frozenset[int]:
    """Identities of the storages that the value of this node lives in; views share theirs."""
    found = value(node)
    leaves = found if isinstance(found, tuple | list) else (found,)
    try:
        return frozenset(
            leaf.untyped_storage()._cdata
            for leaf in leaves
            if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided
        )
    except (
        NotImplementedError
    ):  # a tensor inside vmap has no storage of its own, and cannot be written in place here
        return frozenset()


def written(node: fx.Node) -> tuple[fx.Node, ...]:
    """The argument nodes that this call writes in place."""
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return (out,)
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        return _written_by_schema(node, node.target)
    first = node.args[0] if node.args else node.kwargs.get("input")
    return (first,) if isinstance(first, fx.Node) and _writes_first(node) else ()


def is_pure(node: fx.Node) -> bool:
    """Does it make tensors and do nothing else? Where nobody reads them, it can be left out."""
    found = value(node)
    leaves = found if isinstance(found, tuple | list) else (found,)
    if not all(isinstance(leaf, torch.Tensor) for leaf in leaves) or written(node):
        return False
    called, target = name(node), node.target
    if called in _RANDOM or "dropout" in called or called.startswith("rand"):
        return False
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace == "aten" and torch.Tag.nondeterministic_seeded not in target.tags
    if node.op == "call_method":
        return hasattr(torch.Tensor, called)
    return node.op == "call_function" and getattr(target, "__module__", "") in _PURE_MODULES


def _writes_first(node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(called_module(node), "inplace", False))
    if node.op == "call_function" and node.target in _INPLACE_OPERATORS:
        return True
    called = name(node)
    if node.kwargs.get("inplace") is True or called == "__setitem__":
        return True
    if called in _INPLACE_POSITION and node.op == "call_function":
        position = _INPLACE_POSITION[called]
        return len(node.args) > position and node.args[position] is True
    if getattr(node.target, "__module__", "") == "_operator":
        return False
    return called.endswith("_") and not called.startswith("_") and not called.endswith("__")


def _written_by_schema(node: fx.Node, target: torch._ops.OpOverload) -> tuple[fx.Node, ...]:
    found = []
    for position, argument in enumerate(target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        found += [
            n
            for n in (given if isinstance(given, tuple | list) else (given,))
            if isinstance(n, fx.Node)
        ]
    return tuple(found)
