"""SwitchHead in library models: caches, generation, two sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attn_compiler as ac

tf = pytest.importorskip("transformers")

SPEC = ac.SwitchHead(heads=2, experts=2, k=1)
WORDS = 101


def gpt2() -> Any:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=WORDS, n_positions=64, n_embd=48, n_layer=2, n_head=4,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def llama() -> Any:
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=WORDS, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        )
    )  # fmt: skip


def bart() -> Any:
    return tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=WORDS, d_model=48, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
            decoder_ffn_dim=64, max_position_embeddings=64, pad_token_id=1, bos_token_id=0,
            eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
        )
    )  # fmt: skip


def bert() -> Any:
    return tf.BertModel(
        tf.BertConfig(
            vocab_size=WORDS, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64,
        )
    )  # fmt: skip


def inputs(padded: bool = True) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, WORDS, (2, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0 if padded else 1
    return {"input_ids": ids, "attention_mask": mask}


def rewritten(make: Callable[[], Any], sites: int, **more: Any) -> Any:
    torch.manual_seed(0)
    model = make().eval()
    new = ac.rewrite(model, (), inputs() | more, to=SPEC)
    report = ac.last_report()
    assert report.rewritten == len(report.sites) == sites, str(report)
    return new


def written(model: Any, **options: Any) -> list[list[int]]:
    found = model.generate(
        **inputs(), max_new_tokens=6, min_new_tokens=6, do_sample=False, **options
    )
    return found.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "make", [pytest.param(llama, id="llama"), pytest.param(gpt2, marks=pytest.mark.slow)]
)
def test_what_a_cache_gives_is_what_the_whole_sequence_gives(make: Callable[[], Any]) -> None:
    new = rewritten(make, 2)
    ids = inputs()["input_ids"]
    with torch.no_grad():
        whole = new(ids, use_cache=False).logits
        past = tf.DynamicCache()
        parts = [new(ids[:, :4], past_key_values=past).logits]
        parts += [new(ids[:, i : i + 1], past_key_values=past).logits for i in range(4, 7)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    assert past.layers[0].keys.shape[:3] == (2, 2, 7)


@pytest.mark.slow
@pytest.mark.parametrize("make", [gpt2, llama])
def test_generation_with_padding_in_front(make: Callable[[], Any]) -> None:
    new = rewritten(make, 2)
    want = written(new, use_cache=False)
    assert written(new) == want
    assert written(new, cache_implementation="static") == want


@pytest.mark.slow
def test_an_encoder_and_a_decoder() -> None:
    new = rewritten(bart, 6, decoder_input_ids=inputs()["input_ids"][:, :5])
    assert not any("proj" in n for n, _ in new.named_parameters() if "attn" in n)
    assert written(new) == written(new, use_cache=False)


@pytest.mark.slow
def test_an_encoder() -> None:
    new = rewritten(bert, 2)
    names = {
        n.rpartition(".")[2] for n, _ in new.encoder.layer[0].attention.self.named_parameters()
    }
    assert names == {"w_q", "w_k", "w_v", "w_o", "w_s", "w_d"}
    assert not hasattr(new.encoder.layer[0].attention.output, "dense")
    padded = inputs()
    with torch.no_grad():
        out = new(**padded).last_hidden_state[0, 3:]
        padded["input_ids"][0, :3] = 5
        assert torch.equal(new(**padded).last_hidden_state[0, 3:], out)
