"""rewrite(model, to=GAU(init="convert"), calibration=...): units that start from their block."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import attn_compiler as ac
from attn_compiler.errors import BadOption
from attn_compiler.train.distill import Recipe
from tests.ir.block_models import WIDTH, Net, Post, Pre

CONVERT = ac.GAU(s=6, expansion=4, chunk=None, init="convert")


def batches(number: int = 4, length: int = 11) -> list[Any]:
    draw = torch.Generator().manual_seed(1)
    return [((torch.randn(3, length, WIDTH, generator=draw),), {}) for _ in range(number)]


def averaging(kind: type[Pre] = Pre, **more: Any) -> Pre:
    """A block that a pair of units can compute: all heads see all tokens before alike, and a gated
    net of SiLU is narrow enough.
    """
    net = Net(functional.silu, gated=True)
    model = kind(net=net, **more)
    with torch.no_grad():
        model.attend.qkv.weight[: 2 * WIDTH] = 0
        model.attend.qkv.bias[: 2 * WIDTH] = 0
    for linear in (net.up, net.gate, net.down):
        linear.bias = None  # type: ignore[union-attr]
    return model.eval()


def missed(ours: Tensor, wanted: Tensor) -> float:
    return float((ours - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize(
    ("kind", "causal"), [(Pre, True), pytest.param(Post, False, marks=pytest.mark.slow)]
)
def test_a_block_that_units_can_compute(kind: type[Pre], causal: bool) -> None:
    model, data = averaging(kind, causal=causal), batches()
    new = ac.rewrite(model, *data[0], to=CONVERT, calibration=data, on_reject="raise")
    (x,), _ = batches(5)[-1]
    with torch.no_grad():
        assert missed(new(x) - x, model(x) - x) < 1e-3
    (site,) = ac.last_report().sites
    # a fresh unit mixes tokens its own way: it misses about all of the block's
    before = re.search(r"attention: ([0-9.]+)% before, 0.0% after", site.facts["calibration"])
    assert before is not None and float(before[1]) > 90
    assert site.facts["calibration"].endswith("on 1 of 4 batches, kept back")
    assert all(p.requires_grad for p in new.parameters())


@pytest.mark.slow
def test_a_block_that_they_cannot() -> None:
    """Nearer than a fresh start, and what was asked of it is not changed."""
    model, data = Pre().eval(), batches()
    spec = ac.GAU(s=6, expansion=1.5, chunk=4, init="convert")
    state = copy.deepcopy(model.state_dict())
    new = ac.rewrite(model, *data[0], to=spec, calibration=iter(data))
    fresh = ac.rewrite(model, *data[0], to=ac.GAU(s=6, expansion=1.5, chunk=4))
    (x,), _ = batches(5)[-1]
    with torch.no_grad():
        errors = [missed(m(x) - x, model(x) - x) for m in (new, fresh)]
    assert errors[0] < 0.8 < errors[1]
    assert all(torch.equal(model.state_dict()[n], x) for n, x in state.items())
    assert not model.training and not new.training
    # rows see nothing that comes after them
    assert torch.allclose(new(x)[:, :6], new(x[:, :6]), atol=1e-5)


@pytest.mark.slow
def test_padding_is_not_learnt_from() -> None:
    model = nn.TransformerEncoderLayer(WIDTH, 3, 20, dropout=0.0, batch_first=True).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # else it may run fused
    model.train()
    away = torch.zeros(3, 11, dtype=torch.bool)
    away[:, 7:] = True
    found = []
    for noise in (0.0, 50.0):
        data = [
            ((x + noise * away[..., None],), {"src_key_padding_mask": away})
            for (x,), _ in batches()
        ]
        torch.manual_seed(0)
        found.append(ac.rewrite(model, *data[0], to=CONVERT, calibration=data, on_reject="raise"))
    x = batches(5)[-1][0][0]
    ours = [m(x, src_key_padding_mask=away)[:, :7] for m in found]
    assert torch.allclose(*ours, atol=1e-3)
    assert missed(ours[0], model(x, src_key_padding_mask=away)[:, :7]) < 0.2


@pytest.mark.parametrize("calibration", [None, "later"])
def test_data_is_needed(calibration: Any) -> None:
    with pytest.raises(BadOption, match="calibration is missing"):
        ac.rewrite(Pre(), *batches()[0], to=CONVERT, calibration=calibration)


def test_a_relative_bias_is_needed() -> None:
    with pytest.raises(BadOption, match="relative_bias=False"):
        ac.GAU(init="convert", relative_bias=False)


class Normed(Pre):
    """Its values are normed."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attend.qkv(self.first(x)).chunk(3, -1)
        parts = (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in (q, k, functional.normalize(v)))
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.attend.out(mixed.transpose(1, 2).flatten(2))
        return x + self.net(self.second(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [(Normed(), batches(), "cannot be read"), (Pre(), [], "shows nothing")],
)
def test_what_cannot_be_converted_is_as_before(model: Pre, data: Any, message: str) -> None:
    x = batches()[0][0][0]
    before, names = model(x), [n for n, _ in model.named_parameters()]
    with pytest.raises(BadOption, match=message):
        ac.rewrite(model, (x,), to=CONVERT, calibration=data, inplace=True)
    assert type(model) in (Normed, Pre)
    assert names == [n for n, _ in model.named_parameters()]
    assert torch.equal(model(x), before)


# ---------------------------------------------------------------- models of a library


def language_model(kind: str) -> Any:
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    none = {"bos_token_id": None, "eos_token_id": None, "vocab_size": 61}
    small = {"hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 96}
    if kind == "gpt2":
        model = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=48, n_layer=2, n_head=2, **none))
    elif kind == "llama":
        sizes = {"num_hidden_layers": 2, "num_key_value_heads": 1, **small}
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, **none))
    else:
        model = tf.BertForMaskedLM(tf.BertConfig(num_hidden_layers=2, vocab_size=61, **small))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)  # so that attention is not the mean
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_library_model_is_converted_and_distilled(kind: str) -> None:
    teacher = language_model(kind)
    draw = torch.Generator().manual_seed(2)
    data = [((torch.randint(1, 61, (3, 13), generator=draw),), {}) for _ in range(6)]
    student = ac.rewrite(
        teacher, *data[0], to=ac.GAU(s=16, init="convert"), calibration=data, on_reject="raise"
    )
    fresh = ac.rewrite(teacher, *data[0], to=ac.GAU(s=16))
    wanted = teacher(*data[0][0]).logits
    errors = [missed(m(*data[0][0]).logits, wanted) for m in (student, fresh)]
    assert errors[0] < errors[1]
    done = ac.distill(
        student, teacher, data, steps=(30, 30), lr=2e-4, recipe=Recipe(progress=False)
    )
    assert len(done.layers) == 2
    layers = done.losses["layers"]  # six batches, over and over
    assert sum(layers[-6:]) < sum(layers[:6])
    assert missed(student(*data[0][0]).logits, wanted) < errors[0]
    if kind != "bert":
        for sampled in (False, True):
            with_state, without = (
                written(student, data[0][0][0], sampled, c) for c in (True, False)
            )
            assert torch.equal(with_state, without)


def written(model: Any, ids: Tensor, sampled: bool, cache: bool) -> Tensor:
    torch.manual_seed(5)
    options = {"max_new_tokens": 5, "do_sample": sampled, "pad_token_id": 0, "use_cache": cache}
    return model.generate(ids, **options)  # type: ignore[no-any-return]
