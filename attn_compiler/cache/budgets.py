"""How many tokens each layer needs: the search for budgets, and a loss that makes them fewer.

    K = (T, ..., T);  lower one layer by a step, the one that costs least, while loss(K) <= target

    memory_loss = mean over layers and samples of max_i M_i / tokens
    M_i = sum over k <= i of 1 - min(F[i,k], tau) / tau

Source: Selective Attention (arXiv 2410.02703) has budgets for each layer and such a loss; how the
search goes step by step and which weight the loss has are choices made here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_compiler.errors import BadOption

Budgets = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """What the search found.

    Attributes:
        budgets: tokens of each layer.
        loss: of these budgets.
        path: budgets and loss after each step that was taken, the start first.
    """

    budgets: Budgets
    loss: float
    path: tuple[tuple[Budgets, float], ...]


def search_budgets(
    loss: Callable[[Budgets], float],
    layers: int,
    length: int,
    target: float,
    *,
    step: int | None = None,
    least: int = 2,
    progress: Callable[[Budgets, float], None] | None = None,
) -> Found:
    """Lower budgets greedily while the loss allows it.

    Args:
        loss: of the model with these budgets, on held-out data; called for each layer and step.
        layers: how many there are.
        length: tokens of a sequence, the budget to begin with.
        target: the loss that may not be exceeded, for example that of the dense model.
        step: tokens that a layer loses at a time, a 32nd of `length` by default.
        least: no layer keeps fewer.
        progress: is called with the budgets and their loss after each step.

    Raises:
        BadOption: a number is out of range, or the target is exceeded before anything is dropped.
    """
    step = max(1, length // 32) if step is None else step
    if layers < 1 or step < 1 or not 2 <= least <= length:
        raise BadOption(
            "search_budgets cannot search",
            why=(f"given: layers {layers}, length {length}, step {step}, least {least}",),
            do="give at least one layer, a step of at least 1, and 2 <= least <= length",
        )
    budgets: Budgets = (length,) * layers
    now = loss(budgets)
    if now > target:
        raise BadOption(
            "search_budgets begins above its target",
            why=(f"the loss without pruning is {now}, the target is {target}",),
            do="raise the target or train longer",
        )
    path = [(budgets, now)]
    while True:
        tried = [
            (loss(fewer), fewer)
            for layer in range(layers)
            if (fewer := _lowered(budgets, layer, step, least)) != budgets
        ]
        if not tried or min(tried)[0] > target:
            return Found(budgets, now, tuple(path))
        now, budgets = min(tried, key=lambda one: one[0])
        path.append((budgets, now))
        if progress is not None:
            progress(budgets, now)


def _lowered(budgets: Budgets, layer: int, step: int, least: int) -> Budgets:
    fewer = max(least, budgets[layer] - step)
    return (*budgets[:layer], fewer, *budgets[layer + 1 :])


def needed(amount: Tensor, valid: Tensor | None = None, tau: float = 1.0) -> Tensor:
    """How many tokens each row still needs, softly: M_i = sum over k <= i of 1 - min(F, tau) / tau.

    Args:
        amount: F of a layer, [B, T, T].
        valid: tokens that are no padding, boolean [B, T].
        tau: F from which on a token counts as dropped.

    Returns:
        [B, T], 0 in rows of padding.
    """
    alive = 1 - amount.clamp(max=tau) / tau
    if valid is not None:
        alive = alive * (valid.unsqueeze(1) & valid.unsqueeze(2))
    return alive.tril().sum(-1)


def memory_loss(needs: Sequence[Tensor], tokens: Tensor | int) -> Tensor:
    """The share of tokens that caches need, averaged over layers and samples, as one number that a
    training loop adds with a small weight to its own loss.

    Args:
        needs: of each layer the most that any row needs, [B]: `needed(F).amax(1)`, or what
            attn_compiler::selective_need returns without building F.
        tokens: of each sample that are no padding, [B], or one number for all.
    """
    return torch.stack([(need / tokens).mean() for need in needs]).mean()
