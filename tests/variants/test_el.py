"""EL-attention: the paper's memory table, the speed-ups of Slim attention's table for Whisper, and
the points from which it pays.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import sympy

from attn_compiler.cost.letters import B, Cost, D, G, H, K, L, S, T, d, e, n
from attn_compiler.planning import plan
from attn_compiler.variants.base import Scope, Shape
from attn_compiler.variants.el import (
    Beside,
    ELAttention,
    break_even_tokens,
    compute_bound_rows,
    cost,
    memory_ratio,
    most_first_rows,
    most_heads,
    reads_less,
)
from attn_compiler.variants.flash import Flash
from attn_compiler.variants.flash import cost as flash_cost

GIB = 2**30


def ordinary(work: str, cross: bool) -> Cost:
    return flash_cost(Flash(), work, cross=cross, scope=Scope.SITE)  # type: ignore[arg-type]


def same(one: object, other: object) -> bool:
    return bool(sympy.expand(one - other) == 0)  # type: ignore[operator]


# batch, length -> GB with ordinary attention and with EL, BART-large, fp16, 4 beams
MEMORY = {
    (32, 256): (1.5, 0.0156),
    (32, 1024): (6, 0.0625),
    (64, 256): (3, 0.0313),
    (64, 1024): (12, 0.125),
    (320, 256): (15, 0.1563),
    (320, 1024): (60, 0.625),
}


@pytest.mark.parametrize(("batch", "length"), MEMORY)
def test_memory_of_input_related_states(batch: int, length: int) -> None:
    bart = {"H": 16, "G": 16, "d": 64, "e": 64, "D": 1024, "L": 12, "K": 4, "n": 2, "T": 1}
    sizes = {**bart, "B": batch, "S": length}
    mha = ordinary("decode", cross=True).times(L).numbers(**sizes).cache
    el = cost(ELAttention(), "decode", cross=True).times(L).numbers(**sizes).cache
    expected = MEMORY[batch, length]
    assert mha / GIB == expected[0]
    # four digits behind the point, halves rounded up
    assert math.floor(el / GIB * 10**4 + 0.5) / 10**4 == expected[1]
    assert mha / el == 96 == memory_ratio(1024, 1024, beams=4, layers=12, cross=True)


def test_self_caches_of_wide_heads() -> None:
    assert memory_ratio(1024, 16384) == 32  # T5-11B
    assert memory_ratio(1024, 4096) == 8  # T5-3B
    ratio = ordinary("decode", cross=False).cache / cost(ELAttention(), "decode").cache
    assert sympy.simplify(ratio.subs(e, d) - 2 * G * d / D) == 0


# width, layers, then millions: parameters without and with EL, reads a token without and with it
WHISPER = {
    "tiny": (384, 4, 28.2, 29.4, 6.4, 1.1, 5.60),
    "base": (512, 6, 48.6, 51.7, 12.7, 2.2, 5.83),
    "small": (768, 12, 138.9, 153.1, 38.1, 6.5, 5.84),
    "medium": (1024, 24, 405.4, 455.8, 102.1, 18.1, 5.63),
    "large": (1280, 32, 800.4, 905.2, 172.1, 32.5, 5.30),
}


@pytest.mark.parametrize("model", WHISPER)
def test_whisper_reads_and_speed_ups(model: str) -> None:
    """Batch 64, 1500 frames, 448 tokens; X of the encoder stays on the chip, and a self-attention
    beside EL caches its keys alone.
    """
    width, layers, weights, weights_el, reads, reads_el, speed_up = WHISPER[model]
    sizes = {"H": width // 64, "G": width // 64, "d": 64, "e": 64, "D": width, "L": layers}
    sizes |= {"K": 1, "n": 1, "T": 1}

    def number(found: Cost, **more: int) -> Cost:
        return found.times(layers).numbers(**(sizes | more))

    others = width * 51865 + layers * 8 * width**2
    own = number(ordinary("decode", cross=False), B=0, S=448).read
    mine = others + own + number(ordinary("decode", cross=True), B=0, S=1500).read
    with_el = others + own + number(cost(ELAttention(), "decode", cross=True), B=0, S=1500).read
    assert (round(mine / 1e6, 1), round(with_el / 1e6, 1)) == (weights, weights_el)
    assert with_el - mine == 2 * width**2 * layers
    self_cache = number(ordinary("decode", cross=False), B=1, S=448).cache
    cross_cache = number(ordinary("decode", cross=True), B=1, S=1500).cache
    before = mine / 64 + self_cache + cross_cache
    after = with_el / 64 + self_cache / 2
    assert (round(before / 1e6, 1), round(after / 1e6, 1)) == (reads, reads_el)
    assert round(before / after, 2) == speed_up


def test_the_two_columns_of_a_step() -> None:
    one = {e: d, G: H, T: 1}
    for cross, plain in ((False, 8), (True, 4)):
        mha, el = ordinary("decode", cross), cost(ELAttention(), "decode", cross=cross)
        assert same(mha.flops.subs(one).subs(S, 0), plain * B * K * D * H * d)
        assert same(el.flops.subs(one).subs(S, 0), 8 * B * K * D * H * d)
        assert same(sympy.diff(mha.flops.subs(one), S), 4 * B * K * H * d)
        assert same(sympy.diff(el.flops.subs(one), S), 4 * B * K * H * D)
        assert same(sympy.diff(mha.read.subs(one), S), 2 * B * K * H * d * n)
        assert same(sympy.diff(el.read.subs(one), S), B * D * n * (1 if cross else K))
        assert same(mha.read.subs(one).subs(B, 0), plain * D * H * d * n / 2)
        assert same(el.read.subs(one).subs(B, 0), 4 * D * H * d * n)


def test_one_step_of_bart_large() -> None:
    sizes = {"B": 320, "K": 4, "S": 1024, "T": 1, "H": 16, "G": 16, "d": 64, "e": 64, "D": 1024}
    el = cost(ELAttention(), "decode", cross=True)
    attention = sympy.diff(el.flops, S) * S, sympy.diff(el.read, S) * S
    found = Cost(flops=attention[0], read=attention[1]).numbers(**sizes, n=2)
    assert (round(found.flops / 1e9), round(found.read / 1e9, 2)) == (86, 0.67)
    mha = sympy.diff(ordinary("decode", cross=True).read, S) * S
    assert round(Cost(read=mha).numbers(**sizes, n=2).read / 1e9, 1) == 5.4


# operations a second over bytes a second of data sheets: V100, H100, H200
@pytest.mark.parametrize(
    ("balance", "rows", "heads"),
    [(125e12 / 0.9e12, 69, 139), (989e12 / 3.35e12, 148, 295), (989e12 / 4.8e12, 103, 206)],
)
def test_thresholds_of_devices(balance: float, rows: int, heads: int) -> None:
    assert round(compute_bound_rows(balance)) == rows
    assert round(most_heads(balance)) == heads


def test_break_even_tokens_is_where_caches_and_weights_are_equal() -> None:
    width, inner, beams = 1031, 11 * 89, 3
    sizes = {"H": 11, "G": 11, "d": 89, "e": 89, "D": width, "K": beams, "T": 1, "n": 2, "L": 1}

    def reads(found: Cost, tokens: float) -> float:
        bytes_ = found.read.subs(B, 0) + sympy.diff(found.read, S) * S
        return float(Cost(read=bytes_).numbers(**sizes, B=1, S=tokens).read)

    tokens = break_even_tokens(width, inner, beams)
    mha, el = ordinary("decode", cross=True), cost(ELAttention(), "decode", cross=True)
    assert math.isclose(reads(mha, tokens), reads(el, tokens))
    for batch, length in ((1, math.ceil(tokens)), (1, math.floor(tokens))):
        expected = reads(el, batch * length) < reads(mha, batch * length)
        assert reads_less(width, inner, batch=batch, length=length, beams=beams, cross=True) is (
            expected
        )


def test_break_even_of_square_layers_and_grouped_heads() -> None:
    # B n (2 K - 1) > 2 D where H d = D
    assert break_even_tokens(1024, 1024) == 2 * 1024
    assert break_even_tokens(1024, 1024, beams=4) == 2 * 1024 / 7
    assert break_even_tokens(1024, 512) == math.inf
    # a self cache is smaller where D < 2 G d: more than half as many kv heads as heads
    assert reads_less(1024, 9 * 64, batch=1, length=1)
    assert not reads_less(1024, 8 * 64, batch=1, length=1)


def test_a_first_step_and_prefill() -> None:
    width, heads, length = 1024, 16, 1500
    limit = most_first_rows(width, heads, length)
    assert width / heads < limit < width / (heads - 1) * 1.1
    sizes = {"H": heads, "G": heads, "d": 64, "e": 64, "D": width, "B": 1, "n": 2, "L": 1}
    for rows, wins in ((math.floor(limit), True), (math.ceil(limit), False)):
        shape = {**sizes, "T": rows, "S": length}
        mha = ordinary("prefill", cross=True).numbers(**shape).flops
        el = cost(ELAttention(), "prefill", cross=True).numbers(**shape).flops
        assert (el < mha) is wins


def test_whole_sequences_run_the_ordinary_attention() -> None:
    for work, cross in (("training", False), ("training", True)):
        assert cost(ELAttention(), work, cross=cross) == ordinary(work, cross)  # type: ignore[arg-type]
    el, mha = cost(ELAttention(), "prefill"), ordinary("prefill", cross=False)
    assert (el.flops, el.read) == (mha.flops, mha.read)
    assert same(el.cache, n * B * S * D)


def test_a_key_s_bias_that_is_kept_costs_something() -> None:
    kept, dropped = cost(ELAttention(keep_key_bias=True), "decode"), cost(ELAttention(), "decode")
    assert same(kept.flops - dropped.flops, 2 * B * K * T * H * d)
    assert same(kept.other, B * K * H * T * S)


def test_what_stands_beside_x_is_counted() -> None:
    """A quarter of the features rotated: 2 e / (D + H r) = 1.6; a size of 4 bytes for each key."""
    sizes = {"B": 3, "K": 2, "S": 509, "T": 1, "H": 8, "G": 8, "d": 64, "e": 64, "D": 512, "n": 2}
    plain = cost(ELAttention(), "decode").numbers(**sizes)
    tokens = 3 * 2 * 509
    turned = cost(ELAttention(), "decode", beside=Beside(16, 8)).numbers(**sizes)
    assert turned.cache - plain.cache == 2 * tokens * 8 * 16
    mha = ordinary("decode", cross=False).numbers(**sizes).cache
    assert mha / turned.cache == 1.6 == memory_ratio(512, 512, beside=8 * 16)
    scores, new = 4 * tokens * 8, 2 * 6 * 512 + 2 * 512 * 512
    moved = turned.read - plain.read
    assert moved == 2 * tokens * 8 * 16 + scores + new - 2 * 8 * 16 * 512
    normed = cost(ELAttention(), "decode", beside=Beside(norms=8)).numbers(**sizes)
    assert normed.cache - plain.cache == 4 * tokens * 8
    assert normed.flops - plain.flops == 2 * 6 * 512 * 512
    kept = cost(ELAttention(), "prefill", beside=Beside(16, 8, 8)).cache
    assert kept == n * B * S * D + n * B * S * 8 * 16 + 4 * B * S * 8


def test_a_plan_knows_what_stands_beside_x() -> None:
    shape = Shape(4, 1, 1021, 8, 64, width=512)
    plain, turned, normed = (
        plan(ELAttention(), s, hardware="h200")
        for s in (shape, replace(shape, rotated=16), replace(shape, norms=8))
    )
    assert turned.memory - plain.memory == 2 * 4 * 1021 * 8 * 16
    shared = replace(shape, rotated=16, rotated_heads=1)
    memory = plan(ELAttention(), shared, hardware="h200").memory
    assert memory - plain.memory == 2 * 4 * 1021 * 16
    assert normed.memory - plain.memory == 4 * 4 * 1021 * 8
    assert min(turned.seconds, normed.seconds) > plain.seconds
