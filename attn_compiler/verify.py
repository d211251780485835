"""Does a rewritten owner compute what the original does? Both are judged by their error to float64.

    err(ours, f64)  <=  4 err(original, f64) + 8 ulps of the largest output

A fixed tolerance would be too strict for half precision and too loose for float32; the original's
own error is the scale. Nothing is wider than float64: its error there is that of float32, in
proportion.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from attn_compiler.call import as_call
from attn_compiler.installed import base_of, parameters_of, restore
from attn_compiler.ir.site import Decision, Reason
from attn_compiler.kernels.derivatives import by_reference
from attn_compiler.report import Report
from attn_compiler.snapshot import twin
from attn_compiler.watch import Recorded, copied, tensors_of, untouched

_FACTOR = 4.0
_ULPS = 8.0


def verify_owner(owner: nn.Module, call: Recorded, exact: bool = True) -> str | None:
    """Compare on the recorded arguments; None if it agrees, else what does not.

    Args:
        exact: with the original; otherwise with the plain references of its own operators.
    """
    modes = [(module, module.training) for module in owner.modules()]
    try:
        for module, _ in modes:
            module.training = False  # dropout has no value to compare
        with untouched(owner), call.state():
            return _compare(owner, call.values) if exact else _against_itself(owner, call.values)
    finally:
        for module, mode in modes:
            module.training = mode


def _compare(owner: nn.Module, values: tuple[Any, ...]) -> str | None:
    base = base_of(owner)
    ours = _outputs(type(owner).forward, owner, copied(values))
    theirs = _outputs(base.forward, owner, copied(values))
    exact = _exact(owner, values) or theirs
    if any(x.dtype is torch.float64 for x in theirs):
        narrow = _of_dtype(owner, values, torch.float32) or theirs
        theirs = [_as_rounded(*pair) for pair in zip(theirs, narrow, strict=True)]
    return _disagreements(ours, theirs, exact)


def _as_rounded(wide: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
    """A float64 result with the error of a float32 one, in proportion."""
    if wide.dtype is not torch.float64 or wide.shape != narrow.shape:
        return wide
    error = (narrow - wide) * (torch.finfo(wide.dtype).eps / torch.finfo(torch.float32).eps)
    return wide + error.nan_to_num(0.0, 0.0, 0.0)


def _against_itself(owner: nn.Module, values: tuple[Any, ...]) -> str | None:
    forward = type(owner).forward
    ours = _outputs(forward, owner, copied(values))
    with by_reference():
        theirs = _outputs(forward, owner, copied(values))
    with by_reference(torch.float64):
        exact = _outputs(forward, owner, copied(values))
    return _disagreements(ours, theirs, exact)


def _exact(owner: nn.Module, values: tuple[Any, ...]) -> list[torch.Tensor] | None:
    """The original in float64."""
    with _Wide():
        return _of_dtype(owner, values, torch.float64)


def _of_dtype(
    owner: nn.Module, values: tuple[Any, ...], dtype: torch.dtype
) -> list[torch.Tensor] | None:
    """The original in another dtype; None where its code insists on its own."""
    try:
        module = twin(owner)
        restore(module)
        module = module._apply(partial(_cast, dtype=dtype))
        given = copied(values, partial(_cast, dtype=dtype))
        return _outputs(base_of(owner).forward, module, given)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None


class _Wide(TorchDispatchMode):
    """Casts that the code spells itself (`softmax(x, dtype=torch.float32)`) go to float64 too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*pytree.tree_map(_wide, args), **pytree.tree_map(_wide, kwargs or {}))


def _wide(value: Any) -> Any:
    narrow = isinstance(value, torch.dtype) and value.is_floating_point
    return torch.float64 if narrow else value


def _cast(tensor: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor.clone()


def _outputs(
    forward: Callable[..., Any], owner: nn.Module, values: tuple[Any, ...]
) -> list[torch.Tensor]:
    """Tensors that come out, and those in the arguments afterwards: a cache is an output too."""
    base = base_of(owner)
    names = [p.name for p in parameters_of(base.forward)]
    args, kwargs = as_call(base, dict(zip(names, values, strict=True)))
    result = forward(owner, *args, **kwargs)
    return [*_tensors(result), *tensors_of(values, 0, ordinary=True)]


def verify_graph(
    original: Callable[..., Any], ours: Callable[..., Any], args: tuple[Any, ...]
) -> str | None:
    """Compare two graph modules on an example; None if they agree."""
    with torch.random.fork_rng(), torch.no_grad():
        mine = _tensors(ours(*copied(args)))
        other = _tensors(original(*copied(args)))
        try:
            with _Wide():
                exact = _tensors(copy.deepcopy(original).double()(*copied(args, _cast)))  # type: ignore[attr-defined]
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            exact = other
    return _disagreements(mine, other, exact)


def refused(report: Report, text: str, code: str = "verify.failed") -> Report:
    """The report of a rewrite that was taken back."""
    reasons = tuple(Reason(code, text, site.location) for site in report.sites)
    sites = (
        replace(site, decision=Decision(False, reasons=(reason,)))
        if site.decision.accepted
        else site
        for site, reason in zip(report.sites, reasons, strict=True)
    )
    return replace(report, sites=tuple(sites))


def kept(report: Report, text: str, code: str) -> Report:
    """The report of a rewrite that was not possible, with one more reason why."""
    more = (Reason(code, text),)
    sites = (
        replace(s, decision=replace(s.decision, reasons=(*s.decision.reasons, *more)))
        for s in report.sites
    )
    return replace(report, sites=tuple(sites))


def _tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _disagreements(
    ours: list[torch.Tensor], theirs: list[torch.Tensor], exact: list[torch.Tensor]
) -> str | None:
    if len(ours) != len(theirs):
        return f"{len(ours)} tensors come out instead of {len(theirs)}"
    for position, triple in enumerate(zip(ours, theirs, exact, strict=True)):
        problem = disagreement(*triple)
        if problem:
            return f"output {position}: {problem}"
    return None


def disagreement(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> str:
    """Why `ours` is not as good as `theirs`; "" if it is."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{tuple(ours.shape)} {ours.dtype} instead of {tuple(theirs.shape)} {theirs.dtype}"
    if ours.is_meta or theirs.is_meta:  # a model without numbers
        return "" if ours.device == theirs.device else "numbers on one side alone"
    if not ours.is_floating_point():
        return "" if torch.equal(ours, theirs) else "other numbers"
    if ours.numel() == 0:
        return ""
    wide = [x.detach().double() for x in (ours, theirs, exact)]
    finite = torch.isfinite(wide[1])
    if not torch.equal(finite, torch.isfinite(wide[0])):
        return "infinite or undefined numbers in other places"
    mine, other, truth = (x[finite & torch.isfinite(wide[2])] for x in wide)
    if mine.numel() == 0:
        return ""
    allowed = _FACTOR * float((other - truth).abs().max())
    allowed += _ULPS * torch.finfo(ours.dtype).eps * float(truth.abs().max())
    error = float((mine - truth).abs().max())
    return "" if error <= allowed else f"error {error:.3g} to float64, allowed are {allowed:.3g}"
