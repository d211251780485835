"""What keeps Selective attention out where a cache hands over keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from doors.cached import FEATURES, Attend, Sides, draw
from doors.test_rewrite_el_refused import Form, Part, Shown
from torch import nn

import attn_compiler as ac
from attn_compiler.errors import UnsupportedCall

tf = pytest.importorskip("transformers")
masked_layer = pytest.importorskip("attn_compiler.cache.masked_layer")

REFUSED: dict[str, Callable[[], nn.Module]] = {
    "selective.cache_form": Form,
    "selective.cache_layout": Part,
    "selective.kv_read_elsewhere": Shown,
}


class Latent(Attend):
    """A cache keeps what keys and values are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(FEATURES, 2 * FEATURES)

    def cached(self, sides: Sides, past: Any) -> Sides:
        latents, _ = past.update(*sides, 0)
        k, v = self.both(latents).chunk(2, -1)
        return k, v


def test_what_a_cache_holds_is_named_where_it_is_neither_keys_nor_values() -> None:
    ac.rewrite(Latent().eval(), (draw(2, 7), tf.DynamicCache()), to=ac.Selective())
    (site,) = ac.last_report().sites
    (reason,) = site.decision.reasons
    assert reason.code == "selective.cache_form" and "made of what a cache hands over" in str(
        reason
    )


@pytest.mark.parametrize("code", REFUSED)
def test_it_is_refused(code: str) -> None:
    model = REFUSED[code]().eval()
    new = ac.rewrite(model, (draw(2, 7), tf.DynamicCache()), to=ac.Selective())
    (site,) = ac.last_report().sites
    assert code in {reason.code for reason in site.decision.reasons}, str(site.decision)
    assert type(new) is type(model)


def test_windows_become_layers_of_all_tokens() -> None:
    """Some of them only: masks have one length, so those of the library cannot go on beside."""
    config = tf.MistralConfig(num_hidden_layers=2, sliding_window=5)
    cache = tf.DynamicCache(config=config)
    assert cache.is_sliding == [True, True]
    held: Any = masked_layer.hold(cache, 0, None)
    assert type(held) is masked_layer.MaskedLayer and cache.is_sliding == [False, True]
    keys = draw(2, 3).unsqueeze(1)
    for index in range(2):
        cache.update(keys, keys, index)
    with pytest.raises(UnsupportedCall, match="layer 1 keeps a window"):
        masked_layer.hold(cache, 0, None)


@pytest.mark.parametrize("budget", [None, 4])
@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_a_window_beside_it_is_no_obstacle(kind: str, budget: int | None) -> None:
    """To a layer of all tokens never: its mask is another one. To a layer of a window only when it
    goes on: the masks of a first pass are as long as its rows.
    """
    config = tf.Gemma2Config(
        num_hidden_layers=2, sliding_window=5, layer_types=["sliding_attention", kind]
    )
    cache, keys = tf.DynamicCache(config=config), draw(2, 7).unsqueeze(1)
    cache.update(keys, keys, 0)
    held: Any = masked_layer.hold(cache, 1, budget)
    assert held is cache.layers[1] and cache.is_sliding == [True, False]
    assert held.windowed == (kind == "sliding_attention")
    assert masked_layer.hold(cache, 1, budget) is held
    assert held.get_seq_length() == 0
