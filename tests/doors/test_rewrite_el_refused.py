"""rewrite(model, to=ELAttention()): which attention with a cache is not rewritten, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from doors.cached import (
    FEATURES,
    HEADS,
    INNER,
    WIDTH,
    Attend,
    Sides,
    draw,
    heads,
    rewritten,
    turned,
)
from torch import Tensor, nn

import attn_compiler as ac

tf = pytest.importorskip("transformers")


class NoCache(Attend):
    def cached(self, sides: Sides, past: Any) -> Sides:
        return sides


class Form(Attend):
    """Keys and values by two calls."""

    def cached(self, sides: Sides, past: Any) -> Sides:
        k, _ = past.update(*sides, 0)
        return k, past.layers[0].values


class Part(Attend):
    def cached(self, sides: Sides, past: Any) -> Sides:
        k, v = past.update(*sides, 0)
        return k[:, :, 1:], v[:, :, 1:]


class Deep(Attend):
    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Sequential(nn.Linear(WIDTH, 19), nn.GELU(), nn.Linear(19, INNER))


class Twofold(Attend):
    """Positions are added to what the keys are made of."""

    def sides(self, x: Tensor) -> Sides:
        return heads(self.k(x + 1)), heads(self.v(x))


class Rotated(Attend):
    def sides(self, x: Tensor) -> Sides:
        k, v = super().sides(x)
        angle = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.2, 0.3])
        turned = torch.cat([-k[..., 2:], k[..., :2]], -1)
        return k * angle.cos() + turned * angle.sin(), v


class RotatedAround(Attend):
    """Rotated features stand on both sides of the others."""

    def sides(self, x: Tensor) -> Sides:
        k, v = super().sides(x)
        parts = [turned(k[..., :1].repeat(1, 1, 1, 2))[..., :1], k[..., 1:3], turned(k[..., 3:])]
        return torch.cat(parts, -1), v


class NormedByHand(Attend):
    """By no module."""

    def sides(self, x: Tensor) -> Sides:
        k, v = super().sides(x)
        return k * torch.rsqrt(k.square().mean(-1, keepdim=True) + 1e-3), v


class Scaled(Attend):
    def sides(self, x: Tensor) -> Sides:
        k, v = super().sides(x)
        return k * 0.5, v


class Convolved(Attend):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, INNER, 3, padding=1)

    def sides(self, x: Tensor) -> Sides:
        return heads(self.conv(x.transpose(1, 2)).transpose(1, 2)), heads(self.v(x))


class Strided(Attend):
    """The features of a head are not neighbours."""

    def sides(self, x: Tensor) -> Sides:
        k, v = self.k(x), self.v(x)
        return k.unflatten(-1, (FEATURES, HEADS)).permute(0, 3, 1, 2), heads(v)


class TimeFirst(Attend):
    """[keys, batch, features], as some translate."""

    def sides(self, x: Tensor) -> Sides:
        k, v = (side(x.transpose(0, 1)).unflatten(-1, (-1, FEATURES)) for side in (self.k, self.v))
        return k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)


class Overwritten(Attend):
    def sides(self, x: Tensor) -> Sides:
        made = x + 1
        sides = heads(self.k(made)), heads(self.v(made))
        made.mul_(2)
        return sides


class Dropping(Attend):
    def weights(self, scores: Tensor) -> Tensor:
        return torch.nn.functional.dropout(scores.softmax(-1), 0.5)


class Shown(Attend):
    """Somebody else reads the keys."""

    def forward(self, x: Tensor, past: Any) -> Tensor:
        q = heads(self.q(x))
        k, v = past.update(*self.sides(x), 0)
        weights = self.scores(q @ k.transpose(-1, -2)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)) + k.mean()  # type: ignore[no-any-return]


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "el.no_cache": NoCache,
    "el.cache_form": Form,
    "el.cache_layout": Part,
    "el.cache_larger": lambda: Attend(groups=1),
    "el.no_projection": Deep,
    "el.kv_sources_differ": Twofold,
    "el.rope_on_key": Rotated,
    "el.partial_rope": RotatedAround,
    "el.key_norm": NormedByHand,
    "el.key_scaled": Scaled,
    "el.convolved": Convolved,
    "el.head_layout": Strided,
    "el.overwritten": Overwritten,
    "el.dropout": Dropping,
    "el.kv_read_elsewhere": Shown,
}


KV = ("keys", "values")
# where these attentions are written down
FILES = ("cached.py", "test_rewrite_el_refused.py")


@pytest.mark.parametrize("code", REFUSED)
def test_it_is_refused(code: str) -> None:
    model = REFUSED[code]()
    new, decision = rewritten(model)
    assert not decision.accepted
    found = {reason.code: reason for reason in decision.reasons}
    assert code in found, str(decision)
    told = any(file in found[code].location for file in FILES)
    assert told or code == "el.kv_read_elsewhere"
    assert type(new) is type(model)


def test_another_order_of_batch_and_keys_is_named() -> None:
    _, decision = rewritten(TimeFirst())
    texts = {reason.text for reason in decision.reasons}
    assert texts == {f"what the {s} are made of is not [batch, keys, features]" for s in KV}


def test_another_dtype_under_autocast_is_refused() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        _, decision = rewritten(Attend())
    assert "el.dtype" in {reason.code for reason in decision.reasons}


@pytest.mark.parametrize("make", [Attend, Rotated])
def test_explain_says_what_rewrite_does(make: Callable[[], nn.Module]) -> None:
    model, to = make().eval(), ac.ELAttention()
    told = ac.explain(model, (draw(2, 7), tf.DynamicCache()), to=to)
    assert type(model) is make
    _, done = rewritten(model)
    assert [s.decision for s in told.sites] == [done]
    assert done.accepted is ("attend" in told.graph_after) and "softmax" in told.graph_before


def test_explain_of_a_graph_cannot_change_a_cache() -> None:
    def attend(x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x

    (site,) = ac.explain(attend, (draw(2, 7),), to=ac.ELAttention()).sites
    assert [reason.code for reason in site.decision.reasons] == ["el.needs_rewrite"]


def test_a_backend_cannot_change_a_cache() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        Attend().eval(), backend="attn_compiler", options={"to": ac.ELAttention(), "then": "eager"}
    )
    with torch.no_grad():
        compiled(draw(2, 7), tf.DynamicCache())
    (site,) = ac.last_report().sites
    assert [reason.code for reason in site.decision.reasons] == ["el.needs_rewrite"]
    torch._dynamo.reset()
