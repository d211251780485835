"""Whoever has more to do does not have less to pay: every cost grows with every size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attn_compiler.cost.letters import Cost
from attn_compiler.variants.base import Scope, Work
from attn_compiler.variants.el import ELAttention
from attn_compiler.variants.el import cost as el
from attn_compiler.variants.flash import Flash
from attn_compiler.variants.flash import cost as flash
from attn_compiler.variants.gau import GAU
from attn_compiler.variants.gau import cost as gau
from attn_compiler.variants.linear_attention import LinearAttention
from attn_compiler.variants.linear_attention import cost as linear
from attn_compiler.variants.selective import Selective
from attn_compiler.variants.selective import cost as selective
from attn_compiler.variants.spion import SPION
from attn_compiler.variants.spion import cost as spion
from attn_compiler.variants.switchhead import SwitchHead
from attn_compiler.variants.switchhead import cost as switchhead

COSTS: dict[str, Callable[[Work], Cost]] = {
    "flash": lambda work: flash(Flash(), work, causal=True, scope=Scope.BLOCK),
    "flash, cross": lambda work: flash(Flash(), work, cross=True, scope=Scope.SITE),
    "el": lambda work: el(ELAttention(), work),
    "el, cross": lambda work: el(ELAttention(keep_key_bias=True), work, cross=True),
    "selective": lambda work: selective(Selective(), work, group=2),
    "selective, F": lambda work: selective(Selective(), work, materialise=True),
    "spion": lambda work: spion(SPION(softmax="zero_logit"), work),
    "switchhead": lambda work: switchhead(SwitchHead(), work, causal=True),
    "switchhead, masked": lambda work: switchhead(SwitchHead(), work, strategy="masked"),
    "linear": lambda work: linear(LinearAttention(), work),
    "gau": lambda work: gau(GAU(chunk=None), work, causal=True),
    "gau, chunks": lambda work: gau(GAU(), work),
}
# C, k and E are not sizes of the problem, L divides one cache among layers
FIXED = {"C": 16, "k": 2, "E": 5, "rho": 0.3, "L": 3}
SIZES = ("B", "T", "S", "H", "G", "d", "e", "D", "K", "n")
WORKS: tuple[Work, ...] = ("prefill", "training", "decode")
CASES = [(name, work) for name in COSTS for work in WORKS if (name, work) != ("spion", "decode")]


@pytest.mark.parametrize(("name", "work"), CASES)
@given(sizes=st.tuples(*[st.integers(1, 97)] * len(SIZES)), grown=st.sampled_from(SIZES))
def test_costs_grow(name: str, work: Work, sizes: tuple[int, ...], grown: str) -> None:
    formula = COSTS[name](work)
    shape = dict(zip(SIZES, sizes, strict=True))
    small = formula.numbers(**shape, **FIXED)
    large = formula.numbers(**(shape | {grown: shape[grown] + 1}), **FIXED)
    for field in fields(Cost):
        before, after = getattr(small, field.name), getattr(large, field.name)
        assert before >= 0
        assert after >= before, field.name
