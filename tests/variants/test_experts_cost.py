"""What projections by all experts cost, against every kernel that they start and its bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attn_compiler.cost.letters import Cost, E, H, T, d
from attn_compiler.kernels import expert_forms
from attn_compiler.kernels.expert_forms import Routed
from attn_compiler.variants.costs.switchhead import _all_experts

SIZES = {"T": 2048, "H": 2, "E": 4, "k": 2, "d": 48, "D": 256, "n": 2}


class Counted(TorchDispatchMode):
    """Kernels, and the bytes of what they read and write; views and questions are none."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out, name = op(*args, **(kwargs or {})), op.overloadpacket.__name__
        if op.is_view or name in ("promote_types", "empty", "detach"):
            return out
        read = [a for a in args if isinstance(a, Tensor)]
        read = [] if "zeros" in name else read[1:] if name == "copy_" else read
        flops = 2 * read[0].numel() * read[1].shape[-1] if name == "mm" else 0
        sizes = [sum(map(_bytes, tensors)) for tensors in (read, [out])]
        self.cost += Cost(flops=flops, read=sizes[0], written=sizes[1], launches=1)
        return out


def _bytes(x: Tensor) -> int:
    return x.untyped_storage().nbytes() if 0 in x.stride() else x.numel() * x.itemsize


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("out", [False, True])
def test_products_with_all_experts(
    out: bool, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(expert_forms._CHUNK, "cpu", 2**26)  # a GPU's
    tokens, heads, experts, width = (SIZES[name] for name in ("T", "H", "E", "D"))
    a = torch.randn(tokens * heads, 48) if out else torch.randn(tokens, width)
    sides = (48, width) if out else (width, 48)
    w = torch.randn(experts if shared else heads * experts, *sides)
    index = torch.rand(tokens, heads, experts).argsort(-1)[..., :2]
    call = Routed(
        a.bfloat16(), w.bfloat16(), index, torch.rand(tokens, heads, 2), experts, merge=out
    )
    with Counted() as forward:
        result = expert_forms._masked(call).bfloat16()
    grad = torch.randn_like(result)
    with Counted() as backward:
        found = expert_forms._masked_backward(call, grad, (True, True, True))
        for gradient in found:
            assert gradient is not None
            gradient.bfloat16()

    many, of = (E, H) if shared else (H * E, 1)
    formulas = [
        _all_experts(T, many, d, training, out=out, each=H * d, shared=of)
        for training in (False, True)
    ]
    once, both = (formula.numbers(**SIZES) for formula in formulas)
    for counted, said in ((forward.cost, once), (backward.cost, both.beyond(once))):
        # gates and indices are left out, and the flop of a gate is counted with the product's
        assert said.flops == pytest.approx(counted.flops, rel=0.01)
        assert said.read == pytest.approx(counted.read, rel=0.1)
        assert said.written == pytest.approx(counted.written, rel=0.1)
        assert said.launches == pytest.approx(counted.launches, rel=0.15)
