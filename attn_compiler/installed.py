"""What stands in a model after `rewrite`: a subclass of the owner's class, and the variants of its
forward.

    for variant in self._attn_variants:
        if variant.covers(self, x, mask, kwargs):        # everything the analysis assumed
            return variant.run(self, x, mask, kwargs)    # ordinary Python on self, with the
            operator in it
    return Base.forward(self, x, mask, **kwargs)

Nothing here compiles or patches anything: deepcopy, pickle, hooks, state_dict, an outer
    torch.compile and torch.export
see an ordinary module. A variant is a text of Python; pickling stores the text.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

import attn_compiler.kernels.operators  # noqa: F401  (registers them)
from attn_compiler import swap
from attn_compiler.errors import UnsupportedCall
from attn_compiler.ir.site import AttentionSite
from attn_compiler.variants.base import NewModule, NewTensor

log = logging.getLogger("attn_compiler")
# what a trace can write down of a module's attributes and check later
SIMPLE = (bool, int, float, str, type(None), torch.dtype)
_numbers = itertools.count()
_classes: dict[type[nn.Module], type[nn.Module]] = {}


# ---------------------------------------------------------------- variants


class Variant:
    """One specialised forward.

    Attributes:
        source: text of the functions `covers`, `body` and `run`.
        names: classes and constants that the text refers to.
    """

    def __init__(self, source: str, names: dict[str, Any]) -> None:
        self.source = source
        self.names = names
        space = _execute(source, {**names, **CHECKS})
        self.covers: Callable[..., bool] = space["covers"]
        self.run: Callable[..., Any] = space["run"]

    @property
    def asks_training(self) -> bool:
        """Does it hold for training or for evaluation only?"""
        return ".training is " in self.source

    def __reduce__(self) -> tuple[Any, ...]:
        return Variant, (self.source, self.names)

    def __deepcopy__(self, memo: dict[int, Any]) -> Variant:
        return self  # nothing in it ever changes


def _execute(source: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run generated source as a module of its own: tracebacks, `inspect` and Dynamo find it."""
    name = f"attn_compiler.generated_{next(_numbers)}"
    file = f"<{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = ModuleType(name)
    module.__dict__.update(names)
    sys.modules[name] = module
    exec(compile(source, file, "exec"), module.__dict__)
    return module.__dict__


