"""rewrite(model, to=ELAttention()): which attention with a cache is rewritten, and that every call
computes what it did.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from doors.cached import (
    FEATURES,
    HEADS,
    INNER,
    TURNED,
    WIDTH,
    Attend,
    Counted,
    Sides,
    draw,
    heads,
    rewritten,
    same,
    steps,
    turned,
)
from torch import Tensor, nn

import attn_compiler as ac

tf = pytest.importorskip("transformers")
nbytes = pytest.importorskip("attn_compiler.cache.el").nbytes
layer = pytest.importorskip("attn_compiler.cache.layer")


class Matrix(nn.Module):
    """A linear map as one library spells it: the weight is [inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.size()[:-1], self.bias.shape[0])
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Packed(Attend):
    """Queries, keys and values in one map, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * INNER)

    def sides(self, x: Tensor) -> Sides:
        _, k, v = self.qkv(x).split(INNER, dim=2)
        return heads(k), heads(v)


class Interleaved(Attend):
    """In one map, head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * INNER)

    def sides(self, x: Tensor) -> Sides:
        _, k, v = self.qkv(x).unflatten(-1, (HEADS, 3, FEATURES)).transpose(1, 2).unbind(3)
        return k, v


class Transposed(Attend):
    def __init__(self) -> None:
        super().__init__()
        self.k = self.v = Matrix(WIDTH, INNER)


class Biased(Attend):
    """ALiBi."""

    def scores(self, dot: Tensor) -> Tensor:
        slopes = torch.tensor([0.5, 0.25, 0.125]).view(-1, 1, 1)
        return super().scores(dot + slopes * torch.arange(dot.shape[-1]))


class Capped(Attend):
    """The bias of the keys does not fall out here."""

    def scores(self, dot: Tensor) -> Tensor:
        return super().scores(2 * torch.tanh(dot / 2))


class PartlyRotated(Attend):
    """Some features of a key are rotated, in front."""

    def parted(self, k: Tensor) -> Tensor:
        return torch.cat([turned(k[..., :TURNED]), k[..., TURNED:]], -1)

    def sides(self, x: Tensor) -> Sides:
        k, v = super().sides(x)
        return self.parted(k), v


class RotatedBehind(PartlyRotated):
    def parted(self, k: Tensor) -> Tensor:
        return torch.cat([k[..., :-TURNED], turned(k[..., -TURNED:])], -1)


class RotatedForAll(PartlyRotated):
    """Heads share the rotated features."""

    def parted(self, k: Tensor) -> Tensor:
        shared = turned(k[:, :1, :, :TURNED]).expand(-1, k.shape[1], -1, -1)
        return torch.cat([k[..., TURNED:], shared], -1)


class RotatedPacked(PartlyRotated):
    """The keys of a head behind its queries, in one map."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * INNER)

    def sides(self, x: Tensor) -> Sides:
        _, k, v = self.qkv(x).unflatten(-1, (HEADS, 3, FEATURES)).transpose(1, 2).unbind(3)
        return self.parted(k), v


class Size(nn.Module):
    """A norm as one library spells it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2.0, features))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        found = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)
        return self.weight * found.to(x.dtype)


def layer_norm() -> nn.LayerNorm:
    found = nn.LayerNorm(FEATURES)
    with torch.no_grad():
        found.weight.copy_(torch.linspace(0.5, 2.0, FEATURES))
        found.bias.copy_(torch.linspace(-1.0, 1.0, FEATURES))
    return found


class Normed(Attend):
    """The keys of a head are normalised."""

    def __init__(self, make: Callable[[], nn.Module], groups: int = HEADS) -> None:
        super().__init__(groups)
        self.norm = make()

    def sides(self, x: Tensor) -> Sides:
        k, v = super().sides(x)
        return self.norm(k), v


class NormedWhole(Normed):
    """All keys of a token are normalised together."""

    def sides(self, x: Tensor) -> Sides:
        return heads(self.norm(self.k(x))), heads(self.v(x))


class NormedAndRotated(Normed):
    def sides(self, x: Tensor) -> Sides:
        k, v = super().sides(x)
        return torch.cat([turned(k[..., :TURNED]), k[..., TURNED:]], -1), v


class NormedAndCapped(Normed):
    """The bias of the norm does not fall out here."""

    def scores(self, dot: Tensor) -> Tensor:
        return super().scores(2 * torch.tanh(dot / 2))


LEGAL: dict[str, Callable[[], nn.Module]] = {
    "plain": Attend,
    "rotated in front": PartlyRotated,
    "rotated behind": RotatedBehind,
    "rotated once for all heads": RotatedForAll,
    "rotated, and packed": RotatedPacked,
    "a norm over each head": lambda: Normed(lambda: nn.RMSNorm(FEATURES)),
    "a norm of the user's own": lambda: Normed(lambda: Size(FEATURES)),
    "a norm that takes the mean off": lambda: Normed(layer_norm),
    "a norm over all heads": lambda: NormedWhole(lambda: Size(INNER)),
    "a norm, then a rotation": lambda: NormedAndRotated(layer_norm),
    "a norm with a bias under a cap": lambda: NormedAndCapped(layer_norm),
    "no bias": lambda: Attend(bias=False),
    "packed": Packed,
    "interleaved": Interleaved,
    "a map of the user's own": Transposed,
    "a bias of the scores": Biased,
    "a cap on the scores": Capped,
}


