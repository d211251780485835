"""Exact attention: the costs that every other variant is compared with."""

from __future__ import annotations

import sympy

from attn_compiler.cost.letters import B, Cost, D, G, H, K, S, T, d, e, n
from attn_compiler.variants.base import Scope
from attn_compiler.variants.costs.parts import linear
from attn_compiler.variants.flash import Flash, cost


def same(one: object, other: object) -> bool:
    return bool(sympy.expand(one - other) == 0)  # type: ignore[operator]


def test_core_of_a_sequence() -> None:
    found = cost(Flash(), "prefill")
    assert same(found.flops, 2 * B * H * T * S * (d + e))
    assert same(found.exps, B * H * T * S)
    assert same(found.read + found.written, n * B * (H * T + G * S) * (d + e))
    assert same(found.cache, n * B * G * S * (d + e))
    assert same(cost(Flash(), "prefill", causal=True).flops * 2, found.flops)


def test_training_computes_seven_products_backward_and_keeps_no_scores() -> None:
    forward, both = cost(Flash(), "prefill", causal=True), cost(Flash(), "training", causal=True)
    assert same(
        (both.flops - forward.flops).subs(e, d), sympy.Rational(7, 2) * forward.flops.subs(e, d)
    )
    # scores and dq, dk: twice and once each; dP and dv: twice and once
    pairs = B * H * T * S / 2
    assert same(both.flops - forward.flops, 2 * pairs * ((2 + 1 + 1) * d + (2 + 1) * e))
    assert both.exps == 3 * forward.exps
    kept = n * B * (H * T + G * S) * (d + e) + 4 * B * H * T
    assert same(both.saved, kept)
    assert both.cache == 0


def test_bytes_of_the_backward() -> None:
    forward, both = cost(Flash(), "prefill"), cost(Flash(), "training")
    q, k, v, out = n * B * H * T * d, n * B * G * S * d, n * B * G * S * e, n * B * H * T * e
    sums = 4 * B * H * T  # the forward's logs, and the row sums of the gradient: float32
    row_sums = out + out
    one_kernel = q + k + v + out + sums + sums
    assert same(both.read - forward.read, row_sums + 2 * one_kernel)
    assert same(both.written - forward.written, sums + sums + q + k + v)
    assert both.launches - forward.launches == 3


def test_bytes_of_a_product() -> None:
    rows, wide, out = sympy.symbols("rows wide out")
    x, w, y = n * rows * wide, n * wide * out, n * rows * out
    forward, both = linear(rows, wide, out), linear(rows, wide, out, training=True)
    assert same(forward.read, x + w)
    assert same(forward.written, y)
    # dx from dy and w, dw from dy and x
    assert same(both.read - forward.read, (y + w) + (y + x))
    assert same(both.written - forward.written, x + w)
    assert (forward.launches, both.launches) == (1, 3)


def test_a_step_reads_every_beam_s_cache_whether_causal_or_not() -> None:
    step = cost(Flash(), "decode", causal=True)
    assert step == cost(Flash(), "decode")
    assert same(sympy.diff(step.read, S), n * B * K * G * (d + e))


def test_site_and_block_add_their_products() -> None:
    scopes = (Scope.CORE, Scope.SITE, Scope.BLOCK)
    core, site, block = (cost(Flash(), "prefill", scope=scope) for scope in scopes)
    square = {e: D / H, d: D / H, G: H, S: T}
    assert same((site.flops - core.flops).subs(square), 8 * B * T * D**2)
    assert same(block.flops - site.flops, 16 * B * T * D**2)
    cross = cost(Flash(), "decode", cross=True, scope=Scope.SITE)
    own = cost(Flash(), "decode", scope=Scope.SITE)
    assert same(own.flops - cross.flops, 2 * B * K * T * D * G * (d + e))
    # weights alone: without a batch nothing else is read
    assert same(cross.read.subs(B, 0), n * D * H * (d + e))
    assert same(own.read.subs(B, 0), n * D * (H + G) * (d + e))


def test_training_of_a_product_is_three_products() -> None:
    forward, both = (cost(Flash(), work, scope=Scope.SITE) for work in ("prefill", "training"))
    cores = [cost(Flash(), work).flops for work in ("prefill", "training")]
    assert same(both.flops - cores[1], 3 * (forward.flops - cores[0]))
    assert same(both.saved - cost(Flash(), "training").saved, n * B * T * D)


def test_it_becomes_numbers() -> None:
    sizes = {"B": 2, "T": 7, "S": 7, "H": 3, "G": 3, "d": 5, "e": 5, "D": 15, "n": 2, "K": 1}
    found = cost(Flash(), "training", scope=Scope.BLOCK).numbers(**sizes)
    assert isinstance(found, Cost)
    assert found.flops == 3 * 2 * 2 * 7 * 12 * 15**2 + 9 * 2 * 2 * 3 * 7 * 7 * 5
