"""How many tokens a trained Selective model needs: budgets at the loss of the dense model.

found = at_parity(selective, dense, windows)      found.factor = length * layers / sum(budgets)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from byte_lm import bits
from torch import Tensor, nn

import attn_compiler as ac


@dataclass(slots=True)
class Parity:
    """What a search found.

    Attributes:
        target: loss of the dense model on the windows that were searched with, in bits per byte.
        unpruned: that of the selective model.
        budgets: tokens by layer, None where nothing may be dropped.
        factor: how many times fewer tokens caches hold.
        path: tokens that a layer keeps on average, and the least loss with them.
    """

    target: float
    unpruned: float
    budgets: dict[str, int] | None = None
    factor: float = 1.0
    path: list[tuple[float, float]] = field(default_factory=list)


def loss_of(output: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Bits per byte of the bytes that follow."""
    return bits(output[:, :-1], args[0][:, 1:])


@torch.no_grad()
def at_parity(
    selective: nn.Module, dense: nn.Module, windows: Tensor, *, step: int, progress: bool
) -> Parity:
    """Lower the budgets of one model as long as it is as good as the other.

    Args:
        selective: rewritten with Selective, trained.
        dense: as good as it has to stay.
        windows: held-out bytes [N, T].
        step: tokens that a layer loses at a time.
        progress: draw a bar.
    """
    selective.eval()
    dense.eval()
    found = Parity(
        *(float(loss_of(model(windows), (windows,), {})) for model in (dense, selective))
    )
    if found.unpruned > found.target:
        return found
    layers, length = _layers(selective), windows.shape[1]
    least: dict[int, float] = {length * len(layers): found.unpruned}

    def seen(output: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        loss = loss_of(output, args, kwargs)
        kept = sum(layer.budget or length for layer in layers)
        least[kept] = min(float(loss), least.get(kept, float("inf")))
        return loss

    found.budgets = ac.search_budgets(
        selective, [((windows,), {})], loss=seen, target=found.target, step=step, progress=progress
    )
    found.factor = length * len(layers) / sum(found.budgets.values())
    found.path = [(kept / len(layers), loss) for kept, loss in sorted(least.items(), reverse=True)]
    return found


def _layers(model: nn.Module) -> list[Any]:
    """What the layers of a rewritten model remember: among it their budgets."""
    return [module for module in model.modules() if hasattr(module, "budget")]
