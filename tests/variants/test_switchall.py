"""The feed-forward net of SwitchAll: its sizes and its costs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from attn_compiler.errors import BadOption
from attn_compiler.kernels import experts
from attn_compiler.kernels.sigma_moe import net
from attn_compiler.planning import plan
from attn_compiler.variants.base import Shape
from attn_compiler.variants.switchhead import NetSizes, SwitchHead, net_cost, net_sizes


@pytest.mark.parametrize(("width", "experts_"), [(412, 16), (1024, 32)])
def test_the_papers_nets(width: int, experts_: int) -> None:
    paper = NetSizes(experts_, 128)
    assert net_sizes(width, paper.parameters(width)) == paper and paper.k == 4
    # those of the dense baselines, 2053 and 4110 wide, with biases
    hidden = {412: 2053, 1024: 4110}[width]
    assert net_sizes(width, (2 * width + 1) * hidden + width) == paper


@given(st.integers(8, 8192), st.integers(97, 65536), st.sampled_from([2, 3]), st.booleans())
def test_as_many_parameters_within_a_percent(
    width: int, hidden: int, matrices: int, biased: bool
) -> None:
    parameters = matrices * width * hidden + biased * ((matrices - 1) * hidden + width)
    found = net_sizes(width, parameters)
    assert 4 <= found.experts <= 32 and found.hidden >= 1
    off = abs(found.parameters(width) / parameters - 1)
    assert off <= 0.01, (found, off)


def test_a_net_that_is_too_small() -> None:
    with pytest.raises(BadOption, match="too small"):
        net_sizes(12, 80)


@pytest.mark.parametrize("sizes", [NetSizes(5, 3), NetSizes(3, 7)])
def test_operations_are_those_of_the_kernels(sizes: NetSizes) -> None:
    experts.register_flops()
    n, g, width = sizes.experts, sizes.hidden, 11
    given_ = [torch.randn(s) for s in ((2, 7, width), (n, width), (n, width, g), (n, g, width))]
    with FlopCounterMode(display=False) as counter:
        net(*given_, k=sizes.k, expert_dropout=0.0, hidden_dropout=0.0)
    cost = net_cost(sizes, "prefill").numbers(B=2, T=7, D=width, n=4)
    assert cost.flops == counter.get_total_flops()
    training = net_cost(sizes, "training").numbers(B=2, T=7, D=width, n=4)
    assert training.flops == 3 * cost.flops and training.saved > 0


def test_a_plan_is_of_the_whole_block() -> None:
    shape = Shape(1, 2048, 2048, 16, 64)
    alone = plan(SwitchHead(), shape, hardware="h200")
    both = plan(SwitchHead(feed_forward="sigma_moe"), shape, hardware="h200")
    assert both.spec.feed_forward == "sigma_moe" and isinstance(both.spec.k, int)
    net_alone = net_cost(net_sizes(1024, 8 * 1024**2), "prefill", "sorted")
    extra = net_alone.numbers(B=1, T=2048, D=1024, n=2).flops
    assert both.flops == pytest.approx(alone.flops + extra)
    dense = both.alternatives[0]
    assert dense.flops == pytest.approx(alone.alternatives[0].flops + 16 * 2048 * 1024**2)
    steps = plan(SwitchHead(feed_forward="sigma_moe"), Shape(1, 1, 2048, 16, 64), hardware="h200")
    assert 0 < steps.seconds < both.seconds
