"""What a test may claim about a rewrite: equal numbers, equal gradients, text in order.

Numbers are judged by float64, never by a tolerance somebody liked. With `exact` the same
computation in double,

    max |ours - exact|  <=  max(4 * max |original - exact|, floor * scale)    fp32: floor 1e-6

so a rewrite may be as wrong as the original was, and a little more, but not otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# about eight units in the last place of each type
FLOOR = {torch.float64: 2e-15, torch.float32: 1e-6, torch.float16: 8e-3, torch.bfloat16: 6e-2}
_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class InDouble(TorchDispatchMode):
    """Casts that a model writes down itself (`.float()`, `dtype=...`) go to double instead."""

    # a cond or a flex_attention runs as it is
    supports_higher_order_operators = True

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return func(*tree_map(_wide, args), **tree_map(_wide, kwargs or {}))


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


def double(tree: Any) -> Any:
    """A copy in which every floating tensor, and every module, is in double."""
    if isinstance(tree, nn.Module):
        return copy.deepcopy(tree).double()
    return tree_map(_double_leaf, tree)


def _double_leaf(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    wide = leaf.detach().clone()
    wide = wide.double() if wide.is_floating_point() else wide
    return wide.requires_grad_(leaf.requires_grad)


def fresh(tree: Any) -> Any:
    """A copy of every tensor: a run that writes into its inputs must not spoil the next."""
    return tree_map(
        lambda t: (
            t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
        ),
        tree,
    )


def floats(tree: Any) -> list[Tensor]:
    """The floating tensors of an output, in order."""
    return [t for t in tree_flatten(tree)[0] if isinstance(t, Tensor) and t.is_floating_point()]


@dataclass
class Results:
    """One run: its outputs and, after a training step, one gradient per name."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)


