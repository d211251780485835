"""Models with gated attention units in place of their blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import attn_compiler as ac
from attn_compiler.kernels.gau_unit import NAMES
from tests.ir.block_models import WIDTH, Pre

SMALL = ac.GAU(s=6, expansion=1.5, chunk=4)
X = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(1, 61, (2, 7), generator=torch.Generator().manual_seed(2))


def rewritten(model: nn.Module, *args: Any, to: Any = SMALL, **kwargs: Any) -> nn.Module:
    found: nn.Module = ac.rewrite(model, args, kwargs, to=to, on_reject="raise")
    return drawn(found)


def drawn(model: nn.Module) -> nn.Module:
    """New parameters large enough that everything is seen in the output."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in NAMES:
                parameter.normal_(0, 0.5, generator=draw)
    return model


def close(ours: Tensor, exact: Tensor) -> bool:
    """As near as float32 gets through a few layers."""
    return bool(((ours.double() - exact.double()).abs() <= 1e-4 * exact.abs().max()).all())


def heads(block: Pre, x: Tensor) -> tuple[Tensor, ...]:
    """Its queries, keys and values."""
    parts = block.attend.qkv(x).chunk(3, -1)
    return tuple(t.unflatten(-1, (3, -1)).transpose(1, 2) for t in parts)
