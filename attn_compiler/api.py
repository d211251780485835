"""The doors beside the backend: `rewrite`, `explain` and `fx_pass`.

new = rewrite(model, args)            the same kind of thing, with its attention replaced
report = explain(model, args)         what would be done; nothing is changed
result = fx_pass()(graph_module, x)   for a pipeline of passes
"""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_base import PassResult

from attn_compiler.backend import reports, source_hash
from attn_compiler.cache.expansion import keep_unexpanded
from attn_compiler.cache.memories import MEMORY
from attn_compiler.capture import copy_of, each_graph, has_values, with_values
from attn_compiler.config import CompileConfig, make_config
from attn_compiler.errors import BadOption, NoLegalVariant
from attn_compiler.exported import rewrite_program
from attn_compiler.install import explain_module, rewrite_module
from attn_compiler.pipeline import compile_graph
from attn_compiler.report import Report
from attn_compiler.snapshot import twin
from attn_compiler.train import fitting
from attn_compiler.verify import refused, verify_graph
from attn_compiler.watch import copied, untouched


def rewrite(  # noqa: PLR0913  (the public signature)
    model: Any,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    to: Any = "fastest",
    hardware: Any = None,
    on_reject: Literal["keep", "raise"] = "keep",
    verify: bool = True,
    calibration: Iterable[Any] | Literal["later"] | None = None,
    inplace: bool = False,
) -> Any:
    """Replace the attention of a model, a traced graph or an exported program.

    Args:
        model: an nn.Module, a callable, an fx.GraphModule or an ExportedProgram.
        args, kwargs: an example call.
        to: a spec, "fastest", or a dict from globs over module paths to them.
        hardware: what it is to run on, None for the device of the model.
        on_reject: "raise" to get an error where an attention cannot be replaced.
        verify: compare with the original on the example; what fails is restored and reported.
        calibration: examples for variants that are fitted to data, pairs (args, kwargs); "later"
            leaves them as they start, which is the original function, for a schedule. For
            Selective, LinearAttention and GAU(init="convert") the report then says the loss before
            and after.
        inplace: change the model itself instead of a copy.

    Returns:
        The same kind of thing. The report of the run is `last_report()`.

    Raises:
        BadOption: an option or the example is wrong; the model is as before.
        NoLegalVariant: with `on_reject="raise"`; the model is as before.
    """
    config = _config(to, hardware, on_reject)
    if isinstance(model, nn.Module) and not isinstance(model, fx.GraphModule):
        config = replace(config, installs=True)
    args, kwargs = _example(args, kwargs)
    if isinstance(model, nn.Module) and not isinstance(model, fx.GraphModule):
        return _rewrite_module(model, args, kwargs, config, verify, inplace, calibration)
    if calibration is not None:
        raise BadOption("calibration is given", do="leave it out, or give an nn.Module")
    if isinstance(model, ExportedProgram):
        return _rewrite_program(model, args, kwargs, config, verify)
    if isinstance(model, fx.GraphModule):
        return _rewrite_graph(model, args, config, verify, inplace)
    if callable(model):
        return _rewrite_callable(model, args, kwargs, config, verify)
    raise _no_model(model)


def explain(
    model: Any,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    to: Any = "fastest",
    hardware: Any = None,
) -> Report:
    """What would be found and done, with the graphs before and after; nothing is changed.

    Raises:
        BadOption: an option or the example is wrong.
    """
    installs = isinstance(model, nn.Module) and not isinstance(model, fx.GraphModule)
    config = replace(_config(to, hardware, "keep"), keep_graphs=True, installs=installs)
    args, kwargs = _example(args, kwargs)
    if isinstance(model, ExportedProgram):
        report = compile_graph(copy.deepcopy(model.graph_module), config)
    elif isinstance(model, fx.GraphModule):
        report = _rewritten_copy(model, args, config)[1]
    elif callable(model):
        report = _explain_calls(model, args, kwargs, config)
    else:
        raise _no_model(model)
    _check_globs(config, report)
    return report


def _explain_calls(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], config: CompileConfig
) -> Report:
    _check_call(model, args, kwargs)
    if config.installs and isinstance(model, nn.Module) and config.beyond_cores:
        return explain_module(model, args, kwargs, config)
    reports: list[Report] = []
    memory = MEMORY if config.installs else None
    with untouched(model, grad=True):
        breaks = each_graph(
            model,
            copied(args),
            copied(kwargs),
            lambda gm: reports.append(compile_graph(gm, config, memory=memory)),
        )
    return sum(reports, Report(breaks=breaks))


# ---------------------------------------------------------------- the pass


def fx_pass(
    to: Any = "fastest", hardware: Any = None, on_reject: Literal["keep", "raise"] = "keep"
) -> FxPass:
    """The bare pass: GraphModule -> PassResult.

    Raises:
        BadOption: an option is wrong.
    """
    return FxPass(_config(to, hardware, on_reject))


@dataclass(frozen=True)
class FxPass:
    """Replaces the attention of a graph in place.

    A graph without fake values (symbolic_trace) is called with example inputs:
    `fx_pass()(graph_module, x)`. Given a bare `fx.Graph`, as Inductor's
    `pre_grad_custom_pass` does, it returns None.
    """

    config: CompileConfig

    def __call__(self, target: Any, *inputs: Any) -> PassResult | None:
        """Rewrite.

        Raises:
            BadOption: example inputs are missing.
            NoLegalVariant: with `on_reject="raise"`; the graph is as before.
        """
        if isinstance(target, fx.Graph):
            assert target.owning_module is not None
            reports.add(compile_graph(target.owning_module, self.config))
            return None
        if not isinstance(target, fx.GraphModule):
            raise BadOption(
                f"the pass was given a {type(target).__name__}",
                do="give an fx.GraphModule, as torch.fx.symbolic_trace makes it",
            )
        new, report = _rewritten_copy(target, inputs, self.config)
        publish(report)
        if report.rewritten:
            _take_over(target, new)
        return PassResult(target, bool(report.rewritten))

    def uuid(self) -> str:
        """Changes with the options and with the sources of the package: for compile caches."""
        return hashlib.sha256(f"{source_hash()}{self.config}".encode()).hexdigest()