def loss_of(outputs: Sequence[Tensor], seed: int = 7) -> Tensor:
    """A fixed random combination of all outputs, the same in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for out in outputs:
        if out.requires_grad:
            total = (
                total
                + (
                    out.double() * torch.randn(out.shape, generator=generator, dtype=torch.float64)
                ).sum()
            )
    return total


def run(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    owner: Any,
    training: bool,
) -> Results:
    """Call on copies of the inputs; `training` takes gradients of `owner` and the inputs too."""
    args, kwargs = fresh(tuple(args)), fresh(dict(kwargs))
    if not training:
        with torch.no_grad():
            return Results([o.detach() for o in floats(function(*args, **kwargs))])
    if isinstance(owner, nn.Module):
        owner.zero_grad(set_to_none=True)
    outputs = floats(function(*args, **kwargs))
    loss_of(outputs).backward()  # type: ignore[no-untyped-call]
    return Results([o.detach() for o in outputs], _gradients(owner, args, kwargs))


def _gradients(owner: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {}
    if isinstance(owner, nn.Module):
        found = {
            n: p.grad.detach().clone() for n, p in owner.named_parameters() if p.grad is not None
        }
    for i, leaf in enumerate(tree_flatten((args, kwargs))[0]):
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.grad is not None:
            found[f"input{i}"] = leaf.grad.detach().clone()
    return found


@dataclass
class Gap:
    """How far one tensor is from exact, and how far it may be."""

    name: str
    ours: float
    theirs: float
    budget: float
    vague: bool = False

    @property
    def ok(self) -> bool:
        return self.ours <= self.budget and not self.vague

    def __str__(self) -> str:
        return (
            f"{self.name}: error {self.ours:.2e}, original {self.theirs:.2e},"
            f" budget {self.budget:.2e}"
            + (" (the original itself is so wrong that this proves nothing)" if self.vague else "")
        )


class Beyond(AssertionError):
    """Some tensors are beyond their budget; `ratio` is how far the worst is."""

    def __init__(self, bad: Sequence[Gap], compared: int) -> None:
        lines = "\n  ".join(map(str, bad[:8]))
        super().__init__(f"{len(bad)} of {compared} tensors beyond the float64 budget:\n  {lines}")
        self.ratio = max(
            float("inf") if g.vague or not g.budget else g.ours / g.budget for g in bad
        )


def gap(
    name: str, ours: Tensor, theirs: Tensor, exact: Tensor, scale: float = 0.0, unit: float = 0.0
) -> Gap:
    """Compare one tensor; NaN and infinity must stand in the same places as in the original.

    Where only float16 overflowed in the original, and float64 has a number, ours may have it too.
    """
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        raise AssertionError(
            f"{name}: {ours.dtype}{list(ours.shape)} instead of {theirs.dtype}{list(theirs.shape)}"
        )
    better = ours.isfinite() & ~theirs.isfinite() & exact.isfinite() & (ours.dtype == torch.float16)
    for is_special in (torch.isnan, torch.isinf):
        if not torch.equal(is_special(ours) & ~better, is_special(theirs) & ~better):
            return Gap(name + " (NaN or infinity)", float("inf"), 0.0, 0.0)
    finite = theirs.isfinite() & exact.isfinite()
    a, x = (t.double()[finite | better] for t in (ours, exact))
    b = torch.where(better, exact, theirs.double())[finite | better]
    if not x.numel():
        return Gap(name, 0.0, 0.0, 0.0)
    error, reference = (a - x).abs().max().item(), (b - x).abs().max().item()
    scale = max(scale, x.abs().max().item())
    floor = FLOOR[ours.dtype] * scale
    # an original far from exact proves nothing, unless ours is exact or the same
    wrong = reference > max(1e4 * floor, scale * 0.1)
    vague = wrong and error > max(floor, FLOOR[ours.dtype] * unit) and not torch.equal(a, b)
    return Gap(name, error, reference, max(4 * reference, floor), vague)


def gaps(ours: Results, theirs: Results, exact: Results) -> Iterator[Gap]:
    """Every output and gradient; gradients share one scale, since some (a key bias) are zero.

    Where all are, what cancelled leaves the rounding of the outputs, and is no less exact for it.
    """
    if not len(ours.outputs) == len(theirs.outputs) == len(exact.outputs):
        raise AssertionError(f"{len(ours.outputs)} outputs instead of {len(theirs.outputs)}")
    for i, triple in enumerate(zip(ours.outputs, theirs.outputs, exact.outputs, strict=True)):
        yield gap(f"output{i}", *triple)
    if ours.gradients.keys() != theirs.gradients.keys():
        missing = sorted(theirs.gradients.keys() ^ ours.gradients.keys())
        raise AssertionError(f"gradients differ in number: {missing[:8]}")
    scale, unit = _largest(exact.gradients.values()), _largest(exact.outputs)
    for name, g in ours.gradients.items():
        yield gap(f"d {name}", g, theirs.gradients[name], exact.gradients[name], scale, unit)


def _largest(tensors: Iterable[Tensor]) -> float:
    finite = [t[t.isfinite()].abs() for t in tensors]
    return max((t.max().item() for t in finite if t.numel()), default=0.0)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def exact_of(
    before: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], training: bool
) -> Results:
    """The same computation in double throughout."""
    wide = double(before)
    with InDouble(), _threads(1):
        return run(wide, double(tuple(args)), double(dict(kwargs)), wide, training)


def compare(ours: Results, theirs: Results, exact: Results) -> list[Gap]:
    """All gaps.

    Raises:
        AssertionError: one is beyond its budget; the message lists the worst.
    """
    found = list(gaps(ours, theirs, exact))
    bad = sorted((g for g in found if not g.ok), key=lambda g: -g.ours / (g.budget or 1e-300))
    if bad:
        raise Beyond(bad, len(found))
    return found


def same_numbers(
    before: Callable[..., Any],
    after: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    training: bool = False,
    owner: Any = None,
    exact: Callable[..., Any] | None = None,
) -> list[Gap]:
    """`after` computes what `before` does, up to rounding as `before` itself rounds.

    Args:
        before: the original, a module or a function.
        after: the rewrite; shares the original's parameters, unless `owner` says otherwise.
        args: positional inputs; they are copied for each run.
        kwargs: keyword inputs.
        training: compare gradients of all parameters, and of inputs that require them, too.
        owner: the module whose parameters `after` uses (default: `before`).
        exact: what to run in double, where `before` itself cannot be copied.

    Raises:
        AssertionError: a tensor is beyond its budget.
    """
    kwargs = kwargs or {}
    truth = exact_of(exact or before, args, kwargs, training)
    theirs = run(before, args, kwargs, before, training)
    ours = run(after, args, kwargs, before if owner is None else owner, training)
    return compare(ours, theirs, truth)


def in_order(text: str, *pieces: str) -> None:
    """All pieces stand in `text`, one after the other.

    Raises:
        AssertionError: says which piece is missing after which.
    """
    at = 0
    for i, piece in enumerate(pieces):
        found = text.find(piece, at)
        if found < 0:
            after = f" after {pieces[i - 1]!r}" if i else ""
            where = " (it stands earlier)" if piece in text else ""
            raise AssertionError(f"{piece!r} not found{after}{where} in:\n{text}")
        at = found + len(piece)


def decisions(report: Any) -> str:
    """The sites and the misses of a report in short, for messages of failing tests."""
    lines = []
    for site in report.sites:
        why = ", ".join(r.code for r in site.decision.reasons)
        state = "accepted" if site.decision.accepted else f"refused ({why})"
        shape = f"{site.query_heads}/{site.kv_heads} heads of {site.head_dim}"
        lines.append(f"  {site.path or '<root>'}: {shape}, mask {site.mask}: {state}")
    lines += [f"  missed {m.code}: {m.text} at {m.location}" for m in report.missed]
    return "\n".join(lines) or "  (nothing found)"


def refusals(report: Any) -> list[str]:
    """The code of every refused site and of every miss."""
    codes = [r.code for s in report.sites if not s.decision.accepted for r in s.decision.reasons]
    return codes + [m.code for m in report.missed]


def accepted(report: Any) -> int:
    """How many sites were rewritten.

    Raises:
        AssertionError: the compiler met an error of its own, or what it put in place of an
            attention is not in the graph any more: nothing reads it, the original runs.
    """
    assert "internal.error" not in refusals(report), decisions(report)
    found = sum(bool(s.decision.accepted) for s in report.sites)
    called = report.graph_after.count("torch.ops.attn_compiler.")
    # not every door keeps the graph
    assert called >= found or not report.graph_after, f"{called} operators for\n{decisions(report)}"
    return found
