"""Heads that are mixed by a linear map of parameters, beside a softmax: talking heads.

    softmax(W (q k^T)) v        W (softmax(q k^T)) v        W is [heads, heads]

Neither is an attention of heads by themselves. Only words for a refusal hang on what is found here.
Source: Talking-Heads Attention (arXiv 2003.02436).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir import ops
from attn_compiler.ir.token_wise import CASTS, MOVES, VIEWS, is_parameter, is_tensor

_POINTWISE = frozenset({"mul", "div", "add", "sub", "where", "masked_fill", "dropout", "detach"})
_MAPS = frozenset({"linear", "conv1d", "conv2d", "convolution"}) | ops.CONTRACTION
_SHAPES = frozenset({"view_as", "reshape_as"}) | MOVES | VIEWS
_MOST = 24


def mixed_heads(anchor: fx.Node) -> str:
    """Where heads are mixed around a softmax of a host graph, in words; "" where they are not."""
    if not is_tensor(anchor):
        return ""
    sizes = [ax.hint(n) for n in ops.value(anchor).shape]
    dim = anchor.kwargs.get("dim", anchor.args[1] if len(anchor.args) > 1 else -1)
    if not isinstance(dim, int) or len(sizes) < 3:
        return ""
    keys = sizes.pop(dim)
    for words, step in (("before", _read), ("behind", _readers)):
        for node in _reached(anchor, step):
            if _mixes(node, keys, sizes) and any(map(_is_product, _reached(node, step))):
                return f"a linear map mixes the heads {words} the softmax"
    return ""


def _read(node: fx.Node) -> Iterable[fx.Node]:
    return [n for n in node.all_input_nodes if is_tensor(n)]


def _readers(node: fx.Node) -> Iterable[fx.Node]:
    return [n for n in node.users if is_tensor(n)]


def _reached(start: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """Maps and products that are reached through views and what is done to each number."""
    seen, stack = {start}, list(step(start))
    while stack and len(seen) < _MOST:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        called = ops.arithmetic(node)
        if node.op == "call_module" or ops.name(node) in _MAPS:
            yield node
        elif called in _POINTWISE | CASTS | _SHAPES:
            stack += step(node)


def _weights(node: fx.Node) -> list[torch.Tensor]:
    """The parameters that a node multiplies by, themselves or viewed."""
    if node.op == "call_module":
        return [p for p in ops.called_module(node).parameters() if p.dim() > 1]
    found = []
    for given in _read(node):
        while not is_parameter(given) and ops.name(given) in VIEWS | MOVES | CASTS:
            given = given.all_input_nodes[0]
        if is_parameter(given) and ops.value(given).dim() > 1:
            found.append(ops.value(given))
    return found


def _is_product(node: fx.Node) -> bool:
    return ops.name(node) in ops.CONTRACTION and not _weights(node)


def _mixes(node: fx.Node, keys: int, others: list[int]) -> bool:
    """Is it a map over an axis of the softmax's tensor that is not that of the keys?"""
    weights = _weights(node)
    if len(weights) != 1:
        return False
    first, second, *window = weights[0].shape
    return keys not in (first, second) and {first, second} & set(others) != set() == {
        n for n in window if n != 1
    }
