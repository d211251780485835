"""The layer around an attention: what makes queries, keys and values, and what takes the result.

    q_proj(x), k_proj(y), v_proj(y) -> views, rotation, a cache -> attention -> views -> o_proj

Found by walking: back from each operand to the one linear map that makes it, forward from the
result, through views that nobody else reads, to the one that takes it. What else stands there is
named, and the layer is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir import ops
from attn_compiler.ir.core import Core, Operand
from attn_compiler.ir.expr import Var, walk
from attn_compiler.ir.maps import Made, Strange, made_by, read_by
from attn_compiler.ir.own_positions import made_of, own_reads, without
from attn_compiler.ir.piece import Piece, Sought
from attn_compiler.ir.provenance import location, module
from attn_compiler.ir.pull import val
from attn_compiler.ir.region import FunctionalRegion
from attn_compiler.ir.site import Decision, Reason
from attn_compiler.ir.states import layer_read, layouts, updated
from attn_compiler.ir.trace import Region

State = Mapping[fx.Node, tuple[Any, ...]]
# keys in the meta of a graph's module: the path of the owner, its decisions so far with their
# paths, and symbols of sizes that a replacement changes
PREFIX, BEFORE, VOID = "prefix", "before", "void"


@dataclass(frozen=True)
class Layer:
    """What a layer is made of.

    Attributes:
        query, key, value, out: its linear maps; keys and values may come out of a cache alone.
        turned: are queries and keys rotated by their positions?
        places: host nodes of the keys and values that a cache hands over.
        update: the call that gives it new ones; None where it is only read.
        swapped: is time the first dimension, and batch the second?
        relative: does it make relative positions of its own, which leave with it?
    """

    query: Made
    key: Made | None
    value: Made | None
    out: Made
    turned: bool
    places: tuple[fx.Node, fx.Node] | None
    update: fx.Node | None
    swapped: bool
    relative: bool = False

    @property
    def made(self) -> tuple[Made, ...]:
        return tuple(m for m in (self.query, self.key, self.value, self.out) if m is not None)


def find_layer(region: Region, functional: FunctionalRegion, core: Core, state: State) -> Sought:
    """The layer around an attention, or what stands in the way. Facts: the `layer`, the `core`
    without relative positions of the layer's own, its `widths`, how many `parameters` of which
    `dtype` and `device` it has, whether it is in `training`, and the decision of `before`, if the
    module has been rewritten.

    Codes of obstacles: no_projection, no_output, qk_norm, between, rotation, cross_rotary,
    cache_form, layout, positions, hidden (in a module that was not looked into), nested.
    """
    owner = region.end.graph.owning_module
    assert owner is not None
    path, _ = module(region.end)
    try:
        if PREFIX not in owner.meta:
            raise Strange(region.end, "nested", "it stands in a graph inside of the graph")
        layer, core, beside = _layer(region, functional, core)
        taken = dict.fromkeys(path for made in layer.made for path in made.taken)
        taken |= dict.fromkeys(beside[1])
        before = decided(owner, path, taken)
        if layer.key is None and before is None:
            text = "keys and values come out of a cache that this call does not fill"
            raise Strange(region.end, "no_projection", text)
    except Strange as strange:
        reason = Reason(strange.code, strange.text, location(strange.at), strange.inside)
        return Sought(None, (reason,))
    prefix = owner.meta[PREFIX]
    held = _parameters(owner, taken)
    facts = {
        "layer": layer,
        "core": core,
        "widths": _widths(layer),
        "parameters": sum(p.numel() for p in held),
        "dtype": held[0].dtype,
        "device": held[0].device,
        "training": owner.training,
        "before": before,
    }
    nodes = frozenset(n for made in layer.made for n in made.nodes if n.op != "placeholder")
    nodes |= beside[0]
    given = tuple(made.x for made in layer.made[:-1])
    home = path[len(prefix) :].lstrip(".") if prefix else path
    piece = Piece(layer.out.node, given, nodes, tuple(taken), home, facts)
    return Sought(piece, remaining=core.program if layer.relative else None)


def decided(owner: fx.GraphModule, path: str, taken: Iterable[str]) -> Decision | None:
    """What was decided in this module about the attention that certain weights belong to, or
    modules of such.
    """

    def covers(before: Decision) -> bool:
        return all(any(p == t or p.startswith(f"{t}.") for t in before.taken) for p in taken)

    found = (d for p, d in owner.meta.get(BEFORE, ()) if p == path)
    return next(filter(covers, found), None)


def _widths(layer: Layer) -> dict[str, int]:
    inputs = {"q": layer.query, "k": layer.key, "v": layer.value}
    found = {n: int(ops.value(m.x).shape[-1]) for n, m in inputs.items() if m is not None}
    return found | {"o": int(ops.value(layer.out.node).shape[-1])}


def _parameters(owner: fx.GraphModule, paths: Mapping[str, None]) -> list[torch.nn.Parameter]:
    """Those of the modules, and those themselves, that stand at some paths; each once."""
    found: dict[int, torch.nn.Parameter] = {}
    for path in paths:
        home, _, name = path.rpartition(".")
        value = getattr(owner.get_submodule(home), name)
        held = value.parameters() if isinstance(value, torch.nn.Module) else (value,)
        found |= {id(p): p for p in held}
    return list(found.values())


def _layer(
    region: Region, functional: FunctionalRegion, core: Core
) -> tuple[Layer, Core, tuple[frozenset[fx.Node], tuple[str, ...]]]:
    """The layer, the core without its relative positions, and what makes these."""
    host = {node: h for h, node in reversed(list(functional.of_host.items()))}
    query = made_by(_start(core.q, host, "queries", region), "queries")
    starts = [_start(x, host, name, region) for x, name in ((core.k, "keys"), (core.v, "values"))]
    calls = [node.meta.get("opaque") for node in starts]
    places = update = None
    key = value = None
    if any(calls):
        places = (starts[0], starts[1])
        update = updated(*calls) if all(calls) else None  # type: ignore[arg-type]
        _check_cache(calls, update, places, core)
    if update is not None:
        starts = [_node(update.args[1], update), _node(update.args[2], update)]
    if update is not None or places is None:
        key, value = made_by(starts[0], "keys"), made_by(starts[1], "values")
    out = read_by(region.end)
    swapped = _swapped(query, query.x, core)
    layer = Layer(query, key, value, out, query.turned, places, update, swapped)
    _check(layer, core)
    left, beside = _without_positions(layer, functional, core)
    _check_rows(query, swapped, left)
    return replace(layer, relative=left is not core), left, beside


def _without_positions(
    layer: Layer, functional: FunctionalRegion, core: Core
) -> tuple[Core, tuple[frozenset[fx.Node], tuple[str, ...]]]:
    maps = [made for made in (layer.query, layer.key, layer.value) if made is not None]
    own = own_reads({made.node for made in layer.made}, functional, core)
    if not own:
        return core, (frozenset(), ())
    reads = [core.reads[slot] for slot in own]
    left, crosses = without(core, own), layer.key is None or layer.key.x is not layer.query.x
    if left is None or crosses:
        text = (
            "the scores read what the layer's own queries or keys make, which is not added to them "
            "as relative positions of one sequence are, so that it cannot leave with the layer. "
            'Leave it out of `to`, or give it "fastest", which keeps the function'
        )
        raise Strange(layer.query.node, "positions", text)
    return left, made_of(reads, functional, maps, core)


def _node(value: Any, at: fx.Node) -> fx.Node:
    if not isinstance(value, fx.Node):
        raise Strange(at, "cache_form", "a cache is given no tensor of this module")
    return value


def _start(operand: Operand, host: Mapping[fx.Node, fx.Node], name: str, region: Region) -> fx.Node:
    found = next((host[node] for node, _ in operand.chain if node in host), None)
    if found is None:
        raise Strange(region.end, "no_projection", f"the {name} are not made in this module")
    return found


def _check_cache(
    calls: list[Any], update: fx.Node | None, places: tuple[fx.Node, fx.Node], core: Core
) -> None:
    if update is None and (not all(calls) or layer_read(*calls) is None):
        text = "keys and values do not come from one call of `update` or one layer of a cache"
        raise Strange(places[0], "cache_form", text)
    for obstacle in layouts(core, list(places)):
        raise Strange(places[0], "cache_form", obstacle.text)


def _swapped(made: Made, node: fx.Node, core: Core) -> bool:
    """Is what a node holds [T, B, D] and not [B, T, D]?"""
    text = "the layer does not take and give [batch, rows, width]"
    if ops.value(node).dim() != 3:
        raise Strange(made.node, "layout", text)
    sizes = [ax.size_of(n) for n in ops.value(node).shape[:2]]
    if sizes == [1, 1]:
        return False
    for name, here in (("B", 0), ("T", 1)):
        found = [ax.equal(size, core.sizes[name]) for size in sizes]
        if found[0] == found[1]:
            # written in other symbols: as the example has it
            wanted = _as_number(core.end.node, core.sizes[name])
            found = [ax.hint(size) == wanted for size in ops.value(node).shape[:2]]
        if found[0] != found[1]:
            return found.index(True) != here
    raise Strange(made.node, "layout", text)


def _check_rows(query: Made, swapped: bool, core: Core) -> None:
    """Heads that share a key may have been taken for rows, where there is one row."""
    rows = ax.size_of(ops.value(query.x).shape[0 if swapped else 1])
    named = {
        p.name
        for e in (core.program.score, core.program.mask)
        for p in walk(e)
        if isinstance(p, Var)
    }
    if rows == 1 != core.sizes["T"] and named & {"q", "T"}:
        text = "the scores depend on heads that share keys"
        raise Strange(query.node, "layout", text)


def _as_number(end: fx.Node, size: ax.Size) -> int:
    """A size in the example."""
    values = (val(node) for node in end.graph.nodes)
    shapes = (n for v in values if isinstance(v, torch.Tensor) for n in v.shape)
    return next((ax.hint(n) for n in shapes if ax.equal(ax.size_of(n), size)), 0)


def _check(layer: Layer, core: Core) -> None:
    for strange in _problems(layer, core):
        raise strange


def _problems(layer: Layer, core: Core) -> Iterator[Strange]:
    if layer.key is not None and layer.value is not None:
        if layer.key.turned != layer.query.turned:
            text = "queries are rotated and keys are not, or keys alone"
            yield Strange(layer.key.node, "rotation", text)
        if layer.value.turned:
            yield Strange(layer.value.node, "rotation", "values are rotated")
        if layer.turned and layer.key.x is not layer.query.x:
            text = "queries and keys of two sequences are rotated by their positions"
            yield Strange(layer.key.node, "cross_rotary", text)
        sizes = [
            [ax.size_of(n) for n in ops.value(m.x).shape[:2]] for m in (layer.key, layer.value)
        ]
        if not all(ax.equal(a, b) for a, b in zip(*sizes, strict=True)):
            yield Strange(layer.key.node, "layout", "keys and values have inputs of two lengths")
    if _swapped(layer.out, layer.out.node, core) != layer.swapped:
        yield Strange(layer.out.node, "layout", "the layer turns batch and rows around")
