"""Where a node of the host graph comes from: the user's line, the module, what made an operand."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import torch
from torch import fx

from attn_compiler.ir import ops
from attn_compiler.ir.axes import hint
from attn_compiler.ir.site import Projection

_FRAME = re.compile(r'File "([^"]+)", line (\d+)[^\n]*(?:\n {4}([^\n]+))?')
_SIZES = (int, torch.SymInt)
_FARTHEST = 64
_LINEAR = ("input", "weight", "bias")
_ADDMM = ("input", "mat1", "mat2")


def location(node: fx.Node | None) -> str:
    """The innermost line of the user's code that ran this operation, "file.py:88"."""
    file, number, _ = _frame(node)
    return f"{Path(file).name}:{number}" if file else ""


def source_line(node: fx.Node | None) -> str:
    """The text of that line, as far as the tracer kept it."""
    return _frame(node)[2].strip()


def _frame(node: fx.Node | None) -> tuple[str, str, str]:
    trace = node.meta.get("stack_trace") if node is not None else None
    frames = _FRAME.findall(trace) if trace else []
    torch_home = str(Path(torch.__file__).parent)
    users = [frame for frame in frames if not frame[0].startswith(torch_home)]
    file, number, line = (users or frames or [("", "", "")])[-1]
    return file, number, line


def module(node: fx.Node) -> tuple[str, str]:
    """Qualified name and class name of the innermost module."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "", ""
    path, kind = list(stack.values())[-1]
    return clean(path), kind if isinstance(kind, str) else kind.__name__


def clean(path: str) -> str:
    """Dynamo's spelling of a module path, L['self'].layers[0].attn, as layers.0.attn. The local is
    `fn` where the forward of the root is torch's own, as that of nn.Sequential is. Where a class
    has its own `__getattr__`, Dynamo goes by L['self'].__dict__['_modules']['layers'].
    """
    table = r"(?:_modules|__dict__\[['\"]_modules['\"]\])"
    path = re.sub(rf"\.{table}\[['\"]([^'\"]+)['\"]\]", r".\1", path)
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path)
    path = re.sub(r"^L\.self\.?|^L\.[a-z_]+\.self\.?|^self\.", "", path)
    return re.sub(r"^L\.(fn(\.|$))?", "", path).strip(".")


def display_name(node: fx.Node) -> str:
    """A short name for a tensor: the last name of an input's source, else the node's own."""
    source = node.meta.get("grapharg")
    name = (
        source.source.name
        if source is not None and getattr(source, "source", None) is not None
        else ""
    )
    name = name() if callable(name) else name
    words = re.findall(r"[A-Za-z_][A-Za-z0-9_]*", name)
    if words:
        return str(words[-1])
    found = re.sub(r"_+$", "", node.name)
    return re.sub(r"^l_(kwargs_|args_|self_)?", "", found) or node.name


def sources(node: fx.Node) -> tuple[fx.Node, Projection | None]:
    """The tensor behind an operand's projection, and that projection."""
    seen: set[fx.Node] = set()
    for _ in range(_FARTHEST):
        called = ops.name(node)
        if called == "linear" and node.op == "call_function":
            return _linear(node)
        if called == "linear":
            (given,) = node.all_input_nodes
            return given, Projection(f"{node.target}.weight", f"{node.target}.bias", given.name)
        if called == "addmm":
            return _addmm(node)
        if node.op in ("placeholder", "get_attr") or node in seen or called in ops.BOUNDARY:
            break
        seen.add(node)
        inputs = [n for n in node.all_input_nodes if _elements(n)]
        if not inputs:
            break
        node = max(inputs, key=_elements)
    return _unviewed(node), None


def reaches(source: fx.Node, node: fx.Node) -> bool:
    """Is a tensor a part of what another one is made of, here or through a cache?"""
    return source in _behind(node, source)


def read_by(node: fx.Node) -> set[fx.Node]:
    """The inputs [B, T, D] of a graph, or larger ones, that a tensor is made of, here or through a
    cache.
    """
    return {n for n in _behind(node) if n.op == "placeholder" and _is_activation(n)}


def _behind(node: fx.Node, first: fx.Node | None = None) -> set[fx.Node]:
    """What a node is made of, as far as it stands not before `first`; also what was written into it
    in place. A size is no part of it.
    """
    position = {n: i for i, n in enumerate(node.graph.nodes)}
    writers: dict[int, list[fx.Node]] = {}
    for writer in itertools.takewhile(lambda n: n is not node, position):
        for storage in itertools.chain(*map(ops.storages, ops.written(writer))):
            writers.setdefault(storage, []).append(writer)
    least = 0 if first is None else position[first]
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        # an input may stand for what a cache returned
        here = waiting.pop()
        here = here.meta.get("opaque", here)
        if here not in found and position[here] >= least:
            found.add(here)
            parts = (n for n in here.all_input_nodes if not isinstance(ops.value(n), _SIZES))
            waiting += parts
            for storage in ops.storages(here) if writers else ():
                waiting += writers.get(storage, ())
    return found


def _is_activation(node: fx.Node) -> bool:
    found = ops.value(node)
    floating = isinstance(found, torch.Tensor) and found.is_floating_point()
    floating = floating and not isinstance(found, torch.nn.Parameter)
    return floating and found.dim() > 2 and "opaque" not in node.meta


def _elements(node: fx.Node) -> int:
    found = ops.value(node)
    tensors = found if isinstance(found, tuple | list) else (found,)
    return sum(math.prod(map(hint, t.shape)) for t in tensors if isinstance(t, torch.Tensor))


def _addmm(node: fx.Node) -> tuple[fx.Node, Projection | None]:
    bias, given, weight = (ops.argument(node, i, n) for i, n in enumerate(_ADDMM))
    if not all(isinstance(operand, fx.Node) for operand in (bias, given, weight)):
        return node, None
    return _unviewed(given), Projection(display_path(weight), display_path(bias), given.name)


def _linear(node: fx.Node) -> tuple[fx.Node, Projection | None]:
    given, weight, bias = (ops.argument(node, i, n) for i, n in enumerate(_LINEAR))
    assert isinstance(given, fx.Node)
    if not isinstance(weight, fx.Node):
        return _unviewed(given), None
    name = display_path(bias) if isinstance(bias, fx.Node) else None
    return _unviewed(given), Projection(display_path(weight), name, given.name)


def display_path(node: fx.Node) -> str:
    """Qualified parameter name of a graph input."""
    source = node.meta.get("grapharg")
    name = (
        source.source.name
        if source is not None and getattr(source, "source", None) is not None
        else ""
    )
    name = name() if callable(name) else name
    if name:
        return re.sub(
            r"\._(parameters|buffers)\.",
            ".",
            clean(re.sub(r"_(parameters|buffers)\['([^']+)'\]", r"\2", name)),
        )
    return str(node.target)


def _unviewed(node: fx.Node) -> fx.Node:
    while (
        ops.name(node) in ("view", "reshape", "transpose", "contiguous", "to", "flatten")
        and node.all_input_nodes
    ):
        node = node.all_input_nodes[0]
    return node