def _rewritten_copy(
    gm: fx.GraphModule, inputs: tuple[Any, ...], config: CompileConfig
) -> tuple[fx.GraphModule, Report]:
    if has_values(gm) and not inputs:
        new = copy_of(gm)
        return new, compile_graph(new, config)
    prepared = with_values(gm, inputs)
    report = prepared.compile(config)
    return prepared.module, report


def _take_over(target: fx.GraphModule, new: fx.GraphModule) -> None:
    """Put the graph of a copy, and the constants that the rewriting made, into the original."""
    for name, value in new.named_buffers(recurse=False):
        if not hasattr(target, name):
            target.register_buffer(name, value, persistent=False)
    target.graph = new.graph
    target.recompile()


# ---------------------------------------------------------------- rewrite, by kind


def _rewrite_module(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: CompileConfig,
    verify: bool,
    inplace: bool,
    calibration: Iterable[Any] | Literal["later"] | None = None,
) -> nn.Module:
    _check_call(model, args, kwargs)
    data = fitting.checked(config, calibration)
    new = model if inplace else twin(model)

    def finish(report: Report) -> Report:
        _check_globs(config, report)
        _check_rejected(config, report)
        done = learnt.put(new, fitting.fitted(new, report, config, data, before))
        keep_unexpanded(new)
        return done

    before = fitting.loss_before(new, config, data)
    learnt = fitting.learnt(new, (args, kwargs), config, data)
    publish(rewrite_module(new, args, kwargs, learnt.config, verify, finish))
    return new


def _rewrite_graph(
    gm: fx.GraphModule, args: tuple[Any, ...], config: CompileConfig, verify: bool, inplace: bool
) -> fx.GraphModule:
    original = gm if inplace else copy.deepcopy(gm)
    new, report = _rewritten_copy(original, args, config)
    _check_globs(config, report)
    problem = verify_graph(original, new, args) if verify and args and report.rewritten else None
    if problem is not None:
        publish(refused(report, problem))
        return original
    publish(report)
    if report.rewritten:
        _take_over(original, new)
    return original


def _rewrite_program(
    program: ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: CompileConfig,
    verify: bool,
) -> ExportedProgram:
    new, report = rewrite_program(program, config)
    _check_globs(config, report)
    publish(report)
    return new


class _Function(nn.Module):
    """A function as a module, so that it can be rewritten like one."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _rewrite_callable(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: CompileConfig,
    verify: bool,
) -> Callable[..., Any]:
    new = _rewrite_module(_Function(function), args, kwargs, config, verify, inplace=True)
    return new if type(new) is not _Function else function


# ---------------------------------------------------------------- checks at the door


def publish(report: Report) -> None:
    """Make this the report that `last_report()` gives."""
    reports.clear()
    reports.add(report)


def _config(to: Any, hardware: Any, on_reject: Any) -> CompileConfig:
    return make_config({"to": to, "hardware": hardware, "on_reject": on_reject})


def _example(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(args, torch.Tensor) or not isinstance(args, tuple | list):
        raise BadOption(f"args is a {type(args).__name__}", do="give a tuple: rewrite(model, (x,))")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise BadOption(f"kwargs is a {type(kwargs).__name__}", do="give a dict")
    return tuple(args), dict(kwargs or {})


def _check_call(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Can the model be called like this at all?"""
    forward = model.forward if isinstance(model, nn.Module) else model
    try:
        signature = inspect.signature(forward)
    except ValueError:
        return  # a builtin without a signature: the call itself will tell
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        missing = "missing" in str(error)
        raise BadOption(
            "example inputs are missing" if missing else "the example does not fit the model",
            why=[str(error)],
            do=f"give args and kwargs of one call: ({', '.join(signature.parameters)})",
        ) from error


def _check_globs(config: CompileConfig, report: Report) -> None:
    """A glob that names no attention is a mistake."""
    paths = [s.path for s in report.sites] + [m.path for m in report.missed]
    for glob, _ in config.to:
        if glob != "*" and not any(fnmatch.fnmatchcase(path, glob) for path in paths):
            raise BadOption(
                f'no attention is at "{glob}"',
                where="option to",
                why=[f"attention was found at {', '.join(map(repr, paths)) or 'no place'}"],
                do="give a glob over these paths",
            )


def _check_rejected(config: CompileConfig, report: Report) -> None:
    if config.on_reject != "raise":
        return
    for site in report.sites:
        if not site.decision.accepted and config.wanted(site.path) is not None:
            raise NoLegalVariant(
                "nothing may replace attention",
                where=f"{site.path or 'the root'} ({site.location or 'no source line'})",
                why=[str(reason) for reason in site.decision.reasons],
                do='on_reject="keep" leaves the site as it is',
            )
    unread = [m for m in report.missed if m.code.startswith("owner.")]
    if unread and not report.sites:
        raise NoLegalVariant(
            "no attention could be read",
            where=unread[0].path or "the root",
            why=[f"{m.code}: {m.text}" for m in unread],
            do='on_reject="keep" leaves the model as it is',
        )


def _no_model(model: Any) -> BadOption:
    return BadOption(
        f"the model is a {type(model).__name__}",
        do="give an nn.Module, a callable, an fx.GraphModule or an ExportedProgram",
    )
