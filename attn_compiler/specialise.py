"""From one call of a module to a variant of its forward: trace, rewrite, write the checks and the
text.

    covers(self, x, mask, kwargs)   is everything as it was when the call was traced, up to sizes?
    body(self, x, mask)             the rewritten graph as Python
    run(self, x, mask, kwargs)      body, with the leaves of the arguments
"""

from __future__ import annotations

import operator
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from types import ModuleType
from typing import Any

import sympy
import torch
from torch import fx, nn

from attn_compiler.config import CompileConfig
from attn_compiler.installed import Variant, names_of, parameters_of, require
from attn_compiler.opaque import CONSTANTS, Opaque, settle, shadow
from attn_compiler.pipeline import compile_graph
from attn_compiler.record import Recorder, is_bare
from attn_compiler.report import Report
from attn_compiler.symbols import CaptureError, Mismatch, oblivious

_SMALL = 4096
# the layers of a model follow the first of them
_MOST_GUIDES = 8
_guides: dict[type[nn.Module], list[_Guide]] = {}
_LOCK = threading.RLock()


@dataclass(frozen=True)
class Plan:
    """How the forward of an owner is to be traced.

    Attributes:
        prefix: the owner's path in the model.
        spine: paths, within the owner, of the modules that are traced through.
        config: what may be put in place of an attention.
    """

    prefix: str
    spine: frozenset[str]
    config: CompileConfig

    def inline(self, path: str, module: nn.Module) -> bool:
        """Modules on the way to the attention, and the dropouts and activations beside it."""
        if path in self.spine:
            return True
        return is_bare(module) and path.rpartition(".")[0] in (*self.spine, "")


def specialise(
    owner: nn.Module, base: type[nn.Module], values: tuple[Any, ...], plan: Plan
) -> tuple[Variant, Report]:
    """Trace one call and rewrite its attention.

    Args:
        owner: the module that is called.
        base: the class whose forward is traced.
        values: the arguments by parameter, those of `*` and `**` together.
        plan: how to trace.

    Raises:
        CaptureError: it cannot be traced.
        NoLegalVariant: with `on_reject="raise"`.
    """
    with _LOCK:
        for guide in reversed(_guides.get(base, [])):
            try:
                return _follow(guide, owner, values, plan)
            except (Mismatch, CaptureError):
                continue
        guide, variant = _trace(owner, base, values, plan)
        _guides[base] = [*_guides.get(base, []), guide][-_MOST_GUIDES:]
        return variant, guide.report


@dataclass(frozen=True)
class _Guide:
    """A finished specialisation that others of the same kind may follow."""

    base: type[nn.Module]
    plan: Plan
    recorder: Recorder
    recorded: dict[str, tuple[Any, ...]]
    demands: list[sympy.Basic]
    module: fx.GraphModule
    report: Report


def _trace(
    owner: nn.Module, base: type[nn.Module], values: tuple[Any, ...], plan: Plan
) -> tuple[_Guide, Variant]:
    recorder = Recorder(owner, plan.inline, plan.prefix)
    call = _Call(recorder)
    with oblivious():
        call.record(base, values)
        recorded = _constants(recorder.graph)
        gm = fx.GraphModule(owner, recorder.graph)
        demands, traced = recorder.demands(), len(recorder.symbols.guards())
        report = compile_graph(gm, plan.config)
        demands += _late(recorder.symbols.guards()[traced:])
    call.module_checks()
    call.guard_checks(demands)
    call.guard_nodes(demands, gm.graph)
    settle(gm.graph)
    _spell_constants(gm)
    _sweep(gm.graph)
    recorder.forget()
    guide = _Guide(base, plan, recorder, recorded, demands, gm, report)
    return guide, Variant(_text(names_of(base.forward), call, gm.graph), call.names)


