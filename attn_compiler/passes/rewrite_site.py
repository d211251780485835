"""One recognised attention becomes one operator in the host graph.

softmax(q @ k.T * scale + mask) @ v   ->   attn_compiler::attention(q, k, v, reads, ints, seed,
program=..., ...)
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir import ops
from attn_compiler.ir.axes import hint
from attn_compiler.ir.core import Core
from attn_compiler.ir.no_attention import NotAttention
from attn_compiler.ir.provenance import location
from attn_compiler.ir.region import FunctionalRegion
from attn_compiler.ir.trace import Region
from attn_compiler.passes.emit import Emitter
from attn_compiler.variants.base import Lowering, NewModule, NewTensor

aten = torch.ops.aten
# users that give the same result for any strides of what they read, and those that hand the strides
# on
_LAYOUT_FREE = frozenset({"contiguous", "reshape", "flatten", "linear", "matmul", "clone"})
_LAYOUT_KEPT = frozenset({"transpose", "permute", "swapaxes", "movedim"})
# what gives numbers and has no effect
_NUMBERS = frozenset(
    {
        "size",
        "sym_size",
        "dim",
        "numel",
        "stride",
        "getattr",
        "getitem",
        "add",
        "sub",
        "mul",
        "truediv",
        "pow",
    }
    | {"floordiv", "mod", "neg", "sym_int", "sym_float", "sym_sqrt", "sqrt", "rsub", "max", "min"}
)


def rewrite_site(
    region: Region, functional: FunctionalRegion, core: Core, lowering: Lowering | None = None
) -> tuple[NewTensor | NewModule, ...]:
    """Replace the region's end; the caller removes what is dead afterwards.

    Args:
        lowering: what takes the place of the exact operator, None for itself.

    Returns:
        What the module has to get, under the names that the graph reads.

    Raises:
        NotAttention: `attention.second_reader`; the graph is as before.
        RegionError: an operand cannot be laid out; the graph is as before.
    """
    check_readers(region, functional, core)
    emitter = Emitter(region, functional)
    try:
        added = Added(emitter, lowering or Lowering(core.program))
        result = _emit(emitter, core, added)
    except Exception:
        emitter.undo()
        raise
    region.end.replace_all_uses_with(result)
    return tuple(added.new)


def check_readers(region: Region, functional: FunctionalRegion, core: Core) -> None:
    """Nobody may read what the rewritten attention no longer makes.

    Raises:
        NotAttention: `attention.second_reader`.
    """
    inner = {
        host
        for host, node in functional.of_host.items()
        if node in core.inner and host is not region.end
    }
    graph = region.end.graph
    candidates = set(region.nodes) | unread(graph)
    read = live_nodes(graph, candidates, {region.end}) & inner
    if not read:
        return
    first = min(read, key=list(region.nodes).index)
    reader = next((u for n in read for u in n.users if u not in candidates), None)
    what = "weights" if any(ops.name(n) in ops.SOFTMAX for n in read) else "scores"
    where = location(reader) if reader is not None else ""
    raise NotAttention(
        "attention.second_reader",
        f"the {what} are also read elsewhere{f' ({where})' if where else ''}",
        first,
    )


class Added:
    """What a lowering adds to the graph: reads of new tensors, and the check of a length.

    Attributes:
        new: what the module has to get, under the names that the graph reads.
    """

    def __init__(self, emitter: Emitter, lowering: Lowering) -> None:
        self.emitter = emitter
        self.lowering = lowering
        self.new: list[NewTensor | NewModule] = []
        self.reads = self.tensors(lowering.reads)
        self.extra = [
            self.tensors([x])[0] if isinstance(x, NewTensor) else x for x in lowering.extra
        ]

    def tensors(self, tensors: Sequence[NewTensor]) -> list[fx.Node]:
        """Read tensors that the module gets."""
        made = self.emitter.attributes(tensors)
        self.new += [tensor for tensor, _ in made]
        return [node for _, node in made]

    def module(self, module: NewModule) -> fx.Node:
        """Read a module that the module gets."""
        taken = {str(n.target) for n in self.emitter.graph.find_nodes(op="get_attr")}
        names = (f"{module.name}_{i}" for i in itertools.count())
        named = replace(module, name=next(name for name in names if name not in taken))
        self.new.append(named)
        return self.emitter.submodule(named.name, named.made())

    def check_length(self, core: Core) -> None:
        """A graph of symbolic sizes asks for the length while it runs."""
        if self.lowering.length is None:
            return
        for name in "TS":
            size = core.sizes[name]
            if isinstance(size, int):
                continue
            text = f"{self.lowering.length} tokens, the length it was made for"
            self.emitter.check(self.emitter.size(size), self.lowering.length, text)


def operands(emitter: Emitter, core: Core) -> tuple[fx.Node, list[fx.Node], list[Any]]:
    """Queries as [B, H, T, d], and the tensors and integers that the program reads."""
    roles = core.roles
    q = emitter.canonical(core.q, (roles.batch, roles.query_heads, roles.query, roles.feature))
    q = _protected(emitter, _as_dtype(emitter, q, core.dtype))
    for operation, factor in core.factors:
        target = aten.mul.Tensor if operation == "mul" else aten.div.Tensor
        q = _as_dtype(emitter, emitter.call(target, q, emitter.host(factor)), core.dtype)
    return q, reads_of(emitter, core, q), [emitter.size(size) for size in core.ints]


def reads_of(emitter: Emitter, core: Core, like: fx.Node) -> list[fx.Node]:
    """The tensors that the program reads; numbers become tensors on the device of `like`."""
    return [_protected(emitter, _read(emitter, node, like)) for node in core.reads]


def keys_and_values(emitter: Emitter, core: Core) -> tuple[fx.Node, fx.Node]:
    """Keys [B, G, S, d] and values [B, G, S, dv]."""
    roles = core.roles
    k = emitter.canonical(core.k, (roles.batch, roles.heads, roles.key, roles.feature))
    v = emitter.canonical(core.v, (roles.batch, roles.heads, roles.key, roles.value))
    k, v = (_protected(emitter, _as_dtype(emitter, x, core.dtype)) for x in (k, v))
    return k, v


def dropout_seed(emitter: Emitter, core: Core, q: fx.Node) -> fx.Node | None:
    """A number that says what is dropped, where something is."""
    if not core.dropout:
        return None
    device = ops.value(q).device
    return emitter.call(aten.randint.default, 2**62, [1], dtype=torch.int64, device=device)


def _emit(emitter: Emitter, core: Core, added: Added) -> fx.Node:
    q, reads, ints = operands(emitter, core)
    k, v = keys_and_values(emitter, core)
    seed = dropout_seed(emitter, core, q)
    added.check_length(core)
    both = emitter.call(
        getattr(torch.ops.attn_compiler, added.lowering.operator).default,
        q,
        k,
        v,
        [*reads, *added.reads],
        ints,
        seed,
        *added.extra,
        program=str(added.lowering.program),
        scale=core.scale,
        dropout=core.dropout,
        **dict(added.lowering.options),
    )
    return finish(emitter, core, emitter.call(operator.getitem, both, 0))


def finish(emitter: Emitter, core: Core, out: fx.Node) -> fx.Node:
    """The result [B, H, T, dv] in place of the region's end."""
    roles = core.roles
    groups = (roles.batch, roles.query_heads, roles.query, roles.value)
    restored = emitter.restore(out, core.end, groups)
    restored = _as_dtype(emitter, restored, ops.value(emitter.region.end).dtype)
    return _protected(emitter, _laid_out(emitter, restored), ops.storages(emitter.region.end))


