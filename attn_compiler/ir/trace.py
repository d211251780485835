"""Running a region on fake tensors, and the functional ATen that this leaves.

What the region does inside torch.vmap is traced first, by itself: the tracer that sees operations
before autograd takes them apart does not see through the hidden dimensions.

    _vmap_increment_nesting(n); x = _add_batch_dim(t, 0, 1); y = f(x)
    m = _remove_batch_dim(y, 1, n, 0); _vmap_decrement_nesting()        ->   m = f, an axis more
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from attn_compiler.ir import ops

Decompositions = Mapping[torch._ops.OpOverload, Callable[..., Any]]

NO_GRAD = ("no_grad",)
# what gives its argument back where there is nothing to do
_MAY_RETURN = frozenset({"type_as", "to", "float", "double", "half", "bfloat16", "contiguous"})


class RegionError(Exception):
    """A region could not be cut or re-traced; `code` and `text` go into the report."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


@dataclass(frozen=True)
class Region:
    """Nodes of one host graph that lead to `end`, in graph order.

    Attributes:
        end: the last node: the product with the values.
        nodes: everything to execute, `end` included.
        inputs: nodes whose values the region reads but does not compute.
        mutated: inputs that the region writes in place.
    """

    end: fx.Node
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    mutated: frozenset[fx.Node]


# ---------------------------------------------------------------- trace


def trace_region(
    region: Region,
    keep: list[fx.Node],
    state: Mapping[fx.Node, tuple[Any, ...]],
    spelled: Callable[[Mapping[fx.Node, Any]], Any] | None = None,
    decompositions: Decompositions = MappingProxyType({}),
) -> fx.GraphModule:
    """Functional ATen that computes the values of the nodes `keep` from the region's inputs.

    Args:
        region: what is run.
        keep: nodes of the region.
        state: the ambient state that each node runs in, where it is not the default.
        spelled: what computes the region's end in other words.
        decompositions: what stands for an ATen operation that would come out.

    Raises:
        RegionError: `region.untraceable`, an operation in it does not survive the trace;
            `region.vmap`, it lies inside a transform as a whole.
    """
    if any(is_batched(n) for n in (*region.inputs, region.end)):
        raise RegionError(
            "region.vmap",
            "it runs inside a torch.func transform, where tensors have hidden dimensions",
        )
    try:
        apart = {node: scope for scope in _scopes(region) for node in scope.nodes}
        run = _executor(region, keep, state, apart, spelled)
        return _trace(run, region.inputs, decompositions=decompositions)
    except Exception as error:  # the trace runs arbitrary user operations
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise RegionError("region.untraceable", f"{type(error).__name__}: {first[:160]}") from error


def is_batched(node: fx.Node) -> bool:
    """Does it hold a tensor with hidden dimensions, of torch.vmap or another transform?"""
    return any(
        isinstance(v, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(v)
        for v in pytree.tree_leaves(ops.value(node))
    )


def _executor(
    region: Region,
    keep: list[fx.Node],
    state: Mapping[fx.Node, tuple[Any, ...]],
    apart: Mapping[fx.Node, _Scope],
    spelled: Callable[[Mapping[fx.Node, Any]], Any] | None,
) -> Callable[[dict[fx.Node, Any]], list[Any]]:
    def run(env: dict[fx.Node, Any]) -> list[Any]:
        for node in region.nodes:
            if node in apart:
                scope = apart[node]
                if scope.results[0] not in env:
                    env.update(scope.run(env))
                continue
            same = _returned(node)
            if same is not None:
                env[node] = env[same]
                continue
            with _autocast(state[node]) if node in state else nullcontext():
                other = spelled if node is region.end else None
                env[node] = execute(node, env) if other is None else other(env)
        return [env[node] for node in keep]

    return run


def execute(node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
    """Run one node of a host graph on the values of its arguments."""
    args = fx.map_arg(node.args, env.__getitem__)
    kwargs = fx.map_arg(node.kwargs, env.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _returned(node: fx.Node) -> fx.Node | None:
    """The argument that a call gave back as it was: x.type_as(x). The trace would make a tensor of
    its own of it, and what is written into one of the two would be missing in the other.
    """
    if ops.name(node) not in _MAY_RETURN or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    found, given = ops.value(node), ops.value(node.args[0])
    if not ops.storages(node) & ops.storages(node.args[0]):
        return None
    return node.args[0] if _geometry(found) == _geometry(given) else None


def _geometry(tensor: torch.Tensor) -> tuple[object, ...]:
    sizes = (str(tensor.shape), str(tensor.stride()), str(tensor.storage_offset()))
    return (*sizes, tensor.dtype, tensor.requires_grad)


def _trace(
    run: Callable[[dict[fx.Node, Any]], list[Any]],
    inputs: Sequence[fx.Node],
    pre_dispatch: bool = True,
    decompositions: Decompositions = MappingProxyType({}),
) -> fx.GraphModule:
    """What `run` makes of the values of `inputs`, one placeholder for each of their leaves."""
    # private but stable since 2.6: the pair that torch.export itself traces with
    from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    fakes, spec = pytree.tree_flatten([ops.value(n) for n in inputs])

    def on_leaves(*flat: Any) -> list[Any]:
        return run(dict(zip(inputs, pytree.tree_unflatten(flat, spec), strict=True)))

    mode = FunctionalTensorMode(pre_dispatch=pre_dispatch, export=True)
    functional = dispatch_functionalize(on_leaves, mode)
    with fake_mode(fakes), torch.no_grad():
        return make_fx(functional, dict(decompositions), pre_dispatch=pre_dispatch)(*fakes)


def fake_mode(fakes: Iterable[Any]) -> FakeTensorMode:
    """The mode the fake values were made under."""
    found = next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), None)
    return found if found is not None else FakeTensorMode(allow_non_fake_inputs=True)


def _autocast(arguments: Iterable[Any]) -> AbstractContextManager[Any]:
    stack = ExitStack()
    for device, dtype, enabled, cache in (a for a in arguments if a != NO_GRAD):
        stack.enter_context(
            torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)
        )
    return stack


# ---------------------------------------------------------------- vmap

_OPENS, _CLOSES = "_vmap_increment_nesting", "_vmap_decrement_nesting"


@dataclass(frozen=True)
class _Scope:
    """One outermost torch.vmap: the nodes that run in it, what they read and what they leave."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    traced: fx.GraphModule

    def run(self, env: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        values = fx.Interpreter(self.traced).run(
            *pytree.tree_leaves([env[node] for node in self.inputs])
        )
        return dict(zip(self.results, values, strict=True))


def _scopes(region: Region) -> Iterator[_Scope]:
    if not any(is_batched(node) for node in region.nodes):
        return
    wanted = set(region.nodes)
    depth, nodes = 0, list[fx.Node]()
    for node in region.end.graph.nodes:
        called = ops.name(node)
        depth += (called == _OPENS) - (called == _CLOSES)
        if depth or called == _CLOSES:
            nodes += [node] if node in wanted or called in (_OPENS, _CLOSES) else []
        if nodes and not depth:
            if wanted & set(nodes):
                yield _scope(nodes, wanted)
            nodes = []


def _scope(nodes: list[fx.Node], wanted: set[fx.Node]) -> _Scope:
    inside = set(nodes)
    inputs = tuple(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside))
    results = tuple(n for n in nodes if n in wanted and not is_batched(n))

    def run(env: dict[fx.Node, Any]) -> list[Any]:
        for node in nodes:
            env[node] = execute(node, env)
        return [env[node] for node in results]

    return _Scope(tuple(nodes), inputs, results, _trace(run, inputs, pre_dispatch=False))