def _follow(
    guide: _Guide, owner: nn.Module, values: tuple[Any, ...], plan: Plan
) -> tuple[Variant, Report]:
    """The variant of a module that does what another one of its class did.

    Raises:
        Mismatch: it does something else.
    """
    if plan.spine != guide.plan.spine or plan.config != guide.plan.config:
        raise Mismatch
    recorder = Recorder(owner, plan.inline, plan.prefix, guide.recorder)
    call = _Call(recorder)
    with oblivious():
        call.record(guide.base, values)
    call.module_checks()
    call.guard_checks(guide.demands)
    report = _moved(guide, plan)
    graph = guide.module.graph
    with _patched(graph, guide.recorded, _constants(recorder.graph)):
        return Variant(_text(names_of(guide.base.forward), call, graph), call.names), report


def _constants(graph: fx.Graph) -> dict[str, Any]:
    """What the calls on opaque objects are given, by the name of the node."""
    return {
        node.name: (node.args, node.kwargs)
        for node in graph.nodes
        if node.op in ("call_method", "call_function") and "example_value" not in node.meta
    }


@contextmanager
def _patched(graph: fx.Graph, old: dict[str, Any], new: dict[str, Any]) -> Iterator[None]:
    """Put other constants (the number of the layer) into the calls on opaque objects.

    Raises:
        Mismatch: the calls are others.
    """
    if old.keys() != new.keys():
        raise Mismatch
    nodes = {node.name: node for node in graph.nodes}
    before = {name: (nodes[name].args, nodes[name].kwargs) for name in old if name in nodes}
    try:
        for name, arguments in before.items():
            nodes[name].args, nodes[name].kwargs = _merged(arguments, old[name], new[name])
        yield
    finally:
        for name, arguments in before.items():
            nodes[name].args, nodes[name].kwargs = arguments


def _merged(now: Any, old: Any, new: Any) -> Any:
    if isinstance(old, tuple | list):
        return type(old)(_merged(*items) for items in zip(now, old, new, strict=True))
    if isinstance(old, dict):
        return {key: _merged(now[key], old[key], new[key]) for key in old}
    return now if isinstance(old, fx.Node) or old == new else new


def _moved(guide: _Guide, plan: Plan) -> Report:
    """The report of the followed module, at another path.

    Raises:
        Mismatch: something else is wanted there.
    """
    sites, start = [], len(guide.plan.prefix)
    for site in guide.report.sites:
        path = (plan.prefix + site.path[start:]).lstrip(".")
        if plan.config.wanted(path) != plan.config.wanted(site.path):
            raise Mismatch
        sites.append(replace(site, path=path))
    missed = [
        replace(m, path=(plan.prefix + m.path[start:]).lstrip(".")) for m in guide.report.missed
    ]
    return replace(guide.report, sites=tuple(sites), missed=tuple(missed))


