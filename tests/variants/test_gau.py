"""Gated attention units: sizes, crossings and states of the paper's configuration."""

from __future__ import annotations

import math

import pytest
import sympy
from hypothesis import assume, given
from hypothesis import strategies as st

from attn_compiler.cost.letters import B, C, D, K, S, T, d, e, n
from attn_compiler.errors import BadOption
from attn_compiler.variants.base import Scope
from attn_compiler.variants.costs import gau as formulas
from attn_compiler.variants.flash import Flash
from attn_compiler.variants.flash import cost as flash_cost
from attn_compiler.variants.gau import (
    GAU,
    break_even_length,
    chunk_length,
    chunks_pay_from,
    cost,
    filled,
    parameters,
    sizes,
    state_pays_from,
)

PAPER = {"d": 128, "C": 256, "B": 1, "n": 2, "K": 1}


def block_flops(width: int, length: float, causal: bool) -> float:
    block = flash_cost(Flash(), "prefill", causal=causal, scope=Scope.BLOCK)
    heads = {"H": 1, "G": 1, "d": width, "e": width, "B": 1, "n": 2}
    return float(block.numbers(**heads, D=width, T=length, S=length).flops)


def pair_flops(spec: GAU, width: int, length: float, causal: bool) -> float:
    found = cost(spec, "prefill", causal=causal)
    shape = {"D": width, "e": 2 * width, "T": length, "S": length}
    return float(found.numbers(**(PAPER | shape)).flops)


def test_parameters_of_a_unit() -> None:
    assert parameters(768, 128, 1536, chunked=False, biases=False) == 3_637_760
    assert parameters(768, 128, 1536, chunked=True, biases=False) == 3_638_272


