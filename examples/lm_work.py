"""What a small language model computes and keeps, by formula and as PyTorch counts it.

    work(model, tokens, sizes, spec)   ->   operations of a forward pass, bytes kept

The formulas are those of `attn_compiler.plan`, for attention, and for the net that goes with it.
Norms, activations and the head of the model are not in the bytes of a formula, so that only
differences between two models can be compared with what was counted.
"""

from __future__ import annotations

from typing import Any

import torch
from byte_lm import Sizes
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import attn_compiler as ac
from attn_compiler.kernels import experts, library

# a plan names dense attention beside any variant
_ANY = ac.SwitchHead(heads=1, experts=1, k=1, head_dim=8)


def work(model: nn.Module, tokens: Tensor, sizes: Sizes, spec: Any) -> dict[str, Any]:
    """Operations and bytes of one batch [B, T].

    Args:
        spec: what the layers of the model have become, with all its numbers; None is dense.
    """
    operations, kept = _formula(tokens, sizes, spec)
    return {
        "operations": {"formula": operations, "counted": _operations(model, tokens)},
        "kept": {"formula": kept, "counted": _kept(model, tokens)},
    }


def _formula(tokens: Tensor, sizes: Sizes, spec: Any) -> tuple[float, float]:
    batch, length = tokens.shape
    heads, width = sizes.heads, sizes.width
    plans = [
        ac.plan(
            spec or _ANY,
            # counters take all pairs of a causal attention for computed
            ac.Shape(
                batch, length, length, heads, width // heads, causal=training, training=training
            ),
            hardware="h200",
            dtype=torch.float32,
        )
        for training in (False, True)
    ]
    forward, both = plans if spec is not None else [p.alternatives[0] for p in plans]
    flops = forward.flops
    if getattr(spec, "feed_forward", None) is None:
        flops += 16 * batch * length * width**2
    head = 2 * batch * length * width * 256
    return sizes.layers * flops + head, sizes.layers * both.memory


@torch.no_grad()
def _operations(model: nn.Module, tokens: Tensor) -> float:
    # whoever imported the package before the counter has not told it of the operators
    experts.register_flops()
    library.register_flops()
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    return float(counter.get_total_flops())


def _kept(model: nn.Module, tokens: Tensor) -> float:
    """Bytes of what autograd holds after a forward pass, parameters apart; each storage once."""
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = model(tokens)  # what is kept lives as long as this does
    del result
    return float(sum(held.values()))
