"""Calls of attn_compiler::gau_attention for tests: drawn tensors and options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attn_compiler.kernels.gau import gau_attention

TENSORS = ("q", "k", "v", "q_lin", "k_lin", "gate", "bias", "valid", "documents", "seed")


@dataclass(frozen=True)
class Case:
    """What is handed over, beside the sizes; `drawn` makes the tensors."""

    batch: int = 2
    length: int = 23
    s: int = 5
    e: int = 7
    chunk: int | None = 4
    causal: bool = True
    scale: float = 0.4
    scale_mode: str = "rowcount"
    inside: bool = False
    dropout: float = 0.0
    gated: bool = True
    biased: bool = True
    padded: bool = False
    packed: bool = False

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)

    def drawn(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

        rows = (self.batch, self.length)
        found: dict[str, Any] = {name: normal(*rows, self.s) for name in ("q", "k")}
        found["v"] = normal(*rows, self.e)
        for name in ("q_lin", "k_lin"):
            found[name] = normal(*rows, self.s) if self.chunk else None
        found["gate"] = normal(*rows, self.e) if self.gated else None
        found["bias"] = normal(2 * min(self.chunk or 99, self.length) + 1) if self.biased else None
        found |= {"valid": None, "documents": None, "seed": None}
        if self.padded:  # holes, and a sequence of nothing
            found["valid"] = torch.rand(*rows, generator=draw) > 0.3
            found["valid"][-1] = False
        if self.packed:
            found["documents"] = (torch.rand(*rows, generator=draw) < 0.2).cumsum(1) % 3
        if self.dropout:
            found["seed"] = torch.tensor([11])
        return found

    @property
    def options(self) -> dict[str, Any]:
        names = ("chunk", "causal", "scale", "scale_mode", "inside", "dropout")
        return {name: getattr(self, name) for name in names}


def mixed(case: Case, given: dict[str, Any], function: Any = gau_attention) -> Tensor:
    """`out` of a call."""
    out: Tensor = function(*(given[name] for name in TENSORS), **case.options)[0]
    return out


def with_gradients(
    case: Case, given: dict[str, Any], function: Any = gau_attention
) -> list[Tensor]:
    """`out`, and the gradients of all floating tensors of a fixed sum of it."""
    leaves = {
        name: x.detach().requires_grad_()
        for name, x in given.items()
        if x is not None and x.is_floating_point()
    }
    out = mixed(case, given | leaves, function)
    draw = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), weights, materialize_grads=True)
    return [out.detach(), *grads]