def intact(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Is this still the module that was traced through, without anything attached to it?"""
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
    )


def keeps(module: nn.Module | None, name: str, dtype: torch.dtype) -> bool:
    """Does the module still hold a parameter of this name and dtype?"""
    weight = module._parameters.get(name) if module is not None else None
    return weight is not None and weight.dtype is dtype


def plain(value: Any, dtype: torch.dtype, device: torch.device, dim: int) -> bool:
    """Is this an ordinary strided tensor of this dtype, device and rank?"""
    return (
        isinstance(value, torch.Tensor)
        and not value.is_nested
        and value.layout is torch.strided
        and value.dtype is dtype
        and value.device == device
        and value.dim() == dim
    )


def outline(value: Any) -> str:
    """What a trace may have branched on: the form of a container, and the numbers in it."""
    if isinstance(value, torch.Tensor):
        return "tensor"
    if type(value) is dict:
        return f"dict({', '.join(f'{key!r}: {outline(item)}' for key, item in value.items())})"
    if type(value) in (list, tuple):
        return f"{type(value).__name__}({', '.join(map(outline, value))})"
    return repr(value) if isinstance(value, SIMPLE) else type(value).__name__


# what the text of a variant may call; sizes may be rounded: math.floor(shape_0[1] / 16)
CHECKS = {"intact": intact, "keeps": keeps, "plain": plain, "outline": outline, "math": math}


def require_mode(module: nn.Module, training: bool) -> None:
    """Check that a module of a rewritten graph is in the mode in which the graph was rewritten.

    Raises:
        UnsupportedCall: it is in the other mode, and its dropout would be wrong.
    """
    if module.training is not training:
        raise UnsupportedCall(
            f"a graph for {'training' if training else 'evaluation'} mode runs in the other mode",
            do="rewrite the original graph again after train() or eval()",
        )


# ---------------------------------------------------------------- the class


def parameters_of(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    """Parameters of a forward without `self`, or of a wrapper that sees what is given, and how."""
    first, *others = inspect.signature(forward, follow_wrapped=False).parameters.values()
    return [first, *others] if first.kind is first.VAR_POSITIONAL else others


def names_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Their names, in the order in which `covers` and `run` take them."""
    return tuple(p.name for p in parameters_of(forward))


def rewritten_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of an owner's class whose forward tries the variants first; one per class."""
    if base not in _classes:
        space = _execute(*_forward_source(base))
        forward = space["forward"]
        forward.__wrapped__ = inspect.unwrap(base.forward)
        body = {
            "forward": forward,
            "__reduce_ex__": _reduce,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "_attn_base": base,
        }
        _classes[base] = type(base)(base.__name__, (base,), body)  # type: ignore[misc]
    return _classes[base]


def _defaults(base: type[nn.Module]) -> dict[str, Any]:
    found = parameters_of(base.forward)
    return {p.name: p.default for p in found if p.default is not inspect.Parameter.empty}


def _forward_source(base: type[nn.Module]) -> tuple[str, dict[str, Any]]:
    """Text of the subclass's forward, and what it refers to. Parameters keep their names, by which
    they are given, so that all other names are chosen beside them.
    """
    parameters = parameters_of(base.forward)
    names = ", ".join(p.name for p in parameters)
    self, variant, found, unlike_, base_, defaults = _beside(
        {p.name for p in parameters}, "self", "variant", "found", "unlike", "base", "defaults"
    )
    passed = f"{self}{', ' * bool(names)}{names}"
    text = (
        f"def forward({self}{''.join(_declared(parameters, defaults))}):\n"
        f"    for {variant} in {self}._attn_variants:\n"
        f"        if {variant}.covers({passed}):\n"
        f"            return {variant}.run({passed})\n"
        f"    {found} = {unlike_}({self}, ({names}{',' * bool(names)}))\n"
        f"    if {found} is not None:\n"
        f"        return {found}.run({passed})\n"
        f"    return {base_}.forward({self}{''.join(_passed(parameters))})\n"
    )
    return text, {base_: base, unlike_: unlike, defaults: _defaults(base)}


def _beside(taken: set[str], *wanted: str) -> list[str]:
    """These names, each with underscores until it is none of those that are taken."""
    found = []
    for name in wanted:
        while name in taken:
            name += "_"
        taken = taken | {name}
        found.append(name)
    return found


def _declared(parameters: list[inspect.Parameter], defaults: str) -> Iterator[str]:
    stars: dict[Any, str] = {
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    starred = False
    previous: Any = None
    for p in parameters:
        if previous is inspect.Parameter.POSITIONAL_ONLY is not p.kind:
            yield ", /"
        if p.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            yield ", *"
        starred |= p.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.KEYWORD_ONLY)
        default = "" if p.default is inspect.Parameter.empty else f"={defaults}[{p.name!r}]"
        yield f", {stars.get(p.kind, '')}{p.name}{default}"
        previous = p.kind


def _passed(parameters: list[inspect.Parameter]) -> Iterator[str]:
    for p in parameters:
        if p.kind is inspect.Parameter.VAR_POSITIONAL:
            yield f", *{p.name}"
        elif p.kind is inspect.Parameter.VAR_KEYWORD:
            yield f", **{p.name}"
        elif p.kind is inspect.Parameter.KEYWORD_ONLY:
            yield f", {p.name}={p.name}"
        else:
            yield f", {p.name}"


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    # the class is made, not imported: name the class it was made from
    function, arguments, *rest = type(self)._attn_base.__reduce_ex__(self, protocol)
    return _restore, (type(self)._attn_base, function, arguments[1:]), *rest


def _restore(
    base: type[nn.Module], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    return function(rewritten_class(base), *arguments)


_STATE = ("_attn_variants", "_attn_plan", "_attn_failures", "_attn_sites", "_attn_taken")


def install(
    owner: nn.Module, variants: list[Variant], plan: Any, sites: tuple[AttentionSite, ...] = ()
) -> None:
    """Swap the owner's class; the owner keeps its identity, hooks and name, and all parameters
    that its sites do not replace, and gets the new tensors. What is replaced is kept aside, for
    `restore`, until `settle`.
    """
    owner.__class__ = rewritten_class(base_of(owner))
    owner.__dict__.update(
        _attn_variants=variants, _attn_plan=plan, _attn_failures=(), _attn_sites=sites
    )
    values = swap.made(owner, added(owner))
    paths = [path for site in sites for path in site.decision.taken]
    owner.__dict__["_attn_taken"] = swap.take(owner, paths)
    swap.put(owner, added(owner), values)


def added(owner: nn.Module) -> tuple[NewTensor | NewModule, ...]:
    """What `install` has put into the module."""
    sites: tuple[AttentionSite, ...] = owner.__dict__.get("_attn_sites", ())
    return tuple(new for site in sites for new in site.decision.tensors)


def restore(owner: nn.Module) -> None:
    """Give the owner its class back, and what was taken out of it; not after `settle`, if there is
    anything.
    """
    swap.drop(owner, added(owner))
    swap.give_back(owner, owner.__dict__.get("_attn_taken", ()))
    owner.__class__ = base_of(owner)
    for name in _STATE:
        owner.__dict__.pop(name, None)


def settle(owner: nn.Module) -> None:
    """Let go of the parameters that were replaced; their shapes stay, to analyse other calls."""
    owner.__dict__["_attn_taken"] = tuple(map(swap.emptied, owner.__dict__["_attn_taken"]))


@contextmanager
def as_before(owner: nn.Module) -> Iterator[None]:
    """The owner with the modules that were replaced, without their numbers: for a trace."""
    tensors = (new for new in added(owner) if isinstance(new, NewTensor))
    like = next((t for t in tensors if t.trained), None)
    taken = owner.__dict__.get("_attn_taken", ())
    if like is None or not taken:
        yield
        return
    shaped = [swap.shaped(item, owner.get_parameter(like.path)) for item in taken]
    held = swap.give_back(owner, shaped)
    try:
        yield
    finally:
        swap.put_back(owner, held)


@contextmanager
def original(owner: nn.Module) -> Iterator[None]:
    """The owner as it was, with the numbers that it had; not after `settle`."""
    kind = type(owner)
    held = swap.give_back(owner, owner.__dict__.get("_attn_taken", ()))
    owner.__class__ = base_of(owner)
    try:
        yield
    finally:
        owner.__class__ = kind
        swap.put_back(owner, held)


def rewritten(model: nn.Module) -> Iterator[tuple[str, nn.Module, AttentionSite]]:
    """The sites that stand rewritten in a model: path of the owner, the owner, the site."""
    for path, module in model.named_modules():
        for site in module.__dict__.get("_attn_sites", ()):
            if site.decision.accepted:
                yield path, module, site


def is_exact(sites: Iterable[AttentionSite]) -> bool:
    """Is it the original's function, up to rounding?"""
    return all(site.decision.fidelity == "exact" for site in sites)


def base_of(module: nn.Module) -> type[nn.Module]:
    """The user's class of a module, rewritten or not."""
    return getattr(type(module), "_attn_base", type(module))


# ---------------------------------------------------------------- calls unlike the example


def unlike(owner: nn.Module, values: tuple[Any, ...]) -> Variant | None:
    """A variant for a call that none covers, analysed now; None: the original code runs."""
    exact = is_exact(owner.__dict__["_attn_sites"])
    traced, dynamo = torch.compiler.is_compiling(), torch.compiler.is_dynamo_compiling()
    # the original code computes the same, and a graph that has to be whole stays so
    found = None if traced and (exact or not dynamo) else _analysed(owner, values)
    if found is None and not exact:
        failures = owner.__dict__["_attn_failures"]
        raise UnsupportedCall(
            "a rewritten module was called in a way that its analysis does not cover",
            why=["there is no original that computes the same", *failures[-1:]],
            do="rewrite the model with arguments like these, or call the original model",
        )
    return found


@torch.compiler.disable(reason="attn_compiler analyses a call unlike the example, once")
def _analysed(owner: nn.Module, values: tuple[Any, ...]) -> Variant | None:
    """While torch.compile traces, a graph ends here: what is analysed has to be there. The next
    call is traced with the variant.
    """
    from attn_compiler.extend import extend

    return extend(owner, values)
