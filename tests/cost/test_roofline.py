"""The model obeys physics: more work is never cheaper, a faster machine never slower."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_compiler.cost.calibration import Calibration
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.letters import Cost
from attn_compiler.cost.problem import TEMPLATES, Problem, Template, TileConfig
from attn_compiler.cost.roofline import predict, time_of, time_of_work
from attn_compiler.cost.work import Step, Work

H200, L4 = Hardware.named("h200"), Hardware.named("l4")
ROUND = Calibration(hidden=0.0, clock=1.0, dram=1.0, l2=1.0, launch=0.0, prologue=0.0)
TILE = TileConfig(128, 64, 8, 3)
LONG = Problem(4, 32, 32, 8192, 8192, 128, 128)


def machine(processors: int) -> Hardware:
    return replace(H200, processors=processors, clock=1.0, sustained=1.0)


def seconds(blocks: tuple[tuple[float, float], ...], processors: int, resident: int = 1) -> float:
    """Of programs whose tiles take 10,000 clocks at 1 Hz, with nothing else to wait for."""
    work = Work(blocks, Step(9900.0, 0.0, 0.0, 0.0), 0.0, 0.0, 1)
    return time_of_work(machine(processors), work, TILE, resident, ROUND).seconds / 1e4


def test_equal_programs_come_in_whole_waves() -> None:
    assert seconds(((8, 3),), 4) == 6
    assert seconds(((9, 3),), 4) == 9
    assert seconds(((3, 3),), 4) == 3


def test_unequal_programs_share_evenly_but_for_the_longest() -> None:
    assert seconds(((1, 100), (50, 1)), 4) == 100
    assert seconds(((1, 10), (30, 1)), 4) == 10
    assert seconds(((4, 8), (4, 4), (40, 1)), 4) == (4 * 8 + 4 * 4 + 40) / 4
    # the five longest: some processor runs two of them
    assert seconds(((5, 8), (1, 1)), 4) == 16


def test_residents_share_the_processor() -> None:
    # matrix units are busy all the time: twice the programs, twice the time
    assert seconds(((8, 3),), 4, 2) == pytest.approx(6, rel=0.02)
    assert seconds(((4, 3),), 4, 2) == 3


def test_what_bounds_it() -> None:
    assert predict(H200, LONG, "forward", TILE, 1).limit == "tensor"
    assert predict(H200, replace(LONG, head_dim=64, value_dim=64), "forward", TILE, 2).limit == (
        "special"
    )
    decode = Problem(64, 32, 8, 1, 8192, 128, 128)
    packed = TileConfig(16, 64, 4, 4, heads=4)
    assert predict(H200, decode, "forward", packed, 2).limit == "dram"
    assert predict(H200, replace(LONG, batch=1, heads=1, kv_heads=1), "forward", TILE, 1).limit == (
        "waves"
    )
    small = Problem(1, 2, 2, 16, 16, 64, 64)
    assert predict(H200, small, "forward", TileConfig(16, 64, 4, 3), 1).limit == "launch"
    assert predict(H200, LONG, "forward", TileConfig(16, 64, 4, 4), 2).limit == "l2"


def test_the_bounds_of_a_fused_forward_on_hopper() -> None:
    """Without any overlap an H200 at 1.6 GHz reaches 330, 477 and 615 TFLOP/s at head dims 64, 128
    and 256: exponentials 16 and ordinary operations 128 lanes a clock beside 4096 flop.
    """
    for width, bound in ((64, 330e12), (128, 477e12), (256, 615e12)):
        problem = replace(LONG, head_dim=width, value_dim=width, rows=16384, keys=16384)
        wide = TileConfig(128, 128, 8, 2)
        found = predict(H200, problem, "forward", wide, 1, ROUND)
        flops = 4.0 * 4 * 32 * 16384**2 * width
        # the loop and the accumulator's rescaling take some of it
        assert 0.85 * bound < flops / found.seconds < 1.01 * bound


def test_splitting_is_the_known_trade() -> None:
    """ceil(waves) (tiles / split + c) + merge split: few programs want parts, many want none."""
    tile = TileConfig(16, 64, 4, 4, heads=4)

    def best(batch: int, keys: int) -> int:
        problem = Problem(batch, 32, 8, 1, keys, 128, 128)
        times = {
            s: predict(H200, problem, "forward", replace(tile, splits=s), 2).seconds
            for s in (1, 2, 4, 8, 16, 32, 64)
        }
        return min(times, key=lambda s: times[s])

    assert best(1, 131072) >= 16 and 2 <= best(4, 16384) <= 16
    assert best(64, 16384) == 1 and best(1, 128) == 1


lengths = st.integers(1, 20000)
tiles = st.builds(
    TileConfig,
    st.sampled_from([16, 64, 128]),
    st.sampled_from([32, 64, 128]),
    st.sampled_from([4, 8]),
    st.sampled_from([1, 2, 3]),
)
problems = st.builds(
    lambda batch, group, kv_heads, rows, keys, width, causal: Problem(
        batch, group * kv_heads, kv_heads, rows, keys, width, width, right=0 if causal else None
    ),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 7),
    lengths,
    lengths,
    st.sampled_from([40, 64, 128]),
    st.booleans(),
)
templates = st.sampled_from(TEMPLATES)
residents = st.integers(1, 4)


@settings(max_examples=40)
@given(problems, templates, tiles, residents, st.integers(1, 5000))
def test_more_is_never_cheaper(
    problem: Problem, template: Template, tile: TileConfig, resident: int, more: int
) -> None:
    before = predict(H200, problem, template, tile, resident).seconds
    wider = replace(problem, batch=problem.batch + more % 7)
    assert predict(H200, wider, template, tile, resident).seconds >= before * (1 - 1e-12)
    if template != "keys_and_values":
        longer = replace(problem, keys=problem.keys + more)
        assert predict(H200, longer, template, tile, resident).seconds >= before * (1 - 1e-12)


@settings(max_examples=40)
@given(problems, templates, tiles, residents, st.floats(1.0, 4.0))
def test_a_faster_machine_is_never_slower(
    problem: Problem, template: Template, tile: TileConfig, resident: int, factor: float
) -> None:
    before = predict(L4, problem, template, tile, resident).seconds
    for faster in (
        replace(L4, clock=L4.clock * factor),
        replace(L4, dram_rate=L4.dram_rate * factor),
        replace(L4, l2_rate=L4.l2_rate * factor),
        replace(L4, l2=L4.l2 * factor),
        replace(L4, flops16=L4.flops16 * factor),
        replace(L4, exps=L4.exps * factor),
    ):
        assert predict(faster, problem, template, tile, resident).seconds <= before * (1 + 1e-12)


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 99)), min_size=1, max_size=6),
    st.integers(1, 140),
    residents,
)
def test_more_processors_and_less_work_are_never_slower(
    blocks: list[tuple[int, int]], processors: int, resident: int
) -> None:
    ordered = tuple(sorted(blocks, key=lambda b: -b[1]))
    before = seconds(ordered, processors, resident)
    assert seconds(ordered, processors + 1, resident) <= before * (1 + 1e-12)
    assert seconds(ordered[:-1], processors, resident) <= before * (1 + 1e-12)


def test_a_cost_without_a_tile() -> None:
    gemm = Cost(flops=2 * 8192.0**3, read=2 * 2 * 8192.0**2, written=2 * 8192.0**2, launches=1)
    found = time_of(gemm, H200)
    assert found.limit == "tensor"
    # measured on one H200 with random numbers: 770 to 800 TFLOP/s
    assert 770e12 < gemm.flops / found.seconds < 900e12
    copy = Cost(read=2.0**30, written=2.0**30, launches=1)
    assert time_of(copy, H200).limit == "dram"
    assert (copy.read + copy.written) / time_of(copy, H200).seconds == pytest.approx(
        4.3e12, rel=0.01
    )
    assert time_of(copy, H200, held=1e6).seconds < time_of(copy, H200).seconds
    assert time_of(Cost(launches=5), H200).seconds == pytest.approx(5 * 3e-6)
