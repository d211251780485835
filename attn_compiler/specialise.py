"""From one call of a module to a variant of its forward: trace, rewrite, write the checks and the
text.

    covers(self, x, mask, kwargs)   is everything as it was when the call was traced, up to sizes?
    body(self, x, mask)             the rewritten graph as Python
    run(self, x, mask, kwargs)      body, with the leaves of the arguments
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
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
from attn_compiler.record import Recorder
from attn_compiler.report import Report
from attn_compiler.symbols import CaptureError, oblivious

_SMALL = 4096


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
        bare = not module._parameters and not module._buffers and not module._modules
        return bare and path.rpartition(".")[0] in self.spine


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
    recorder = Recorder(owner, plan.inline, plan.prefix)
    call = _Call(recorder)
    names = names_of(base.forward)
    with oblivious():
        fakes = {n: call.leaf(n, v) for n, v in zip(names, values, strict=True)}
        recorder.run(base.forward, *_as_call(base, fakes))
        gm = fx.GraphModule(owner, recorder.graph)
        recorder.graph = recorder.symbols.graph = gm.graph
        demands, traced = recorder.demands(), len(recorder.symbols.guards())
        report = compile_graph(gm, plan.config)
        demands += _late(recorder.symbols.guards()[traced:])
    call.module_checks(plan)
    call.guard_checks(demands, gm.graph)
    settle(gm.graph)
    _spell_constants(gm)
    _sweep(gm.graph)
    return Variant(_text(names, call, gm.graph), call.names), report


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
        if type(value) in (int, str, bool, type(None), torch.dtype) or type(value) is float and isfinite(value):
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

    def module_checks(self, plan: Plan) -> None:
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
            weight = next(iter(recorder.root.get_submodule(path)._parameters), None)
            if (
                weight is not None
                and getattr(recorder.root.get_submodule(path), weight) is not None
            ):
                found = getattr(recorder.root.get_submodule(path), weight)
                self.check(f"{_path(path)}.{weight}.dtype is {found.dtype}")
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

    def guard_checks(self, guards: list[sympy.Basic], graph: fx.Graph) -> None:
        """Check before the call what can be, and the rest at the end of the graph."""
        symbols = self.recorder.symbols
        with graph.inserting_before(graph.output_node()):
            for guard in guards:
                text = symbols.text(guard)
                if text is not None:
                    self.check(text)
                else:
                    graph.call_function(require, (symbols.expression(guard), str(guard)))
        for assumption in self.recorder.assumptions:
            constant = isinstance(assumption.value, bool | None)
            same = operator.is_ if constant else operator.eq
            if assumption.text:
                spelled = repr(assumption.value) if constant else self.name(assumption.value)
                self.check(f"{assumption.text} {'is' if constant else '=='} {spelled}")
            with graph.inserting_after(assumption.node):
                found = graph.call_function(same, (assumption.node, assumption.value))
            with graph.inserting_after(found):
                graph.call_function(require, (found, f"{assumption.node} is {assumption.value!r}"))


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
    """Erase reads of sizes and pieces that nothing needs."""
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
