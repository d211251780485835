"""Decoders that look at an encoder, under the variants for one causal sequence: attention to the
encoder stays as it is, with a reason, and that to the decoder's own tokens is rewritten.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from doors.cached import FEATURES, HEADS, INNER, WIDTH, draw, heads
from doors.test_linear_attention import moved
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import attn_compiler as ac
from attn_compiler.ir.site import Kind

tf = pytest.importorskip("transformers")

LINEAR = ac.LinearAttention(window=3)


class Two(nn.Module):
    """Attention to the decoder's tokens and to the encoder's, in one module, each with a cache."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own, self.cross = nn.Linear(WIDTH, 3 * INNER), nn.Linear(WIDTH, 2 * INNER)
        self.q = nn.Linear(WIDTH, INNER)
        self.out = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor, encoded: Tensor, past: Any, across: Any, mask: Any) -> Tensor:
        q, k, v = map(heads, self.own(x).chunk(3, -1))
        k, v = past.update(k, v, 0)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        k, v = across.update(*map(heads, self.cross(encoded).chunk(2, -1)), 0)
        y = scaled_dot_product_attention(heads(self.q(x)), k, v, attn_mask=mask)
        return x + self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


SIZES = [(5, 7, True), (5, 5, True), (1, 1, False)]


@pytest.mark.parametrize(("rows", "keys", "masked"), SIZES)
@pytest.mark.parametrize("spec", [LINEAR, ac.Selective()])
def test_the_other_sequence_is_refused(spec: Any, rows: int, keys: int, masked: bool) -> None:
    """By a reason of its own, also where sizes agree or a mask might have made it causal."""
    mask = torch.ones(2, 1, rows, keys).tril().bool() if masked else None
    caches = tf.DynamicCache(), tf.DynamicCache()
    ac.rewrite(Two(), (draw(2, rows), draw(2, keys) + 1, *caches, mask), to=spec)
    own, across = ac.last_report().sites
    assert own.decision.accepted and own.kind is Kind.SELF
    assert across.kind is Kind.CROSS
    family = own.decision.variant
    assert [r.code for r in across.decision.reasons] == [f"{family}.not_causal"]


class Low(nn.Module):
    """Queries and keys are more than one linear map away from what they share."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Linear(WIDTH, 7), nn.LayerNorm(7)
        self.q, self.kv = nn.Linear(7, INNER), nn.Linear(WIDTH, 2 * HEADS * FEATURES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = heads(self.q(self.norm(self.down(x))))
        k, v = map(heads, self.kv(y.tanh()).chunk(2, -1))
        return scaled_dot_product_attention(q, k, v)


def test_one_sequence_is_known_by_what_is_read() -> None:
    class Same(Low):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, x)

    for model, given, kind in (
        (Same(), (draw(2, 7),), Kind.SELF),
        (Low(), (draw(2, 7), draw(2, 11)), Kind.CROSS),
    ):
        (site,) = ac.explain(model, given).sites
        assert site.kind is kind


class Images(nn.Module):
    """Queries and keys are made by convolutions of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Conv2d(3, INNER, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k = (heads(y(x).flatten(2).mT) for y in (self.q, self.k))
        return (q @ k.mT).softmax(-1) @ k


class Written(nn.Module):
    """Keys are read from a tensor that this call has written its own into."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Linear(WIDTH, INNER) for _ in range(2))
        self.register_buffer("past", torch.zeros(2, HEADS, 13, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        self.past[:, :, 5 : 5 + x.shape[1]] = heads(self.k(x)).detach()
        keys = self.past[:, :, : 5 + x.shape[1]]
        return (heads(self.q(x)) @ keys.mT).softmax(-1) @ keys


class Library(nn.Module):
    """Keys have the batch size of the queries, and nothing else of them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 1, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.attention(x, y, y)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "given", "kind"),
    [
        (Images(), (torch.randn(2, 3, 4, 5),), Kind.SELF),
        (Written(), (draw(2, 3),), Kind.SELF),
        (Library(), (draw(2, 7), draw(2, 5)), Kind.CROSS),
    ],
)
def test_one_sequence_is_known_by_both_doors(model: nn.Module, given: Any, kind: Kind) -> None:
    ac.rewrite(model, given)
    (site,) = ac.last_report().sites
    assert site.kind is kind
    torch.compile(model, backend="attn_compiler", options={"then": "eager"})(*given)
    (site,) = ac.last_report().sites
    assert site.kind is kind


_PAIR: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "vocab_size": 61,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": None, "decoder_start_token_id": 4,
    "forced_eos_token_id": None,
}  # fmt: skip
_SOUND: dict[str, Any] = {
    "num_mel_bins": 8, "max_source_positions": 13, "max_target_positions": 40,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "bart": lambda a: tf.BartForConditionalGeneration(tf.BartConfig(**_PAIR, **a)),
    "pegasus": lambda a: tf.PegasusForConditionalGeneration(tf.PegasusConfig(**_PAIR, **a)),
    "whisper": lambda a: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(**_PAIR, **_SOUND, **a)
    ),
}
IDS = torch.tensor([[3, 19, 23, 29, 31, 37, 41], [5, 7, 11, 13, 17, 0, 0]])


def given(name: str) -> dict[str, Tensor]:
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 26, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": IDS, "attention_mask": (IDS > 0).long()}


@functools.cache
def made(name: str, attention: str, spec: Any) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]({"attn_implementation": attention}).eval()
    for path, parameter in model.named_parameters():
        parameter.data *= 1 if "norm" in path else 3
    example = {**given(name), "decoder_input_ids": torch.tensor([[4, 9, 8], [4, 7, 6]])}
    model = ac.rewrite(model, (), example, to=spec)
    variants = [site.decision.variant for site in ac.last_report().sites]
    assert variants.count("") == 3 and len(set(variants)) == 2
    moved(model)
    return model.double()


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("spec", [LINEAR, ac.Selective(), ac.Selective(budgets=[5, 7])])
@pytest.mark.parametrize(
    ("name", "attention"),
    [("bart", "sdpa"), ("bart", "eager"), ("pegasus", "sdpa"), ("whisper", "sdpa")],
)
def test_tokens_are_those_without_a_cache(name: str, attention: str, spec: Any, beams: int) -> None:
    model = made(name, attention, spec)
    options = {"do_sample": False, "num_beams": beams, "min_new_tokens": 11, "max_new_tokens": 11}
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in given(name).items()}
    exact = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(model.generate(**inputs, **options), exact)
