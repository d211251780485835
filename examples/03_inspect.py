"""Doors 3 and 4: look without touching, and the bare FX pass for a pipeline of your own.

    report = ac.explain(model, (x,))        result = ac.fx_pass()(symbolic_trace(model), x)

A graph by symbolic_trace knows no shapes: the pass is given the example beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

import attn_compiler as ac


class Attention(nn.Module):
    """Four projections and a softmax; keys at a distance of eight and more are not seen."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (self._heads(to(x_BTD)) for to in (self.to_q, self.to_k, self.to_v))
        scores_BHTS = torch.einsum("bhtd,bhsd->bhts", q, k) / q.size(-1) ** 0.5
        rows = torch.arange(x_BTD.size(1))
        near = (rows[:, None] - rows[None, :]).abs() < 8
        weights_BHTS = torch.softmax(scores_BHTS.masked_fill(~near, float("-inf")), dim=-1)
        return self.to_out((weights_BHTS @ v).transpose(1, 2).flatten(-2))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """For the command line: attn-compiler explain examples/03_inspect.py:make"""
    torch.manual_seed(0)
    return Attention().eval(), (torch.randn(2, 24, 32),)


def main() -> None:
    model, (x,) = make()

    print(ac.explain(model, (x,)))

    traced = fx.symbolic_trace(model)
    expected = traced(x)
    result = ac.fx_pass()(traced, x)
    print(f"modified: {result.modified}")
    print(result.graph_module.code)
    print(f"largest difference: {(result.graph_module(x) - expected).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