# numbers of a token that are kept besides x
BESIDE = {
    "rotated in front": HEADS * TURNED,
    "rotated behind": HEADS * TURNED,
    "rotated once for all heads": TURNED,
    "rotated, and packed": HEADS * TURNED,
    "a norm over each head": HEADS,
    "a norm of the user's own": HEADS,
    "a norm that takes the mean off": HEADS,
    "a norm over all heads": 1,
    "a norm, then a rotation": HEADS * (TURNED + 1),
    "a norm with a bias under a cap": HEADS,
}


QUICK = {"rotated in front", "a norm over all heads", "a norm, then a rotation"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in QUICK or n not in BESIDE else pytest.mark.slow)
        for n in LEGAL
    ],
)
def test_it_is_rewritten_and_the_same(name: str) -> None:
    model = LEGAL[name]()
    new, decision = rewritten(model)
    assert decision.accepted and decision.variant == "el", str(decision)
    past = same(model, new)
    assert type(past.layers[0]) is layer.StatesLayer
    kept = 2 * 13 * (WIDTH + BESIDE.get(name, 0)) * 4
    assert past.layers[0].nbytes == nbytes(past) == kept
    with Counted() as counted:
        steps(new, tf.DynamicCache())
    assert counted.found["el_attention"] >= 3


def test_a_prompt_runs_ordinary_attention_and_a_step_reads_states() -> None:
    new, _ = rewritten(Attend())
    past = tf.DynamicCache()
    for length, wanted in ((41, "attention"), (1, "el_attention")):
        with Counted() as counted, torch.no_grad():
            new(draw(2, length), past)
        assert counted.found == {"el_attention": 0, "attention": 0} | {wanted: 1}


class Kept:
    """A cache that somebody wrote."""

    def __init__(self) -> None:
        self.held: list[Sides] = []

    def update(self, k: Tensor, v: Tensor, index: int) -> Sides:
        if len(self.held) <= index:
            self.held.append((k, v))
        else:
            past = self.held[index]
            self.held[index] = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.held[index]


def test_a_cache_that_cannot_hold_states_goes_on_holding_keys() -> None:
    model = Attend()
    new, decision = rewritten(model)
    assert decision.accepted
    assert isinstance(same(model, new, Kept), Kept)
    config = tf.GPT2Config(n_layer=1, n_head=HEADS, n_embd=INNER)
    past = same(model, new, lambda: tf.DynamicCache(config=config))
    assert type(past.layers[0]) is layer.StatesLayer


class Begins(Attend):
    """Behind an empty cache, keys are read only as far as there are any."""

    def cached(self, sides: Sides, past: Any) -> Sides:
        k, v = past.update(*sides, 0)
        count = sides[0].shape[2]
        if k.shape[2] > count > 1:
            k, v = k[:, :, :count], v[:, :, :count]
        return k, v


def test_a_prompt_reads_the_beginning_of_a_static_cache() -> None:
    """And in another model of the kind all of a dynamic one: what is alike follows the analysis of
    the first.
    """
    x, config = draw(2, 7), tf.GPT2Config(n_layer=1)
    for make, kind in (
        (lambda: tf.StaticCache(config, max_cache_len=17), layer.StaticStatesLayer),
        (tf.DynamicCache, layer.StatesLayer),
    ):
        new, decision = rewritten(model := Begins(), x, make())
        assert decision.accepted, decision
        with torch.no_grad():
            torch.testing.assert_close(new(x, past := make()), model(x, make()))
        assert type(past.layers[0]) is kind


class BeginsInside(Begins):
    """The cache is one of two in one."""

    def cached(self, sides: Sides, past: Any) -> Sides:
        return super().cached(sides, past.self_attention_cache)


def test_caches_inside_of_one_are_told_apart() -> None:
    model, x, config = BeginsInside(), draw(2, 7), tf.GPT2Config(n_layer=1)

    def both(make: Callable[[], Any]) -> Any:
        return tf.EncoderDecoderCache(make(), tf.DynamicCache())

    new, decision = rewritten(model, x, both(tf.DynamicCache))
    assert decision.accepted, decision
    for make in (lambda: tf.StaticCache(config, max_cache_len=17), tf.DynamicCache):
        with torch.no_grad():
            torch.testing.assert_close(new(x, both(make)), model(x, both(make)))


@pytest.mark.parametrize("to", ["fastest", ac.ELAttention()])
@torch.no_grad()
def test_how_many_keys_there_are_is_read_before_the_cache_counts_on(to: Any) -> None:
    torch.manual_seed(0)
    config = tf.BloomConfig(vocab_size=61, hidden_size=16, n_head=4, n_layer=2)
    model = tf.BloomForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0, 0.5)
    ids = torch.randint(0, 61, (2, 7))
    new, past = ac.rewrite(model, (ids,), to=to), tf.StaticCache(config, max_cache_len=11)
    assert ac.last_report().rewritten == 2
    # without a mask the model asks the cache, whose answer is a tensor that `update` writes to
    parts = (ids[:, :4], *ids[:, 4:].split(1, 1))
    found = torch.cat([new(part, past_key_values=past).logits for part in parts], 1)
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)
