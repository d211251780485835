"""LinearAttention in generation: a library's models and caches, steps against whole passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from doors.cached import draw
from doors.test_linear_attention import moved
from doors.test_rewrite_el_refused import Form, Part, Shown
from doors.test_selective_generate import IDS, MODELS, inputs, stepwise
from torch import nn

import attn_compiler as ac
from attn_compiler.errors import UnsupportedCall
from attn_compiler.train.distill import Recipe

tf = pytest.importorskip("transformers")
linear_layer = pytest.importorskip("attn_compiler.cache.linear_layer")

WINDOW = 3
SLOW = pytest.mark.slow
CASES = [
    pytest.param("llama", True), pytest.param("gpt2", False),
    pytest.param("llama", False, marks=SLOW), pytest.param("gpt2", True, marks=SLOW),
    pytest.param("llama, eager", True, marks=SLOW),
]  # fmt: skip


def rewritten(name: str, padded: bool, window: int = WINDOW) -> Any:
    spec = ac.LinearAttention(window=window)
    model = ac.rewrite(MODELS[name](), (), inputs(padded), to=spec, on_reject="raise")
    moved(model)
    return model


@pytest.mark.parametrize(("name", "padded"), CASES)
def test_steps_are_the_whole_pass(name: str, padded: bool) -> None:
    model, given = rewritten(name, padded), inputs(padded)
    real = IDS > 0 if padded else torch.ones_like(IDS, dtype=torch.bool)
    cache = tf.DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(**given, use_cache=False).logits
        steps = stepwise(model, given, 4, cache)
        if not padded:  # a row alone has no mask
            first = model(IDS[:, :1].clamp(min=1), use_cache=False).logits
            torch.testing.assert_close(first, whole[:, :1], rtol=0, atol=1e-11)
        dense = MODELS[name]()(**given).logits
    torch.testing.assert_close(steps[real], whole[real], rtol=0, atol=1e-11)
    assert all(type(layer) is linear_layer.LinearLayer for layer in cache.layers)
    assert not torch.allclose(whole[real], dense[real], atol=1e-6)
    for layer in cache.layers:
        assert layer.get_seq_length() == IDS.shape[1]
        assert layer.window[0].shape[2] == WINDOW  # the newest leaves when the next one comes


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generate_needs_no_more_for_more_tokens(name: str, beams: int) -> None:
    model, given = rewritten(name, True), inputs(True)
    options = {"do_sample": False, "num_beams": beams, "pad_token_id": 0}
    sizes = []
    for more in (4, 19):
        exact = model.generate(**given, **options, max_new_tokens=more, use_cache=False)
        found = model.generate(
            **given, **options, max_new_tokens=more, return_dict_in_generate=True
        )
        assert torch.equal(found.sequences, exact)
        sizes.append(sum(layer.nbytes for layer in found.past_key_values.layers))
    assert sizes[0] == sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_end_to_end(name: str) -> None:
    """Rewritten, run, differentiated, taught; the error that is left is less."""
    original, given = MODELS[name]().float(), inputs(False)
    new = ac.rewrite(original, (), given, to=ac.LinearAttention(window=2), on_reject="raise")
    new(**given, labels=given["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in new.parameters())
    new.requires_grad_(False)
    for maps in ac.feature_maps(new).values():
        maps.requires_grad_(True)
    draw = torch.Generator().manual_seed(0)
    batches = [((), {"input_ids": torch.randint(1, 61, (4, 23), generator=draw)}) for _ in "ab"]
    done = ac.distill(new, original, batches, steps=(60, 0), lr=0.03, recipe=Recipe(progress=False))
    losses = done.losses["layers"]
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])


def test_the_batch_of_a_cache_may_change() -> None:
    model, given = rewritten("llama", False), inputs(False)
    cache = tf.DynamicCache(config=model.config)
    with torch.no_grad():
        model(given["input_ids"][:, :5], past_key_values=cache)
        model(given["input_ids"][:, 5:6], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
        ids = given["input_ids"].flip(0)
        found = model(ids[:, 6:], past_key_values=cache).logits
        exact = model(ids, use_cache=False).logits[:, 6:]
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-11)
    with pytest.raises(UnsupportedCall, match="cannot forget"):
        cache.crop(-1)
    layer = cache.layers[0]
    with pytest.raises(UnsupportedCall, match="was given keys and values"):
        layer.update(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4))
    with pytest.raises(UnsupportedCall, match="no new tokens"):
        layer.taken()
    layer.take(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4))
    with pytest.raises(UnsupportedCall, match="updated twice"):
        layer.take(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4))
    cache.reset()
    assert layer.get_seq_length() == 0 and layer.nbytes == 0


def test_other_caches_are_refused() -> None:
    model, given = rewritten("llama", False), inputs(False)
    filled = tf.DynamicCache(config=model.config)
    filled.update(torch.zeros(2, 2, 3, 4).double(), torch.zeros(2, 2, 3, 4).double(), 0)
    with pytest.raises(UnsupportedCall, match="cannot hold the sums"):
        model(given["input_ids"], past_key_values=filled)


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "linear.cache_form": Form,
    "linear.cache_layout": Part,
    "linear.kv_read_elsewhere": Shown,
}


@pytest.mark.parametrize("code", REFUSED)
def test_it_is_refused(code: str) -> None:
    model = REFUSED[code]().eval()
    new = ac.rewrite(model, (draw(2, 7), tf.DynamicCache()), to=ac.LinearAttention())
    (site,) = ac.last_report().sites
    assert code in {reason.code for reason in site.decision.reasons}, str(site.decision)
    assert type(new) is type(model)