def _as_call(
    base: type[nn.Module], values: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for p in parameters_of(base.forward):
        value = values[p.name]
        if p.kind is p.VAR_POSITIONAL:
            args += value
        elif p.kind is p.VAR_KEYWORD:
            kwargs |= value
        elif p.kind is p.KEYWORD_ONLY:
            kwargs[p.name] = value
        else:
            args.append(value)
    return tuple(args), kwargs


def _late(guards: list[sympy.Basic]) -> list[sympy.Basic]:
    """What the rewriting demands; whether a size is 1 it asks only to choose between a view and a copy."""
    return [guard for guard in guards if not isinstance(guard, sympy.Ne)]


class _Call:
    """The arguments of the traced call, and the checks that another call must pass."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.checks: list[str] = []
        self.names: dict[str, Any] = {}
        self.leaves: list[str] = []
        self._seen: dict[int, tuple[Any, str]] = {}

    def name(self, value: Any) -> str:
        """Text for a constant or a class: a literal where there is one."""
        if type(value) in (int, str, bool, type(None), torch.dtype) or (
            type(value) is float and isfinite(value)
        ):
            return repr(value)
        for name, known in self.names.items():
            if known is value or (type(known) is type(value) is torch.device and known == value):
                return name
        name = f"{type(value).__name__ if not isinstance(value, type) else value.__name__}_{len(self.names)}"
        self.names[name] = value
        return name

    def check(self, text: str) -> None:
        if text not in self.checks:
            self.checks.append(text)

    # ------------------------------------------------------------ arguments

    def record(self, base: type[nn.Module], values: tuple[Any, ...]) -> None:
        """Trace the call."""
        names = names_of(base.forward)
        fakes = {n: self.leaf(n, v) for n, v in zip(names, values, strict=True)}
        result = self.recorder.run(base.forward, *_as_call(base, fakes))
        self.recorder.graph.output(self.recorder.argument(result))

    def leaf(self, text: str, value: Any) -> Any:
        """The fake for one argument, or a container of fakes."""
        if isinstance(value, torch.Tensor):
            return self._tensor(text, value)
        if type(value) in (tuple, list):
            self.check(f"type({text}) is {type(value).__name__} and len({text}) == {len(value)}")
            return type(value)(self.leaf(f"{text}[{i}]", item) for i, item in enumerate(value))
        if type(value) is dict:
            self.check(f"type({text}) is dict and list({text}) == {list(value)!r}")
            return {key: self.leaf(f"{text}[{key!r}]", item) for key, item in value.items()}
        if value is None or value is True or value is False:
            self.check(f"{text} is {value!r}")
            return value
        if isinstance(value, (*CONSTANTS, int)):
            self.check(f"type({text}) is {self.name(type(value))}")
            self.check(f"{text} == {self.name(value)}")
            return value
        self.check(f"type({text}) is {self.name(type(value))}")
        return Opaque(self.recorder, shadow(value, self.recorder.symbols), self._place(text), text)

    def _tensor(self, text: str, value: torch.Tensor) -> torch.Tensor:
        if id(value) in self._seen:
            fake, first = self._seen[id(value)]
            self.check(f"{text} is {first}")
            return fake  # type: ignore[no-any-return]
        if (
            type(value) not in (torch.Tensor, nn.Parameter)
            or value.is_nested
            or value.layout is not torch.strided
        ):
            raise CaptureError("owner.argument", f"{text} is no ordinary strided tensor")
        device = self.name(value.device)
        self.check(f"plain({text}, {value.dtype}, {device}, {value.dim()})")
        fake = self.recorder.symbols.tensor(value)
        for dim, size in enumerate(fake.shape):
            if isinstance(size, int):
                self.check(f"{text}.size({dim}) == {size}")
        self.recorder.learn(fake, self._place(text), text)
        self._seen[id(value)] = fake, text
        return fake

    def _place(self, text: str) -> fx.Node:
        self.leaves.append(text)
        return self.recorder.graph.placeholder("".join(c if c.isalnum() else "_" for c in text))

    # ------------------------------------------------------------ modules, attributes, state

    def module_checks(self) -> None:
        """The modules that were traced through, what was read of them, and the ambient state."""
        recorder = self.recorder
        for path, kind in recorder.kinds.items():
            if path:
                self.check(f"intact({_path(path)}, {self.name(kind)})")
        for (path, name), value in recorder.reads.items():
            if isinstance(value, bool | None):
                self.check(f"{_path(path)}.{name} is {value!r}")
            else:
                self.check(f"{_path(path)}.{name} == {self.name(value)}")
        for path in dict.fromkeys(recorder.leaves):
            weights = recorder.root.get_submodule(path)._parameters
            name, weight = next(iter(weights.items()), ("", None))
            if weight is not None:
                self.check(f"{_path(path)}.{name}.dtype is {weight.dtype}")
        for node in recorder.graph.nodes:
            if node.op == "get_attr" and isinstance(node.meta.get("example_value"), torch.Tensor):
                found = node.meta["example_value"]
                device = self.name(found.device)
                self.check(f"plain({_path(node.target)}, {found.dtype}, {device}, {found.dim()})")
        self._state_checks()

    def _state_checks(self) -> None:
        for device in sorted({v.type for v in self.names.values() if isinstance(v, torch.device)}):
            enabled = torch.is_autocast_enabled(device)
            self.check(f"torch.is_autocast_enabled({device!r}) is {enabled}")
            if enabled:
                self.check(
                    f"torch.get_autocast_dtype({device!r}) is {torch.get_autocast_dtype(device)}"
                )
        if self.recorder.grad_read:
            self.check(f"torch.is_grad_enabled() is {torch.is_grad_enabled()}")
        if self.recorder.layout_read:
            for fake, text in self._seen.values():
                self.check(f"{text}.is_contiguous() is {fake.is_contiguous()}")

    # ------------------------------------------------------------ sizes and branches

    def guard_checks(self, demands: list[sympy.Basic]) -> None:
        """Check before the call what can be checked then."""
        for demand in demands:
            text = self.recorder.symbols.text(demand)
            if text is not None:
                self.check(text)
        for assumption in self.recorder.assumptions:
            constant = isinstance(assumption.value, bool | None)
            if assumption.text:
                same = "is" if constant else "=="
                self.check(f"{assumption.text} {same} {self.name(assumption.value)}")

    def guard_nodes(self, demands: list[sympy.Basic], graph: fx.Graph) -> None:
        """Check while the graph runs what was not known before it."""
        symbols = self.recorder.symbols
        with graph.inserting_before(graph.output_node()):
            for demand in demands:
                if symbols.text(demand) is None:
                    graph.call_function(require, (symbols.expression(demand), str(demand)))
        for assumption in self.recorder.assumptions:
            same = operator.is_ if isinstance(assumption.value, bool | None) else operator.eq
            with graph.inserting_after(assumption.node):
                found = graph.call_function(same, (assumption.node, assumption.value))
            with graph.inserting_after(found):
                text = f"{assumption.text or assumption.node} is {assumption.value!r}"
                graph.call_function(require, (found, text))


def _path(path: str) -> str:
    text = "self"
    for piece in filter(None, path.split(".")):
        text = f"{text}.{piece}" if piece.isidentifier() else f"getattr({text}, {piece!r})"
    return text


def _spell_constants(gm: fx.GraphModule) -> None:
    """Constants that the rewriting has registered become literals: the owner does not have them."""
    for node in list(gm.graph.nodes):
        if node.op != "get_attr" or not str(node.target).startswith("_attn_constant"):
            continue
        constant = getattr(gm, str(node.target))
        if constant.numel() > _SMALL:
            raise CaptureError("owner.constant", "a large constant tensor stands in the attention")
        with gm.graph.inserting_before(node):
            literal = gm.graph.call_function(
                torch.tensor,
                (constant.tolist(),),
                {"dtype": constant.dtype, "device": constant.device},
            )
        node.replace_all_uses_with(literal)
        gm.graph.erase_node(node)


def _sweep(graph: fx.Graph) -> None:
    """Erase reads of sizes and pieces that nothing needs; read the others as Python does."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int):
        node.op, node.target = "call_method", "size"  # torch.func has no rule for the operator
    free = ("size", "stride", "getitem", "add", "mul", "sub", "floordiv", "eq")
    for node in reversed(list(graph.nodes)):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if not node.users and node.op in ("call_function", "call_method") and name in free:
            graph.erase_node(node)


def _text(names: tuple[str, ...], call: _Call, graph: fx.Graph) -> str:
    code = graph.python_code(root_module="self")
    imports = {"torch"}
    for name, value in code.globals.items():
        if not re.search(rf"\b{name}\b", code.src):
            continue
        if isinstance(value, ModuleType):
            imports.add(name if value.__name__ == name else f"{value.__name__} as {name}")
        else:
            call.names.setdefault(name, value)
    body = code.src.strip().replace("def forward(", "def body(", 1)
    parameters = ", ".join(("self", *names))
    checks = "".join(f"    if not ({check}):\n        return False\n" for check in call.checks)
    leaves = ", ".join(("self", *call.leaves))
    return (
        "".join(f"import {name}\n" for name in sorted(imports)) + "\n\n"
        f"def covers({parameters}):\n{checks}    return True\n\n\n{body}\n\n\n"
        f"def run({parameters}):\n    return body({leaves})\n"
    )
