"""Door 1: a torch.compile backend. No import, no change to the model.

torch.compile(model)  ->  torch.compile(model, backend="attn_compiler")
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attn_compiler as ac


class CausalSelfAttention(nn.Module):
    """Attention as people write it: packed projection, lower triangle, softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        split = (B, T, self.heads, D // self.heads)
        q, k, v = (t.view(split).transpose(1, 2) for t in self.qkv(x_BTD).split(D, dim=2))
        scores_BHTS = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        future_TT = torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).triu(1)
        scores_BHTS = scores_BHTS.masked_fill(future_TT, float("-inf"))
        y_BHTd = scores_BHTS.softmax(dim=-1) @ v
        return self.out(y_BHTd.transpose(1, 2).reshape(B, T, D))


def main() -> None:
    torch.manual_seed(0)
    model = CausalSelfAttention(width=64, heads=4).eval()
    x = torch.randn(2, 100, 64)
    compiled = torch.compile(model, backend="attn_compiler", options={"then": "eager"})
    with torch.no_grad():
        difference = (compiled(x) - model(x)).abs().max().item()
    print(ac.last_report())
    print(f"largest difference: {difference:.1e}")


if __name__ == "__main__":
    main()
