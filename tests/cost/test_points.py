"""Points of a roofline plot: where they lie, and that no prediction lies above its roof."""

from __future__ import annotations

import pytest
import torch

import attn_compiler as ac
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.points import roofline

H200 = Hardware.named("h200")


def test_roofs() -> None:
    found = roofline(H200)
    assert found.peak == H200.peak16 and found.sustained == 0.87 * H200.peak16
    assert found.roof(1.0) == 4.8e12 and found.roof(1e6) == found.sustained
    assert found.roof(found.ridge) == pytest.approx(found.sustained)
    assert roofline(H200, 4).peak == H200.processors * H200.clock * H200.flops32


def test_a_point_is_work_over_bytes_and_seconds() -> None:
    found = roofline(H200).with_point("a", (600.0, 30.0), 2.0, "dram").points
    assert [(p.name, p.intensity, p.rate, p.limit) for p in found] == [("a", 20.0, 300.0, "dram")]
    assert roofline(H200).with_point("nothing", (0.0, 30.0), 2.0, "launch").points == ()


@pytest.mark.parametrize("hardware", ["h200", "a100", "l4", "cpu"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("query", [1, 1024])
def test_no_way_of_a_plan_lies_above_the_roof(hardware: str, training: bool, query: int) -> None:
    shape = ac.Shape(2, query, 1024, 8, 64, training=training)
    dtype = torch.float32 if hardware == "cpu" else torch.bfloat16
    plan = ac.plan("fastest", shape, hardware=hardware, dtype=dtype)
    drawn = plan.roofline
    assert drawn is not None and drawn.hardware == plan.hardware
    assert [p.name for p in drawn.points] == [plan.name, *(a.name for a in plan.alternatives)]
    for point in drawn.points:
        # a cache may serve what the plot counts as memory's
        assert point.rate <= 1.01 * min(drawn.peak, point.intensity * drawn.cache)
