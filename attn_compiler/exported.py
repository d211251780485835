"""rewrite(ExportedProgram): a new program of the same signature; the old one stays as it is."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, OutputSpec

from attn_compiler.config import CompileConfig
from attn_compiler.ir.site import Decision, Reason
from attn_compiler.passes.emit import CONSTANT
from attn_compiler.pipeline import compile_graph
from attn_compiler.report import Report


def rewrite_program(
    program: ExportedProgram, config: CompileConfig
) -> tuple[ExportedProgram, Report]:
    """The rewritten program and what was done."""
    module = copy.deepcopy(program.graph_module)
    before = _output_names(module)
    report = compile_graph(module, config)
    if not report.rewritten:
        return program, report
    if any(str(n.target).startswith(CONSTANT) for n in module.graph.nodes):
        reason = Reason(
            "export.constant", "a constant tensor would have to be added to the program"
        )
        kept = (
            replace(s, decision=Decision(False, reasons=(reason,))) if s.decision.accepted else s
            for s in report.sites
        )
        return program, replace(report, sites=tuple(kept))
    renamed = dict(zip(before, _output_names(module), strict=True))
    return _rebuilt(program, module, renamed), report


def _output_names(module: fx.GraphModule) -> list[str]:
    results: Any = module.graph.output_node().args[0]
    return [node.name for node in results if isinstance(node, fx.Node)]


def _rebuilt(
    program: ExportedProgram, module: fx.GraphModule, renamed: dict[str, str]
) -> ExportedProgram:
    old = program.graph_signature
    signature = ExportGraphSignature(
        input_specs=list(old.input_specs),
        output_specs=[_renamed(spec, renamed) for spec in old.output_specs],
    )
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=dict(program.range_constraints),
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _renamed(spec: OutputSpec, renamed: dict[str, str]) -> OutputSpec:
    name = getattr(spec.arg, "name", None)
    if name is None or renamed.get(name, name) == name:
        return spec
    return replace(spec, arg=replace(spec.arg, name=renamed[name]))
