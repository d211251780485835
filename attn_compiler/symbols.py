"""Fake tensors with symbolic sizes, and the graph nodes their symbols come from.

    real tensor [2, 7, 64]  ->  fake tensor [s0, s1, s2],  s1 = hidden_states.size(1)

Every dimension but those of size 1 is a symbol of its own. What the traced code demands of the
sizes collects as guards
in the ShapeEnv; a guard becomes Python text to check before a call, or a node that checks while the
graph runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean, BooleanAtom
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental import _config as fx_config
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy.functions import Min
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.reference import PythonReferenceAnalysis


class CaptureError(Exception):
    """Something cannot be traced soundly; `code` and `text` go into the report.

    Attributes:
        inside: path of the submodule whose code it is, "" for the root's own.
    """

    def __init__(self, code: str, text: str, inside: str = "") -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.inside = inside


@dataclass(frozen=True)
class Origin:
    """Where the value of a symbol is read.

    Attributes:
        value: the symbolic number.
        node: a tensor or, with an empty `method`, the number itself.
        method: "size", "stride" or "storage_offset".
        dim: its argument.
        text: the same as Python text over the arguments of the call; "" if it is only known while
            the graph runs.
    """

    value: torch.SymInt
    node: fx.Node
    method: str = ""
    dim: int = 0
    text: str = ""


class Mismatch(Exception):
    """A call does not take the same steps as the one it is compared with."""


class Symbols:
    """One ShapeEnv, its fake mode, and the origin of each symbol.

    Every value that is made while a call is traced is a step. A second call that takes the same
    steps gets the same
    values without any computation: the layers of a model are alike.

    Attributes:
        static: are sizes those of the example, for code that no symbol gets through?
        steps: what was asked for and what was given, in order.
    """

    def __init__(self, graph: fx.Graph, static: bool = False) -> None:
        self.graph = graph
        self.static = static
        self.steps: list[tuple[Any, Any]] = []
        self._guide: list[tuple[Any, Any]] | None = None
        self.env = ShapeEnv(duck_shape=False, specialize_zero_one=False)
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self.mode.cache_enabled = False  # with symbolic sizes the cache costs more than it saves
        self.origins: dict[sympy.Symbol, Origin] = {}
        self._nodes: dict[sympy.Expr, fx.Node] = {}
        self._count = 0

    def follow(self, graph: fx.Graph) -> Symbols:
        """The same symbols for the trace of another call, which must take the same steps."""
        found = copy.copy(self)
        found.graph, found.origins, found._nodes = graph, {}, {}
        found.steps, found._guide = [], self.steps
        return found

    @property
    def following(self) -> bool:
        return self._guide is not None

    def produce(self, token: Any, make: Callable[[], Any]) -> Any:
        """A value: made, or taken from the call that is followed.

        Raises:
            Mismatch: that call made something else at this point.
        """
        if self._guide is None:
            value = make()
        elif len(self.steps) < len(self._guide) and self._guide[len(self.steps)][0] == token:
            value = self._guide[len(self.steps)][1]
        else:
            raise Mismatch
        self.steps.append((token, value))
        return value

    def next_token(self) -> Any:
        """What the call that is followed asked for next."""
        assert self._guide is not None
        return self._guide[len(self.steps)][0] if len(self.steps) < len(self._guide) else None

    def arrive(self) -> None:
        """Raise Mismatch unless every step of the call that is followed was taken."""
        if self._guide is not None and len(self.steps) != len(self._guide):
            raise Mismatch

    # ------------------------------------------------------------ values

    def tensor(self, real: torch.Tensor) -> FakeTensor:
        """A fake of a real tensor; its symbols have no origin before `bind`."""
        token = (
            *("tensor", tuple(real.shape), real.stride(), real.dtype, real.device),
            *(real.requires_grad, self.static),
        )
        return self.produce(token, lambda: self._tensor(real, not self.static))  # type: ignore[no-any-return]

    def _tensor(self, real: torch.Tensor, dynamic: bool = True) -> FakeTensor:
        if _is_dense(real):
            numbers = [self._integer(n) if dynamic and n > 1 else n for n in real.shape]
            return self._dense(numbers, real)
        source = self._source()
        kinds = [
            DimDynamic.DYNAMIC if dynamic and size > 1 else DimDynamic.STATIC for size in real.shape
        ]
        sizes, strides, offset = self.env.create_symbolic_sizes_strides_storage_offset(
            real, source, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds)
        )
        del offset  # no operation that is traced here reads it
        with self.mode:
            fake = torch.empty_strided(sizes, strides, dtype=real.dtype, device=real.device)
        fake.requires_grad_(real.requires_grad)
        assert isinstance(fake, FakeTensor)
        return fake

    def _dense(self, sizes: list[Any], like: torch.Tensor) -> FakeTensor:
        """A fake without gaps whose dimensions lie in memory in the order of another tensor's."""
        with torch._C.DisableTorchFunction():
            strides = like.stride()
            order = sorted(range(like.dim()), key=lambda d: -hint(strides[d]))
        with self.mode, torch._C.DisableTorchFunction():
            dense = torch.empty([sizes[d] for d in order], dtype=like.dtype, device=like.device)
            if order != list(range(like.dim())):
                dense = dense.permute([order.index(d) for d in range(like.dim())])
            dense.requires_grad_(like.requires_grad)
        assert isinstance(dense, FakeTensor)
        return dense

    def integer(self, value: int) -> torch.SymInt:
        """A symbolic integer with this value as its hint."""
        return self.produce(("integer", value), lambda: self._integer(value))  # type: ignore[no-any-return]

    def _integer(self, value: int) -> torch.SymInt:
        source = self._source()
        symbol = self.env.create_symbol(
            value, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
        )
        node = self.env.create_symintnode(symbol, hint=value, source=source)
        assert isinstance(node, torch.SymInt)
        return node

    def fixed(self, value: Any) -> Any:
        """The value with the sizes of the example: opaque objects compute without symbols."""
        if isinstance(value, torch.SymInt):
            return hint(value)
        if not isinstance(value, torch.Tensor):
            return value
        with self.mode, torch._C.DisableTorchFunction():
            sizes, strides = (
                [hint(n) for n in numbers] for numbers in (value.size(), value.stride())
            )
            found = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
            return found.requires_grad_(value.requires_grad)

    def _source(self) -> ConstantSource:
        self._count += 1
        return ConstantSource(f"attn_value{self._count}")

    # ------------------------------------------------------------ origins

    def bind(self, value: Any, node: fx.Node, text: str = "") -> None:
        """Remember that this node holds the value; a symbol keeps its first origin.

        Args:
            text: of the number itself or, for a tensor, of its shape.
        """
        if isinstance(value, torch.SymInt):
            self._bind_one(Origin(value, node, text=text))
        if not isinstance(value, torch.Tensor):
            return
        with torch._C.DisableTorchFunction():
            read: dict[str, tuple[Any, ...]] = {"size": value.size(), "stride": value.stride()}
        for method, numbers in read.items():
            for dim, number in enumerate(numbers):
                if isinstance(number, torch.SymInt):
                    spelled = f"{text}[{dim}]" if text and method == "size" else ""
                    self._bind_one(Origin(number, node, method, dim, spelled))

    def _bind_one(self, origin: Origin) -> None:
        symbol = origin.value.node._expr
        if isinstance(symbol, sympy.Symbol):
            self.origins.setdefault(symbol, origin)

    def known(self, number: Any) -> bool:
        """Can the graph compute this size?"""
        return (
            not isinstance(number, torch.SymInt)
            or number.node.expr.free_symbols <= self.origins.keys()
        )

    def fresh(self, value: torch.Tensor) -> torch.Tensor:
        """The value itself, or a fake like it whose sizes of unknown origin are new symbols."""
        with torch._C.DisableTorchFunction():
            shape, stride = value.size(), value.stride()
        if all(self.known(n) for n in (*shape, *stride)):
            return value
        sizes = [n if self.known(n) else self._integer(hint(n)) for n in shape]
        return self._dense(sizes, value)

    def renewed(self, value: torch.Tensor, sizes: list[Any]) -> torch.Tensor:
        """A fake like it with these sizes; where one is None, a new symbol."""
        with torch._C.DisableTorchFunction():
            numbers = [hint(n) for n in value.size()]
        made = [
            size if size is not None else self._integer(n) if n > 1 else n
            for n, size in zip(numbers, sizes, strict=True)
        ]
        return self._dense(made, value)

    # ------------------------------------------------------------ numbers as nodes and text

    def node(self, number: torch.SymInt | torch.SymFloat | torch.SymBool) -> Any:
        """A node at the end of the graph that computes a symbolic number."""
        return self.expression(number.node.expr, number)

    def expression(self, expr: sympy.Basic, value: Any = None) -> Any:
        """Nodes at the insertion point of the graph for an expression over bound symbols.

        Raises:
            CaptureError: `owner.size`, a symbol has no origin.
        """
        if expr in self._nodes and not self._nodes[expr]._erased:
            return self._nodes[expr]
        env = {symbol: fx.Proxy(self._symbol(symbol)) for symbol in expr.free_symbols}
        found = sympy_interp(PythonReferenceAnalysis, env, expr)
        if not isinstance(found, fx.Proxy):
            return found
        if value is not None:
            found.node.meta.setdefault("example_value", value)
            self._nodes[expr] = found.node
        return found.node

    def _symbol(self, symbol: sympy.Symbol) -> fx.Node:
        if symbol not in self._nodes or self._nodes[symbol]._erased:
            origin = self.origins.get(symbol)
            if origin is None:
                raise CaptureError(
                    "owner.size", "a size comes from something that is not an argument"
                )
            node = origin.node
            if origin.method:
                node = self.graph.call_method(origin.method, (origin.node, origin.dim))
                node.meta["example_value"] = origin.value
            self._nodes[symbol] = node
        return self._nodes[symbol]

    def gone(self, expr: sympy.Basic) -> bool:
        """Is it about a size of something that is made no more?"""
        origins = (self.origins.get(symbol) for symbol in expr.free_symbols)
        return any(origin is not None and origin.node._erased for origin in origins)

    def guards(self) -> list[sympy.Basic]:
        """What was demanded of the symbols so far."""
        return [plainer(g.expr) for g in self.env.guards if g.expr is not sympy.true]

    def text(self, expr: sympy.Basic) -> str | None:
        """A guard as Python text over the arguments of the call, None if a symbol is only known
        later.
        """
        origins = {symbol: self.origins.get(symbol) for symbol in expr.free_symbols}
        if not all(origin is not None and origin.text for origin in origins.values()):
            return None
        printer = _Printer({symbol: origin.text for symbol, origin in origins.items() if origin})
        return str(printer.doprint(expr))


