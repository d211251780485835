"""SwitchHead: the paper's tables by its own count, by its equation and by exact counting; its head
widths; the costs that follow from the exact count.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import sympy
from hypothesis import assume, given
from hypothesis import strategies as st

from attn_compiler.cost.letters import B, Cost, D, E, G, H, K, Number, S, T, d, e, k, n
from attn_compiler.errors import BadOption
from attn_compiler.variants.base import Scope
from attn_compiler.variants.costs import switchhead_tables as tables
from attn_compiler.variants.flash import Flash
from attn_compiler.variants.flash import cost as flash_cost
from attn_compiler.variants.switchhead import (
    SwitchHead,
    attention_parameters,
    break_even_length,
    cost,
    feed_forward_width,
    few_heads,
    filled,
    largest_width,
    parameters,
    whole_width,
)


class Model(NamedTuple):
    """A row of the paper's table of models, its dense baseline, and what the tables say of it."""

    width: int
    heads: int
    experts: int
    k: int
    head_dim: int
    tokens: int
    dense: tuple[int, int]
    positions: bool = True
    context: int = 2


class Printed(NamedTuple):
    """Millions of multiply-adds, and of floats: dense and SwitchHead by the tables; by equation
    13; SwitchHead and dense by exact counting.
    """

    dense: float
    dense_floats: float
    table: float
    table_floats: float
    equation: float
    exact: float
    exact_dense: float


MODELS = {
    "WT103 47M": Model(412, 2, 5, 2, 76, 256, (10, 41)),
    "C4 47M": Model(412, 2, 5, 3, 76, 256, (10, 41)),
    "WT103 262M": Model(1024, 2, 8, 4, 132, 512, (16, 64)),
    "C4 262M": Model(1024, 4, 4, 2, 112, 512, (16, 64)),
    "Enwik8": Model(512, 2, 4, 2, 112, 512, (8, 64)),
    "RoPE 45M": Model(412, 2, 5, 3, 64, 512, (10, 41), False, 1),
    "RoPE 243M": Model(1024, 4, 4, 2, 100, 1024, (16, 64), False, 1),
}

PRINTED = {
    "WT103 47M": Printed(453.4, 3.5, 170.4, 0.8, 200.3, 291.4, 647.1),
    "C4 47M": Printed(453.4, 3.5, 202.5, 0.8, 232.5, 339.6, 647.1),
    "WT103 262M": Printed(5368.7, 21.0, 1955.6, 2.9, 2215.7, 3209.9, 7514.6),
    "C4 262M": Printed(5368.7, 21.0, 2358.1, 5.6, 2819.5, 4018.8, 7514.6),
    "Enwik8": Printed(1610.6, 10.5, 709.3, 2.8, 822.5, 1239.9, 2415.4),
    "RoPE 45M": Printed(560.9, 6.1, 285.6, 1.3, 283.5, 287.7, 560.9),
    "RoPE 243M": Printed(6442.5, 37.7, 3365.5, 10.0, 3357.1, 3390.6, 6442.5),
}


def millions(formula: Number, model: Model, *, dense: bool = False, context: int = 0) -> float:
    heads, head_dim = model.dense if dense else (model.heads, model.head_dim)
    keys = (context or model.context) * model.tokens
    sizes = {"H": heads, "d": head_dim, "D": model.width, "E": model.experts, "k": model.k}
    found = Cost(flops=formula).numbers(**sizes, T=model.tokens, S=keys).flops
    return round(found / 1e6, 1)


@pytest.mark.parametrize("name", MODELS)
def test_tables_by_all_counts(name: str) -> None:
    model, xl = MODELS[name], MODELS[name].positions
    assert PRINTED[name] == Printed(
        dense=millions(tables.dense_macs(xl), model, dense=True),
        dense_floats=millions(tables.dense_floats(xl), model, dense=True),
        table=millions(tables.table_macs(xl), model),
        table_floats=millions(tables.table_floats(xl), model),
        equation=millions(tables.equation_macs(xl), model),
        exact=millions(tables.exact_macs(xl), model),
        exact_dense=millions(tables.exact_dense_macs(xl), model, dense=True),
    )


def test_the_large_rotating_model_was_printed_with_a_context_it_does_not_have() -> None:
    model = MODELS["RoPE 243M"]
    assert millions(tables.table_macs(False), model, context=2) == 4212.7
    assert millions(tables.table_floats(False), model, context=2) == 18.4


def test_44_percent_of_the_operations_is_one_count_of_three() -> None:
    shares = []
    for ours, theirs in (
        (tables.table_macs(True), tables.dense_macs(True)),
        (tables.equation_macs(True), tables.dense_macs(True)),
        (tables.exact_macs(True), tables.exact_dense_macs(True)),
    ):
        model = MODELS["C4 262M"]
        shares.append(millions(ours, model) / millions(theirs, model, dense=True))
    assert [round(share, 3) for share in shares] == [0.439, 0.525, 0.535]


