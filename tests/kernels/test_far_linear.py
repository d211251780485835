"""Softmax inside a chunk, linear attention outside of it, one denominator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels.far_linear import near_and_far

TIGHT = {"rtol": 1e-11, "atol": 1e-12}


def drawn(length: int = 23, groups: int = 2) -> list[Tensor]:
    """q, k, v and features of q and k, of 4 heads."""
    draw = torch.Generator().manual_seed(0)
    sizes = ((4, 5), (groups, 5), (groups, 7), (4, 3), (groups, 3))
    found = [
        torch.randn(2, heads, length, width, generator=draw, dtype=torch.float64)
        for heads, width in sizes
    ]
    return [*found[:3], found[3].relu(), found[4].exp()]


def plain(given: list[Tensor], chunk: int, causal: bool, valid: Tensor | None = None) -> Tensor:
    """The same by matrices of T x T."""
    q, k, v, f, g = (x.repeat_interleave(4 // x.shape[1], 1) for x in given)
    index = torch.arange(q.shape[2])
    near = index[:, None] // chunk == index // chunk
    far = index[:, None] // chunk > index // chunk if causal else ~near
    near = near & (index <= index[:, None]) if causal else near
    weights = (q @ k.mT * 0.3).exp() * near + f @ g.mT * far
    if valid is not None:
        weights = weights * valid[:, None, None]
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights @ v, 0.0) / torch.where(total > 0, total, 1.0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 23, 30])
@pytest.mark.parametrize("padded", [False, True])
def test_it_is_its_equation(chunk: int, causal: bool, padded: bool) -> None:
    given = [x.requires_grad_() for x in drawn()]
    valid = torch.rand(2, 23, generator=torch.Generator().manual_seed(1)) > 0.4 if padded else None
    exact = plain(given, chunk, causal, valid)
    found = near_and_far(
        *given[:3], (given[3], given[4]), chunk=chunk, causal=causal, scale=0.3, valid=valid
    )
    assert torch.allclose(found, exact, **TIGHT)
    weights = torch.randn_like(exact)
    grads = [torch.autograd.grad(x, given, weights, materialize_grads=True) for x in (found, exact)]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, **TIGHT)


def test_one_chunk_is_attention() -> None:
    q, k, v, f, g = drawn(groups=4)
    for causal in (True, False):
        exact = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3)
        found = near_and_far(q, k, v, (f, g), chunk=23, causal=causal, scale=0.3)
        assert torch.allclose(found, exact, **TIGHT)


def test_large_scores_and_half_precision() -> None:
    q, k, v, f, g = drawn()
    for factor in (1e3, -1e3):
        found = near_and_far(factor * q, k, v, (f, g), chunk=4, causal=True, scale=1.0)
        assert found.isfinite().all()
    half = [x.bfloat16() for x in (q, k, v, f, g)]
    exact = plain([x.double() for x in half], 4, True)
    found = near_and_far(*half[:3], (half[3], half[4]), chunk=4, causal=True, scale=0.3)
    assert found.dtype == torch.bfloat16
    error = (found.double() - exact).norm()
    assert error <= 2 * (exact.bfloat16().double() - exact).norm()


def test_a_prefix_has_the_rows_of_the_whole() -> None:
    q, k, v, f, g = drawn()
    whole = near_and_far(q, k, v, (f, g), chunk=4, causal=True, scale=0.3)
    for length in range(1, 23):
        *qkv, left, right = (x[:, :, :length] for x in (q, k, v, f, g))
        found = near_and_far(*qkv, (left, right), chunk=4, causal=True, scale=0.3)
        assert torch.allclose(found, whole[:, :, :length], **TIGHT)


def test_refusals() -> None:
    q, k, v, f, g = drawn()
    for bad in ((q[:, :, 1:], k, v, (f, g)), (q, k, v, (f, g[..., 1:])), (q[0], k, v, (f, g))):
        with pytest.raises(UnsupportedCall, match="cannot read"):
            near_and_far(*bad, chunk=4, causal=True, scale=0.3)
