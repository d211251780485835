"""The doors' graphs, made ready for the pipeline: a fake value on every node, and no module where
an
idea should stand.

    Dynamo            every graph of a call, breaks allowed; the values are there
    fx.GraphModule    values from example inputs, with symbolic sizes; leaf modules that attend are
                      spelled out: self.attn(x, x, x)  ->  F.multi_head_attention_forward(x, ...)

What is spelled out and not rewritten is put back.
"""

from __future__ import annotations

import copy
import inspect
import linecache
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.utils import counters, graph_break_reasons
from torch.utils import _pytree as pytree

from attn_compiler.config import CompileConfig
from attn_compiler.errors import BadOption, require
from attn_compiler.installed import require_mode
from attn_compiler.ir import ops
from attn_compiler.ir.site import Break
from attn_compiler.pipeline import compile_graph
from attn_compiler.record import Recorder, is_bare
from attn_compiler.report import Report
from attn_compiler.symbols import CaptureError, Symbols, oblivious

# how Dynamo says which function it leaves
_FRAME = "frame skipped: "
_OFTEN = 2**31 - 1
# to look does not count among what the user compiles, where torch can tell (from 2.13 on)
_APART: dict[str, Any] = (
    {"isolate_recompiles": True}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters
    else {}
)
_ANCHORS = ops.SOFTMAX | ops.SDPA | ops.MHA | ops.FLEX | ops.EXPONENTIAL


# ---------------------------------------------------------------- Dynamo


def each_graph(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    visit: Callable[[fx.GraphModule], None],
) -> tuple[Break, ...]:
    """Call the model once and visit a copy of every graph that Dynamo finds in it.

    Returns:
        Where a graph ended before the model did, in order, each line once.
    """
    graphs = 0

    def collect(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        visit(copy.deepcopy(gm))
        return gm.forward

    ended, complained = graph_break_reasons, counters["unimplemented"]
    before, known = len(ended), dict(complained)
    # Dynamo stops tracing what it has traced often: of one class it would show eight modules
    with torch._dynamo.config.patch(recompile_limit=_OFTEN, accumulated_recompile_limit=_OFTEN):
        torch.compile(model, backend=collect, **_APART)(*args, **kwargs)
    found = [_broken(reason) for reason in ended[before:]]
    found += [_skipped(t) for t, n in complained.items() if n > known.get(t, 0) and _FRAME in t]
    if not graphs and not found:
        return (Break("", "nothing was traced: it is kept from the tracer, or calls no torch"),)
    return tuple(dict.fromkeys(found))


def _broken(reason: Any) -> Break:
    """A break in the words of the tracer, at the innermost line of the user's."""
    text = (reason.reason.strip().splitlines() or [""])[0]
    if text.startswith("generic_jump"):  # its own word is that of a bytecode
        text = "a branch depends on the value of a tensor"
    home = str(Path(torch.__file__).parent)
    users = [frame for frame in reason.user_stack if not frame.filename.startswith(home)]
    if not users:
        return Break("", text)
    frame = users[-1]
    return Break(f"{Path(frame.filename).name}:{frame.lineno}", text, (frame.line or "").strip())


def _skipped(text: str) -> Break:
    """A function that is not traced at all, since the tracer would have to let go in a loop."""
    found = re.search(rf"{_FRAME}(\S+) \((.+) line (\d+)\)", text)
    name, file, line = found.groups() if found else ("the function", "", "0")
    first = text.splitlines()[0]
    return Break(
        f"{Path(file).name}:{line}" if file else "",
        f"{first}, in a loop, so that nothing of {name} is traced",
        linecache.getline(file, int(line)).strip(),
    )


# ---------------------------------------------------------------- graph modules


def has_values(gm: fx.GraphModule) -> bool:
    """Did whoever made this graph leave fake values on it?"""
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return bool(inputs) and all(n.meta.keys() & {"example_value", "val"} for n in inputs)


@dataclass
class _Expansion:
    """One call of a leaf module, and the operations that it was spelled out to.

    Attributes:
        target, args, kwargs, meta: the call.
        inserted: the operations.
        result: the nodes of its tensors, in the structure that it returns.
        modes: the modes of the modules inside, by path, where the code asked for them.
    """

    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]
    inserted: list[fx.Node]
    result: Any
    modes: dict[str, bool]

    def settle(self) -> None:
        """Keep it if something in it was rewritten, else put the call back."""
        first = self.inserted[0]
        graph = first.graph
        if any(node._erased for node in self.inserted):
            self._check_modes(graph)
            return
        with graph.inserting_before(first):
            call = graph.call_module(self.target, self.args, self.kwargs)
            call.meta = self.meta
            pieces = self.result if isinstance(self.result, tuple | list) else None
            for position, node in enumerate(pieces or [self.result]):
                if isinstance(node, fx.Node):
                    piece = call
                    if pieces is not None:
                        piece = graph.call_function(operator.getitem, (call, position))
                        piece.meta = dict(node.meta)
                    node.replace_all_uses_with(piece)
        for node in reversed(self.inserted):
            if not node.users:
                graph.erase_node(node)

    def _check_modes(self, graph: fx.Graph) -> None:
        with graph.inserting_before(graph.output_node()):
            for path, training in self.modes.items():
                module = graph.get_attr(path)
                graph.call_function(require_mode, (module, training))


