"""A choice fits, is quick, is kept for a class of shapes, and obeys physics as a whole."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_compiler.cost import search
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.limits import facts, resident
from attn_compiler.cost.peers import order
from attn_compiler.cost.problem import TEMPLATES, Problem, Template, bucket, visible
from attn_compiler.cost.search import choose
from attn_compiler.cost.tile import legal

NAMES = ("h200", "h100-pcie", "a100", "l4", "rtx4090", "rtx5090")
H200 = Hardware.named("h200")
PREFILL = Problem(4, 32, 8, 4096, 4096, 128, 128, right=0)
DECODE = Problem(4, 32, 8, 1, 8192, 128, 128, right=0, shift=8191)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_choice_fits(name: str, width: int, template: Template) -> None:
    hardware = Hardware.named(name)
    problem = replace(PREFILL, head_dim=width, value_dim=width)
    found = choose(hardware, problem, template)
    assert found
    for tile, expected in found:
        takes = facts(hardware, template, max(64, problem.width), 2, tile)
        assert takes is not None and takes.compiled and not takes.spilled
        assert takes.shared <= hardware.shared_block and takes.registers <= 512
        assert resident(hardware, tile.warps, takes.registers, takes.shared) >= 1
        assert expected.seconds > 0
    assert [t.seconds for _, t in found] == sorted(t.seconds for _, t in found)


def test_where_no_kernel_runs_there_is_no_choice() -> None:
    for name in ("v100", "t4", "cpu"):
        assert choose(Hardware.named(name), PREFILL) == ()
    assert choose(H200, replace(PREFILL, head_dim=512)) == ()
    # of Blackwell's servers the compiler was asked about the forward only
    assert choose(Hardware.named("b200"), PREFILL) != ()
    assert choose(Hardware.named("mi355x"), PREFILL, "queries") == ()
    assert choose(H200, replace(PREFILL, itemsize=4, tf32=True)) == ()


@pytest.mark.parametrize("name", ["h200", "a100", "l4"])
def test_single_precision(name: str) -> None:
    for template in TEMPLATES:
        found = choose(Hardware.named(name), replace(PREFILL, itemsize=4), template)
        # without matrix units: slower than 16-bit products by at least their rates' ratio
        fast = choose(Hardware.named(name), PREFILL, template)
        assert found[0][1].seconds > 3 * fast[0][1].seconds


def test_score_programs_leave_room() -> None:
    plain = {t for t, _ in legal(H200, PREFILL, "forward")}
    with_reads = {t for t, _ in legal(H200, replace(PREFILL, score_bytes=2), "forward")}
    assert with_reads and with_reads < plain


def test_a_long_prefill_takes_large_tiles_and_a_decode_packs_heads_and_splits() -> None:
    tile, expected = choose(H200, PREFILL)[0]
    assert tile.block_m == 128 and tile.splits == 1 and tile.heads == 1
    flops = 4 * 4 * 32 * visible(PREFILL) * 128
    # what plain Triton kernels are known to reach there: 370 to 490 TFLOP/s
    assert 330e12 < flops / expected.seconds < 560e12
    tile, expected = choose(H200, DECODE)[0]
    assert tile.heads == 4 and tile.block_m <= 32 and tile.splits > 1
    moved = 2 * 4 * 8 * 8192 * 128 * 2
    assert 0.4 * 4.8e12 < moved / expected.seconds < 4.8e12


def test_a_choice_is_quick() -> None:
    def once(problem: Problem) -> float:
        start = time.process_time()  # not what other processes take
        choose(H200, problem)
        return time.process_time() - start

    once(PREFILL), once(DECODE)
    # classes that were not met before
    assert min(once(replace(PREFILL, batch=n)) for n in range(5, 9)) < 0.010
    assert min(once(replace(DECODE, batch=n)) for n in range(5, 9)) < 0.010
    assert min(once(DECODE) for _ in range(5)) < 0.001


def test_a_class_of_shapes_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is counted, since seconds are the machine's."""
    predictions = 0
    predict = search.predict

    def counted(*args: Any) -> Any:
        nonlocal predictions
        predictions += 1
        return predict(*args)

    monkeypatch.setattr(search, "predict", counted)
    search._choose.cache_clear()
    first = choose(H200, PREFILL)
    asked = predictions
    assert 0 < asked == len(first) <= 200
    for n in range(3073, 4097, 93):  # lengths of the same class
        assert choose(H200, replace(PREFILL, rows=n, keys=n)) is first
    assert predictions == asked
    for n in range(1000, 9000, 7):  # a cache that grows
        choose(H200, replace(DECODE, keys=n, shift=n - 1))
    assert predictions - asked <= 8 * 200
    order.cache_clear()
    for work in ("forward", "backward"):
        for n in range(3073, 4097, 93):
            order(H200, replace(PREFILL, rows=n, keys=n).bucketed(), ("flash", "triton"), work)
    assert order.cache_info().misses == 2


def test_a_growing_length_meets_few_classes() -> None:
    classes = {replace(DECODE, keys=n, shift=n - 1).bucketed() for n in range(1000, 9000)}
    assert len(classes) <= 8
    classes = {replace(PREFILL, rows=n, keys=n).bucketed() for n in range(1000, 9000)}
    assert len(classes) <= 8
    assert [bucket(n) for n in (1, 16, 17, 25, 33, 1000, 1025)] == [1, 16, 24, 32, 48, 1024, 1536]


@settings(max_examples=25)
@given(
    st.sampled_from(NAMES),
    st.sampled_from(TEMPLATES),
    st.integers(1, 4),
    st.sampled_from([1, 7, 100, 2000]),
    st.integers(1, 30000),
    st.integers(1, 30000),
    st.booleans(),
)
def test_longer_is_never_cheaper(
    name: str, template: Template, group: int, rows: int, keys: int, more: int, causal: bool
) -> None:
    hardware = Hardware.named(name)
    problem = Problem(2, 6 * group, 6, rows, keys, 64, 64, right=0 if causal else None)
    problem = replace(problem, shift=keys - rows)
    longer = replace(problem, keys=keys + more, shift=keys + more - rows)
    before = choose(hardware, problem, template)[0][1].seconds
    assert choose(hardware, longer, template)[0][1].seconds >= before * (1 - 1e-9)
    faster = replace(hardware, clock=hardware.clock * 2, dram_rate=hardware.dram_rate * 2)
    assert choose(faster, problem, template)[0][1].seconds <= before * (1 + 1e-9)
