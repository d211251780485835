"""Least squares that hold on to a start."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_compiler.variants.conversion.regression import Products, regressed


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_many_rows_decide() -> None:
    x, w, start = numbers(211, 7, seed=0), numbers(7, 3, seed=1), numbers(7, 3, seed=2)
    noise = 0.1 * numbers(211, 3, seed=3)
    y = x @ w + noise
    found = regressed(Products.of(x[:150], y[:150]), Products.of(x[150:], y[150:]), start)
    best = torch.linalg.lstsq(x, y).solution
    assert (found - best).abs().max() < 1e-2 * (start - best).abs().max()


def test_few_rows_scale_the_start() -> None:
    """Noise alone tells nothing but the size."""
    x, w = numbers(9, 7, seed=0), numbers(7, 3, seed=1)
    kept = numbers(50, 7, seed=4)
    noisy = 2 * x @ w + 3 * numbers(9, 3, seed=3)
    found = regressed(Products.of(x, noisy), Products.of(kept, 2 * kept @ w), w)
    plain = torch.linalg.lstsq(x, noisy).solution
    assert (found - 2 * w).norm() < 0.5 * (plain - 2 * w).norm()


def test_a_start_that_is_right_but_for_its_size() -> None:
    x, w = numbers(5, 7, seed=0), numbers(7, 3, seed=1)
    assert torch.allclose(regressed(Products.of(x, 3 * x @ w), None, w), 3 * w)
