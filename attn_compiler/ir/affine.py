"""Linear maps of a host graph, by what they do; and what else stands in their place.

k_proj(x), F.linear(x, w, b), a module of the user's with addmm in it   ->   x, w, b
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir import ops
from attn_compiler.ir.provenance import location
from attn_compiler.ir.region import FunctionalRegion
from attn_compiler.ir.site import Reason

_ROTATIONS = frozenset({"sin", "cos", "polar", "view_as_complex", "complex"})
_NORMS = frozenset(
    {"rsqrt", "sqrt", "var_mean", "var", "std", "norm", "linalg_vector_norm", "layer_norm"}
    | {"rms_norm", "native_layer_norm", "_fused_rms_norm"}
)
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "convolution"})
_PIECES = frozenset({"slice", "select", "narrow", "split", "getitem", "split_with_sizes"})
_VIEWS = frozenset({"view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand"})


class Blocked(Exception):
    """Keys or values are no such image of x; `reasons` say what stands in the way."""

    def __init__(self, at: fx.Node, *found: tuple[str, str]) -> None:
        super().__init__("; ".join(text for _, text in found))
        self.reasons = tuple(Reason(code, text, location(at)) for code, text in found)


@dataclass(frozen=True)
class LinearMap:
    """x W^T + b.

    Attributes:
        x: host node of the input.
        weight, bias: paths of the parameters in the module that owns the graph.
        transposed: is the weight [D, outputs]?
        module: path of the module that is the map, "" if the code names the weight itself.
    """

    x: fx.Node
    weight: str
    bias: str | None
    transposed: bool
    module: str

    @property
    def width(self) -> int:
        """D."""
        owner, (home, _, name) = self.x.graph.owning_module, self.weight.rpartition(".")
        assert owner is not None
        weight: torch.Tensor = getattr(owner.get_submodule(home), name)
        return weight.shape[0 if self.transposed else 1]


# ---------------------------------------------------------------- linear maps


def linear_map(made: fx.Node, name: str) -> LinearMap:
    """The map whose result a host node is; `name` says what is made by it.

    Raises:
        Blocked: it is none.
    """
    given = made.all_input_nodes
    if made.op == "call_module":
        module, path = ops.called_module(made), str(made.target)
        names = affine(module, made) if len(given) == 1 else None
        if names is None:
            raise _named_module(module, made, name)
        bias = f"{path}.{names[1]}" if names[1] else None
        return LinearMap(given[0], f"{path}.{names[0]}", bias, names[2], path)
    parameters = given[1:]
    if ops.name(made) == "linear" and all(n.op == "get_attr" for n in parameters):
        paths = [str(n.target) for n in parameters]
        return LinearMap(given[0], paths[0], paths[1] if len(paths) > 1 else None, False, "")
    text = f"the {name} are not made by one linear map of parameters"
    raise Blocked(made, ("no_projection", text))


def is_linear_map(made: fx.Node) -> bool:
    """Is it the result of one?"""
    try:
        linear_map(made, "keys")
    except Blocked:
        return False
    return True


def affine(module: nn.Module, call: fx.Node) -> tuple[str, str | None, bool] | None:
    """Weight, bias and whether the weight is [D, outputs], if a module is one linear map.

    `torch.nn.Linear` is one; of any other module with a matrix and nothing else the forward is
    looked at.
    """
    weights = {n: p for n, p in module._parameters.items() if p is not None}
    if is_listened_to(module):
        return None
    if type(module) is nn.Linear:
        return "weight", "bias" if "bias" in weights else None, False
    matrices = [n for n, p in weights.items() if p.dim() == 2]
    vectors = [n for n, p in weights.items() if p.dim() == 1]
    if module._modules or module._buffers or len(matrices) != 1 or len(vectors) > 1:
        return None
    nodes = inside(module, call)
    products = [n for n in nodes if ops.name(n) not in _VIEWS]
    if len(products) != 1 or ops.name(products[0]) not in ("addmm", "mm"):
        return None
    *bias, given, weight = products[0].args
    inputs = _origins(nodes, list(weights))
    if inputs(given) != "" or inputs(weight) != matrices[0]:
        return None
    if [inputs(b) for b in bias] != vectors or products[0].kwargs:
        return None
    assert isinstance(weight, fx.Node)
    transposed = ops.name(weight) not in ("t", "transpose", "permute")
    return matrices[0], vectors[0] if vectors else None, transposed


def is_listened_to(module: nn.Module) -> bool:
    """Does calling the module run more than its class's forward?"""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def inside(module: nn.Module, call: fx.Node) -> list[fx.Node]:
    """The ATen operations of a module's forward; none where it cannot be traced."""
    given = ops.value(call.all_input_nodes[0])
    sizes = [ax.hint(n) for n in given.shape]
    x = torch.empty(sizes, dtype=given.dtype, device="meta")
    names = [n for n, p in module._parameters.items() if p is not None]
    weights = [torch.empty_like(p, device="meta") for p in module.parameters(recurse=False)]

    def run(x: Any, *given: Any) -> Any:
        table = dict(zip(names, given, strict=True))
        return torch.func.functional_call(module, table, (x,))

    try:
        traced = make_fx(run, tracing_mode="real")(x, *weights)
    except Exception:  # runs the module's own code
        return []
    return [n for n in traced.graph.nodes if n.op == "call_function"]


