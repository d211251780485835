"""Selective attention in generation: a library's models and caches, steps against whole passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attn_compiler as ac

tf = pytest.importorskip("transformers")
# imported by name: the library is imported with them
selective = pytest.importorskip("attn_compiler.cache.selective")
masked_layer = pytest.importorskip("attn_compiler.cache.masked_layer")

IDS = torch.tensor([[0, 0, 5, 7, 11, 13, 17], [3, 19, 23, 29, 31, 37, 41]])
LAYERS, ROOM = 2, 40


def llama() -> Any:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=LAYERS, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=61, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return _sharp(tf.LlamaForCausalLM(config))


def gpt2() -> Any:
    torch.manual_seed(0)
    config = tf.GPT2Config(
        n_embd=24, n_layer=LAYERS, n_head=3, vocab_size=61, n_positions=64,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return _sharp(tf.GPT2LMHeadModel(config))


def _sharp(model: Any) -> Any:
    """Logits that mask something, in float64."""
    for name, parameter in model.named_parameters():
        if "norm" not in name and "ln" not in name:
            parameter.data *= 3
    return model.double().eval()


MODELS = {"llama": llama, "gpt2": gpt2}


def inputs(padded: bool) -> dict[str, Tensor]:
    ids = IDS if padded else IDS.clamp(min=1)
    return {"input_ids": ids} | ({"attention_mask": (ids > 0).long()} if padded else {})


def rewritten(name: str, padded: bool, spec: Any) -> Any:
    model = ac.rewrite(MODELS[name](), (), inputs(padded), to=spec, on_reject="raise")
    return model.eval()


def stepwise(model: Any, given: dict[str, Tensor], prompt: int, cache: Any) -> Tensor:
    """Logits of a prompt, then of one token after the other."""
    ids, mask = given["input_ids"], given.get("attention_mask")
    found = []
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
        more = {} if mask is None else {"attention_mask": mask[:, :end]}
        out = model(ids[:, start:end], past_key_values=cache, use_cache=True, **more)
        found.append(out.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("spec", [{}, {"start": "dedicated_head"}, {"start": "gate"}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_steps_are_the_whole_pass(name: str, padded: bool, spec: dict[str, Any]) -> None:
    model = rewritten(name, padded, ac.Selective(**spec))
    torch.manual_seed(3)
    for parameter in model.named_parameters():
        if "attn_select" in parameter[0] or "attn_gate" in parameter[0]:
            torch.nn.init.normal_(parameter[1])
    given = inputs(padded)
    with torch.no_grad():
        whole = model(**given, use_cache=False).logits
        cache = tf.DynamicCache()
        steps = stepwise(model, given, 4, cache)
    real = torch.ones_like(IDS, dtype=torch.bool) if not padded else IDS > 0
    torch.testing.assert_close(steps[real], whole[real], rtol=0, atol=1e-11)
    assert all(type(layer) is masked_layer.MaskedLayer for layer in cache.layers)
    dense = MODELS[name]()(**given).logits
    assert not torch.allclose(whole[real], dense[real], atol=1e-6)
