"""A model rewritten to EL-attention is an ordinary module: hooks, copies, training, gradients."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from doors.cached import Attend, Counted, draw, heads, rewritten, same
from torch import Tensor, nn

import attn_compiler as ac

tf = pytest.importorskip("transformers")
layer = pytest.importorskip("attn_compiler.cache.layer")


def test_hooks_on_a_projection_are_not_passed_over() -> None:
    model = Attend()
    new, _ = rewritten(model)
    for module in (model, new):
        module.k.register_forward_hook(lambda m, a, out: out * 1.5)
    past = same(model, new)
    assert type(past.layers[0]) is not layer.StatesLayer


class Two(nn.Module):
    """Two layers, of which the second does not do what the first does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attend(), Attend()
        self.second.k.register_forward_hook(lambda m, args, out: out * 1.5)

    def forward(self, x: Tensor, past: Any, other: Any) -> Tensor:
        return self.second(self.first(x, past), other)  # type: ignore[no-any-return]


def test_a_layer_with_a_hook_does_not_follow_one_without() -> None:
    model = Two().eval()
    new = ac.rewrite(model, (draw(2, 7), tf.DynamicCache(), tf.DynamicCache()), to=ac.ELAttention())
    assert [s.decision.variant for s in ac.last_report().sites] == ["el", ""]
    pasts = [[tf.DynamicCache(), tf.DynamicCache()] for _ in range(2)]
    for length in (7, 1, 1):
        with torch.no_grad():
            ours, theirs = (
                m(draw(2, length), *past) for m, past in zip((new, model), pasts, strict=True)
            )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert type(pasts[0][0].layers[0]) is layer.StatesLayer
    assert type(pasts[0][1].layers[0]) is not layer.StatesLayer


class Numbered(Attend):
    """Biased by the distance, for which the cache is asked how much it holds in this layer."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor, past: Any) -> Tensor:
        first = past.get_seq_length(self.number)
        q = heads(self.q(x))
        k, v = past.update(*self.sides(x), self.number)
        rows, keys = torch.arange(x.shape[1])[:, None] + first, torch.arange(k.shape[2])
        dot = q @ k.transpose(-1, -2) - 0.3 * (rows - keys)
        weights = dot.masked_fill(keys > rows, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Several(nn.Module):
    """Layers of one cache."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Numbered(number) for number in range(3))

    def forward(self, x: Tensor, past: Any) -> Tensor:
        for attend in self.layers:
            x = attend(x, past)
        return x


def test_a_layer_that_follows_another_asks_for_its_own_length() -> None:
    model = Several().eval()
    new = ac.rewrite(model, (draw(2, 7), tf.DynamicCache()), to=ac.ELAttention())
    assert [s.decision.variant for s in ac.last_report().sites] == ["el"] * 3
    past = same(model, new)
    assert {type(held) for held in past.layers} == {layer.StatesLayer}


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_computes_with_its_own_weights(again: Any) -> None:
    model = Attend()
    new, _ = rewritten(model)
    twin, other = again(new), copy.deepcopy(model)
    for module in (twin, other):
        with torch.no_grad():
            module.k.weight.mul_(1.3)
            module.v.weight.mul_(0.7)
    same(other, twin)
    same(model, new)


def test_training_runs_the_ordinary_attention() -> None:
    class Dropped(Attend):
        def weights(self, scores: Tensor) -> Tensor:
            return torch.nn.functional.dropout(scores.softmax(-1), 0.5, self.training)

    model = Dropped()
    new, decision = rewritten(model)
    assert decision.accepted
    new.train()
    past = tf.DynamicCache()
    new(draw(2, 7), past).sum().backward()
    assert type(past.layers[0]) is not layer.StatesLayer
    assert new.k.weight.grad is not None and new.v.weight.grad is not None
    same(model, new.eval())


def test_inference_mode() -> None:
    new, _ = rewritten(Attend())
    past = tf.DynamicCache()
    with torch.inference_mode(), Counted() as counted:
        for length in (7, 1, 1):
            new(draw(2, length), past)
    assert counted.found["el_attention"] >= 2 and type(past.layers[0]) is layer.StatesLayer


def test_gradients() -> None:
    model = Attend()
    new, _ = rewritten(model)
    grads = []
    for module in (new, model):
        past = tf.DynamicCache()
        sum(module(draw(2, length), past).square().sum() for length in (7, 1)).backward()
        grads.append([p.grad for p in module.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