@pytest.mark.parametrize(
    ("layers", "width", "millions", "transformer"),
    [(24, 768, 87.3, 84.9), (24, 512, 39.3, 37.7), (48, 1024, 308.3, 302.0)],
)
def test_parameters_of_stacks(layers: int, width: int, millions: float, transformer: float) -> None:
    one = parameters(width, 128, 2 * width, chunked=False, biases=False)
    assert round(layers * one / 1e6, 1) == millions
    assert round(layers // 2 * 12 * width**2 / 1e6, 1) == transformer


@pytest.mark.parametrize("width", [512, 769, 1024, 4096])
@pytest.mark.parametrize("causal", [True, False])
def test_crossing_with_exact_attention(width: int, causal: bool) -> None:
    length = break_even_length(width, causal=causal)
    assert math.isclose(length, (1792 if causal else 1152) + 32768 / width)
    chunked = pair_flops(GAU(chunk=256), width, length, causal)
    assert math.isclose(chunked, block_flops(width, length, causal))


@pytest.mark.parametrize(
    ("width", "ratios"), [(1024, (0.91, 1.02, 1.45, 3.19)), (4096, (0.97, 1.00, 1.13, 1.61))]
)
def test_operations_of_a_block_over_those_of_a_pair(width: int, ratios: tuple[float, ...]) -> None:
    lengths = (512, 2048, 8192, 32768)
    found = [
        block_flops(width, length, True) / pair_flops(GAU(), width, length, True)
        for length in lengths
    ]
    assert tuple(round(ratio, 2) for ratio in found) == ratios


def test_without_chunks_there_is_never_less_to_do() -> None:
    found = [
        round(block_flops(1024, length, True) / pair_flops(GAU(chunk=None), 1024, length, True), 2)
        for length in (512, 2048, 8192, 32768)
    ]
    assert found == [0.94, 0.85, 0.68, 0.55]


def test_operations_in_letters() -> None:
    f, width = sympy.Rational(1, 2), {e: 2 * D, S: T}
    per_token = 2 * B * T
    chunked = cost(GAU(), "prefill", causal=True).flops.subs(width) / per_token
    whole = cost(GAU(chunk=None), "prefill", causal=True).flops.subs(width) / per_token
    linear = 12 * D**2 + 2 * D * d
    assert sympy.expand(chunked - linear - 2 * f * C * (d + 2 * D) - 8 * d * D) == 0
    assert sympy.expand(whole - linear - 2 * f * T * (d + 2 * D)) == 0


def test_intensity_of_the_cores() -> None:
    shape = {**PAPER, "e": 2048, "T": 256, "S": 256}
    half = sympy.Rational(1, 2)
    chunk = formulas.core("prefill", chunked=True, share=half).numbers(**shape)
    assert round(chunk.flops / 1e6) == 411
    assert round((chunk.read + chunk.written) / 1e6, 1) == 3.4
    assert round(chunk.flops / (chunk.read + chunk.written)) == 121
    for length, intensity in ((1024, 174), (8192, 1390)):
        shape |= {"T": length, "S": length}
        whole = formulas.core("prefill", chunked=False, share=half).numbers(**shape)
        # three digits
        assert float(f"{whole.flops / (whole.read + whole.written):.3g}") == intensity


def test_states_for_generation() -> None:
    step = cost(GAU(), "decode")
    for width, mebibytes in ((1024, 4.1), (4096, 16.1)):
        state = step.numbers(**PAPER, D=width, e=2 * width, T=1).cache
        assert round(state / 2**20, 1) == mebibytes
        tokens = state_pays_from(width)
        assert math.isclose(state, 2 * width * 2 * tokens)
    assert round(state_pays_from(1024), -1) == 1060
    whole = cost(GAU(chunk=None), "decode").numbers(**PAPER, D=1024, e=2048, T=1, S=997).cache
    assert whole / (2 * 1024 * 2 * 997) == 2.125


def test_a_step_in_chunks_does_not_grow_with_the_length() -> None:
    assert S not in cost(GAU(), "decode").flops.free_symbols
    assert S in cost(GAU(chunk=None), "decode").flops.free_symbols
    # over a whole chunk, steps do what the parallel form does for a chunk behind others
    steps = C * cost(GAU(), "decode").flops.subs({K: 1, T: 1})
    parallel = cost(GAU(), "prefill", causal=True).flops.subs(T, C)
    assert sympy.expand(steps - parallel) == 0


@pytest.mark.parametrize("causal", [True, False])
def test_chunks_pay_from_where_operations_are_equal(causal: bool) -> None:
    length = chunks_pay_from(128, 2048, causal=causal)
    both = [pair_flops(GAU(chunk=chunk), 1024, length, causal) for chunk in (256, None)]
    assert math.isclose(*both)
    assert chunk_length(128, 2048, math.ceil(length), causal=causal) == 256
    assert chunk_length(128, 2048, math.floor(length), causal=causal) is None


def test_bytes_of_a_step_in_chunks() -> None:
    """It reads the state, float32, and half a chunk of Z and V; it writes its own Z and V, and
    once for a chunk the state.
    """
    step = formulas.core("decode", chunked=True)
    state, token = 4 * d * e, n * (d + e)
    assert sympy.expand(step.read - B * K * (state + token * C / 2)) == 0
    assert sympy.expand(step.written - B * K * T * (token + state / C)) == 0
    assert sympy.expand(step.cache - B * K * (state + token * C)) == 0


def test_training_in_chunks_has_four_products_for_the_state_s_two() -> None:
    both, forward = (formulas.core(x, chunked=True) for x in ("training", "prefill"))  # type: ignore[arg-type]
    state, pairs = 4 * B * T * d * e, B * T * C
    assert sympy.expand(forward.flops - state - 2 * pairs * (d + e)) == 0
    assert sympy.expand(both.flops - forward.flops - 2 * state - 2 * pairs * (4 * d + 3 * e)) == 0


def test_training_keeps_no_scores() -> None:
    for chunk in (256, None):
        both, forward = (cost(GAU(chunk=chunk), work) for work in ("training", "prefill"))
        assert sympy.expand(both.saved - 2 * n * B * T * (D + 3 * e + d)) == 0
        assert both.exps == forward.exps == 2 * B * T * (2 * e + d)
    pairs = 2 * 2 * B * T * S
    inside = both.flops - 3 * 2 * 2 * B * T * D * (3 * e + d)
    assert sympy.expand(inside - pairs * (d + e) - pairs * (4 * d + 3 * e)) == 0


@pytest.mark.parametrize("chunk", [256, None])
def test_kernels_of_a_gpu_do_more(chunk: int | None) -> None:
    """A pair at e = 2048: eight slices of 256 columns, in the forward pass and for dV."""
    spec, shape = GAU(chunk=chunk), PAPER | {"D": 1024, "e": 2048, "T": 8192, "S": 8192}
    found = {}
    for work in ("prefill", "training"):
        with_kernels = cost(spec, work, causal=True, gpu=True).numbers(**shape)  # type: ignore[arg-type]
        found[work] = with_kernels.beyond(cost(spec, work, causal=True).numbers(**shape))  # type: ignore[arg-type]
    scores = 2 * 8192 * 128 * (chunk or 8192)  # of both units, half of the pairs
    again = 2 * 2 * 8192 * 128 * 2048 if chunk else 0  # states in the backward
    assert found["prefill"].flops == 7 * scores
    assert found["training"].flops == 15 * scores + again
    # of two units: three or one launch in a forward pass, seven or three and two products more
    base = {"prefill": 2 * 1, "training": 2 * 3}
    launches = {"prefill": 3, "training": 3 + 9} if chunk else {"prefill": 1, "training": 1 + 5}
    for work, count in launches.items():
        assert found[work].launches == 2 * count - base[work]
    states = 4 * 8192 / 256 * 128 * 2048 if chunk else 0
    assert found["prefill"].written == 2 * 2 * states


def test_numbers_of_a_spec_stand_in_its_costs() -> None:
    found = cost(GAU(chunk=64, s=32, expansion=1.5), "prefill")
    general = cost(GAU(), "prefill").numbers(B=2, T=7, S=7, D=22, n=2, C=64, d=32, e=33)
    assert found.numbers(B=2, T=7, S=7, D=22, n=2) == general


def test_auto_is_the_paper_s_from_a_width_of_512() -> None:
    for width in (512, 768, 4096):
        found = filled(GAU(), width=width, replaced=12 * width**2 + 13 * width, length=4096)
        assert (found.s, found.expansion, found.chunk) == (128, 2, 256)
    assert filled(GAU(), width=512, replaced=12 * 512**2, length=300).chunk is None
    kept = GAU(chunk=None, s=64, expansion=3.0)
    assert filled(kept, width=512, replaced=12 * 512**2, length=4096) == kept


@given(st.integers(2, 63), st.floats(0.9, 2.0), st.sampled_from([64, None]))
def test_auto_matches_the_parameters_of_what_it_replaces(
    width: int, size: float, chunk: int | None
) -> None:
    width, replaced = 16 * width, int(size * 12 * (16 * width) ** 2)
    spec = GAU(chunk=chunk)
    assume(width < 512 or size > 1.1)  # else they are the paper's sizes, which are fixed
    s, expansion = sizes(spec, width, replaced)
    pair = 2 * parameters(width, s, round(expansion * width), chunked=chunk is not None)
    assert abs(pair / replaced - 1) <= 0.02
    assert s % 16 == 0


def test_a_block_that_is_too_small_is_refused() -> None:
    with pytest.raises(BadOption, match="s=512"):
        sizes(GAU(s=512), 64, 12 * 64**2)
