"""FlexAttention calls: score_mod and mask_mod are read as expressions instead of being run on
indices.

flex_attention(q, k, v, lambda s, b, h, i, j: s + slope[h] * (j - i))   ->   score  dot + t0[h] * (k
- q)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from attn_compiler.ir import contractions, gathers, ops, values, views  # noqa: F401  (enter their rules)
from attn_compiler.ir.axes import along
from attn_compiler.ir.core import Core, Operand
from attn_compiler.ir.expr import DOT, Expr
from attn_compiler.ir.fused import Fused, from_fused
from attn_compiler.ir.no_attention import NotAttention
from attn_compiler.ir.pull import Coordinates, Puller, shape, to_expr
from attn_compiler.ir.region import FunctionalRegion
from attn_compiler.ir.trace import Region, trace_region


def recognise_flex(node: fx.Node) -> tuple[Region, FunctionalRegion, Core]:
    """The attention of a flex_attention call.

    Raises:
        NotAttention: more than its output is read.
        RegionError: a score_mod that cannot be traced.
    """
    end = _output(node)
    query, key, value, score_mod, block_mask, scale, _, score_reads, mask_reads = node.args[:9]
    given_nodes = (query, key, value, scale, *score_reads, *mask_reads)  # type: ignore[misc]
    listed = [n for n in given_nodes if isinstance(n, fx.Node)]
    inputs = tuple(dict.fromkeys(listed))
    region = Region(end=end, nodes=(node, end), inputs=inputs, mutated=frozenset())
    functional = _placeholders(region)
    given = functional.of_host
    puller = Puller()
    operands = (given[query], given[key], given[value])  # type: ignore[index]
    sizes = (*shape(operands[0])[:3], shape(operands[2])[-1])
    where: Coordinates = tuple(along(puller.new_axis(size)) for size in sizes)
    keys = puller.new_axis(shape(operands[1])[-2])
    position = [to_expr(w) for w in (*where[:3], along(keys))]
    logits = _body(puller, node, score_mod, [DOT, *position], [given[n] for n in score_reads])  # type: ignore[union-attr,index]
    mask = _body(puller, node, block_mask[-1], position, [given[n] for n in mask_reads])  # type: ignore[index,union-attr]
    grouped = shape(operands[0])[1] != shape(operands[1])[1]
    factor = given[scale] if isinstance(scale, fx.Node) else scale
    fused = Fused(operands[0], operands, keys, grouped, factor, logits, mask)
    return region, functional, from_fused(puller, Operand(operands[0], where), where, fused)  # type: ignore[arg-type]


def _output(node: fx.Node) -> fx.Node:
    """The node that takes the output; log-sum-exp and maximum must not be read."""
    read = [user for user in node.users if user.users]
    if len(read) != 1 or ops.name(read[0]) != "getitem" or read[0].args[1] != 0:
        raise NotAttention(
            "attention.second_reader", "more than the output of flex_attention is read", node
        )
    return read[0]


def _placeholders(region: Region) -> FunctionalRegion:
    """A region that computes nothing: one placeholder for each input."""
    graph = fx.Graph()
    of_host: dict[fx.Node, fx.Node] = {}
    for position, host in enumerate(region.inputs):
        of_host[host] = graph.placeholder(f"arg{position}")
        of_host[host].meta = {"val": ops.value(host), "bounded": False}
    read = {node: host for host, node in of_host.items()}
    graph.output(tuple(read))
    module = fx.GraphModule(torch.nn.Module(), graph)
    return FunctionalRegion(graph, of_host, next(iter(of_host.values())), read, module)


def _body(
    puller: Puller, node: fx.Node, function: Any, known: list[Expr], reads: list[fx.Node]
) -> Expr:
    """The value of score_mod or mask_mod at the symbolic position."""
    owner = node.graph.owning_module
    assert owner is not None and isinstance(function, fx.Node)
    body = owner.get_submodule(str(function.target))
    assert isinstance(body, fx.GraphModule)
    inputs = tuple(n for n in body.graph.nodes if n.op == "placeholder")
    calls = tuple(n for n in body.graph.nodes if n.op not in ("placeholder", "output"))
    result = body.graph.output_node().args[0]
    result = result[0] if isinstance(result, tuple | list) else result
    assert isinstance(result, fx.Node)
    if result in inputs:
        return known[inputs.index(result)]
    # an index that is a tensor of no dimensions looks up an element instead of leaving the graph
    with TransformGetItemToIndex():
        traced = trace_region(Region(result, calls, inputs, frozenset()), [result], {})
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    puller.bound.update(zip(placeholders, [*known, *reads], strict=True))
    outputs = traced.graph.output_node().args[0]
    assert isinstance(outputs, tuple | list) and isinstance(outputs[0], fx.Node)
    return puller.expr(outputs[0], ())
