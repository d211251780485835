"""rewrite(model, to=GAU()): language models go on token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from doors.gated import IDS, SMALL, X, close, heads, rewritten
from torch import Tensor
from torch.nn import functional

import attn_compiler as ac
from attn_compiler.errors import UnsupportedCall
from tests.ir.block_models import Parallel

tf = pytest.importorskip("transformers")


def language_model(kind: str, layers: int = 1) -> Any:
    torch.manual_seed(0)
    none = {"bos_token_id": None, "eos_token_id": None, "vocab_size": 61}
    if kind == "gpt2":
        config = tf.GPT2Config(n_embd=12, n_layer=layers, n_head=2, n_positions=64, **none)
        return tf.GPT2LMHeadModel(config).eval()
    config = tf.LlamaConfig(
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=layers,
        num_attention_heads=2,
        **none,
    )
    return tf.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("kind", "chunk"), [pytest.param("gpt2", None, marks=pytest.mark.slow), ("llama", 4)]
)
def test_generation_is_the_full_pass(kind: str, chunk: int | None) -> None:
    new: Any = rewritten(language_model(kind, 2), IDS, to=ac.GAU(s=6, expansion=1.5, chunk=chunk))
    options = {"do_sample": False, "pad_token_id": 0}
    out = new.generate(
        IDS, max_new_tokens=6, output_logits=True, return_dict_in_generate=True, **options
    )
    full = new(out.sequences, use_cache=False).logits[:, 6:-1]
    assert close(torch.stack(out.logits, 1), full)
    layer, _ = out.past_key_values.layers
    assert layer.get_seq_length() == 12
    beams = {"max_new_tokens": 3, "num_beams": 3, **options}
    assert torch.equal(new.generate(IDS, **beams), new.generate(IDS, use_cache=False, **beams))


@pytest.mark.slow
def test_generation_with_padding_on_the_left() -> None:
    new: Any = rewritten(language_model("llama"), IDS, to=SMALL)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    out = new.generate(
        IDS, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    whole = functional.pad(mask, (0, 6), value=1)
    full = new(out.sequences, attention_mask=whole, use_cache=False).logits[:, 6:-1]
    assert close(torch.stack(out.logits, 1), full)


@pytest.mark.slow
def test_the_state_does_not_grow() -> None:
    new: Any = rewritten(language_model("llama"), IDS, to=SMALL)
    sizes = []
    for count in (6, 14):
        out = new.generate(
            IDS, max_new_tokens=count, do_sample=False, pad_token_id=0, return_dict_in_generate=True
        )
        sizes.append(sum(layer.nbytes for layer in out.past_key_values.layers))
    assert sizes[0] == sizes[1] > 0
    layer = new(IDS).past_key_values.layers[0]  # the first tokens themselves, of both units
    assert layer.nbytes == 2 * IDS.numel() * 12 * 4


class NetFirst(Parallel):
    def forward(self, x: Tensor, past: Any) -> Tensor:  # type: ignore[override]
        normed = self.first(x)
        made = self.net(normed)
        q, k, v = heads(self, normed)
        k, v = past.update(k, v, 0)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return made + self.attend.out(mixed.transpose(1, 2).flatten(2)) + x  # type: ignore[no-any-return]


def test_a_net_that_comes_before_the_cache() -> None:
    ac.rewrite(NetFirst(), (X, tf.DynamicCache()), to=SMALL)
    (site,) = ac.last_report().sites
    assert [r.code for r in site.decision.reasons] == ["block.order"]


def test_a_cache_that_cannot_hold_states() -> None:
    new: Any = rewritten(language_model("llama"), IDS, to=SMALL)
    cache = tf.StaticCache(new.config, max_cache_len=16)
    with pytest.raises(UnsupportedCall):
        new(IDS, past_key_values=cache)


@pytest.mark.parametrize(("kind", "chunk"), [("gpt2", None), ("llama", 4)])
def test_a_token_alone_is_the_first_of_many(kind: str, chunk: int | None) -> None:
    """One row sees itself alone, be it the first of many or one of a sequence seen as a whole."""
    new: Any = rewritten(language_model(kind), IDS, to=ac.GAU(s=6, expansion=1.5, chunk=chunk))
    whole = new(IDS, use_cache=False).logits
    for length in (1, 2, 5):
        part = new(IDS[:, :length], use_cache=False).logits
        assert close(part, whole[:, :length]), length
