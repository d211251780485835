"""Regions: the few nodes around one candidate, cut out of a host graph and re-traced to functional
ATen.

    host graph --cut--> Region (nodes in graph order, inputs) --functionalise--> FunctionalRegion
    (pure ATen)

The cut goes by graph order and by storage, not by def-use alone: a mask written in place through a
view of the scores
is no ancestor of the softmax, and a slice by def-use would silently drop it. Every write, before
the region's end, to
a storage that a node of the region lives in belongs to the region.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from attn_compiler.ir import ops
from attn_compiler.ir.trace import NO_GRAD, Region, RegionError, is_batched, trace_region

LARGEST = 1500


@dataclass(frozen=True)
class FunctionalRegion:
    """The region as pure ATen.

    Attributes:
        graph: placeholders in the order of `Region.inputs`; each node has meta["val"].
        of_host: the functional node that holds the value of a host node *after* the region has run.
        end: the functional node of `Region.end`.
        read: region inputs by their placeholder.
        module: owner of the graph and of the constants in it.
    """

    graph: fx.Graph
    of_host: Mapping[fx.Node, fx.Node]
    end: fx.Node
    read: Mapping[fx.Node, fx.Node]
    module: fx.GraphModule


# ---------------------------------------------------------------- cut


def order(graph: fx.Graph) -> dict[fx.Node, int]:
    """Position of each node in its graph."""
    return {node: position for position, node in enumerate(graph.nodes)}


def cut(end: fx.Node, position: Mapping[fx.Node, int], writers: Iterable[fx.Node]) -> Region:
    """The region that ends at `end`.

    Args:
        end: host node of the product with the values (or of a fused attention).
        position: `order(end.graph)`.
        writers: the nodes of the graph that write in place, in graph order.

    Raises:
        RegionError: `region.too_large`.
    """
    inside: set[fx.Node] = set()
    inputs: set[fx.Node] = set()
    _reach(end, 0, inside, inputs)
    earlier = [w for w in writers if position[w] < position[end]]
    touched = _storages(inside | inputs)
    pending = True
    while pending:
        pending = False
        for writer in earlier:
            if writer in inside or not any(ops.storages(t) & touched for t in ops.written(writer)):
                continue
            inputs.discard(writer)
            _reach(writer, 0, inside, inputs)
            touched = _storages(inside | inputs)
            pending = True
    if len(inside) > LARGEST:
        raise RegionError(
            "region.too_large",
            f"{len(inside)} operations lead to this attention, more than {LARGEST}",
        )
    nodes = tuple(sorted(inside, key=position.__getitem__))
    return Region(
        end=end,
        nodes=nodes,
        inputs=tuple(sorted(inputs, key=position.__getitem__)),
        mutated=frozenset(_mutated(nodes, inputs)),
    )


def _reach(end: fx.Node, depth: int, inside: set[fx.Node], inputs: set[fx.Node]) -> None:
    """Walk back from `end` through at most two contractions (the scores and the product with the
    values).
    """
    best: dict[fx.Node, int] = {}
    stack = [(end, depth)]
    while stack:
        node, depth = stack.pop()
        if best.get(node, 99) <= depth:
            continue
        best[node] = depth
        contraction = ops.is_contraction(node)
        if (
            node is not end
            and node not in inside
            and (is_boundary(node) or (contraction and depth >= 2))
        ):
            inputs.add(node)
            continue
        inputs.discard(node)
        inside.add(node)
        stack.extend((argument, depth + contraction) for argument in node.all_input_nodes)


def is_boundary(node: fx.Node) -> bool:
    """Does a region start behind this node?"""
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.op == "call_module" or isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    home = getattr(node.target, "__module__", None)
    if node.op == "call_function" and str(home).startswith("attn_compiler."):
        return True  # it reads what a module holds
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in (
        "aten",
        "prims",
    ):
        return True
    if ops.is_contraction(node):
        return False
    return ops.name(node) in ops.BOUNDARY or not _has_tensor(ops.value(node))


def _has_tensor(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_has_tensor(item) for item in value)
    return isinstance(value, torch.Tensor)


def _storages(nodes: Iterable[fx.Node]) -> set[int]:
    return {identity for node in nodes for identity in ops.storages(node)}


def _mutated(nodes: Iterable[fx.Node], inputs: Iterable[fx.Node]) -> Iterable[fx.Node]:
    hit = {
        identity
        for node in nodes
        for target in ops.written(node)
        for identity in ops.storages(target)
    }
    return (node for node in inputs if ops.storages(node) & hit)


# ---------------------------------------------------------------- ambient state


def ambient(graph: fx.Graph) -> dict[fx.Node, tuple[Any, ...]]:
    """For each node, the state it runs in: arguments of `torch.autocast`, and NO_GRAD."""
    stack: list[tuple[fx.Node, Any]] = []
    without = False
    found: dict[fx.Node, tuple[Any, ...]] = {}
    for node in graph.nodes:
        called = ops.name(node)
        if called == "_enter_autocast":
            stack.append((node, tuple(node.args)))
        elif called == "_exit_autocast":
            stack = [entry for entry in stack if entry[0] is not node.args[0]]
        elif called == "_set_grad_enabled":
            without = node.args[0] is False
        if stack or without:
            found[node] = (*(a for _, a in stack), *((NO_GRAD,) if without else ()))
    return found


# ---------------------------------------------------------------- functionalise


Memo = dict[Any, fx.GraphModule]


def functionalise(
    region: Region, state: Mapping[fx.Node, tuple[Any, ...]], memo: Memo | None = None
) -> FunctionalRegion:
    """Trace the region alone, on its fake inputs, to functional pre-dispatch ATen.

    Args:
        region: what to trace.
        state: `ambient(graph)`.
        memo: traces of equal regions: the layers of a model are alike.

    Raises:
        RegionError: `region.untraceable`, an operation in it does not survive the trace.
    """
    made = (*region.nodes, *(n for n in region.inputs if n in region.mutated))
    keep = [n for n in made if isinstance(ops.value(n), torch.Tensor) and not is_batched(n)]
    key = None if memo is None or region.mutated else _signature(region, state)
    module = memo.get(key) if memo is not None and key is not None else None
    if module is None:
        module = trace_region(region, keep, state)
        if memo is not None and key is not None:
            memo[key] = module
    graph = module.graph
    leaves = iter(n for n in graph.nodes if n.op == "placeholder")
    spread = {
        host: [next(leaves) for _ in pytree.tree_leaves(ops.value(host))] for host in region.inputs
    }
    read = {nodes[0]: host for host, nodes in spread.items() if len(nodes) == 1}
    results = graph.output_node().args[0]
    assert isinstance(results, tuple | list)
    _mark_bounded(graph, read)
    of_host = {
        host: node for host, node in zip(keep, results, strict=True) if isinstance(node, fx.Node)
    }
    _mark_cut(of_host, region, state)
    for placeholder, host in read.items():
        if host in region.mutated:
            placeholder.meta["overwritten"] = True
        else:
            of_host.setdefault(host, placeholder)
    return FunctionalRegion(graph, of_host, of_host[region.end], read, module)


def _signature(region: Region, state: Mapping[fx.Node, tuple[Any, ...]]) -> Any:
    """What a trace depends on: operations, how they are connected, and what the inputs are."""
    number = {node: position for position, node in enumerate((*region.inputs, *region.nodes))}
    calls = tuple(
        (
            node.op,
            str(node.target) if node.op == "call_method" else node.target,
            str(fx.map_arg((node.args, node.kwargs), lambda n: _Place(number[n]))),
            str(state.get(node, ())),
        )
        for node in region.nodes
    )
    return calls, tuple(_kind(node) for node in region.inputs)


class _Place(int):
    """Stands for a node in a signature, where a plain number would be a constant."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


