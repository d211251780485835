"""From one call of a module to a variant of its forward: trace, rewrite, write the checks and the
text.

    covers(self, x_, mask_, kwargs_)   is all as it was when the call was traced, up to sizes?
    body(self, x_, mask_)              the rewritten graph as Python
    run(self, x_, mask_, kwargs_)      body, with the leaves of the arguments
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import sympy
import torch
from torch import fx, nn

from attn_compiler.cache.el import CALLS
from attn_compiler.cache.memories import MEMORY
from attn_compiler.call import Call, given
from attn_compiler.config import CompileConfig
from attn_compiler.installed import CHECKS, Variant, names_of
from attn_compiler.ir.layer import BEFORE, PREFIX, VOID
from attn_compiler.opaque import NUMBER, settle
from attn_compiler.passes.emit import CONSTANT, MODAL
from attn_compiler.pipeline import compile_graph
from attn_compiler.record import Recorder, is_bare
from attn_compiler.report import Report
from attn_compiler.symbols import CaptureError, Mismatch, Symbols, exactly, oblivious
from attn_compiler.writer import Written

_SMALL = 4096
# what a variant's text defines
_FUNCTIONS = ("covers", "body", "run")
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
        closed: paths of modules beside them that can only be called.
    """

    prefix: str
    spine: frozenset[str]
    config: CompileConfig
    closed: frozenset[str] = frozenset()

    def inline(self, path: str, module: nn.Module) -> bool:
        """Modules on the way to the attention, and the dropouts and activations beside it."""
        if path in self.spine or path in self.closed:
            return path in self.spine
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
        guide, variant = _best(owner, base, values, plan)
        if not guide.plan.closed:  # another module may be traced through there
            kept = replace(guide, asked=plan.spine)
            _guides[base] = [*_guides.get(base, []), kept][-_MOST_GUIDES:]
        return variant, guide.report


def _best(
    owner: nn.Module, base: type[nn.Module], values: tuple[Any, ...], plan: Plan
) -> tuple[_Guide, Variant]:
    """Submodules that cannot be traced through, as they keep something, stay calls; those whose
    calls give what no graph holds are traced through.
    """
    try:
        return _of_any_size(owner, base, values, plan)
    except CaptureError as refusal:
        path = frozenset({refusal.inside})
        if not refusal.inside or path <= plan.spine | plan.closed:
            raise
        if refusal.code == "owner.value":
            return _best(owner, base, values, replace(plan, spine=plan.spine | path))
        found = _best(owner, base, values, replace(plan, closed=plan.closed | path))
        if not found[0].report.rewritten:
            raise  # the attention lies in it
        return found


def _of_any_size(
    owner: nn.Module, base: type[nn.Module], values: tuple[Any, ...], plan: Plan
) -> tuple[_Guide, Variant]:
    """With symbolic sizes or, where code or recognition does not get through them, with these."""
    found = None
    try:
        found = _trace(owner, base, values, plan)
        if not found[0].report.missed:
            return found
    except CaptureError as refusal:
        if refusal.code != "owner.untraceable":
            raise
    try:
        fixed = _trace(owner, base, values, plan, static=True)
    except CaptureError:
        if found is None:
            raise
        return found
    better = found is None or fixed[0].report.rewritten > found[0].report.rewritten
    return fixed if better else found  # type: ignore[return-value]


@dataclass(frozen=True)
class _Guide:
    """A finished specialisation that others of the same kind may follow; `training` is the mode
    that its graph is for, None for both, and `asked` the spine that its plan began with.
    """

    base: type[nn.Module]
    plan: Plan
    recorder: Recorder
    recorded: dict[str, tuple[Any, ...]]
    demands: list[sympy.Basic]
    module: fx.GraphModule
    report: Report
    bypassed: tuple[str, ...]
    training: bool | None
    asked: frozenset[str] = frozenset()


def _taken(report: Report) -> list[str]:
    """What leaves the module with this rewrite."""
    return [path for site in report.sites for path in site.decision.taken]


def _trace(
    owner: nn.Module,
    base: type[nn.Module],
    values: tuple[Any, ...],
    plan: Plan,
    static: bool = False,
) -> tuple[_Guide, Variant]:
    symbols = Symbols(Written(), static)
    recorder = Recorder(owner, plan.inline, symbols, prefix=plan.prefix)
    call = Call(recorder)
    with oblivious():
        call.record(base, values)
        _sweep(recorder.graph)
        recorded = _constants(recorder.graph)
        gm = fx.GraphModule(owner, recorder.graph)
        gm.meta[PREFIX] = plan.prefix
        gm.meta[BEFORE] = [(s.path, s.decision) for s in owner.__dict__.get("_attn_sites", ())]
        demands, traced = recorder.demands(), len(recorder.symbols.guards())
        with exactly():
            report = compile_graph(gm, plan.config, cache=CALLS, memory=MEMORY)
        demands += _late(recorder.symbols.guards()[traced:])
        void = gm.meta.get(VOID, set())
        demands = [d for d in demands if not d.free_symbols & void and not symbols.gone(d)]
    bypassed = _bypassed(gm.graph)
    recorder.inspect(bypassed)
    training = owner.training if any(n.meta.get(MODAL) for n in gm.graph.nodes) else None
    if training is not None:
        recorder.reads["", "training"] = training
    call.module_checks(gm.graph, _taken(report))
    call.guard_checks(demands)
    call.guard_nodes(demands, gm.graph)
    settle(gm.graph)
    _spell_constants(gm)
    _sweep(gm.graph)
    recorder.forget()
    guide = _Guide(base, plan, recorder, recorded, demands, gm, report, bypassed, training)
    return guide, Variant(_text(names_of(base.forward), call, gm.graph), call.names)


