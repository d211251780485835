"""Relative positions of a layer's own: what its queries or keys add to the scores, distance by
distance.

    score (dot + t0[b, h, q, k]) * 0.125   ->   score dot * 0.125     t0 = shift((q + v) @ R(p)^T)

New heads have other queries, which these products do not fit. Where they are added to `dot` they
can leave, and the parameters that they alone are made of leave with them.

Sources: Transformer-XL (arXiv 1901.02860), relative keys (arXiv 1803.02155).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir import ops
from attn_compiler.ir.affine import is_listened_to
from attn_compiler.ir.core import Core
from attn_compiler.ir.expr import DOT, Call, Const, Expr, Read, call, slots, walk
from attn_compiler.ir.maps import Made, Strange, is_parameter
from attn_compiler.ir.region import FunctionalRegion

_SUMS, _FACTORS = ("add", "sub"), ("mul", "div", "neg")


def own_reads(maps: Collection[fx.Node], functional: FunctionalRegion, core: Core) -> list[int]:
    """Slots of what the program reads and the layer's own maps make; `maps` are host nodes."""

    def is_own(read: fx.Node) -> bool:
        return any(node in maps for node in _above(list(_hosts([read], functional))))

    return [slot for slot, read in enumerate(core.reads) if is_own(read)]


def without(core: Core, gone: Collection[int]) -> Core | None:
    """The attention without what is read from some slots and added to `dot`; None if something
    else is done with it.
    """
    program = core.program
    score = _without(program.score, gone)
    others = [program.mask, *([] if program.sink is None else [program.sink])]
    if score is None or any(_reads(expr, gone) for expr in others):
        return None
    kept = [slot for slot in range(len(core.reads)) if slot not in gone]
    score, mask, *sink = (_renumbered(e, kept) for e in (score, *others))
    return replace(
        core,
        program=replace(program, score=score, mask=mask, sink=sink[0] if sink else None),
        reads=tuple(core.reads[slot] for slot in kept),
    )


def _reads(expr: Expr, gone: Collection[int]) -> bool:
    return not set(slots(expr)).isdisjoint(gone)


def _without(expr: Expr, gone: Collection[int]) -> Expr | None:
    """None where what is read is not a term of a sum with `dot`."""
    if not _reads(expr, gone):
        return expr
    if isinstance(expr, Read):
        return Const(0.0) if expr.slot in gone else None
    assert isinstance(expr, Call)
    held = [arg for arg in expr.args if _reads(arg, gone)]
    if expr.op in _FACTORS and len(held) == 1 and DOT not in walk(expr):
        return Const(0.0)
    # a mask upon the term alone stays
    whole = expr.op in _SUMS or (expr.op == "where" and expr.args[0] not in held)
    if not whole and not all(DOT in walk(arg) for arg in held):
        return None
    left = [_without(arg, gone) for arg in expr.args]
    return None if None in left else call(expr.op, *(arg for arg in left if arg is not None))


def _renumbered(expr: Expr, kept: Sequence[int]) -> Expr:
    if isinstance(expr, Read):
        return Read(kept.index(expr.slot), tuple(_renumbered(i, kept) for i in expr.index))
    if isinstance(expr, Call):
        return Call(expr.op, tuple(_renumbered(arg, kept) for arg in expr.args))
    return expr


# ---------------------------------------------------------------- in the host graph


def made_of(
    reads: Sequence[fx.Node], functional: FunctionalRegion, maps: Sequence[Made], core: Core
) -> tuple[frozenset[fx.Node], tuple[str, ...]]:
    """The host nodes that make some reads out of the layer's maps, and the modules and parameters
    among them, by path.

    Raises:
        Strange: positions, a module with hooks, or what differs from sequence to sequence: it would
            be lost.
    """
    kept = set(_above([made.x for made in maps]))
    ends = {made.node for made in maps} | kept
    nodes: list[fx.Node] = []
    for node in _above(list(_hosts(reads, functional)), ends):
        if node not in ends and node.op == "placeholder":
            _check_given(node, core)
        elif node not in ends:
            nodes.append(node)
    taken = dict.fromkeys(path for node in nodes for path in _trained(node))
    return frozenset(nodes), tuple(taken)


def _check_given(node: fx.Node, core: Core) -> None:
    """Distances are those of all sequences: what is given for each token of each is none."""
    value = ops.value(node)
    sizes = [ax.size_of(n) for n in value.shape] if isinstance(value, torch.Tensor) else []
    batch, *lengths = (core.sizes[name] for name in "BTS")
    if any(ax.equal(n, batch) for n in sizes) and any(
        ax.equal(n, length) for n in sizes for length in lengths
    ):
        text = (
            f"what queries or keys add to the scores is made of {node.name}, which is given for "
            "tokens of each sequence, and not of distances alone: it would be lost (if it holds "
            "distances, give an example of several sequences)"
        )
        raise Strange(node, "positions", text)


def _trained(node: fx.Node) -> Iterator[str]:
    path = str(node.target)
    if node.op == "get_attr" and is_parameter(node):
        yield path
    elif node.op == "call_module":
        module = ops.called_module(node)
        if any(map(is_listened_to, module.modules())):
            raise Strange(node, "positions", f"{path} makes relative positions, and has hooks")
        if any(True for _ in module.parameters()):
            yield path


def _hosts(reads: Sequence[fx.Node], functional: FunctionalRegion) -> Iterator[fx.Node]:
    """The nearest host nodes at or above functional ones."""
    of = {node: host for host, node in reversed(list(functional.of_host.items()))}
    of |= functional.read
    for node in _above(reads, of):
        if node in of:
            yield of[node]


def _above(start: Sequence[fx.Node], ends: Collection[fx.Node] = ()) -> Iterator[fx.Node]:
    """Nodes and all that they are made of, each once; nothing above `ends`."""
    stack, seen = list(start), set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if node not in ends:
            stack += node.all_input_nodes
