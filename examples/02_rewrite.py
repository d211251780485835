"""Door 2: rewrite a model. The result is an ordinary module: copy, save, export or train it.

new = ac.rewrite(model, (x,))
"""

from __future__ import annotations

import copy

import torch
from torch import nn

import attn_compiler as ac


def main() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(d_model=64, nhead=4, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
    x = torch.randn(2, 50, 64)

    new = ac.rewrite(model, (x,))
    print(f"a {type(new).__name__} with the same {len(new.state_dict())} entries in its state_dict")
    assert new.state_dict().keys() == model.state_dict().keys()

    # an ordinary module: an export holds what it computes
    exported = torch.export.export(new, (x,))
    operator = torch.ops.attn_compiler.attention.default
    count = sum(node.target is operator for node in exported.graph.nodes)
    print(f"attention operators in its export: {count}")

    # the copy has weights of its own, and trains
    twin = copy.deepcopy(new)
    twin(x).square().mean().backward()
    difference = (new(x) - model(x)).abs().max().item()
    gradients = sum(p.grad is not None for p in twin.parameters())
    print(f"largest difference: {difference:.1e}; parameters with a gradient: {gradients}")


if __name__ == "__main__":
    main()
