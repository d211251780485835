"""The arguments of one traced call, and the checks that another call must pass to be treated alike.

    plain(x, torch.float32, cpu, 3) and type(past) is DynamicCache and self.attn.training is False
    ...

Everything that the trace relied on is written down as a line of Python, except sizes that nothing
depended on.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from math import isfinite
from typing import Any

import sympy
import torch
from torch import fx, nn

from attn_compiler.errors import require
from attn_compiler.holding import held
from attn_compiler.installed import names_of, parameters_of
from attn_compiler.opaque import CONSTANTS, Opaque, is_cache, shadow
from attn_compiler.passes.emit import CONSTANT
from attn_compiler.record import Recorder
from attn_compiler.symbols import CaptureError
from attn_compiler.writer import attribute


def as_call(
    base: type[nn.Module], values: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Values by parameter as the arguments of a call."""
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


def given(name: str) -> str:
    """A parameter in generated text: `plain` is `plain_`. No other name there ends so, hence no
    name of the user's can hide a check, a builtin or a constant.
    """
    return f"{name}_"


def shown(text: str) -> str:
    """Text over arguments with the names that the user gave them."""
    return re.sub(r"^(\w+)_", r"\1", text)


class Call:
    """The arguments of the traced call, and the checks that another call must pass."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.lines: list[str] = []
        self.names: dict[str, Any] = {}
        self.leaves: list[str] = []
        self._named: tuple[str, ...] = ()
        self._seen: dict[int, tuple[Any, str]] = {}
        self._homes: dict[str, int] = {}

    def name(self, value: Any) -> str:
        """Text for a constant or a class: a literal where there is one."""
        if type(value) in (int, str, bool, type(None), torch.dtype) or (
            type(value) is float and isfinite(value)
        ):
            return repr(value)
        for name, known in self.names.items():
            if known is value or (type(known) is type(value) is torch.device and known == value):
                return name
        kind = value if isinstance(value, type) else type(value)
        name = f"{_cleaned(kind.__name__)}_const{len(self.names)}"
        self.names[name] = value
        return name

    def check(self, condition: str) -> None:
        self._add(f"    if not ({condition}):\n        return False\n")

    def let(self, name: str, value: str) -> str:
        """A name for something that is read more than once."""
        self._add(f"    {name} = {value}\n")
        return name

    def _add(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)

    # ------------------------------------------------------------ arguments

    def record(self, base: type[nn.Module], values: tuple[Any, ...]) -> None:
        """Trace the call."""
        names = names_of(base.forward)
        starred = (p for p in parameters_of(base.forward) if p.kind is p.VAR_KEYWORD)
        self._named = tuple(f"{given(p.name)}[" for p in starred)
        fakes = {n: self.leaf(given(n), v) for n, v in zip(names, values, strict=True)}
        result = self.recorder.run(base.forward, *as_call(base, fakes))
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
        if self.recorder.symbols.static:
            raise CaptureError("owner.untraceable", f"{shown(text)} holds tensors of unknown sizes")
        self.check(f"type({text}) is {self.name(type(value))}")
        # of two caches in one, a static one is as long before the prompt as behind it
        for name, part in getattr(value, "__dict__", {}).items():
            if is_cache(part):
                self.check(f"type({text}.{name}) is {self.name(type(part))}")
        sites = self.recorder.root.__dict__.get("_attn_sites", ())
        seen = shadow(value, self.recorder.symbols, sites)
        return Opaque(self.recorder, seen, self._place(text), text)

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
            raise CaptureError("owner.argument", f"{shown(text)} is no ordinary strided tensor")
        device = self.name(value.device)
        self.check(f"plain({text}, {value.dtype}, {device}, {value.dim()})")
        fake = self.recorder.symbols.tensor(value)
        shape = self.let(f"shape_{len(self._seen)}", f"{text}.shape")
        for dim, size in enumerate(fake.shape):
            if isinstance(size, int):
                self.check(f"{shape}[{dim}] == {size}")
        self.recorder.learn(fake, self._place(text), shape)
        self._seen[id(value)] = fake, text
        return fake

    def _place(self, text: str) -> fx.Node:
        name = self._leaf_name(text)
        alike = [other for other in self.leaves if self._leaf_name(other) == name]
        self.leaves.append(text)
        return self.recorder.graph.placeholder(
            given(f"{name}_{len(self.leaves)}" if alike else name)
        )

    def _leaf_name(self, text: str) -> str:
        """An argument of `**` has the name by which it is given."""
        if text.startswith(self._named):
            return _cleaned(text.partition("['")[2].replace("']", "", 1))
        return _cleaned(shown(text))

    # ------------------------------------------------------------ modules, attributes, state

    def module_checks(self, graph: fx.Graph, taken: Iterable[str]) -> None:
        """The modules that were traced through, what was read of them, the parameters that the
        graph reads, and the ambient state; nothing that was taken out.
        """
        recorder, gone = self.recorder, frozenset(taken)
        for path, kind in recorder.kinds.items():
            if path and not _within(path, gone):
                self.check(f"intact({self._module(path)}, {self.name(kind)})")
        self._attribute_checks(gone)
        for path in dict.fromkeys(p for p in recorder.leaves if p not in gone):
            weights = recorder.root.get_submodule(path)._parameters
            name, weight = next(iter(weights.items()), ("", None))
            if weight is not None:
                self.check(f"keeps({self._module(path)}, {name!r}, {weight.dtype})")
        for node in graph.nodes:
            found = node.meta.get("example_value")
            constant = str(node.target).startswith(CONSTANT)
            if node.op == "get_attr" and not constant and isinstance(found, torch.Tensor):
                home, _, name = str(node.target).rpartition(".")
                self._same(attribute(self._module(home), name), found)
            elif node.target is held and len(node.args) > 3 and isinstance(found, torch.Tensor):
                _, path, name, key = node.args
                self._same(f"{self._attribute(str(path), str(name))}[{self.name(key)}]", found)
        self._state_checks()

    def _same(self, text: str, found: torch.Tensor) -> None:
        """A tensor that a module holds is of the kind that it was."""
        device = self.name(found.device)
        self.check(f"plain({text}, {found.dtype}, {device}, {found.dim()})")
        self.check(f"{text}.shape == {tuple(found.shape)}")

    def _attribute_checks(self, gone: frozenset[str]) -> None:
        """What was read of modules is as it was."""
        recorder = self.recorder
        for (path, name), value in recorder.reads.items():
            if not _within(path, gone):
                same = "is" if isinstance(value, bool | None) else "=="
                self.check(f"{self._attribute(path, name)} {same} {self.name(value)}")
        for (path, name), form in recorder.forms.items():
            if not _within(path, gone):
                self.check(f"outline({self._attribute(path, name)}) == {form!r}")

    def _attribute(self, path: str, name: str) -> str:
        """What is read of a module; of one whose class is not checked, None if it has no such."""
        home = self._module(path)
        return (
            attribute(home, name)
            if path in self.recorder.kinds
            else f"getattr({home}, {name!r}, None)"
        )

    def _module(self, path: str) -> str:
        """A name for a submodule, read from the dicts in which modules hold each other."""
        if not path:
            return "self"
        parent, _, last = path.rpartition(".")
        home = self._module(parent)
        number = self._homes.setdefault(path, len(self._homes))
        return self.let(f"module_{_cleaned(path)}_{number}", f"{home}._modules.get({last!r})")

    def _state_checks(self) -> None:
        types = {v.type for v in self.names.values() if isinstance(v, torch.device)}
        for device in sorted(filter(torch.amp.is_autocast_available, types)):
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
                what = shown(assumption.text) or assumption.node
                text = f"{what} is {assumption.value!r}"
                graph.call_function(require, (found, text))


def _cleaned(text: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in text)


def _within(path: str, gone: frozenset[str]) -> bool:
    """Is it a module that was taken out, or inside of one?"""
    return any(path == other or path.startswith(f"{other}.") for other in gone)
