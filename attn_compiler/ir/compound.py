"""Operations that hold a product and more, said in operations of one idea each.

einsum("bhqk,bhkd,hde->bhqe", p, v, w)   ->   einsum(einsum(p, v), w)
addmm(c, a, b, beta=2)                   ->   2 * c + a @ b
vecdot(a, b)                             ->   (a * b).sum(-1)
(softmax(s) * gate_BH11) @ v             ->   (softmax(s) @ v) * gate_BH11
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attn_compiler.ir import ops
from attn_compiler.ir.axes import hint
from attn_compiler.ir.contractions import einsum_labels
from attn_compiler.ir.trace import Decompositions

# between a softmax and the gate on it
_NEAR = 4
_GATED = frozenset({"matmul", "__matmul__", "bmm"})


@dataclass(frozen=True)
class Spelling:
    """What computes the value of a node from the values of `inputs`."""

    inputs: tuple[fx.Node, ...]
    run: Callable[[Mapping[fx.Node, Any]], Tensor]


def spelling(node: fx.Node) -> Spelling | None:
    """How a node can be said in simpler operations, None where it is simple, or a linear map."""
    called = ops.name(node)
    if node.op == "call_module" or called not in (*_GATED, *_FUNCTIONS) or ops.written(node):
        return None
    found = _gated(node) if called in _GATED else None
    if found is not None or called not in _FUNCTIONS or not _wanted(node, called):
        return found
    function = _FUNCTIONS[called]

    def run(env: Mapping[fx.Node, Any]) -> Tensor:
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        return _in_place_of(ops.value(node), function(*args, **kwargs))

    return Spelling(tuple(dict.fromkeys(node.all_input_nodes)), run)


def _wanted(node: fx.Node, called: str) -> bool:
    if called == "einsum":
        return len([n for n in node.all_input_nodes if ops.value(n).dim()]) > 2
    if called == "addmm":
        return not any(_is_stored(ops.argument(node, at, f"mat{at}")) for at in (1, 2))
    return True


def _is_stored(node: Any) -> bool:
    """Is it a view of something that the graph does not make, as a weight is?"""
    while isinstance(node, fx.Node) and len(node.all_input_nodes) == 1:
        (inner,) = node.all_input_nodes
        if not ops.storages(node) & ops.storages(inner):
            return False
        node = inner
    return not isinstance(node, fx.Node) or node.op in ("placeholder", "get_attr")


def _in_place_of(original: Tensor, result: Tensor) -> Tensor:
    """In the dtype, which autocast chooses by the operation, and with the order of strides that
    readers rely on.
    """
    result = result.to(original.dtype)
    if [str(s) for s in result.stride()] == [str(s) for s in original.stride()]:
        return result
    order = sorted(range(result.dim()), key=lambda d: (-hint(original.stride(d)), d))
    inverse = [order.index(d) for d in range(len(order))]
    return result.permute(order).contiguous().permute(inverse)


# ---------------------------------------------------------------- sums of products


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    product = torch.matmul(mat1, mat2)
    product = product if alpha == 1 else product * alpha
    if beta == 0:  # whatever it holds, also NaN
        return product
    return (input if beta == 1 else input * beta) + product


def _baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, **factors: Any) -> Tensor:
    return _addmm(input, batch1, batch2, **factors)


def _addbmm(input: Tensor, batch1: Tensor, batch2: Tensor, **factors: Any) -> Tensor:
    # one product over the batch as well
    return _addmm(input, batch1.transpose(0, 1).flatten(1), batch2.flatten(0, 1), **factors)


def _vecdot(x: Tensor, y: Tensor, *, dim: int = -1) -> Tensor:
    return (x * y).sum(dim)


def _cosine(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    one, other = (
        x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(eps) for x in (x1, x2)
    )
    return _vecdot(one, other, dim=dim)


def _einsum(equation: str, *operands: Any) -> Tensor:
    """Two operands at a time: first those that are summed over, then what makes the smallest."""
    if len(operands) == 1 and not isinstance(operands[0], Tensor):
        operands = tuple(operands[0])
    labels = einsum_labels(equation, [x.dim() for x in operands])
    if labels is None:
        raise ValueError(equation)
    return _pairwise(list(zip(operands, labels[0], strict=True)), labels[1])


def _pairwise(terms: list[tuple[Tensor, Sequence[Any]]], output: Sequence[Any]) -> Tensor:
    sizes = {name: hint(n) for x, names in terms for n, name in zip(x.shape, names, strict=True)}
    while len(terms) > 1:
        plans = []
        for pair in itertools.combinations(range(len(terms)), 2):
            others = [names for at, (_, names) in enumerate(terms) if at not in pair]
            needed = set(output).union(*others)
            both = dict.fromkeys((*terms[pair[0]][1], *terms[pair[1]][1]))
            kept = [name for name in both if name in needed]
            elements = 1
            for name in kept:
                elements *= sizes[name]
            plans.append((len(kept) == len(both), elements, pair, kept))
        _, _, (one, other), kept = min(plans, key=lambda plan: plan[:2])
        kept = list(output) if len(terms) == 2 else kept
        made = _contract(terms[one], terms[other], kept)
        terms = [term for at, term in enumerate(terms) if at not in (one, other)] + [(made, kept)]
    return terms[0][0]


def _contract(
    one: tuple[Tensor, Sequence[Any]], other: tuple[Tensor, Sequence[Any]], kept: Sequence[Any]
) -> Tensor:
    letters: dict[Any, str] = {}
    for name in (*one[1], *other[1]):
        letters.setdefault(name, string.ascii_letters[len(letters)])
    left, right, out = ("".join(letters[n] for n in names) for names in (one[1], other[1], kept))
    return torch.einsum(f"{left},{right}->{out}", one[0], other[0])


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "einsum": _einsum,
    "addmm": _addmm,
    "baddbmm": _baddbmm,
    "addbmm": _addbmm,
    "vecdot": _vecdot,
    "linalg_vecdot": _vecdot,
    "cosine_similarity": _cosine,
}
# where they come out of another function
DECOMPOSITIONS: Decompositions = {torch.ops.aten.baddbmm.default: _baddbmm}

# ---------------------------------------------------------------- gates


def _gated(node: fx.Node) -> Spelling | None:
    """(p * gate) @ v, where the gate does not tell keys, or does not tell rows, apart."""
    weights, values = (ops.argument(node, at, name) for at, name in enumerate(("input", "other")))
    if not isinstance(weights, fx.Node) or not isinstance(values, fx.Node):
        return None
    if ops.arithmetic(weights) != "mul" or ops.written(weights):
        return None
    for p, gate in (weights.args[:2], weights.args[1::-1]):
        if isinstance(p, fx.Node) and isinstance(gate, fx.Node) and _follows_softmax(p):
            whole, part = ops.value(p), ops.value(gate)
            if _is_gate(part, whole):
                break
    else:
        return None
    after = part.dim() == 0 or part.shape[-1] == 1

    def run(env: Mapping[fx.Node, Any]) -> Tensor:
        if after:
            made = torch.matmul(env[p], env[values]) * env[gate]
        else:
            made = torch.matmul(env[p], env[values] * env[gate].transpose(-1, -2))
        return _in_place_of(ops.value(node), made)

    return Spelling(tuple(dict.fromkeys((p, gate, values))), run)


def _is_gate(gate: Any, weights: Any) -> bool:
    if not isinstance(gate, Tensor) or not isinstance(weights, Tensor) or not weights.dim() > 1:
        return False
    if gate.dim() > weights.dim():
        return False
    return gate.dim() == 0 or gate.shape[-1] == 1 or (gate.dim() > 1 and gate.shape[-2] == 1)


def _follows_softmax(node: fx.Node) -> bool:
    for _ in range(_NEAR):
        if ops.name(node) in ops.SOFTMAX:
            return True
        if not node.args or not isinstance(node.args[0], fx.Node) or ops.is_contraction(node):
            return False
        node = node.args[0]
    return False
