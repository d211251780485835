"""Where an attention may end: host nodes that sum values with weights which go back to a softmax.

Detection only. It must not miss anything; whether it *is* an attention is decided on the functional
region.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from attn_compiler.ir import ops
from attn_compiler.ir.region import is_boundary

# a softmax and its product with the values are never far apart
_FARTHEST = 16
# nor is the product and its division by the sum of the weights
_LATE = 4


@dataclass(frozen=True)
class Candidate:
    """An anchor and the nodes that may be its product with the values (none: not an attention)."""

    anchor: fx.Node
    ends: tuple[fx.Node, ...]


def find_candidates(graph: fx.Graph) -> Iterator[Candidate]:
    """Candidates in graph order; a fused attention is its own end."""
    for node in graph.nodes:
        called = ops.name(node)
        if called in ops.SDPA or called in ops.FLEX:
            yield Candidate(node, (node,))
        elif called in ops.SOFTMAX or (called in ops.EXPONENTIAL and _is_normalised(node)):
            # what is multiplied and summed may also be the mask, for a sum of weights
            ends = tuple(sorted(_ends(node), key=lambda end: not ops.is_contraction(end)))
            late = _quotients(ends) if called in ops.EXPONENTIAL else ()
            yield Candidate(node, tuple(dict.fromkeys((*ends, *late))))


def _is_normalised(exponential: fx.Node) -> bool:
    """exp(x) that is summed and divided, or whose argument has a logsumexp taken off."""
    following = {ops.arithmetic(user) for user in _near(exponential, 6)}
    if following & {"sum", "add"} and following & {"div", "reciprocal"}:
        return True
    return any(ops.name(n) in ("logsumexp", "log_softmax") for n in _behind(exponential, 4))


def _quotients(ends: tuple[fx.Node, ...]) -> Iterator[fx.Node]:
    """Divisions after a product: (exp(x) @ v) / sum(exp(x))."""
    for end in ends:
        for user in _near(end, _LATE):
            if ops.arithmetic(user) in ("div", "mul") and not is_boundary(user):
                yield user


def _near(node: fx.Node, depth: int) -> Iterator[fx.Node]:
    seen = {node}
    front = [node]
    for _ in range(depth):
        front = [user for n in front for user in n.users if user not in seen and not seen.add(user)]  # type: ignore[func-returns-value]
        yield from front


def _behind(node: fx.Node, depth: int) -> Iterator[fx.Node]:
    front = [node]
    for _ in range(depth):
        front = [argument for n in front for argument in n.all_input_nodes]
        yield from front


def _ends(anchor: fx.Node) -> Iterator[fx.Node]:
    """Contractions reachable from the anchor without passing a boundary or another contraction."""
    seen = {anchor}
    front = [(anchor, False)]
    for _ in range(_FARTHEST):
        following: list[tuple[fx.Node, bool]] = []
        for node, multiplied in front:
            for user in node.users:
                if user in seen or user.op == "output":
                    continue
                seen.add(user)
                called = ops.name(user)
                if ops.is_contraction(user) or (called == "sum" and multiplied):
                    yield user
                elif not is_boundary(user) and called not in ops.SOFTMAX:
                    following.append((user, multiplied or ops.arithmetic(user) == "mul"))
        front = following