def _origins(nodes: list[fx.Node], names: list[str]) -> Callable[[Any], str | None]:
    """For a node of such a trace: the parameter it is a view of, "" for the input."""
    if not nodes:
        return lambda node: None
    places = [n for n in nodes[0].graph.nodes if n.op == "placeholder"]
    table = dict(zip(places, ["", *names], strict=True))

    def origin(node: Any) -> str | None:
        while isinstance(node, fx.Node) and ops.name(node) in _VIEWS:
            node = node.args[0]
        return table.get(node)

    return origin


# ---------------------------------------------------------------- what else it is


def between(functional: FunctionalRegion | None, name: str, at: fx.Node) -> Blocked:
    """What stands between a linear map and the cache, as an error to raise."""
    if functional is None:
        return _verdict(set(), name, at)
    if _turned_in_part(functional):
        text = f"a rotation of a part of the features stands between the linear map and the {name}"
        return Blocked(at, ("partial_rope", f"{text}: the rest alone could be read out of x"))
    called, stack = set[str](), [functional.end]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        called.add(ops.name(node))
        host = functional.read.get(node)
        if host is not None and host.op == "call_module":
            called |= _called(ops.called_module(host), host)
        stack.extend(node.all_input_nodes)
    return _verdict(called, name, at)


def _turned_in_part(functional: FunctionalRegion) -> bool:
    """Are some features rotated, and others beside them views of what the region reads?"""
    end = functional.end
    while ops.name(end) in _VIEWS:
        end = end.all_input_nodes[0]
    parts = end.all_input_nodes if ops.name(end) == "cat" else []
    whole = [part for part in parts if _is_piece(part)]
    turned = [part for part in parts if part not in whole]
    return bool(whole) and any({"neg", "cat"} <= _ancestry(p) for p in turned)


def _is_piece(node: fx.Node) -> bool:
    while ops.name(node) in _VIEWS | _PIECES:
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


def _ancestry(end: fx.Node) -> set[str]:
    found, stack, seen = set[str](), [end], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            found.add(ops.name(node))
            stack.extend(node.all_input_nodes)
    return found


def _named_module(module: nn.Module, call: fx.Node, name: str) -> Blocked:
    called = _called(module, call)
    if called & {"addmm", "mm", "linear", "matmul", "bmm"} or not called:
        text = f"the {name} are made by a {type(module).__name__}, which is not one linear map"
        return Blocked(call, ("no_projection", text))
    return _verdict(called, name, call)


def _called(module: nn.Module, call: fx.Node) -> set[str]:
    return {ops.name(n) for n in inside(module, call)}


def _verdict(called: set[str], name: str, at: fx.Node) -> Blocked:
    between = f"between the linear map and the {name}"
    found = []
    if called & _ROTATIONS or {"neg", "cat"} <= called:
        found.append(("rope_on_key", f"a rotation stands {between}"))
    if called & _NORMS:
        text = f"a normalisation that is no module of a known form stands {between}"
        found.append(("key_norm", text))
    if called & _CONVOLUTIONS:
        found.append(("convolved", f"a convolution stands {between}"))
    if not found and called & {"mul", "div"} and not called & {"add", "sub"}:
        found.append(("key_scaled", f"a multiplication stands {between}"))
    if not found:
        text = f"the {name} are not views of what one linear map gives"
        found.append(("no_projection", text))
    return Blocked(at, *found)
