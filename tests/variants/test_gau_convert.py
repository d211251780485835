"""Weights of two units out of a trained block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from attn_compiler.kernels.gau_layer import GauForm, GauParameters, fresh, gau_layer
from attn_compiler.variants.conversion.gau import Net, Taught, kept_back, missed, net_start

WIDTH, SECOND = 7, GauForm(chunk=5, causal=True, scale_mode="fixed(1)")


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(expanded: int) -> GauParameters:
    return fresh((WIDTH, expanded, 4), chunk=5, like=numbers(1, seed=0))


def taught(net: Net, act: object) -> list[Taught]:
    found = []
    for seed in range(4):
        x = numbers(3, 11, WIDTH, seed=seed)
        up = x @ net.up + (0 if net.b_up is None else net.b_up)
        gate = None if net.gate is None else x @ net.gate
        hidden = act(up) if gate is None else act(gate) * up  # type: ignore[operator]
        y = hidden @ net.down + (0 if net.b_down is None else net.b_down)
        found.append(Taught(x, y))
    return found


def lost(found: GauParameters, calls: list[Taught]) -> float:
    return missed(calls, [gau_layer(c.x, found, SECOND) for c in calls])


@pytest.mark.parametrize(
    ("name", "act", "gated", "expanded", "most"),
    [
        ("silu", functional.silu, True, 19, 1e-20),  # 2 * 9 channels fit
        ("silu", functional.silu, True, 9, 2e-2),
        ("gelu", functional.gelu, True, 13, 2e-2),
        ("gelu", functional.gelu, False, 9, 1e-3),
        ("relu", functional.relu, False, 9, 1e-2),
        ("silu", functional.silu, False, 9, 1e-9),
    ],
)
def test_a_net_that_fits(name: str, act: object, gated: bool, expanded: int, most: float) -> None:
    gate = numbers(WIDTH, 9, seed=8) if gated else None
    b_up = None if gated else numbers(9, seed=9)
    net = Net(
        numbers(WIDTH, 9, seed=5),
        b_up,
        numbers(9, WIDTH, seed=6),
        numbers(WIDTH, seed=7),
        name,
        gate,
    )
    calls = taught(net, act)
    assert lost(net_start(unit(expanded), net, calls), calls) < most


def test_the_channels_that_matter_stay() -> None:
    net = Net(numbers(WIDTH, 9, seed=5), None, numbers(9, WIDTH, seed=6), None, "silu")
    net.down[[1, 4, 6]] *= 1e-4
    calls = taught(net, functional.silu)
    assert lost(net_start(unit(6), net, calls), calls) < 1e-6


def test_a_fourth_is_kept_back() -> None:
    assert kept_back([1]) == ([1], [])
    assert kept_back([1, 2]) == ([1], [2])
    assert kept_back(list(range(9))) == ([0, 1, 2, 4, 5, 6, 8], [3, 7])
