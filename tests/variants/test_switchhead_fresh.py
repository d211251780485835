"""Parameters before training: shapes, deviations, and as many as the closed form says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attn_compiler.kernels.switchhead import Mixture, Weights
from attn_compiler.variants.switchhead import SwitchHead, parameters
from attn_compiler.variants.switchhead_fresh import (
    Drawing,
    fresh,
    fresh_positions,
    fresh_sigma_moe,
)

D, C = 211, 37
MIXTURES = {
    "v and o": Mixture(2, 5, 2),
    "shared": Mixture(2, 5, 2, shared=True),
    "o": Mixture(3, 4, 2, ("o",)),
    "v, shared": Mixture(3, 4, 2, ("v",), shared=True),
    "k": Mixture(3, 4, 2, ("k",)),
    "all four": Mixture(2, 3, 2, ("q", "k", "v", "o")),
}


def drawing(scale: float = 1.0) -> Drawing:
    return Drawing(scale, torch.Generator().manual_seed(0))


def is_normal(x: Tensor, deviation: float) -> bool:
    """Mean and deviation within five standard errors."""
    n = x.numel()
    off = abs(float(x.double().mean())) / deviation * n**0.5
    return off < 5 and abs(float(x.double().std()) / deviation - 1) * (2 * n) ** 0.5 < 5


@pytest.mark.parametrize("name", MIXTURES)
def test_as_many_parameters_as_the_closed_form_says(name: str) -> None:
    mixture = MIXTURES[name]
    weights = fresh(mixture, D, C, drawing())
    spec = SwitchHead(
        heads=mixture.heads, experts=mixture.experts, k=mixture.k, head_dim=C,
        experts_on=mixture.experts_on, shared_selection=mixture.shared,
    )  # fmt: skip
    tensors = [getattr(weights, n) for n in Weights.__slots__]
    assert sum(x.numel() for x in tensors if x is not None) == parameters(spec, D)


def test_deviations() -> None:
    mixture, s = Mixture(2, 5, 2), 0.3
    weights = fresh(mixture, D, C, drawing(s))
    assert weights.w_q.shape == weights.w_k.shape == (2, D, C)
    assert weights.w_v.shape == (10, D, C) and weights.w_o.shape == (10, C, D)
    for w in (weights.w_q, weights.w_k, weights.w_v):
        assert is_normal(w, s / D**0.5)
    assert is_normal(weights.w_o, s / (2 * C) ** 0.5)
    assert weights.w_s is not None and weights.w_d is not None
    assert not torch.equal(weights.w_s, weights.w_d)
    for router in (weights.w_s, weights.w_d):
        assert router.shape == (10, D) and is_normal(router, s / D**0.5)
        torch.testing.assert_close(router.norm(dim=1), torch.full((10,), s))
    assert is_normal(fresh_positions(mixture, D, C, drawing(s)), s / D**0.5)


def test_outputs_start_with_the_variance_that_is_said() -> None:
    """k / 4 on each side, as gates are near 1/2."""
    from attn_compiler.kernels.switchhead import keys_values

    mixture = Mixture(2, 8, 4)
    weights = fresh(mixture, D, C, drawing())
    x = torch.randn(3, 101, D, generator=torch.Generator().manual_seed(1))
    v = keys_values(x, weights, mixture).v
    # the gates of those that were chosen are above 1/2
    assert 1.0 < float(v.var()) < 2.5


def test_sigma_moe() -> None:
    w_sel, w_1, w_2 = fresh_sigma_moe(11, D, C, drawing(0.5))
    assert (w_sel.shape, w_1.shape, w_2.shape) == ((11, D), (11, D, C), (11, C, D))
    torch.testing.assert_close(w_sel.norm(dim=1), torch.full((11,), 0.5))
    assert is_normal(w_1, 0.5 / D**0.5) and is_normal(w_2, 0.5 / (11 * C) ** 0.5)


def test_a_generator_and_a_dtype_decide_everything() -> None:
    ours = fresh(Mixture(2, 3, 1), D, C, drawing())
    again = fresh(Mixture(2, 3, 1), D, C, drawing())
    assert torch.equal(ours.w_o, again.w_o)
    half = Drawing(generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    assert torch.equal(fresh(Mixture(2, 3, 1), D, C, half).w_q, ours.w_q.bfloat16())
