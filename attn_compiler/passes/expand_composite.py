"""Fused attention functions that hold projections as well, and products that hold more, are spelled
out, so that one walk serves them all.

    F.multi_head_attention_forward(x, ...)   ->   its ATen operations, in the host graph
    addmm(bias, q, k.T)                      ->   bias + q @ k.T

If the attention inside is not rewritten, the user's call comes back as it was.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from attn_compiler.ir import ops
from attn_compiler.ir.compound import DECOMPOSITIONS, Spelling, spelling
from attn_compiler.ir.trace import Region, RegionError, trace_region


@dataclass
class Expansion:
    """One call and what it was expanded to.

    Attributes:
        original: the user's node, without users while expanded.
        users: pairs of a reader of the original and the node it reads now.
        inserted: the operations, in order.
    """

    original: fx.Node
    users: list[tuple[fx.Node, fx.Node]]
    inserted: list[fx.Node]

    def rewritten(self, dead: Set[fx.Node]) -> bool:
        """Was an attention inside replaced, alone or with all that is around it: does anything
        that is left read what neither the call nor its arguments made?

        Args:
            dead: nodes that nothing needs any more.
        """
        if self.users and all(replacement in dead for _, replacement in self.users):
            return True
        own = {*self.inserted, *self.original.all_input_nodes}
        left = (node for node in self.inserted if not node._erased)
        unread = any(not piece.users for _, piece in self.users)
        return unread or any(not own.issuperset(node.all_input_nodes) for node in left)

    def undo(self) -> None:
        for piece, replacement in self.users:
            replacement.replace_all_uses_with(piece)
        _erase_unused(self.inserted)

    def replaced(self) -> set[fx.Node]:
        """The user's nodes that nothing reads any more."""
        return {self.original, *(user for user, _ in self.users)}


def expand_composites(graph: fx.Graph, state: dict[fx.Node, tuple[Any, ...]]) -> list[Expansion]:
    """Expand every call of a fused function with projections, and every compound product."""
    found: list[Expansion] = []
    for node in list(graph.nodes):
        fused = ops.name(node) in ops.MHA and node.op == "call_function"
        words = None if fused else spelling(node)
        if fused or words is not None:
            try:
                found.append(_expand(node, state, words))
            except RegionError:
                continue
    return found


def _expand(
    node: fx.Node, state: dict[fx.Node, tuple[Any, ...]], words: Spelling | None
) -> Expansion:
    inputs = tuple(dict.fromkeys(node.all_input_nodes)) if words is None else words.inputs
    region = Region(end=node, nodes=(node,), inputs=inputs, mutated=frozenset())
    run = None if words is None else words.run
    module = trace_region(region, [node], state, run, DECOMPOSITIONS)
    if any(n.op == "get_attr" for n in module.graph.nodes):
        raise RegionError("region.constant", "a constant stands inside a fused attention")
    graph = node.graph
    env: dict[fx.Node, fx.Node] = dict(
        zip((n for n in module.graph.nodes if n.op == "placeholder"), inputs, strict=True)
    )
    key = "example_value" if "example_value" in node.meta else "val"
    inserted: list[fx.Node] = []
    with graph.inserting_before(node):
        for inner in module.graph.nodes:
            if inner.op != "call_function":
                continue
            copy = graph.node_copy(inner, env.__getitem__)
            copy.meta = {
                k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")
            }
            copy.meta[key] = inner.meta.get("val")
            env[inner] = copy
            inserted.append(copy)
    outputs = pytree.tree_leaves(module.graph.output_node().args[0])
    try:
        return _connect(
            node, [env.get(out) if isinstance(out, fx.Node) else None for out in outputs], inserted
        )
    except RegionError:
        _erase_unused(inserted)
        raise


def _connect(node: fx.Node, outputs: list[fx.Node | None], inserted: list[fx.Node]) -> Expansion:
    if isinstance(ops.value(node), torch.Tensor):
        pairs = [(node, _result(node, outputs, inserted))]
    else:
        pairs = [(user, _piece(user, outputs)) for user in node.users]
    for user, replacement in pairs:
        user.replace_all_uses_with(replacement)
    _erase_unused(inserted)
    return Expansion(node, pairs, [n for n in inserted if not n._erased])


def _result(node: fx.Node, outputs: list[fx.Node | None], inserted: list[fx.Node]) -> fx.Node:
    (result,) = outputs
    if result is None or result not in inserted:
        raise RegionError("region.composite_user", "a product gives one of its arguments")
    # its views, through which it may be written, share this storage
    result.meta["example_value" if "example_value" in node.meta else "val"] = ops.value(node)
    return result


def _piece(user: fx.Node, outputs: list[fx.Node | None]) -> fx.Node:
    position = user.args[1] if ops.name(user) == "getitem" else None
    replacement = outputs[position] if isinstance(position, int) else None
    if replacement is None:
        raise RegionError("region.composite_user", "a fused attention is read in an unusual way")
    return replacement


def _erase_unused(inserted: list[fx.Node]) -> None:
    for node in reversed(inserted):
        if not node._erased and not node.users:
            node.graph.erase_node(node)