@dataclass
class Prepared:
    """A graph with values; `module` shares parameters and submodules with the user's.

    Attributes:
        module: the copy.
        symbols: sizes, and what is demanded of them.
        asked: what spelled-out modules asked about sizes.
        expansions: the modules that were spelled out.
    """

    module: fx.GraphModule
    symbols: Symbols
    asked: list[sympy.Basic] = field(default_factory=list)
    expansions: list[_Expansion] = field(default_factory=list)

    def compile(self, config: CompileConfig) -> Report:
        """Rewrite the graph."""
        with oblivious():
            report = compile_graph(self.module, config)
        self._finish()
        if config.keep_graphs:
            return replace(report, graph_after=self.module.print_readable(print_output=False))
        return report

    def _finish(self) -> None:
        """After the rewriting: put back what was not rewritten, check what was assumed of sizes."""
        for expansion in reversed(self.expansions):  # a call may read what another one gives
            expansion.settle()
        graph = self.module.graph
        if any(n.target is torch.ops.attn_compiler.attention.default for n in graph.nodes):
            demands = [g for g in self.symbols.guards() if not isinstance(g, sympy.Ne)]
            with graph.inserting_before(graph.output_node()):
                for demand in dict.fromkeys((*demands, *self.asked)):
                    graph.call_function(require, (self.symbols.expression(demand), str(demand)))
        graph.lint()
        self.module.recompile()


