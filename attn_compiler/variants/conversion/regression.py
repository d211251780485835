"""Least squares that hold on to a start, as firmly as data that was kept back asks for.

    W = argmin |X W - Y|^2 + hold * mean(X^T X) |W - g W_0|^2,      g = <X W_0, Y> / |X W_0|^2

With hold infinite only the number g is fitted: few rows decide little, many decide all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float64).tiny
# of a mean square; the first wins where nothing was kept back
_HOLDS = (1e-1, math.inf, 10.0, 1.0, 1e-2, 1e-3, 1e-4, 1e-6)


@dataclass(frozen=True, slots=True)
class Products:
    """Sums over rows, in double.

    Attributes:
        normal: X^T X [n, n].
        right: X^T Y [n, D].
    """

    normal: Tensor
    right: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Products:
        """Of rows X [N, n] and Y [N, D]."""
        x, y = x.double(), y.double()
        return cls(x.mT @ x, x.mT @ y)

    def __add__(self, other: Products) -> Products:
        return Products(self.normal + other.normal, self.right + other.right)


def regressed(fitted: Products, kept: Products | None, start: Tensor) -> Tensor:
    """W [n, D] in double.

    Args:
        fitted: of the rows to fit.
        kept: of rows that choose how firmly to hold on; then both are fitted.
        start: W_0 [n, D].
    """
    start = _gain(fitted, start.double()) * start.double()
    if kept is None:
        return _held(fitted, start, _HOLDS[0])
    hold = min(_HOLDS, key=lambda hold: _missed(_held(fitted, start, hold), kept))
    return _held(fitted + kept, start, hold)


def _gain(products: Products, start: Tensor) -> Tensor:
    size = (start * (products.normal @ start)).sum().clamp_min(_TINY)
    return (start * products.right).sum() / size


def _held(products: Products, start: Tensor, hold: float) -> Tensor:
    normal, right = products.normal, products.right
    if math.isinf(hold):
        return start
    ridge = (hold * normal.diagonal().mean()).clamp_min(_TINY).expand(len(normal)).diag()
    way: Tensor = torch.linalg.solve(normal + ridge, right - normal @ start)
    return start + way


def _missed(found: Tensor, products: Products) -> float:
    """Square of what is missed, less what does not depend on `found`."""
    return float((found * (products.normal @ found - 2 * products.right)).sum())
