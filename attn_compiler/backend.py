"""torch.compile(model, backend="attn_compiler"): rewrite the attention of each graph, then let
Inductor compile it.

PyTorch's own switches work: `TORCH_LOGS=attn_compiler` logs each decision, `+attn_compiler` also
the graphs, and `TORCH_TRACE=folder` puts the report and the graphs into the trace that tlparse
reads.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx
from torch._logging import trace_structured  # type: ignore[attr-defined]

from attn_compiler.config import CompileConfig, make_config
from attn_compiler.pipeline import compile_graph
from attn_compiler.report import Report

log = logging.getLogger("attn_compiler")
# PyTorch's own: it has a handler while a structured trace is written
_trace = logging.getLogger("torch.__trace")


class Reports:
    """Reports of the graphs compiled since the last torch.compile call or reset."""

    def __init__(self) -> None:
        self._graphs: list[Report] = []
        self._calls: tuple[int, ...] = ()

    def clear(self) -> None:
        self._graphs.clear()
        self._calls = self._compile_calls()

    def add(self, report: Report) -> None:
        self._forget_older_calls()
        self._graphs.append(report)

    def merged(self) -> Report:
        self._forget_older_calls()
        return functools.reduce(lambda a, b: a + b, self._graphs, Report())

    def _forget_older_calls(self) -> None:
        if self._calls != self._compile_calls():
            self.clear()

    @staticmethod
    def _compile_calls() -> tuple[int, ...]:
        """The torch.compile calls with this backend: Dynamo keeps each one's wrapper."""
        dynamo = sys.modules.get("torch._dynamo.eval_frame")
        if dynamo is None:
            return ()
        return tuple(
            key
            for key, wrapper in dynamo.cached_backends.items()
            if getattr(wrapper, "compiler_fn", None) is attn_compiler
        )


reports = Reports()


def attn_compiler(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend: called by torch.compile once per graph.

    Raises:
        BadOption: an unknown or wrong option (torch wraps it in BackendCompilerFailed).
        NoLegalVariant: with `on_reject="raise"`.
    """
    config = make_config({**(options or {}), **({"mode": mode} if mode is not None else {})})
    watched = _watched()
    report = compile_graph(gm, replace(config, keep_graphs=watched))
    if watched:
        _tell(report)
    run = gm.forward if config.then == "eager" else _inductor(gm, example_inputs, config)
    # Dynamo may stop Inductor and start again: only what came to its end counts
    reports.add(report)
    return run


def _watched() -> bool:
    """Does somebody want to see the graphs?"""
    return log.isEnabledFor(logging.DEBUG) or bool(_trace.handlers)


def _tell(report: Report) -> None:
    """The report and the graphs for the log, and for a structured trace if one is written."""
    log.debug("before:\n%s", report.graph_before)
    log.debug("after:\n%s", report.graph_after)
    log.debug("%s", report)
    _artifact("attn_compiler_report", "json", report.to_json())
    _artifact("attn_compiler_before", "string", report.graph_before)
    _artifact("attn_compiler_after", "string", report.graph_after)


def _artifact(name: str, encoding: str, text: str) -> None:
    about = {"name": name, "encoding": encoding}
    trace_structured("artifact", metadata_fn=lambda: about, payload_fn=lambda: text)


def _inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: CompileConfig
) -> Callable[..., Any]:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(config.mode) if config.mode else {}), **dict(config.inductor)}
    # AOTAutograd's cache does not see the autograd formula of an operator: a tag makes it see our
    # sources
    with torch.compiler.config.patch(  # type: ignore[attr-defined]
        cache_key_tag=f"{torch.compiler.config.cache_key_tag}{source_hash()}"
    ):
        return cast(
            Callable[..., Any], compile_fx(gm, list(example_inputs), config_patches=patches or None)
        )


@functools.cache
def source_hash() -> str:
    """Hash of every source file of the package."""
    digest = hashlib.sha256()
    home = Path(__file__).parent
    for file in sorted(home.rglob("*.py*")):
        if file.suffix in (".py", ".jinja"):
            digest.update(str(file.relative_to(home)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def last_report() -> Report:
    """Everything compiled since the last torch.compile call or torch._dynamo.reset(), merged."""
    return reports.merged()


def register() -> None:
    """Make the backend's name known where the package is not installed."""
    from torch._dynamo.backends.registry import _BACKENDS, register_backend

    if "attn_compiler" not in _BACKENDS:
        register_backend(compiler_fn=attn_compiler, name="attn_compiler")


attn_compiler.reset = reports.clear  # type: ignore[attr-defined]
