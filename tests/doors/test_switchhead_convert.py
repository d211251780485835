"""SwitchHead out of the trained layers of living models, through the door."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as ac
from attn_compiler.errors import BadOption
from attn_compiler.train.distill import Recipe
from tests.doors import switched
from tests.doors.switched import FEATURES, D, H, draw, heads

Batches = list[tuple[tuple[Any, ...], dict[str, Any]]]


def batches(number: int = 3) -> Batches:
    return [((draw(seed),), {}) for seed in range(number)]


def converted(model: nn.Module, data: Batches | None = None, **sizes: Any) -> nn.Module:
    data = data or batches()
    spec = ac.SwitchHead(init="convert", **sizes)
    return ac.rewrite(model.eval(), *data[0], to=spec, calibration=data)  # type: ignore[no-any-return]


def codes() -> set[str]:
    return {r.code for s in ac.last_report().sites for r in s.decision.reasons}


def errors() -> tuple[float, float]:
    """Of the layer's output, as drawn and converted."""
    words = ac.last_report().sites[0].facts["calibration"].split()
    return float(words[2]), float(words[5])


# ---------------------------------------------------------------- exact


class Plain(switched.Einsums):
    """No biases."""


class Turned(switched.Rotary):
    def __init__(self) -> None:
        super().__init__(bias=False)


class Neighbours(Turned):
    """Neighbouring channels are a pair, the values are scaled, and time is the first dimension."""

    def sides(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (heads(m(x)) for m in (self.q, self.k, self.v))
        angles = torch.arange(x.shape[1])[:, None] * 0.1 ** torch.arange(3)
        cos, sin = angles.cos(), angles.sin()

        def turned(t: Tensor) -> Tensor:
            a, b = t[..., 1::2], t[..., 2::2]
            pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
            return torch.cat([t[..., :1], pairs], -1)

        return turned(q), turned(k), 1.5 * v

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


class KeysAlike(switched.Grouped):
    """Keys and values shared, with the biases that change no score."""

    def __init__(self) -> None:
        super().__init__()
        self.q.bias = None


EXACT = {"a map of einsum": Plain, "rotated": Turned, "pairs of neighbours": Neighbours,
         "shared keys": KeysAlike}  # fmt: skip
SOON = "a map of einsum"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n != SOON else ()) for n in EXACT]
)
def test_as_many_maps_as_heads_compute_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = EXACT[name]()
    new = converted(model, batches(1), heads=H, experts=2, k=1, head_dim=FEATURES + 4)
    assert codes() == set() and errors()[1] < 1e-12
    x = draw(9, batch=2, length=17)
    torch.testing.assert_close(new(x), model(x), rtol=1e-4, atol=2e-5)


# ---------------------------------------------------------------- approximate


