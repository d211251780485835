"""A graph as lines that people read, each with its type, the user's source line and its modules.

%mul_1 = call_function[operator.mul](%matmul, 0.125)
    ->   mul_1  float32[2, 4, 7, 7]  matmul * 0.125      model.py:31   layers.0 / layers.0.attn
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch.fx.graph import inplace_methods, magic_methods

from attn_compiler.ir import ops
from attn_compiler.ir.provenance import clean, display_path, location

Names = dict[fx.Node, str]
LineKind = Literal["input", "call", "output"]


@dataclass(frozen=True, slots=True)
class Line:
    """One node.

    Attributes:
        name: of the node; of a parameter its path.
        kind: "input", "call" or "output".
        type: dtype and shape of its value, "" where it is no tensor.
        op: bare name of what is called, "" if nothing is.
        text: what it computes, as a Python expression.
        place: "file.py:88" of the user's code.
        code: that line.
        modules: path and class name of each module around it, the outermost first.
    """

    name: str
    kind: LineKind
    type: str
    op: str
    text: str
    place: str
    code: str
    modules: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Listing:
    """A graph before and after; `name` is "" for the graph itself, else that of a body in it."""

    name: str
    before: tuple[Line, ...]
    after: tuple[Line, ...]


def lines(graph: fx.Graph) -> tuple[Line, ...]:
    """Every node that computes something or brings something in."""
    names = _names(graph)
    return tuple(_line(node, names) for node in graph.nodes if node.op != "get_attr")


def _line(node: fx.Node, names: Names) -> Line:
    place = location(node)
    kinds: dict[str, LineKind] = {"placeholder": "input", "output": "output"}
    return Line(
        name=names[node],
        kind=kinds.get(node.op, "call"),
        type=_type(ops.value(node)),
        op=ops.name(node),
        text=_text(node, names),
        place=place,
        code=_code(node, place),
        modules=_modules(node),
    )


def _names(graph: fx.Graph) -> Names:
    """What nodes are called: inputs as the user calls them, where no other node is called so."""
    taken = {node.name for node in graph.nodes}
    found: Names = {}
    for node in graph.nodes:
        name = str(node.target) if node.op == "get_attr" else node.name
        if node.op == "placeholder" and "grapharg" in node.meta:
            path = display_path(node)
            name = name if path in taken else path
        found[node] = name
    return found


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, tuple | list):
        return ", ".join(filter(None, map(_type, value)))
    return ""


def _code(node: fx.Node, place: str) -> str:
    """The text of the source line, which the trace quotes."""
    file, _, number = place.rpartition(":")
    trace = node.meta.get("stack_trace") or ""
    found = re.search(rf'{re.escape(file)}", line {number}, [^\n]*\n[ ]*([^\n]+)', trace)
    return found[1].strip() if place and found else ""


def _modules(node: fx.Node) -> tuple[tuple[str, str], ...]:
    found = []
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        owner = kind if isinstance(kind, str) else kind.__name__
        found.append((clean(path), owner.rpartition(".")[2]))
    return tuple((path, owner) for path, owner in found if path)


def _text(node: fx.Node, names: Names) -> str:
    if node.op == "placeholder":
        return ""
    given = [_argument(a, names) for a in node.args]
    named = [f"{name}={_argument(a, names)}" for name, a in node.kwargs.items()]
    if node.op == "output":
        return given[0]
    if node.op == "call_method":
        return f"{given[0]}.{node.target}({', '.join((*given[1:], *named))})"
    if node.op == "call_module":
        return f"self.{node.target}({', '.join((*given, *named))})"
    infix = _infix(node.target)
    if ops.name(node) == "getitem" and isinstance(node.args[1], tuple):
        given[1] = ", ".join(_argument(a, names) for a in node.args[1])
    if infix and not named and len(given) == infix.count("{}"):
        return infix.format(*given)
    return f"{_function(node.target)}({', '.join((*given, *named))})"


def _infix(target: Any) -> str:
    """`{} + {}` for operator.add and its like."""
    if getattr(target, "__module__", "") != "_operator":
        return ""
    written = magic_methods | inplace_methods
    return str(written.get(target.__name__, ""))


def _function(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.replace("::", ".")
    name = getattr(target, "__name__", str(target))
    home = (getattr(target, "__module__", "") or "").removeprefix("_")
    if home.startswith("torch"):
        return f"F.{name}" if home.startswith("torch.nn.functional") else f"torch.{name}"
    if home.endswith("C._nn"):
        return f"F.{name}"
    return name


def _argument(value: Any, names: Names) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, tuple | list):
        inside = ", ".join(_argument(a, names) for a in value)
        if isinstance(value, list):
            return f"[{inside}]"
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if value is Ellipsis:
        return "..."
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_argument(v, names)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        ends = [value.start, value.stop, *([] if value.step is None else [value.step])]
        return ":".join("" if end is None else _argument(end, names) for end in ends)
    return str(value) if isinstance(value, torch.dtype | torch.device) else repr(value)
