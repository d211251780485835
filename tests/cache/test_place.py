"""Caches of other kinds and with an `update` of their own, under each variant that changes what a
cache holds: used as they are meant, or refused with a reason.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import draw, text
from doors.test_selective_generate import inputs, rewritten
from torch import Tensor

import attn_compiler as ac
from attn_compiler.cache import linear, masked
from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels.feature_maps import FeatureMaps
from attn_compiler.kernels.selective_memory import Memory

tf = pytest.importorskip("transformers")
gau = pytest.importorskip("attn_compiler.cache.gau")
place = pytest.importorskip("attn_compiler.cache.place")
masked_layer = pytest.importorskip("attn_compiler.cache.masked_layer")

B, H, G, T, D = 2, 6, 2, 7, 5
PROMPT = 4
MEMORY, MAPS = Memory(), FeatureMaps(H, G, D).double()
PRUNED = Memory().eval()
PRUNED.budget = 11
OPTIONS: dict[str, Any] = {"program": text(mask="(k <= q + (S - T))"), "scale": 0.4}
SELECTIVE: dict[str, Any] = {"dropout": 0.0, "head": 0, "select_from": "qk", "causal": True}
REST: tuple[Any, ...] = ((), (), None, (), None, None)
Calls = dict[str, tuple[Any, Any, dict[str, Any]]]
# what a site remembers, the calls of its variant, and their options
KINDS: Calls = {
    "selective": (MEMORY, masked.MASKED, SELECTIVE),
    "budgets": (PRUNED, masked.MASKED, SELECTIVE),
    "linear": (MAPS, linear.LINEAR, {"window": 3}),
}


class After(tf.DynamicCache):
    """Gives other values than it keeps."""

    calls = 0

    def update(self, keys: Tensor, values: Tensor, index: int, *more: Any) -> Any:
        self.calls += 1
        keys, values = super().update(keys, values, index, *more)
        return keys, -3 * values


class Before(tf.DynamicCache):
    """Keeps other values than it is given."""

    def update(self, keys: Tensor, values: Tensor, index: int, *more: Any) -> Any:
        return super().update(keys, -3 * values, index, *more)


class Dropping(tf.DynamicCache):
    """Gives all tokens, and keeps those of a window."""

    def update(self, keys: Tensor, values: Tensor, index: int, *more: Any) -> Any:
        keys, values = super().update(keys, values, index, *more)
        held = self.layers[index]
        held.keys, held.values = keys[:, :, -2:], values[:, :, -2:]
        return keys, values


class Elsewhere(tf.DynamicCache):
    """Keeps tokens in a list of its own."""

    def update(self, keys: Tensor, values: Tensor, index: int, *more: Any) -> Any:
        return keys, values


def _noted(cache: Any, *args: Any) -> Any:
    cache.calls += 1
    return tf.DynamicCache.update(cache, *args)


def listened() -> Any:
    """An ordinary cache with another `update` of its own."""
    cache = tf.DynamicCache()
    cache.calls, cache.update = 0, functools.partial(_noted, cache)
    return cache


def layer_of_its_own() -> Any:
    cache = tf.DynamicCache()
    place.layer_for(cache, 0).update = None
    return cache


def filled() -> Any:
    cache = tf.DynamicCache()
    cache.update(torch.zeros(B, G, 3, D), torch.zeros(B, G, 3, D), 0)
    return cache


@functools.cache
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(draw(B, T, n, D).double().transpose(1, 2) * 2 for n in (H, G, G))  # type: ignore[return-value]


def whole(name: str, turned: float = 1.0) -> Tensor:
    """Without a cache, with values `turned` v."""
    memory, calls, options = KINDS[name]
    q, k, v = tensors()
    return calls.attend(memory, (k, turned * v), q, REST, **OPTIONS, **options)  # type: ignore[no-any-return]


def steps(name: str, cache: Any) -> Tensor:
    """A prompt, and tokens after a change of the batch."""
    memory, calls, options = KINDS[name]
    found, order = [], torch.tensor([0, 1])
    for start, end in ((0, PROMPT), *((i, i + 1) for i in range(PROMPT, T))):
        q, k, v = (x[order, :, start:end] for x in tensors())
        kept = calls.keep(cache, (memory, k), v, 0)
        assert calls.shown(kept, 0).shape == (B, G, end, D)
        found.append(calls.attend(memory, kept, q, REST, **OPTIONS, **options)[order])
        if start == 0:
            cache.reorder_cache(order := torch.tensor([1, 0]))
    return torch.cat(found, 2)


@pytest.mark.parametrize("kind", [After, Before])
def test_what_an_update_gives_is_read(kind: Any) -> None:
    found = steps("selective", cache := kind())
    torch.testing.assert_close(found, whole("selective", -3.0), rtol=0, atol=1e-12)
    assert type(cache.layers[0]) is masked_layer.MaskedLayer
    assert kind is Before or cache.calls == 1 + T - PROMPT


def test_what_an_update_notes_is_noted() -> None:
    cache = listened()
    torch.testing.assert_close(steps("selective", cache), whole("selective"), rtol=0, atol=1e-12)
    assert cache.calls == 1 + T - PROMPT


@pytest.mark.parametrize("make", [tf.DynamicCache, After, listened])
def test_dynamo_knows_whose_update_it_is(make: Callable[[], Any]) -> None:
    cache = make()
    found = torch.compile(place.own_update, backend="eager", fullgraph=True)(cache)
    assert found is place.own_update(cache) is (make is not tf.DynamicCache)


CONFIG = tf.GPT2Config(n_layer=1)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "update": (After, "`update` of its own"),
    "wrapped": (listened, "`update` of its own"),
    "layer": (layer_of_its_own, "layer 0 is a DynamicLayer, which has a way of its own"),
    "quantised": (lambda: tf.QuantizedCache("fp8", CONFIG), "Fp8QuantizedLayer"),
    "static": (lambda: tf.StaticCache(CONFIG, max_cache_len=9), "StaticLayer"),
    "filled": (filled, "holds 3 tokens that another model put there"),
}
OTHER_TOKENS: dict[str, tuple[Callable[[], Any], str]] = {
    "dropping": (Dropping, "gives 4 tokens, and its layer holds 2"),
    "elsewhere": (Elsewhere, "gives 4 tokens, and its layer holds 0"),
}


@pytest.mark.parametrize("given", REFUSED)
def test_it_is_refused(given: str) -> None:
    make, words = REFUSED[given]
    for name in ("budgets", "linear"):
        with pytest.raises(UnsupportedCall, match=words):
            steps(name, make())
    with pytest.raises(UnsupportedCall, match=words):
        gau.hold(make(), None, None, 0)


@pytest.mark.parametrize("given", [*list(REFUSED)[2:], *OTHER_TOKENS])
def test_selective_refuses_what_keeps_other_tokens(given: str) -> None:
    make, words = (REFUSED | OTHER_TOKENS)[given]
    with pytest.raises(UnsupportedCall, match=words):
        steps("selective", make())


def test_what_is_no_cache_of_the_library() -> None:
    for hold in (lambda: gau.hold(object(), None, None, 0), lambda: steps("linear", object())):
        with pytest.raises(UnsupportedCall, match="no cache of transformers"):
            hold()
    cache = tf.DynamicCache()
    assert gau.hold(cache, None, None, 2)[2] is cache.layers[2]


@pytest.mark.parametrize("name", KINDS)
def test_keys_that_are_moved_away(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offloaded caches do that after each `update`; attention reads what that gave."""
    away: list[tuple[Tensor, Tensor]] = []

    def offload(cache: Any, index: int, *_: Any) -> None:
        held = cache.layers[index]
        if type(held) is masked_layer.MaskedLayer:
            away.append((held.keys, held.values))
            held.keys, held.values = (torch.full_like(x, torch.nan) for x in away[-1])

    def prefetch(cache: Any, *_: Any) -> None:
        if away:
            cache.layers[0].keys, cache.layers[0].values = away.pop()

    class Stream:
        def wait_stream(self, _: Any) -> None:
            """There is none on a CPU."""

    monkeypatch.setattr(torch.cuda, "default_stream", lambda *_: Stream())
    monkeypatch.setattr(tf.DynamicCache, "offload", offload)
    monkeypatch.setattr(tf.DynamicCache, "prefetch", prefetch)
    cache = tf.DynamicCache()
    cache.offloading, cache.only_non_sliding, cache.prefetch_stream = True, False, Stream()
    memory, calls, options = KINDS[name]
    found = []
    for i in range(T):
        q, k, v = (x[:, :, i : i + 1] for x in tensors())
        kept = calls.keep(cache, (memory, k), v, 0)
        found.append(calls.attend(memory, kept, q, REST, **OPTIONS, **options))
    torch.testing.assert_close(torch.cat(found, 2), whole(name), rtol=0, atol=1e-12)
    assert len(away) == (name == "selective")


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_an_update_of_its_own(beams: int) -> None:
    options = {"do_sample": False, "num_beams": beams, "pad_token_id": 0, "max_new_tokens": 9}
    model = rewritten("llama", True, ac.Selective())
    turned = copy.deepcopy(model)
    for layer in turned.model.layers:
        layer.self_attn.v_proj.weight.data *= -3
    exact = turned.generate(**inputs(True), **options, use_cache=False)
    for kind in (After, Before):
        found = model.generate(**inputs(True), **options, past_key_values=kind())
        assert torch.equal(found, exact)
    assert not torch.equal(exact, model.generate(**inputs(True), **options))