def _protected(
    emitter: Emitter, node: fx.Node, stands_for: frozenset[int] = frozenset()
) -> fx.Node:
    """A copy where the tensor is written later on: the operator keeps it for its backward."""
    if not emitter.written_later & (ops.storages(node) | stands_for):
        return node
    return emitter.call(aten.clone.default, node)


def _as_dtype(emitter: Emitter, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if ops.value(node).dtype == dtype else emitter.call(aten.to.dtype, node, dtype)


def _read(emitter: Emitter, node: fx.Node, like: fx.Node) -> fx.Node:
    host = emitter.host(node)
    if isinstance(ops.value(host), torch.Tensor):
        return _as_given(emitter, host)
    return emitter.call(
        aten.scalar_tensor.default, host, dtype=torch.float64, device=ops.value(like).device
    )


def _as_given(emitter: Emitter, host: fx.Node) -> fx.Node:
    """A copy, made at once, of a position or a length that an object gave: it may be the object's
    own, and its next call writes to it, as a static cache counts its tokens.
    """
    value = ops.value(host)
    if value.dim() > 1 or value.is_floating_point():
        return host
    given = (n for n in emitter.graph.nodes if "opaque" in n.meta)
    if not any(ops.storages(host) & ops.storages(n) for n in given):
        return host
    early = Emitter(emitter.region, emitter.functional, host.next)
    copy = early.call(aten.clone.default, host)
    emitter.new += early.new
    return copy


def _laid_out(emitter: Emitter, node: fx.Node) -> fx.Node:
    """Give the result the strides the original had, unless no reader can tell."""
    end = emitter.region.end
    if _layout_free(end):
        return node
    wanted, given = ops.value(end), ops.value(node)
    if _strides(wanted) == _strides(given):
        return node
    if _dense(wanted):
        return emitter.call(aten.contiguous.default, node)
    order = sorted(range(wanted.dim()), key=lambda d: (-hint(wanted.stride(d)), d))
    if order == list(range(len(order))):
        return emitter.call(aten.contiguous.default, node)
    inverse = [order.index(d) for d in range(len(order))]
    dense = emitter.call(aten.contiguous.default, emitter.call(aten.permute.default, node, order))
    return emitter.call(aten.permute.default, dense, inverse)


def _layout_free(node: fx.Node) -> bool:
    """Can no reader tell the strides? ATen copies are traced away where the strides made them
    needless.
    """
    return not isinstance(node.target, torch._ops.OpOverload) and all(
        (called := ops.name(user)) in _LAYOUT_FREE
        or (called in _LAYOUT_KEPT and _layout_free(user))
        for user in node.users
    )


def _dense(value: torch.Tensor) -> bool:
    """Is it contiguous, asked without a guard on its sizes?"""
    expected: ax.Size = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not ax.equal(ax.size_of(stride), expected) and ax.size_of(size) != 1:
            return False
        expected = ax.simple(expected * ax.size_of(size))
    return True


def _strides(value: torch.Tensor) -> list[Any]:
    return [ax.size_of(stride) for stride in value.stride()]


# ---------------------------------------------------------------- what is still needed


def live_nodes(graph: fx.Graph, candidates: set[fx.Node], removed: set[fx.Node]) -> set[fx.Node]:
    """Those of `candidates` whose value, or whose write, something outside of them still needs.

    Everything outside counts as needed. A write is needed if something needed, or an input of the
    graph, lives in the
    storage it writes to.
    """
    live: set[fx.Node] = set()
    own = [node for node in graph.nodes if node in candidates]
    read = (n for n in own if any(u not in candidates and u not in removed for u in n.users))
    _close(list(read), candidates, removed, live)
    writers = [node for node in own if ops.written(node)]
    pending = bool(writers)
    while pending:
        pending = False
        held = _storages(
            n for n in graph.nodes if n not in removed and (n in live or n not in candidates)
        )
        for writer in writers:
            if writer not in live and any(
                ops.storages(target) & held for target in ops.written(writer)
            ):
                _close([writer], candidates, removed, live)
                pending = True
    return live


def _close(
    stack: list[fx.Node], candidates: set[fx.Node], removed: set[fx.Node], live: set[fx.Node]
) -> None:
    while stack:
        node = stack.pop()
        if node in candidates and node not in live and node not in removed:
            live.add(node)
            stack.extend(node.all_input_nodes)


def _storages(nodes: Iterable[fx.Node]) -> set[int]:
    return {identity for node in nodes for identity in ops.storages(node)}


def unread(graph: fx.Graph, readers: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """Sizes, arithmetic on them, and tensors that nobody reads but `readers`: tracers leave them
    behind, and so does a model that hands on its scores to whom it may concern.
    """
    found: set[fx.Node] = set()
    idle = set(readers)
    for node in reversed(graph.nodes):
        if node.users.keys() <= idle and (
            (ops.name(node) in _NUMBERS and _is_number(node)) or ops.is_pure(node)
        ):
            found.add(node)
            idle.add(node)
    return found


def _is_number(node: fx.Node) -> bool:
    value = ops.value(node)
    if isinstance(value, tuple | list):
        return all(isinstance(n, int | torch.SymInt) for n in value)
    return isinstance(value, int | float | torch.SymInt | torch.SymFloat)


def erase_dead(graph: fx.Graph, candidates: set[fx.Node]) -> None:
    """Erase those of `candidates`, and of the numbers, that nothing needs any more."""
    candidates = candidates | unread(graph, candidates)
    dead = candidates - live_nodes(graph, candidates, set())
    for node in reversed(list(graph.nodes)):
        if node in dead:
            graph.erase_node(node)
