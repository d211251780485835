"""Which cache a generation gets, hidden states or keys and values: by the cost model, once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from doors.cached import FEATURES, HEADS, WIDTH, Attend, draw, same
from doors.cached import heads as by_heads
from torch import Tensor

import attn_compiler as ac
from attn_compiler.cache import choice
from attn_compiler.cost.hardware import Hardware
from attn_compiler.errors import BadOption
from attn_compiler.passes.show_states import verdict
from attn_compiler.variants.el import most_heads

tf = pytest.importorskip("transformers")
layer = pytest.importorskip("attn_compiler.cache.layer")

LONG = ac.Shape(1009, 1, 521, 8, 61, width=8 * 61, causal=False)


def of_heads(heads: int) -> ac.Shape:
    return replace(LONG, heads=heads, head_dim=8 * 61 // heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["cpu", "h200", "l4"])
def test_the_plan_follows_the_break_even_point(name: str, dtype: torch.dtype) -> None:
    """Well below so many heads it pays, well above it does not."""
    hardware = Hardware.named(name)
    # a CPU multiplies in float32 there
    half = dtype.itemsize == 2 and hardware.kind != "cpu"
    rate = hardware.flops16 if half else hardware.flops32
    share = hardware.constants_of("states").clock if hardware.kind == "cpu" else 1.0
    flops = share * rate * hardware.processors * hardware.clock * hardware.sustained
    limit = most_heads(flops / hardware.dram_rate, dtype.itemsize)
    for heads, pays in ((max(1, int(limit / 4)), True), (int(4 * limit), False)):
        # so long that projections are little of it
        shape = ac.Shape(16, 1, 32768, heads, 16, width=16 * heads, causal=False)
        found = ac.plan(ac.ELAttention(), shape, hardware=hardware, dtype=dtype)
        assert found.keep is not pays, (heads, limit)


def test_a_verdict_says_what_was_predicted() -> None:
    for heads in (4, 244):
        found = ac.plan(ac.ELAttention(), of_heads(heads), hardware="cpu", dtype=torch.float32)
        text = verdict(of_heads(heads), Hardware.named("cpu"), torch.float32)
        assert text.startswith("does not pay" if found.keep else "pays")
        assert f"{found.seconds * 1e6:,.0f} us and not " in text and "predicted for cpu" in text
    beams = verdict(replace(LONG, beams=3), Hardware.named("cpu"), torch.float32)
    assert "1009 x 521 keys for 3 beams each" in beams


def test_an_unknown_device_keeps_the_smaller_cache() -> None:
    assert choice.faster(LONG, torch.device("meta"), torch.float32)


def test_one_question_for_each_layer_of_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    answer = True

    def faster(*question: Any) -> bool:
        asked.append(question)
        return answer

    monkeypatch.setattr(choice, "faster", faster)
    model = Attend()
    new = ac.rewrite(
        model.eval(), (draw(2, 7), tf.DynamicCache()), to=ac.ELAttention(only_where_faster=True)
    )
    for answer in (True, False):
        asked.clear()
        past = same(model, new)
        assert (type(past.layers[0]) is layer.StatesLayer) is answer
        shape = ac.Shape(2, 1, 8, HEADS, FEATURES, HEADS, FEATURES, WIDTH)
        # a cache that holds keys is asked no more either
        assert asked == [(shape, torch.device("cpu"), torch.float32)]


def test_nothing_is_asked_where_the_smaller_cache_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "faster", lambda *_: pytest.fail("asked"))
    model = Attend()
    new = ac.rewrite(model.eval(), (draw(2, 7), tf.DynamicCache()), to=ac.ELAttention())
    assert "pay" in ac.last_report().sites[0].facts["el"]
    assert type(same(model, new).layers[0]) is layer.StatesLayer


@pytest.mark.parametrize(("hardware", "word"), [("h200", "h200"), (None, "cpu")])
def test_explain_reports_the_prediction(hardware: str | None, word: str) -> None:
    told = ac.explain(
        Attend().eval(), (draw(2, 7), tf.DynamicCache()), to=ac.ELAttention(), hardware=hardware
    )
    (site,) = told.sites
    assert f"for a step over 2 x 7 keys for 1 beam each, predicted for {word}" in site.facts["el"]
    assert site.facts["el"] in str(told)


class Crosses(Attend):
    """Attention over what an encoder gave."""

    def forward(self, x: Tensor, states: Tensor, past: Any) -> Tensor:  # type: ignore[override]
        q = by_heads(self.q(x))
        k, v = past.update(*self.sides(states), 0)
        weights = (q @ k.transpose(-1, -2) * FEATURES**-0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_explain_reports_the_prediction_for_beams() -> None:
    """One step over the input of many beams, and as many predictions as `plan` makes."""
    args, told = (draw(2, 1), draw(2, 8), tf.DynamicCache()), {}
    for beams in (1, 61):
        to = ac.ELAttention(beams=beams)
        (site,) = ac.explain(Crosses().eval(), args, to=to, hardware="h200").sites
        shape = ac.Shape(
            2, 1, 8, HEADS, FEATURES, HEADS, FEATURES, WIDTH, causal=False, beams=beams
        )
        told[beams] = site.facts["el"]
        assert told[beams] == verdict(shape, Hardware.named("h200"), torch.float32)
    assert "for 61 beams each" in told[61] and told[1] != told[61]
    with pytest.raises(BadOption):
        ac.ELAttention(beams=0)
