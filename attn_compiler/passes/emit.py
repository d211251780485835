"""Writing nodes into the host graph: operands brought to [batch, heads, rows, features], and the
result brought back.

All of it is views wherever strides allow: unflatten, permute, expand, flatten.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from attn_compiler.errors import require
from attn_compiler.ir import axes as ax
from attn_compiler.ir import ops
from attn_compiler.ir.axes import Axis, Index
from attn_compiler.ir.core import Operand
from attn_compiler.ir.region import FunctionalRegion
from attn_compiler.ir.trace import Region, RegionError, fake_mode
from attn_compiler.passes.runs import Groups, atoms_of, covers, extent, real, runs_of
from attn_compiler.variants.base import NewTensor

aten = torch.ops.aten
# name of a constant that the rewriting registers
CONSTANT = "_attn_constant"
# key in the meta of a node that is right for the mode (training or not) of its module alone
MODAL = "modal"
# how sizes are made of sizes
_ARITHMETIC: dict[type[sympy.Basic], Callable[[Any, Any], Any]] = {
    sympy.Mul: operator.mul,
    sympy.Add: operator.add,
    FloorDiv: operator.floordiv,
    Mod: operator.mod,
    PythonMod: operator.mod,
}
_META = ("nn_module_stack", "stack_trace", "source_fn_stack")


class Emitter:
    """Inserts nodes before the end of a region, or before `at`, and gives each its fake value."""

    def __init__(
        self, region: Region, functional: FunctionalRegion, at: fx.Node | None = None
    ) -> None:
        self.region = region
        self.at = region.end if at is None else at
        self.functional = functional
        self.graph = region.end.graph
        self.mode = fake_mode(ops.value(n) for n in (region.end, *region.inputs))
        self.key = "example_value" if "example_value" in region.end.meta else "val"
        self.new: list[fx.Node] = []
        self._host: dict[fx.Node, fx.Node] = {}
        for host, node in functional.of_host.items():
            if host is not region.end:
                self._host.setdefault(node, host)
        self._sizes: dict[Any, fx.Node] = {}

    @functools.cached_property
    def written_later(self) -> frozenset[int]:
        """Storages that operations after the region's end write to."""
        found: set[int] = set()
        node = self.region.end.next
        while node.op != "root":
            for target in ops.written(node):
                found |= ops.storages(target)
            node = node.next
        return frozenset(found)

    # ------------------------------------------------------------ nodes

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Insert one call, with its fake value and the provenance of the region's end."""
        with self.graph.inserting_before(self.at):
            node = self.graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), ops.value)
        with enable_python_dispatcher(), self.mode, torch.no_grad():
            self._known(node, target(*values[0], **values[1]))
        return node

    def opaque(
        self, target: Callable[..., Any], args: Any, kwargs: dict[str, Any], value: Any
    ) -> fx.Node:
        """Insert a call whose arguments are no tensors alone, with the value that it will have."""
        with self.graph.inserting_before(self.at):
            node = self.graph.call_function(target, args, kwargs)
        self._known(node, value)
        return node

    def _known(self, node: fx.Node, value: Any) -> None:
        node.meta[self.key] = value
        for name in _META:
            if name in self.region.end.meta:
                node.meta[name] = self.region.end.meta[name]
        self.new.append(node)

    def host(self, node: Any) -> Any:
        """The host node that holds the value of a functional node, copied into the host graph if
        there is none.
        """
        if not isinstance(node, fx.Node):
            return node
        if node not in self._host:
            if node.op == "placeholder":
                raise RegionError(
                    "region.overwritten", "an input of the attention is overwritten before its end"
                )
            if node.op != "call_function":
                self._host[node] = self._constant(node)
            else:
                assert callable(node.target)
                args, kwargs = fx.map_arg((node.args, node.kwargs), self.host)
                self._host[node] = self.call(node.target, *args, **kwargs)
        return self._host[node]

    def _constant(self, node: fx.Node) -> fx.Node:
        owner = self.graph.owning_module
        assert owner is not None
        name = f"{CONSTANT}{sum(k.startswith(CONSTANT) for k in dir(owner))}"
        constant = getattr(self.functional.module, str(node.target))
        owner.register_buffer(name, constant, persistent=False)
        with self.graph.inserting_before(self.at):
            created = self.graph.get_attr(name)
        created.meta[self.key] = self.mode.from_tensor(constant)
        return created

    def attributes(
        self, tensors: Sequence[NewTensor], leaving: Sequence[str] = ()
    ) -> list[tuple[NewTensor, fx.Node]]:
        """Read tensors that the module is going to have, under names that are free: new ones may
        have those of parameters that leave.
        """
        taken = {str(n.target) for n in self.graph.find_nodes(op="get_attr")} - set(leaving)
        found = _free(tensors, taken)
        return [(tensor, self._attribute(tensor)) for tensor in found]

    def _attribute(self, tensor: NewTensor) -> fx.Node:
        owner = self.graph.owning_module
        assert owner is not None
        device = tensor.device or ops.value(self.region.end).device
        home, _, name = tensor.path.rpartition(".")
        if home and not any(path == home for path, _ in owner.named_modules()):
            owner.add_submodule(home, torch.nn.Module())
        place = owner.get_submodule(home)
        if not hasattr(place, name):  # an old parameter of this name is going to be taken out
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            place.register_buffer(name, empty, persistent=False)
        with self.graph.inserting_before(self.at):
            node = self.graph.get_attr(tensor.path)
        with self.mode:
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        node.meta[self.key] = value
        self.new.append(node)
        return node

    def submodule(self, name: str, module: torch.nn.Module) -> fx.Node:
        """Read a module that the owner of the graph is given here; it has no value."""
        owner = self.graph.owning_module
        assert owner is not None
        owner.register_module(name, module)
        with self.graph.inserting_before(self.at):
            node = self.graph.get_attr(name)
        self.new.append(node)
        return node

    def check(self, size: Any, expected: int, text: str) -> None:
        """Ask for a size while the graph runs."""
        with self.graph.inserting_before(self.at):
            same = self.graph.call_function(operator.eq, (size, expected))
            self.graph.call_function(require, (same, text))

    def undo(self) -> None:
        """Erase what was inserted."""
        for node in reversed(self.new):
            if not node.users:
                self.graph.erase_node(node)

    # ------------------------------------------------------------ sizes

    def size(self, size: ax.Size) -> Any:
        """An int, or a host node that computes the symbolic size."""
        if isinstance(size, int):
            return size
        if size not in self._sizes:
            self._sizes[size] = self._find_size(size)
        return self._sizes[size]

    def _find_size(self, size: sympy.Expr) -> fx.Node:
        for node in self.region.inputs:
            value = ops.value(node)
            if isinstance(value, torch.SymInt) and ax.equal(ax.size_of(value), size):
                return node
        for node in (*self.region.inputs, *self.region.nodes):
            value = ops.value(node)
            if node is self.region.end or not isinstance(value, torch.Tensor):
                continue
            for dimension, length in enumerate(value.shape):
                if ax.equal(ax.size_of(length), size):
                    return self.call(aten.sym_size.int, node, dimension)
        found = self._size_before(size)
        if found is not None:
            return found
        combine = next((f for kind, f in _ARITHMETIC.items() if isinstance(size, kind)), None)
        if combine is not None:
            parts = [self.size(ax.simple(part)) for part in size.args]
            result = parts[0]
            for part in parts[1:]:
                result = self.call(combine, result, part)
            return result  # type: ignore[no-any-return]
        raise RegionError("region.symbolic_size", f"no node of the graph holds the size {size}")

    def _size_before(self, size: sympy.Expr) -> fx.Node | None:
        """Anything earlier in the graph that has this size."""
        node = self.region.end.prev
        while node.op != "root":
            value = ops.value(node)
            if isinstance(value, torch.SymInt) and ax.equal(ax.size_of(value), size):
                return node
            sizes = value.shape if isinstance(value, torch.Tensor) else ()
            for dimension, length in enumerate(map(ax.size_of, sizes)):
                if ax.equal(length, size):
                    return self.call(aten.sym_size.int, node, dimension)
            node = node.prev
        return None

    # ------------------------------------------------------------ layouts

    def canonical(self, operand: Operand, groups: Groups) -> fx.Node:
        """The operand with one dimension per group, in this order; axes it does not run along are
        expanded.
        """
        node, where = self._source(operand)
        dims = [runs_of(w.resolved(), groups) for w in where]
        present = [axis for runs in dims for run in runs for axis in run]
        x = self._sliced(self.host(node), where)
        x, atoms = self._unflatten(x, dims)
        fixed = [w.const for w, runs in zip(where, dims, strict=True) if not runs]
        x, atoms = self._drop_units(x, atoms, fixed)
        target = [run for group in groups for run in atoms_of(group, atoms)]
        x = self._permute(x, [atoms.index(run) for run in target])
        return self._grouped(x, target, groups, present)

    def _source(self, operand: Operand) -> tuple[fx.Node, tuple[Index, ...]]:
        """The outermost view of the operand along no more axes than its innermost source."""
        wanted = real(operand.where)
        for node, where in reversed(operand.chain):
            if not all(isinstance(w, Index) for w in where):
                continue
            indices = tuple(w.resolved() for w in where if isinstance(w, Index))
            if real(indices) == wanted and covers(indices, node):
                return node, indices
        raise RegionError(
            "region.layout", "no view of an operand holds exactly what the attention reads of it"
        )

    def _unflatten(
        self, x: fx.Node, dims: Sequence[list[tuple[Axis, ...]]]
    ) -> tuple[fx.Node, list[tuple[Axis, ...]]]:
        atoms: list[tuple[Axis, ...]] = []
        for runs in dims:
            if len(runs) > 1:
                x = self.call(
                    aten.unflatten.int, x, len(atoms), self._shape([extent(run) for run in runs])
                )
            atoms += runs if runs else [()]
        return x, atoms

    def _shape(self, sizes: Sequence[ax.Size]) -> list[Any]:
        """Sizes for a view: one symbolic size may be left to torch."""
        symbolic = [position for position, size in enumerate(sizes) if not isinstance(size, int)]
        if len(symbolic) == 1:
            return [-1 if position == symbolic[0] else size for position, size in enumerate(sizes)]
        return [self.size(size) for size in sizes]

    def _sliced(self, x: fx.Node, where: Sequence[Index]) -> fx.Node:
        """Keep of each dimension the part that is read."""
        for dimension, (index, size) in enumerate(zip(where, ops.value(x).shape, strict=True)):
            length = extent(axis for axis, _ in index.terms)
            if index.terms and not ax.equal(length, ax.size_of(size)):
                start, stop = self.size(index.const), self.size(ax.simple(index.const + length))
                x = self.call(aten.slice.Tensor, x, dimension, start, stop)
        return x

    def _drop_units(
        self, x: fx.Node, atoms: list[tuple[Axis, ...]], fixed: Sequence[ax.Size]
    ) -> tuple[fx.Node, list[tuple[Axis, ...]]]:
        chosen = list(fixed)
        for position in reversed(range(len(atoms))):
            if not atoms[position]:
                x = self.call(aten.select.int, x, position, self.size(chosen.pop()))
        return x, [run for run in atoms if run]

    def _permute(self, x: fx.Node, order: list[int]) -> fx.Node:
        return x if order == sorted(order) else self.call(aten.permute.default, x, order)

    def _grouped(
        self, x: fx.Node, atoms: list[tuple[Axis, ...]], groups: Groups, present: Iterable[Axis]
    ) -> fx.Node:
        """Unite the runs of each group, expanding along axes that are absent."""
        held = set(present)
        for position, group in enumerate(groups):
            missing = [axis for axis in group if axis not in held]
            if missing and len(missing) == len(group):
                x = self.call(aten.unsqueeze.default, x, position)
                if any(axis.extent != 1 for axis in group):
                    x = self._expand(x, position, extent(group))
                continue
            x = self._united(x, position, group, atoms, held)
        return x

    def _united(
        self,
        x: fx.Node,
        position: int,
        group: tuple[Axis, ...],
        atoms: list[tuple[Axis, ...]],
        held: set[Axis],
    ) -> fx.Node:
        if not group:
            return self.call(aten.unsqueeze.default, x, position)
        count = 0
        remaining = list(group)
        while remaining:
            run = next((r for r in atoms if r[0] is remaining[0]), None)
            if run is None:
                x = self.call(aten.unsqueeze.default, x, position + count)
                x = self._expand(x, position + count, remaining[0].extent)
                remaining = remaining[1:]
            else:
                remaining = remaining[len(run) :]
            count += 1
        return (
            x
            if count == 1
            else self.call(aten.flatten.using_ints, x, position, position + count - 1)
        )

    def _expand(self, x: fx.Node, position: int, size: ax.Size) -> fx.Node:
        if size == 1:
            return x
        shape: list[Any] = [-1] * ops.value(x).dim()
        shape[position] = self.size(size)
        return self.call(aten.expand.default, x, shape)

    def restore(self, x: fx.Node, end: Operand, groups: Groups) -> fx.Node:
        """The result, one dimension per group, in the dimensions of the original output."""
        dims = [runs_of(w.resolved(), groups) for w in end.where]
        wanted = [run for runs in dims for run in runs]
        atoms: list[tuple[Axis, ...]] = []
        for group in groups:
            runs = atoms_of(group, wanted)
            if len(runs) > 1:
                x = self.call(
                    aten.unflatten.int, x, len(atoms), self._shape([extent(run) for run in runs])
                )
            atoms += runs if runs else [()]
        x, atoms = self._drop_units(x, atoms, [0] * atoms.count(()))
        x = self._permute(x, [atoms.index(run) for run in wanted])
        for position, runs in enumerate(dims):
            if len(runs) > 1:
                x = self.call(aten.flatten.using_ints, x, position, position + len(runs) - 1)
            elif not runs:
                x = self.call(aten.unsqueeze.default, x, position)
        return x


def _free(tensors: Sequence[NewTensor], taken: Container[str]) -> list[NewTensor]:
    """With the first number that makes all their names new."""
    for number in itertools.count():
        named = [
            t if t.home is not None and number == 0 else replace(t, name=f"{t.name}_{number}")
            for t in tensors
        ]
        if not any(t.path in taken for t in named):
            break
    return named