class _Printer(PythonPrinter):
    """Python text in which each symbol is spelled by where it is read."""

    def __init__(self, texts: dict[Any, str]) -> None:
        super().__init__()
        self.texts = texts

    def _print_Symbol(self, expr: sympy.Symbol) -> str:
        return self.texts[expr]


def plainer(guard: sympy.Basic) -> sympy.Basic:
    """min(a, b) == a as a <= b: what reads a slice demands, in a form that a solver understands."""
    if isinstance(guard, sympy.Eq):
        for least, side in (guard.args, guard.args[::-1]):
            if isinstance(least, Min | sympy.Min) and side in least.args:
                return sympy.And(*(side <= other for other in least.args if other != side))
    return guard


def hint(number: int | torch.SymInt) -> int:
    """The value a size had in the example."""
    return number if isinstance(number, int) else int(number.node.hint)


def _is_dense(tensor: torch.Tensor) -> bool:
    expected = 1
    for stride, size in sorted(
        (s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@contextmanager
def oblivious() -> Iterator[None]:
    """The state in which calls are traced.

    No size is specialised because it might be 0 or 1; autocast keeps no copies of weights, which
    would be fakes here and stay when the real computation goes on; and a checkpoint around the call
    does not see what the fakes save for backward.
    """
    keeps = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        quiet = fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
        with quiet, saved_tensors_hooks(_same, _same):
            yield
    finally:
        torch.set_autocast_cache_enabled(keeps)


def exactly() -> Any:
    """Within `oblivious`: answer questions about 0 and 1 after all, by the example."""
    return fx_config.patch(backed_size_oblivious=False)  # type: ignore[attr-defined]


def answered(question: sympy.Basic, answer: Any) -> sympy.Basic:
    """The question and its answer as a condition."""
    if answer in (sympy.true, sympy.false, True, False) and isinstance(
        question, Boolean | BooleanAtom
    ):
        return question if answer else sympy.Not(question)
    return sympy.Eq(question, answer)
