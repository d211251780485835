"""Pairs of gated units that are started from the blocks which they replace.

    teacher's block on calibration  ->  inputs and outputs of its branches, maps of its heads
                                    ->  weights of the pair (`variants.conversion.gau`)

A block is read through two forwards of its module: the exact rewriting says q, k, v and what comes
out of the heads, and the rewritten one, with the teacher's answers in place of its units, what the
branches were given. That both together are the trained block is checked by its output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attn_compiler.call import as_call
from attn_compiler.config import CompileConfig
from attn_compiler.errors import BadOption
from attn_compiler.installed import Variant, base_of, names_of, original, rewritten
from attn_compiler.ir.site import AttentionSite
from attn_compiler.kernels.devices import observed
from attn_compiler.kernels.frame import Inputs
from attn_compiler.kernels.gau_unit import Call, answered
from attn_compiler.listen import calls_through
from attn_compiler.report import Report
from attn_compiler.specialise import Plan, specialise
from attn_compiler.train.distill import first_tensor, relative
from attn_compiler.train.gau_block import TrainedBlock, unreadable
from attn_compiler.variants import Flash
from attn_compiler.variants.conversion.gau import judged
from attn_compiler.variants.gau import GAU
from attn_compiler.watch import Recorded, autocast, bound, copied

_EXACT = CompileConfig(to=(("*", Flash()),))
# relative square of the output of a block that is read rightly
_SAME = 1e-3


def converts(spec: Any) -> bool:
    """Does a spec ask for units that start from a block?"""
    return isinstance(spec, GAU) and spec.init == "convert"


def convert(model: nn.Module, report: Report, data: Iterable[Any]) -> Report:
    """Start the pairs of a rewritten model from the blocks that they replaced.

    Args:
        model: rewritten, and not settled: its modules still hold what was taken out.
        report: of that.
        data: pairs (args, kwargs).

    Returns:
        The report, which says what each branch misses of the block's before and after.

    Raises:
        BadOption: there is no data, none of it reaches a block, or a block cannot be read.
    """
    batches = list(data)
    found = [item for item in rewritten(model) if converts(item[2].decision.spec)]
    owners = {path: owner for path, owner, _ in found}
    words: dict[str, str] = {}
    with torch.inference_mode(False), torch.no_grad(), _evaluating(model):
        for path, owner in owners.items():
            with ExitStack() as stack:
                for other in owners.values():
                    stack.enter_context(original(other))
                calls = _calls(model, path, owner, batches)
            reader = _Reader(path, owner, [site for at, _, site in found if at == path])
            for given, output in calls:
                reader.read(given, output)
            words |= reader.start(calls)
    sites = (
        replace(s, facts={**s.facts, "calibration": words[s.path]}) if s.path in words else s
        for s in report.sites
    )
    return replace(report, sites=tuple(sites))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# ---------------------------------------------------------------- what a block was given


def _calls(
    model: nn.Module, path: str, owner: nn.Module, batches: Sequence[Any]
) -> list[tuple[Recorded, Tensor]]:
    """Calls of an owner in the trained model, and what it put out first."""
    found: list[tuple[Recorded, Tensor]] = []

    def hear(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if module is not owner:
            return module._call_impl(*args, **kwargs)
        given = Recorded(copied(bound(base_of(owner), args, kwargs)), tuple(autocast()))
        output = module._call_impl(*args, **kwargs)
        found.append((given, first_tensor(output).clone()))
        return output

    with calls_through(hear):
        for args, kwargs in batches:
            model(*copied(args), **copied(dict(kwargs or {})))
    if not found:
        raise BadOption(
            "calibration shows nothing of a block",
            where=path or "the root",
            why=["there are no batches, or the model does not run it on them"],
            do="give batches, pairs (args, kwargs), that run through all that is rewritten",
        )
    return found


# ---------------------------------------------------------------- a module


class _Reader:
    """Reads the blocks of one module."""

    def __init__(self, path: str, owner: nn.Module, sites: Sequence[AttentionSite]) -> None:
        self.path, self.owner, self.base = path, owner, base_of(owner)
        self.blocks = [TrainedBlock(owner, site) for site in sites]
        plan: Plan = owner.__dict__["_attn_plan"]
        self.plan = replace(plan, config=_EXACT)
        self.variants: list[tuple[Variant, Report]] = []

    def read(self, given: Recorded, output: Tensor) -> None:
        """What one call of the module shows, and what it put out."""
        with given.state():
            with original(self.owner):
                variant, report = self._exact(given.values)
                heard: list[Inputs] = []
                with observed(heard.append):
                    variant.run(self.owner, *copied(given.values))
            paths = [s.path for s in report.sites if s.decision.accepted]
            cores = list(zip(paths, heard, strict=False))
            for block in self.blocks:
                found = next((c for c in cores if c[0] == block.site.path), None)
                if found is None:
                    raise unreadable(block.site.path, "its attention is not one of its own")
                cores.remove(found)
                block.core = found[1]
            with answered(self._answer):
                ours = self._run(given)
        if float(relative(ours, output)) > _SAME:
            raise unreadable(self.path, "its maps and its net do not add up to what it computes")

    def _exact(self, values: tuple[Any, ...]) -> tuple[Variant, Report]:
        for variant, report in self.variants:
            if variant.covers(self.owner, *values):
                return variant, report
        self.variants.append(specialise(self.owner, self.base, copied(values), self.plan))
        return self.variants[-1]

    def _answer(self, call: Call) -> Tensor:
        block = next(b for b in self.blocks if b.units[call.number].w_o is call.weights.w_o)
        return block.answer(call)

    def _run(self, given: Recorded) -> Tensor:
        values = dict(zip(names_of(self.base.forward), copied(given.values), strict=True))
        args, kwargs = as_call(self.base, values)
        return first_tensor(self.owner(*args, **kwargs))

    def start(self, calls: Sequence[tuple[Recorded, Tensor]]) -> dict[str, str]:
        """Write the weights of all pairs; words for the report, by the path of the attention."""
        before = self._missed(calls)
        words = {block.site.path: block.start() for block in self.blocks}
        whole = f"of what the block puts out: {before:.1%} before, {self._missed(calls):.1%} after"
        number = len(judged(calls))
        how = "kept back" if number < len(calls) else "those that it was fitted to"
        where = f"on {number} of {len(calls)} batches, {how}"
        return {path: f"{text}, {whole}; {where}" for path, text in words.items()}

    def _missed(self, calls: Sequence[tuple[Recorded, Tensor]]) -> float:
        found = []
        for given, output in judged(calls):
            with given.state():
                found.append(float(relative(self._run(given), output)))
        return sum(found) / len(found)
