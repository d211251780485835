"""How tensors that a module gets start, where they are not full of one number.

Start(normal, (0.02,))                               a deviation that is given
Start(normal, (0.02,), Like(("attn.q_proj",)))       that of weights which are replaced, if any
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Like:
    """The scale of weights that are replaced: their authors chose it for this model.

    Attributes:
        paths: of modules and parameters below the owner; the largest matrix among them counts.
        gain: what its root mean square is multiplied with.
    """

    paths: tuple[str, ...]
    gain: float = 1.0

    def deviation(self, owner: torch.nn.Module) -> float | None:
        """None where no matrix of them has finite numbers: on the meta device, in integers, or
        where nobody has filled them yet.
        """
        held = (p for path in self.paths for p in _weights(owner, path))
        matrices = [p for p in held if p.dim() >= 2 and p.is_floating_point() and not p.is_meta]
        if not matrices:
            return None
        largest = max(matrices, key=torch.Tensor.numel).detach()
        found = self.gain * float(largest.double().square().mean().sqrt())
        return found if math.isfinite(found) else None


def _weights(owner: torch.nn.Module, path: str) -> list[torch.nn.Parameter]:
    home, _, name = path.rpartition(".")
    value = getattr(owner.get_submodule(home), name)
    return list(value.parameters()) if isinstance(value, torch.nn.Module) else [value]


@dataclass(frozen=True, slots=True)
class Start:
    """How a new tensor starts, where it is not full of one number.

    Attributes:
        write: write(tensor, *numbers) fills a tensor in place, and draws from the global generator;
            a function of a module, so that it compares, and is pickled, by its name.
        numbers: what it needs to know.
        like: the one number is the deviation of these weights, where they have one.
    """

    write: Callable[..., Any]
    numbers: tuple[float, ...] = ()
    like: Like | None = None


def normal(tensor: torch.Tensor, deviation: float) -> None:
    """Independent normal numbers with mean 0."""
    tensor.normal_(0.0, deviation)


def rows_of_length(tensor: torch.Tensor, length: float) -> None:
    """Rows in random directions, all of one length."""
    tensor.normal_()
    tensor.mul_(length / torch.linalg.vector_norm(tensor, dim=-1, keepdim=True))
