"""A model that makes the cache of its layers itself, whose layers hand their weights up to it.

Model().forward(x):  past = DynamicCache(config=self.config);  self.attend(x, past)
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from doors.cached import FEATURES, Attend, Counted, draw, heads
from torch import Tensor, nn

import attn_compiler as ac

tf = pytest.importorskip("transformers")
DynamicCache, EncoderDecoderCache = tf.DynamicCache, tf.EncoderDecoderCache


class Weighed(Attend):
    """Gives its weights, too, so that the model alone keeps them to itself."""

    def forward(self, x: Tensor, past: Any) -> Any:
        q = heads(self.q(x))
        k, v = self.cached(self.sides(x), past)
        weights = self.weights(self.scores(q @ k.mT * FEATURES**-0.5))
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = tf.GPT2Config(n_layer=1)
        self.attend = Weighed()

    def forward(self, x: Tensor, past: Any = None) -> Any:
        if past is None:
            past = DynamicCache(config=self.config)
        assert isinstance(past, DynamicCache)
        return self.attend(x, past)[0], past


class OfTwo(Model):
    """A cache made of two others that are made."""

    def forward(self, x: Tensor, past: Any = None) -> Any:
        if past is None:
            past = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache())
        return self.attend(x, past.self_attention_cache)[0], past


@pytest.mark.parametrize("kind", [Model, OfTwo])
def test_a_model_may_make_its_cache_itself(kind: type[Model]) -> None:
    model = kind().eval()
    new = ac.rewrite(model, (draw(2, 7),), to=ac.Flash())
    (site,) = ac.last_report().sites
    assert site.decision.accepted and site.mask == "causal(S - T)", str(ac.last_report())
    assert type(DynamicCache) is type and type(EncoderDecoderCache) is type
    ours = theirs = None
    for length in (5, 1, 3):
        mine, ours = new(draw(3, length), ours)
        wanted, theirs = model(draw(3, length), theirs)
        torch.testing.assert_close(mine, wanted)
        assert type(ours) is type(theirs) and ours.get_seq_length() == theirs.get_seq_length()
    past = None
    with Counted() as counted:  # all kinds of calls are known by now
        for length in (5, 1, 3):
            past = new(draw(3, length), past)[1]
    assert counted.found["attention"] == 3


def test_a_cache_is_made_of_what_the_module_holds_then() -> None:
    new = ac.rewrite(Model().eval(), (draw(2, 7),), to=ac.Flash())
    new.config = tf.GPT2Config(n_layer=3)
    with Counted() as counted:
        past = new(draw(2, 4))[1]
    assert len(past.layers) == 3 and counted.found["attention"] == 1


def test_each_call_makes_a_cache_of_its_own() -> None:
    new = ac.rewrite(Model().eval(), (draw(2, 7),), to=ac.Flash())
    first, second = new(draw(2, 4))[1], new(draw(2, 4))[1]
    assert first is not second and second.get_seq_length() == 4