def _kind(node: fx.Node) -> Any:
    value = ops.value(node)
    if isinstance(value, torch.Tensor):
        layout = (str(tuple(value.shape)), str(value.stride()), str(value.storage_offset()))
        made = (isinstance(value, torch.nn.Parameter), node.op, value.requires_grad)
        return (*layout, value.dtype, str(value.device), *made)
    # a number that is only known later is the same symbol nowhere, and nothing depends on which
    return "later" if isinstance(value, torch.SymFloat) else (type(value), str(value))


def _mark_cut(
    of_host: Mapping[fx.Node, fx.Node], region: Region, state: Mapping[fx.Node, tuple[Any, ...]]
) -> None:
    """Mark values made without gradients where the end has them: nobody reads past them."""
    if NO_GRAD in state.get(region.end, ()):
        return
    for host, node in of_host.items():
        if NO_GRAD in state.get(host, ()) and node.meta["val"].dtype.is_floating_point:
            node.meta["no_grad"] = True


def _mark_bounded(graph: fx.Graph, read: Mapping[fx.Node, fx.Node]) -> None:
    """Mark values that hold no huge negative numbers: a mask given by the caller may, a learned
    bias does not.
    """
    for node in graph.nodes:
        if node.op == "placeholder":
            host = read.get(node)
            if host is None:
                continue
            given = isinstance(ops.value(host), torch.nn.Parameter) or host.op not in (
                "placeholder",
                "get_attr",
            )
            found = ops.value(host)
            node.meta["bounded"] = (
                given or not isinstance(found, torch.Tensor) or not found.dtype.is_floating_point
            )
        elif node.op == "call_function":
            huge = any(
                isinstance(a, int | float) and a <= -1e8
                for a in (*node.args, *node.kwargs.values())
            )
            node.meta["bounded"] = not huge and all(
                n.meta.get("bounded", False) for n in node.all_input_nodes
            )