def with_values(gm: fx.GraphModule, inputs: Sequence[Any]) -> Prepared:
    """A copy of a graph without values, run once on fakes of the example inputs.

    Raises:
        BadOption: inputs are missing, or the graph cannot be run on them.
    """
    places = [node for node in gm.graph.nodes if node.op == "placeholder"]
    required = [node for node in places if not node.args]
    if not len(required) <= len(inputs) <= len(places):
        raise BadOption(
            "example inputs are missing"
            if len(inputs) < len(required)
            else "too many example inputs",
            why=[f"the graph takes {', '.join(n.name for n in places)}; {len(inputs)} were given"],
            do="hand over one example for each input",
        )
    module = copy_of(gm)
    prepared = Prepared(module, Symbols(module.graph))
    try:
        with oblivious():
            _Values(prepared, inputs).run()
    except Exception as error:  # the graph runs whatever operations the user put there
        text = (str(error).strip() or "no message").splitlines()[0]
        raise BadOption(
            "the graph cannot be run on these example inputs",
            why=[f"{type(error).__name__}: {text}"],
            do="hand over inputs that the graph accepts",
        ) from error
    return prepared


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph again, over the same parameters and submodules."""
    graph = fx.Graph()
    output = graph.output(graph.graph_copy(gm.graph, {}))
    output.meta = dict(gm.graph.output_node().meta)
    return fx.GraphModule(gm, graph)


class _Values:
    """Runs a graph on fakes, node by node, and spells out modules on the way."""

    def __init__(self, prepared: Prepared, inputs: Sequence[Any]) -> None:
        self.prepared = prepared
        self.graph = prepared.module.graph
        self.symbols = prepared.symbols
        self.inputs = list(inputs)
        self.env: dict[fx.Node, Any] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "output":
                return
            if node._erased:
                continue
            with self.graph.inserting_before(node):
                self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        if node.op == "call_module":
            module = self.prepared.module.get_submodule(str(node.target))
            if self._expand(node, module):
                return
            value = self._call(lambda a, k: module(*a, **k), node)
        elif node.op == "placeholder":
            value = self._input(node)
        elif node.op == "get_attr":
            value = self._attribute(str(node.target))
        elif node.op == "call_method":
            value = self._call(lambda a, k: getattr(a[0], str(node.target))(*a[1:], **k), node)
        else:
            target: Any = node.target
            value = self._call(lambda a, k: target(*a, **k), node)
        self._note(node, value)

    def _note(self, node: fx.Node, value: Any) -> None:
        self.env[node] = value
        node.meta["example_value"] = value
        self.symbols.bind(value, node)

    def _input(self, node: fx.Node) -> Any:
        value = self.inputs.pop(0) if self.inputs else node.args[0]
        return self.symbols.tensor(value) if isinstance(value, torch.Tensor) else value

    def _attribute(self, path: str) -> Any:
        value = operator.attrgetter(path)(self.prepared.module)
        if isinstance(value, torch.Tensor):
            return self.symbols.mode.from_tensor(value, static_shapes=True)
        return value

    def _call(self, run: Callable[[Any, Any], Any], node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.env.__getitem__)
        with enable_python_dispatcher(), self.symbols.mode:
            return run(args, kwargs)

    # ------------------------------------------------------------ modules

    def _expand(self, node: fx.Node, module: nn.Module) -> bool:
        if not (is_bare(module) or module._modules):
            return False
        before = node.prev
        recorder = Recorder(module, _everything, self.symbols, home=str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.env.__getitem__)
        for argument in node.all_input_nodes:
            for leaf in pytree.tree_leaves(self.env[argument]):
                if isinstance(leaf, torch.Tensor):
                    recorder.writer.know(leaf, argument)
        try:
            result = recorder.argument(recorder.run(type(module).forward, args, kwargs))
        except CaptureError:
            _erase_between(before, node)
            return False
        inserted = _between(before, node)
        attends = any(ops.name(n) in _ANCHORS for n in inserted)
        if not inserted or recorder.stores or not (attends or is_bare(module)):
            _erase_between(before, node)
            return False
        self._replace(node, inserted, result, recorder)
        self.env |= {n: n.meta.get("example_value") for n in inserted}
        return True

    def _replace(
        self, node: fx.Node, inserted: list[fx.Node], result: Any, recorder: Recorder
    ) -> None:
        target = str(node.target)
        modes = {
            f"{target}.{path}".rstrip("."): value
            for (path, name), value in recorder.reads.items()
            if name == "training"
        }
        self.prepared.expansions.append(
            _Expansion(target, node.args, node.kwargs, dict(node.meta), inserted, result, modes)
        )
        self.prepared.asked += recorder.asked
        for user in list(node.users):
            user.args, user.kwargs = _substituted((user.args, user.kwargs), node, result)
            if user.target is operator.getitem and isinstance(user.args[0], tuple):
                piece = user.args[0][user.args[1]]  # type: ignore[index]
                if isinstance(piece, fx.Node):
                    user.replace_all_uses_with(piece)
                    self.graph.erase_node(user)
        self.graph.erase_node(node)


def _everything(path: str, module: nn.Module) -> bool:
    return not path or bool(module._modules) or is_bare(module)


def _between(before: fx.Node, after: fx.Node) -> list[fx.Node]:
    found = []
    node = before.next
    while node is not after:
        found.append(node)
        node = node.next
    return found


def _erase_between(before: fx.Node, after: fx.Node) -> None:
    for node in reversed(_between(before, after)):
        node.graph.erase_node(node)


def _substituted(value: Any, old: fx.Node, new: Any) -> Any:
    """Arguments with a node replaced by a structure of nodes."""
    if value is old:
        return new
    if isinstance(value, tuple | list):
        return type(value)(_substituted(item, old, new) for item in value)
    if isinstance(value, dict):
        return {key: _substituted(item, old, new) for key, item in value.items()}
    return value