# x before it is rounded, hidden channels of the baseline, and of the paper's model
WIDTHS = {
    "WT103 47M": (78.2, 2053, 2080),
    "C4 47M": (78.2, 2053, 2080),
    "WT103 262M": (133.9, 4110, 4147),
    "C4 262M": (115.7, 4110, 4188),
    "Enwik8": (115.7, 2053, 2088),
    "RoPE 45M": (67.5, 2053, 2092),
    "RoPE 243M": (101.6, 4110, 4136),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_head_widths_of_the_paper(name: str) -> None:
    model, (limit, base, hidden) = MODELS[name], WIDTHS[name]
    spec = SwitchHead(heads=model.heads, experts=model.experts, k=model.k, head_dim=model.head_dim)
    budget = attention_parameters(model.width, *model.dense, positions=model.positions)
    found = largest_width(spec, model.width, budget, positions=model.positions)
    assert round(found, 1) == limit
    assert whole_width(found, (4,)) == model.head_dim
    left = budget - parameters(spec, model.width, positions=model.positions)
    # the paper's hidden widths were rounded by hand, 0 to 6 down
    assert 0 <= feed_forward_width(base, model.width, left) - hidden <= 6


def test_auto_takes_the_paper_s_rule_and_widths_that_fill_tensor_cores() -> None:
    big = filled(SwitchHead(), width=1024, heads=16, head_dim=64)
    assert (big.heads, big.experts, big.k, big.head_dim) == (4, 4, 2, 96)
    small = filled(SwitchHead(), width=412, heads=10, head_dim=41)
    assert (small.heads, small.experts, small.k, small.head_dim) == (2, 5, 3, 64)
    wide = filled(SwitchHead(heads=2), width=1024, heads=16, head_dim=64)
    assert (wide.experts, wide.k) == (8, 4)
    assert filled(SwitchHead(experts=3, k=1, heads=5), width=512, heads=8, head_dim=64).k == 1
    assert filled(SwitchHead(k=7), width=512, heads=8, head_dim=64).experts == 7


@given(st.integers(1, 40), st.integers(8, 128), st.integers(1, 40), st.booleans(), st.booleans())
def test_auto_never_costs_more_parameters(
    heads: int, head_dim: int, kv_heads: int, shared: bool, all_experts: bool
) -> None:
    assume(heads % kv_heads == 0)
    spec = SwitchHead(
        shared_selection=shared, experts_on=("q", "k", "v", "o") if all_experts else ("v", "o")
    )
    width = 61 * 8
    budget = attention_parameters(width, heads, head_dim, kv_heads)
    try:
        found = filled(spec, width=width, heads=heads, head_dim=head_dim, kv_heads=kv_heads)
    except BadOption:
        assert largest_width(replace(spec, **_counts(heads)), width, budget) < 8  # type: ignore[arg-type]
        return
    assert int(found.heads) * int(found.experts) == heads
    assert int(found.k) <= int(found.experts)
    assert int(found.head_dim) % 8 == 0
    assert parameters(found, width) <= budget
    wider = replace(found, head_dim=int(found.head_dim) + 16)
    assert parameters(wider, width) > budget


def _counts(heads: int) -> dict[str, int]:
    maps = few_heads(heads)
    return {"heads": maps, "experts": heads // maps}


def test_a_width_that_does_not_fit_is_refused() -> None:
    assert [whole_width(x) for x in (8.0, 15.9, 16.0, 101.6, 133.9)] == [8, 8, 16, 96, 128]
    with pytest.raises(BadOption, match=r"7\.9 wide"):
        whole_width(7.9)


def test_costs_are_the_exact_count() -> None:
    found = cost(SwitchHead(), "prefill").flops.subs(S, T)
    exact = tables.exact_macs(positions=False).subs(S, T)
    assert sympy.expand(found - 2 * B * exact) == 0
    every = cost(SwitchHead(), "prefill", strategy="masked")
    assert sympy.expand(every.flops.subs(S, T) - found.subs(k, E)) == 0
    # three for each expert of the values, which PyTorch starts one by one
    assert sympy.diff(every.launches, E) == 3 * H


def test_shared_selection_and_projections_without_experts_cost_less() -> None:
    flops = cost(SwitchHead(), "prefill").flops
    shared = cost(SwitchHead(shared_selection=True), "prefill").flops
    assert sympy.expand(flops - shared - 2 * B * T * H * E * D) == 0
    output = cost(SwitchHead(experts_on=("o",)), "prefill").flops
    router, value = 2 * B * T * H * E * D, 2 * B * T * H * d
    assert sympy.expand(flops - output - router - value * (k * (D + 1) - D)) == 0


def test_distances_are_projected_once_for_all_sequences() -> None:
    placed = SwitchHead(positions="transformer_xl")
    found = cost(placed, "prefill").flops.subs(S, T)
    exact = tables.exact_macs(positions=True).subs(S, T)
    again = 2 * (B - 1) * (2 * T - 1) * D * H * d
    assert sympy.expand(found - 2 * B * exact + again) == 0
    both = cost(placed, "training").flops - cost(SwitchHead(), "training").flops
    one = cost(placed, "prefill").flops - cost(SwitchHead(), "prefill").flops
    assert sympy.expand(both - 3 * one) == 0


def test_parameters_of_projected_distances() -> None:
    placed = filled(SwitchHead(positions="transformer_xl"), width=1024, heads=16, head_dim=64)
    plain = replace(placed, positions="none")
    assert parameters(placed, 1024) == parameters(plain, 1024, positions=True)
    assert parameters(placed, 1024) <= attention_parameters(1024, 16, 64)


def test_training_has_three_products_for_one_and_the_values_again() -> None:
    forward, both = (cost(SwitchHead(), work).flops.subs(S, 0) for work in ("prefill", "training"))
    again = 2 * B * T * H * k * d * (D + 1)
    assert sympy.expand(both - 3 * forward - again) == 0


def test_bytes_of_the_routes() -> None:
    """A gate, float32, and an expert, int32: written by both sides, read by values and outputs,
    again by each of their two gradients, and kept.
    """
    routes = 2 * 8 * B * T * H
    forward, both = cost(SwitchHead(), "prefill"), cost(SwitchHead(), "training")
    assert sympy.expand(sympy.diff(forward.written, k) - routes) == 0
    assert sympy.expand(sympy.diff(forward.read, k) - routes) == 0
    assert sympy.expand(sympy.diff(both.read, k) - 3 * routes) == 0
    assert sympy.expand(sympy.diff(both.saved, k) - routes) == 0


@pytest.mark.parametrize(("heads", "head_dim"), [(4, 112), (2, 132)])
def test_the_cache_shrinks_with_heads_and_width(heads: int, head_dim: int) -> None:
    spec = SwitchHead(heads=heads, head_dim=head_dim)
    dense = flash_cost(Flash(), "decode").cache
    ratio = cost(spec, "decode").cache / dense.subs({H: 16, G: 16, d: 64, e: 64})
    assert sympy.simplify(ratio) == sympy.Rational(heads * head_dim, 1024)


def test_a_step_reads_the_experts_that_were_chosen() -> None:
    sizes = {"B": 1, "K": 1, "T": 1, "S": 0, "H": 2, "E": 5, "k": 2, "d": 64, "D": 512, "n": 2}
    found = cost(SwitchHead(), "decode")
    one, many = (found.numbers(**(sizes | {"B": batch})).read for batch in (1, 1000))
    without = found.numbers(**(sizes | {"E": 2})).read
    # the routers are larger, the experts that are read are not
    assert one - without == 2 * 512 * 2 * 2 * 3
    all_read = found.numbers(**(sizes | {"B": 1000, "E": 7})).read - many
    assert all_read == 2 * 512 * 2 * 2 * 2 + 2 * 2 * 2 * 2 * 64 * 512
    assert sympy.expand(found.cache - 2 * n * B * K * H * S * d) == 0


def test_gains_over_a_block_with_flash_attention() -> None:
    """Width 1024, 4 heads of 112, causal, 16 heads of 64 replaced: what is quadratic falls 2.29
    times, the block much less.
    """
    sizes = {"B": 1, "D": 1024, "n": 2}
    dense = flash_cost(Flash(), "prefill", causal=True, scope=Scope.BLOCK)
    rest = dense.flops - flash_cost(Flash(), "prefill", causal=True, scope=Scope.SITE).flops
    ours = Cost(flops=rest) + cost(SwitchHead(heads=4, experts=4, k=2, head_dim=112), "prefill",
                                   causal=True)  # fmt: skip
    replaced = {"H": 16, "G": 16, "d": 64, "e": 64}
    for length, gain in ((4096, 1.29), (16384, 1.59), (65536, 1.97)):
        before = dense.numbers(**sizes, **replaced, T=length, S=length).flops
        after = ours.numbers(**sizes, T=length, S=length).flops
        assert round(before / after, 2) == gain
    assert round(1024 / (4 * 112), 2) == 2.29
    assert round(1024 / (2 * 132), 2) == 3.88


@pytest.mark.parametrize("causal", [True, False])
def test_break_even_length_is_where_operations_are_equal(causal: bool) -> None:
    # five of six experts active: more to do for a token, less for its context
    spec = SwitchHead(heads=3, experts=6, k=5, head_dim=67)
    width, inner = 521, 11 * 47
    length = break_even_length(spec, width=width, inner=inner, causal=causal)
    sizes = {"B": 1, "D": width, "n": 2, "T": length, "S": length}
    mine = cost(spec, "prefill", causal=causal).numbers(**sizes).flops
    dense = flash_cost(Flash(), "prefill", causal=causal, scope=Scope.SITE)
    assert 0 < length < math.inf
    assert math.isclose(mine, dense.numbers(**sizes, H=11, G=11, d=47, e=47).flops)


def test_break_even_length_at_its_ends() -> None:
    big = SwitchHead(heads=4, experts=4, k=2, head_dim=96)
    assert break_even_length(big, width=1024, inner=1024) == 0
    slow = [break_even_length(big, width=1024, inner=1024, efficiency=x) for x in (0.2, 0.1)]
    assert 0 < slow[0] < slow[1] < math.inf
    wide = SwitchHead(heads=4, experts=4, k=2, head_dim=256)
    assert break_even_length(wide, width=1024, inner=1024) == math.inf