def _follow(
    guide: _Guide, owner: nn.Module, values: tuple[Any, ...], plan: Plan
) -> tuple[Variant, Report]:
    """The variant of a module that does what another one of its class did.

    Raises:
        Mismatch: it does something else.
    """
    if plan.spine != guide.asked or plan.config != guide.plan.config:
        raise Mismatch
    plan = replace(plan, spine=guide.plan.spine)
    if guide.training not in (None, owner.training):
        raise Mismatch
    symbols = guide.recorder.symbols.follow(Written())
    recorder = Recorder(owner, plan.inline, symbols, prefix=plan.prefix, guide=guide.recorder)
    call = Call(recorder)
    with oblivious():
        call.record(guide.base, values)
        _sweep(recorder.graph)
    if _answers(recorder) != _answers(guide.recorder):
        raise Mismatch
    recorder.inspect(guide.bypassed)
    if guide.training is not None:
        recorder.reads["", "training"] = guide.training
    graph = guide.module.graph
    call.module_checks(graph, _taken(guide.report))
    call.guard_checks(guide.demands)
    report = _moved(guide, plan)
    with _patched(graph, guide.recorded, _constants(recorder.graph)):
        return Variant(_text(names_of(guide.base.forward), call, graph), call.names), report


def _answers(recorder: Recorder) -> list[tuple[type, Any]]:
    """What opaque objects said where the code took a branch on it: the graph checks it again."""
    return [(type(a.value), a.value) for a in recorder.assumptions]


def _bypassed(graph: fx.Graph) -> tuple[str, ...]:
    """Modules whose weights the rewritten graph reads instead of calling them."""
    found = {path: None for node in graph.nodes for path in node.meta.get("bypassed", ())}
    return tuple(found)


def _constants(graph: fx.Graph) -> dict[str, Any]:
    """What the calls on opaque objects are given, by the name of the node."""
    return {
        node.name: (node.args, node.kwargs)
        for node in graph.nodes
        if node.op in ("call_method", "call_function")
        and ("example_value" not in node.meta or NUMBER in node.meta)
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

    def moved(path: str) -> str:
        inner = path[start:].lstrip(".")
        return f"{plan.prefix}.{inner}" if plan.prefix and inner else plan.prefix or inner

    for site in guide.report.sites:
        path = moved(site.path)
        if plan.config.wanted(path) != plan.config.wanted(site.path):
            raise Mismatch
        sites.append(replace(site, path=path))
    missed = [replace(m, path=moved(m.path)) for m in guide.report.missed]
    return replace(guide.report, sites=tuple(sites), missed=tuple(missed))


def _late(guards: list[sympy.Basic]) -> list[sympy.Basic]:
    """What the rewriting demands. It asks whether a size is 1, also by comparing strides, to choose
    a view or a copy: that is not demanded.
    """
    return [guard for guard in guards if not (isinstance(guard, sympy.Ne) or _about_one(guard))]


def _about_one(guard: sympy.Basic) -> bool:
    """Does it hold wherever no size is below 2, as 1 < s or t < s*t?"""
    strict = isinstance(guard, sympy.StrictLessThan | sympy.StrictGreaterThan)
    if not strict and not isinstance(guard, sympy.LessThan | sympy.GreaterThan):
        return False
    # sizes from 2 are 2 + n with n from 0, and a sum without a minus is not negative
    sizes = sorted(guard.free_symbols, key=str)
    room = (guard.gts - guard.lts).subs({s: s + 2 for s in sizes}, simultaneous=True)
    try:
        terms = dict(sympy.Poly(room, *sizes).terms())
    except sympy.PolynomialError:
        return False
    least = terms.get((0,) * len(sizes), 0)
    return all(c >= 0 for c in terms.values()) and (least > 0 or not strict)


def _spell_constants(gm: fx.GraphModule) -> None:
    """Constants that the rewriting has registered become literals: the owner does not have them."""
    for node in list(gm.graph.nodes):
        if node.op != "get_attr" or not str(node.target).startswith(CONSTANT):
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
    free = ("size", "stride", "getitem", "add", "mul", "sub", "floordiv")
    for node in reversed(list(graph.nodes)):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        # what opaque objects give has no value here and is still to be read
        idle = node.target in (CALLS.shown, MEMORY.shown) or (
            name in free and "example_value" in node.meta
        )
        if idle and not node.users:
            graph.erase_node(node)


class _Reserving(fx.graph.CodeGen):
    """Prints a graph without these names for anything of its own."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.names = tuple(names)

    def additional_globals(self) -> list[tuple[str, Any]]:
        return [(name, object()) for name in self.names]


def _text(names: tuple[str, ...], call: Call, graph: fx.Graph) -> str:
    reserved = (*_FUNCTIONS, *CHECKS, *call.names)
    graph.set_codegen(_Reserving(reserved))
    code = graph.python_code(root_module="self")
    imports = {"torch"}
    for name, value in code.globals.items():
        if name in reserved or not re.search(rf"\b{name}\b", code.src):
            continue
        if isinstance(value, ModuleType):
            imports.add(name if value.__name__ == name else f"{value.__name__} as {name}")
        else:
            call.names[name] = value
    body = code.src.strip().replace("def forward(", "def body(", 1)
    parameters = ", ".join(("self", *map(given, names)))
    checks, leaves = "".join(call.lines), ", ".join(("self", *call.leaves))
    return (
        "".join(f"import {name}\n" for name in sorted(imports)) + "\n\n"
        f"def covers({parameters}):\n{checks}    return True\n\n\n{body}\n\n\n"
        f"def run({parameters}):\n    return body({leaves})\n"
    )
