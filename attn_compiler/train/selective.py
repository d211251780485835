"""Selective attention in a model: its memory loss, its budgets, what it costs a trained model.

    loss = cross_entropy(model(x), y) + 0.02 * memory_loss(model)     in a training loop
    found = search_budgets(model, batches, target=dense_loss)         {"layers.0.attn": 40, ...}
    set_budgets(model, found)                                         prunes from now on
    Selective(budgets=get_budgets(model))                             the same in another model

The memory loss is that of `cache.budgets`, the search too; here both are told to a model.

Source: Selective Attention (arXiv 2410.02703); weights and steps are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attn_compiler.cache import budgets as by_numbers
from attn_compiler.errors import BadOption, UnsupportedCall
from attn_compiler.installed import rewritten
from attn_compiler.ir.site import AttentionSite
from attn_compiler.kernels.selective_memory import Memory
from attn_compiler.train.progress import bar
from attn_compiler.variants import MEASURED
from attn_compiler.variants.selective import MEMORY, Selective

Batch = tuple[Sequence[Any], Mapping[str, Any]]
Loss = Callable[[Any, Sequence[Any], Mapping[str, Any]], Tensor]


def memories(model: nn.Module) -> dict[str, Memory]:
    """What each site of Selective attention remembers, by its path, in the order of the model."""
    found: dict[str, Memory] = {}
    for _, owner, site in rewritten(model):
        for new in site.decision.tensors:
            memory = getattr(owner, new.name) if new.name.startswith(MEMORY) else None
            if isinstance(memory, Memory):
                found[site.path] = memory
    return found


def _memories(model: nn.Module) -> dict[str, Memory]:
    found = memories(model)
    if not found:
        raise BadOption(
            "the model has no Selective attention",
            do="rewrite it first: rewrite(model, args, to=Selective())",
        )
    return found


# ---------------------------------------------------------------- the memory loss


def memory_loss(
    model: nn.Module, *, tokens: Tensor | int | None = None, tau: float = 1.0
) -> Tensor:
    """The share of tokens that caches would need for the last training pass, in 0 to 1: a training
    loop adds it to its own loss with a small weight, before it goes backward.

        mean over layers and samples of  max_i M_i / tokens
        M_i = sum over k <= i of 1 - min(F[i,k], tau) / tau

    It has gradients for the selecting heads. Under checkpointing it does where that is not
    reentrant; in compiled models from the first call on.

    Args:
        model: rewritten with Selective, after a forward pass in training mode with gradients.
        tokens: of each sample that are no padding, [B], or one number; all rows by default.
        tau: F from which on a token counts as dropped.

    Returns:
        One number.

    Raises:
        BadOption: the model has no Selective attention.
        UnsupportedCall: there was no such pass.
    """
    found = _memories(model)
    needs, counts = [], []
    for path, memory in found.items():
        memory.asked = True
        if memory.seen is None:
            raise UnsupportedCall(
                "the memory loss has no training pass to look at",
                where=path or "the root",
                why=("what a layer needs is kept in training mode with gradients only",),
                do="call the model in train() first; a compiled or reentrantly checkpointed one"
                " keeps it from the next pass on, or not at all",
            )
        needs.append(memory.seen.need(tau))
        counts.append(memory.seen.q.shape[2])
    if tokens is not None:
        return by_numbers.memory_loss(needs, tokens)
    shares = [need / count for need, count in zip(needs, counts, strict=True)]
    return by_numbers.memory_loss(shares, 1)


# ---------------------------------------------------------------- budgets


def set_budgets(model: nn.Module, budgets: Mapping[str, int] | Sequence[int] | None) -> None:
    """Prune to so many tokens in evaluation: caches of generation and whole passes alike.

    Args:
        model: rewritten with Selective.
        budgets: tokens by module path, or for each site in order; None to keep all. Sites that a
            dict leaves out keep all.

    Raises:
        BadOption: a path is unknown, there are too many or too few, or one is below 2.
    """
    found = _memories(model)
    given = _by_path(found, budgets)
    for path, memory in found.items():
        memory.budget = given.get(path)


def get_budgets(model: nn.Module) -> dict[str, int]:
    """The budgets that stand in a model, by module path: for a file, or for `set_budgets` and
    `Selective(budgets=...)` where another model is rewritten. The state_dict has them too.

    Args:
        model: rewritten with Selective.

    Returns:
        Tokens of the sites that have a budget.

    Raises:
        BadOption: the model has no Selective attention.
    """
    found = _memories(model)
    return {path: m.budget for path, m in found.items() if m.budget is not None}


def _by_path(
    found: Mapping[str, Any], budgets: Mapping[str, int] | Sequence[int] | None
) -> dict[str, int]:
    if budgets is None:
        return {}
    if not isinstance(budgets, Mapping):
        if len(budgets) != len(found):
            raise BadOption(
                f"{len(budgets)} budgets for {len(found)} layers",
                where="option budgets",
                why=[f"Selective attention is at {', '.join(map(repr, found))}"],
                do="give one number for each",
            )
        budgets = dict(zip(found, budgets, strict=True))
    unknown = [path for path in budgets if path not in found]
    if unknown or any(budget < 2 for budget in budgets.values()):
        raise BadOption(
            f"no Selective attention is at {unknown[0]!r}" if unknown else "a budget is below 2",
            where="option budgets",
            why=[f"Selective attention is at {', '.join(map(repr, found))}"],
            do="give at least 2 tokens for these paths",
        )
    return dict(budgets)


def put_budgets(model: nn.Module, wanted: Callable[[str], Any]) -> None:
    """Give the sites the budgets of their specs; one spec's numbers go to its sites in order.

    Raises:
        BadOption: they do not fit.
    """
    found = memories(model)
    specs = {spec: None for path in found if isinstance(spec := wanted(path), Selective)}
    for spec in specs:
        if spec.budgets is None:
            continue
        own = {path: memory for path, memory in found.items() if wanted(path) == spec}
        for path, budget in _by_path(own, spec.budgets).items():
            own[path].budget = budget


def search_budgets(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    target: float | None = None,
    step: int | None = None,
    least: int = 2,
    progress: bool = True,
) -> dict[str, int]:
    """Look for the fewest tokens that layers may keep, greedily, one step of one layer at a time.

    Args:
        model: rewritten with Selective, as it was trained; afterwards it is as before.
        batches: held-out data, pairs (args, kwargs).
        loss: of an output and the args and kwargs it came from. By default the output's own
            `.loss`, or that of the next token where logits [B, T, V] come of tokens [B, T].
        target: the loss that may not be exceeded, for example that of a dense model; by default
            the model's own without pruning.
        step: tokens that a layer loses at a time, a 32nd of the length by default.
        least: no layer keeps fewer.
        progress: draw a bar of the tokens that are gone.

    Returns:
        Tokens by module path, for `set_budgets` or `Selective(budgets=...)`.

    Raises:
        BadOption: no Selective attention, no batches, no loss, or a target that is exceeded before
            anything is dropped.
    """
    found, data = _memories(model), list(batches)
    before = {path: memory.budget for path, memory in found.items()}
    paths = list(found)

    def of(budgets: Sequence[int]) -> float:
        set_budgets(model, dict(zip(paths, budgets, strict=True)))
        return losses(model, data, loss)

    try:
        for memory in found.values():
            memory.budget, memory.rows = None, 0
        start = losses(model, data, loss)
        length = max(memory.rows or 0 for memory in found.values())
        target = start if target is None else target
        size = max(1, length // 32) if step is None else step
        with bar("budgets", len(paths) * -(-length // size), 0, shown=progress) as advance:
            result = by_numbers.search_budgets(
                of, len(paths), length, target, step=size, least=least,
                progress=lambda _, value: advance(value),
            )  # fmt: skip
    finally:
        for path, budget in before.items():
            found[path].budget, found[path].rows = budget, None
    return dict(zip(paths, result.budgets, strict=True))


# ---------------------------------------------------------------- the loss of a model


def losses(model: nn.Module, batches: Iterable[Any], loss: Loss | None = None) -> float:
    """Mean loss of a model in evaluation, each batch with the same weight.

    Raises:
        BadOption: there is no batch, or no loss that is understood.
    """
    values = []
    with torch.no_grad(), _evaluating(model):
        for args, kwargs in batches:
            given = dict(kwargs or {})
            output = model(*args, **given)
            values.append(float((loss or own_loss)(output, args, given)))
    if not values:
        raise BadOption("there are no batches", do="give at least one pair (args, kwargs)")
    return sum(values) / len(values)


def own_loss(output: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The `.loss` of an output, or the mean loss of the next token.

    Raises:
        BadOption: it is neither.
    """
    found = getattr(output, "loss", None)
    if isinstance(found, Tensor):
        return found
    logits = getattr(output, "logits", output)
    tokens = next((x for x in (*args, *kwargs.values()) if _are_tokens(x, logits)), None)
    if tokens is None:
        raise BadOption(
            "the loss of this model is not known",
            why=["its output has no .loss, and is no logits [B, T, V] of tokens [B, T]"],
            do="give batches with labels, or search_budgets a loss",
        )
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def _are_tokens(x: Any, logits: Any) -> bool:
    both = isinstance(x, Tensor) and isinstance(logits, Tensor)
    return both and x.dtype == torch.int64 and logits.dim() == 3 and x.shape == logits.shape[:2]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def described(
    sites: Iterable[AttentionSite], before: float, after: float
) -> tuple[AttentionSite, ...]:
    """Sites with what their change of function cost the model."""
    words = f"loss {before:.4f} before, {after:.4f} after, of all that was rewritten"
    measured = {variant.name for variant in MEASURED}
    return tuple(
        replace(s, facts={**s.facts, "calibration": words})
        if s.decision.accepted and s.decision.variant in measured
        else s
        for s in sites
    )
