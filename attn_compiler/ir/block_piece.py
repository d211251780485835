"""The block around an attention as a piece of the graph that can be replaced.

norm -> attention -> +, norm -> feed-forward net -> +     both branches are replaced, norms stay
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir import ops
from attn_compiler.ir.block import Block, Branch
from attn_compiler.ir.blocks import find_block
from attn_compiler.ir.core import Core
from attn_compiler.ir.layer import PREFIX, decided
from attn_compiler.ir.piece import Piece, Sought
from attn_compiler.ir.provenance import module
from attn_compiler.ir.region import FunctionalRegion
from attn_compiler.ir.token_wise import is_parameter
from attn_compiler.ir.trace import Region

State = Mapping[fx.Node, tuple[Any, ...]]


def find_block_piece(
    region: Region, functional: FunctionalRegion, core: Core, state: State
) -> Sought:
    """The block around an attention, or what stands in the way. Facts: the `block`, `homes` of what
    replaces its two branches, whether it is `batch_first`, the `rows` of the example, `dtype` and
    `device` of its parameters, host nodes that the mask `reads` (None where one is computed on the
    way), and the decision of `before`, if the module has been rewritten.
    """
    found = find_block(region.end, core)
    if found.block is None:
        return Sought(None, found.obstacles)
    block, owner = found.block, region.end.graph.owning_module
    assert owner is not None
    path, _ = module(region.end)
    known = PREFIX in owner.meta
    weights = [n for n in region.end.graph.nodes if _belongs(n, block)]
    held = ops.value(weights[0])
    reads = [_host(functional, node) for node in core.reads]
    facts = {
        "block": block,
        "homes": tuple(home_of(b) if known else "" for b in (block.attention, block.feed_forward)),
        "batch_first": block.batch_first,
        "rows": ax.hint(ops.value(block.x).shape[1 if block.batch_first else 0]),
        "dtype": held.dtype,
        "device": held.device,
        "reads": None if None in reads else tuple(reads),
        "before": decided(owner, path, block.parameters),
    }
    nodes = block.attention.nodes | block.feed_forward.nodes
    nodes |= {n for n in weights if n.op == "get_attr"}
    taken = tuple(leaving(owner, block.parameters, facts["homes"])) if known else ()
    return Sought(Piece(block.y, (block.x,), nodes, taken, facts["homes"][0], facts))


def _belongs(node: fx.Node, block: Block) -> bool:
    return is_parameter(node) and str(node.target) in block.parameters


def _host(functional: FunctionalRegion, node: fx.Node) -> fx.Node | None:
    """The host node of a tensor that the program reads."""
    found = functional.read.get(node)
    return found or next((h for h, n in functional.of_host.items() if n is node), None)


def home_of(branch: Branch) -> str:
    """The lowest module that holds all parameters of a branch, and no linear map alone."""
    homes = [path.split(".")[:-1] for path in branch.parameters]
    shared = []
    for parts in zip(*homes, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def leaving(owner: fx.GraphModule, parameters: tuple[str, ...], homes: Iterable[str]) -> list[str]:
    """Modules of which nothing is left, and parameters of the others."""
    gone, found = set(parameters), dict[str, None]()
    above = {home[:end] for home in homes for end in _ends(home)}
    for path in parameters:
        whole = path
        for end in _ends(path)[:-1][::-1]:
            place = path[:end]
            inside = {f"{place}.{n}" for n, _ in owner.get_submodule(place).named_parameters()}
            if place in above or not inside <= gone:
                break
            whole = place
        found[whole] = None
    return list(found)


def _ends(path: str) -> list[int]:
    """Where the names of a path end."""
    return [i for i, c in enumerate(path) if c == "."] + [len(path)]
