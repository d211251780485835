"""How a causal condition is made: a boolean tensor [T, T], or what is added to the scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.entry import D

SCALE = 1 / math.sqrt(D)
INF = float("-inf")


def tril(t: int) -> Tensor:
    return torch.tril(torch.ones(t, t)) == 1


def triu(t: int) -> Tensor:
    return ~torch.triu(torch.ones(t, t, dtype=torch.bool), diagonal=1)


def compared(t: int) -> Tensor:
    return torch.arange(t)[None, :] <= torch.arange(t)[:, None]


def compared_backwards(t: int) -> Tensor:
    rows = torch.arange(t).view(-1, 1)
    return (rows - torch.arange(t)).ge(0)


def strictly(t: int) -> Tensor:
    position = torch.arange(t)
    return ~(position.unsqueeze(0) > position.unsqueeze(1))


def four_dimensional(t: int) -> Tensor:
    return torch.ones(t, t).tril().view(1, 1, t, t).bool()


def additive(t: int) -> Tensor:
    return torch.full((t, t), INF).triu(1) == 0


def counted(t: int) -> Tensor:
    order = torch.ones(t).cumsum(0)
    return order[:, None] >= order[None, :]


def by_indices(t: int) -> Tensor:
    mask = torch.zeros(t, t, dtype=torch.bool)
    rows, columns = torch.tril_indices(t, t)
    mask[rows, columns] = True
    return mask


CONDITIONS = (tril, triu, compared, compared_backwards, strictly, four_dimensional, additive)
