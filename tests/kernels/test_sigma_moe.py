"""The feed-forward net of SwitchAll against its equation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attn_compiler.kernels import experts
from attn_compiler.kernels.sigma_moe import sigma_moe

B, T, D, N, G = 2, 11, 7, 5, 3


def drawn() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((B, T, D), (N, D), (N, D, G), (N, G, D))
    x, w_sel, w_1, w_2 = (torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes)
    return x, w_sel, w_1, w_2


def by_equation(x: Tensor, w_sel: Tensor, w_1: Tensor, w_2: Tensor, k: int) -> Tensor:
    logits = x @ w_sel.mT
    gates = logits.sigmoid() * (logits >= logits.sort(-1).values[..., -k, None])
    each = torch.einsum("btd,ndg->btng", x, w_1).relu()
    return torch.einsum("btng,ngd,btn->btd", each, w_2, gates)


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_is_the_equation(k: int) -> None:
    given = drawn()
    found, routes = sigma_moe(*given, k=k)
    torch.testing.assert_close(found, by_equation(*given, k))
    assert routes.index.shape == (B, T, 1, k)


def test_gradients() -> None:
    leaves = [t[:1, :4] if i == 0 else t for i, t in enumerate(drawn())]
    leaves = [t.clone().requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(lambda *given: sigma_moe(*given, k=2)[0], leaves)


def test_dropped_experts_are_silent() -> None:
    given = drawn()
    found, routes = sigma_moe(*given, k=N, dropout=0.5, seed=torch.tensor([2]))
    expected = torch.zeros_like(found)
    order = routes.index[:, :, 0].long()
    gates = torch.zeros(B, T, N, dtype=torch.float64).scatter(2, order, routes.gate[:, :, 0])
    assert 0.3 < (gates == 0).double().mean() < 0.7
    each = torch.einsum("btd,ndg->btng", given[0], given[2]).relu()
    expected = torch.einsum("btng,ngd,btn->btd", each, given[3], gates)
    torch.testing.assert_close(found, expected)


def test_operations() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    experts.register_flops()
    k = 2
    with FlopCounterMode(display=False) as counter:
        sigma_moe(*drawn(), k=k)
    gates = 2 * k * G  # of ones going up, of the router going down
    assert counter.get_total_flops() == 2 * B * T * (2 * k * G * D + N * D + gates)