class Padded(switched.Fused):
    """One packed matrix, and a mask of padding."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = (heads(t) for t in self.qkv(x).split(D, -1))
        seen = mask[:, None, None]
        return self.result(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen))


def padded(seed: int, kept: int = 7) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """Padding of huge numbers: it must teach nothing."""
    x, mask = draw(seed, batch=4), torch.ones(4, 11, dtype=torch.bool)
    mask[:2, kept:] = False
    return (torch.where(mask[..., None], x, 50.0), mask), {}


def test_fewer_maps_start_near_the_layer() -> None:
    torch.manual_seed(0)
    model = Padded()
    data = [padded(seed) for seed in range(5)]
    new = converted(model, data, k=3)
    before, after = errors()
    assert after < 0.5 < before
    (x, mask), _ = padded(11, kept=5)
    gap, size = ((a[mask]).square().sum() for a in (new(x, mask) - model(x, mask), model(x, mask)))
    assert float(gap / size) < 0.6
    text = str(ac.last_report())
    assert "converted" in text and "2 heads" in text
    assert dict(new.named_parameters())["b_o"].shape == (D,)


class Crossed(switched.Separate):
    def scores(self, dot: Tensor) -> Tensor:
        return dot


@pytest.mark.slow
def test_two_sequences() -> None:
    torch.manual_seed(0)
    model = Crossed()
    data = [((draw(s), draw(s + 50, length=5)), {}) for s in range(3)]
    new = converted(model, data)
    before, after = errors()
    assert after < 0.5 * before
    assert new(*data[1][0]).shape == (3, 11, D)


@pytest.mark.slow
def test_half_precision_is_read_in_single() -> None:
    torch.manual_seed(0)
    model = switched.Separate().bfloat16()
    data = [((x.bfloat16(),), {}) for ((x,), _) in batches(1)]
    new = converted(model, data, heads=H, experts=1, k=1)
    assert errors()[1] < 1e-4
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_what_goes_in_is_as_before() -> None:
    model = switched.Stack(switched.Separate, 1)
    held = {n: x.clone() for n, x in model.state_dict().items()}
    data = batches(2)
    given = [x.clone() for ((x,), _) in data]
    converted(model, data)
    assert all(torch.equal(x, held[n]) for n, x in model.state_dict().items())
    assert all(torch.equal(a, b) for a, ((b,), _) in zip(given, data, strict=True))
    assert not any("ear" in n for n, _ in model.named_modules())


# ---------------------------------------------------------------- no


class TwoSources(switched.Separate):
    def sides(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return heads(self.q(x)), heads(self.k(x + 1)), heads(self.v(x))


class Uneven(switched.Separate):
    """Turned by the square of the position."""

    def sides(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().sides(x, y)
        at = torch.arange(x.shape[1]) ** 2 * 0.05
        q, k = (torch.cat([switched.rotated(t[..., :-1], at), t[..., -1:]], -1) for t in (q, k))
        return q, k, v


@pytest.mark.parametrize(
    ("kind", "sizes", "code"),
    [
        (switched.Separate, {"heads": 2, "experts": 2}, "switchhead.convert_heads"),
        pytest.param(Turned, {"head_dim": 5}, "switchhead.convert_width", marks=pytest.mark.slow),
        pytest.param(TwoSources, {}, "switchhead.convert_sources", marks=pytest.mark.slow),
        pytest.param(Uneven, {}, "switchhead.convert_rotation", marks=pytest.mark.slow),
    ],
)
def test_it_stays_with_a_reason(kind: type[nn.Module], sizes: dict[str, Any], code: str) -> None:
    new = converted(kind(), batches(1), **sizes)
    assert codes() == {code}
    assert type(new) is kind


@pytest.mark.slow
def test_a_cache_that_holds_tokens() -> None:
    tf = pytest.importorskip("transformers")

    class Cached(switched.Separate):
        def forward(self, x: Tensor, past: Any) -> Tensor:  # type: ignore[override]
            q, k, v = self.sides(x, x)
            k, v = past.update(k, v, 0)
            return self.result((q @ k.mT).softmax(-1) @ v)

    past = tf.DynamicCache()
    past.update(torch.randn(3, H, 4, FEATURES), torch.randn(3, H, 4, FEATURES), 0)
    converted(Cached(), [((draw(), past), {})])
    assert codes() == {"switchhead.convert_cache"}


@pytest.mark.slow
def test_what_is_misread_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_compiler.variants.conversion.reading.LARGE", 2.0**41)
    converted(switched.Separate(), batches(1))
    assert codes() == {"switchhead.convert_unread"}


@pytest.mark.slow
def test_what_was_not_heard_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_compiler.train.switchhead_convert._ears", lambda model: [])
    converted(switched.Separate(), batches(1))
    assert codes() == {"switchhead.convert_unheard"}


@pytest.mark.parametrize(
    ("given", "words"),
    [(None, "calibration is missing"), ("later", "calibration is missing"),
     pytest.param([], "calibration shows nothing", marks=pytest.mark.slow),
     pytest.param([draw()], "not a pair", marks=pytest.mark.slow)],
)  # fmt: skip
def test_it_takes_calibration(given: Any, words: str) -> None:
    with pytest.raises(BadOption, match=words):
        ac.rewrite(
            switched.Separate(), (draw(),), to=ac.SwitchHead(init="convert"), calibration=given
        )


def test_heads_become_experts_on_values_and_outputs() -> None:
    with pytest.raises(BadOption, match="experts_on"):
        ac.SwitchHead(init="convert", experts_on=("o",))


# ---------------------------------------------------------------- distillation


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_converted_model_is_distilled(name: str) -> None:
    from tests.doors import test_switchhead_library as library

    torch.manual_seed(0)
    teacher = getattr(library, name)().eval()
    data = [((), library.inputs())]
    student = converted(teacher, data)
    assert codes() == set()
    done = ac.distill(
        student, teacher, data, steps=(20, 20), lr=1e-4, recipe=Recipe(progress=False)
    )
    assert len(done.layers) == 2
    for losses in done.losses.values():
        assert losses[-1] < losses[0]


@pytest.mark.slow
def test_the_cache_of_the_teacher_is_not_the_students() -> None:
    tf = pytest.importorskip("transformers")

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, past=tf.DynamicCache())  # type: ignore[no-any-return]

    class Inner(switched.Separate):
        def forward(self, x: Tensor, past: Any = None) -> Tensor:  # type: ignore[override]
            q, k, v = self.sides(x, x)
            if past is not None:
                k, v = past.update(k, v, 0)
            return self.result((q @ k.mT).softmax(-1) @ v)

    torch.manual_seed(0)
    teacher, data = Cached().eval(), batches(1)
    student = converted(teacher, data)
    assert codes() == set()
    done = ac.distill(student, teacher, data, steps=(3, 0), lr=1e-4, recipe=Recipe(progress=False))
    before = errors()[1]
    assert done.losses["layers"][0] == pytest.approx(before, rel=0.02)
