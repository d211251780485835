"""Selective attention in generation: a library's models and caches, steps against whole passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attn_compiler as ac
from attn_compiler.errors import UnsupportedCall

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


def llama_eager() -> Any:
    """Its mask is a tensor of zeros and large negative numbers that is added."""
    model = llama()
    model.set_attn_implementation("eager")
    return model


def mistral() -> Any:
    """Layers of a sliding window, which the library's cache keeps short."""
    torch.manual_seed(0)
    config = tf.MistralConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=LAYERS, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=61, max_position_embeddings=64, sliding_window=3,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return _sharp(tf.MistralForCausalLM(config))


def gemma2() -> Any:
    """One layer of a sliding window, one of all tokens."""
    torch.manual_seed(0)
    config = tf.Gemma2Config(
        hidden_size=24, intermediate_size=40, num_hidden_layers=LAYERS, num_attention_heads=6,
        num_key_value_heads=2, head_dim=4, vocab_size=61, max_position_embeddings=64,
        sliding_window=3, bos_token_id=None, eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    return _sharp(tf.Gemma2ForCausalLM(config))


def _sharp(model: Any) -> Any:
    """Logits that mask something, in float64."""
    for name, parameter in model.named_parameters():
        if "norm" not in name and "ln" not in name:
            parameter.data *= 3
    return model.double().eval()


MODELS = {
    "llama": llama, "gpt2": gpt2, "llama, eager": llama_eager, "mistral": mistral,
    "gemma2": gemma2,
}  # fmt: skip


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


SLOW = pytest.mark.slow
CASES = [
    pytest.param("llama", True, {}),
    pytest.param("gpt2", False, {"start": "dedicated_head"}),
    pytest.param("llama", False, {"start": "dedicated_head"}, marks=SLOW),
    pytest.param("llama", True, {"start": "dedicated_head"}, marks=SLOW),
    pytest.param("llama", True, {"start": "gate"}, marks=SLOW),
    pytest.param("gpt2", True, {}, marks=SLOW),
    pytest.param("llama, eager", True, {}, marks=SLOW),
    pytest.param("mistral", True, {}, marks=SLOW),
    pytest.param("gemma2", True, {}, marks=SLOW),
    pytest.param("gpt2", True, {"start": "gate"}, marks=SLOW),
]


def awake(model: Any) -> Any:
    """What starts at 0 gets a value."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "attn_select" in name or "attn_gate" in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(("name", "padded", "spec"), CASES)
def test_steps_are_the_whole_pass(name: str, padded: bool, spec: dict[str, Any]) -> None:
    model, given = awake(rewritten(name, padded, ac.Selective(**spec))), inputs(padded)
    real = torch.ones_like(IDS, dtype=torch.bool) if not padded else IDS > 0
    with torch.no_grad():
        whole = model(**given, use_cache=False).logits
        cache = tf.DynamicCache(config=model.config)
        steps = stepwise(model, given, 4, cache)
        dense = MODELS[name]()(**given).logits
    torch.testing.assert_close(steps[real], whole[real], rtol=0, atol=1e-11)
    assert all(type(layer) is masked_layer.MaskedLayer for layer in cache.layers)
    assert not torch.allclose(whole[real], dense[real], atol=1e-6)


@pytest.mark.parametrize("beams", [1, pytest.param(3, marks=SLOW)])
def test_generate_prunes(beams: int) -> None:
    """With room for all tokens the same text as without a cache; with less, less memory. A prompt
    read at once leaves the cache that its tokens one by one would have left.
    """
    model, given = rewritten("llama", True, ac.Selective(budgets=[ROOM] * LAYERS)), inputs(True)
    options = {"max_new_tokens": 9, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    options["return_dict_in_generate"] = True
    exact = model.generate(**given, **options, use_cache=False).sequences
    sizes = {}
    for budget in (ROOM, 8, 4):
        ac.set_budgets(model, [budget] * LAYERS)
        found = model.generate(**given, **options)
        cache = found.past_key_values
        assert all(type(layer) is selective.SelectiveLayer for layer in cache.layers)
        sizes[budget] = sum(layer.nbytes for layer in cache.layers)
        if budget == ROOM:
            assert torch.equal(found.sequences, exact)
    assert sizes[8] == 2 * sizes[4] and sizes[ROOM] == ROOM / 4 * sizes[4]
    if beams == 1:
        with torch.no_grad():
            whole = model(**given, use_cache=False).logits  # pruned by the row that evicts a key
            steps = stepwise(model, given, 4, tf.DynamicCache())
        real = IDS > 0
        torch.testing.assert_close(steps[real], whole[real], rtol=0, atol=1e-11)


def test_caches_it_cannot_go_on_with() -> None:
    model, given = rewritten("llama", False, ac.Selective()), inputs(False)
    cache = tf.DynamicCache()
    model(given["input_ids"][:, :3], past_key_values=cache)
    with pytest.raises(UnsupportedCall, match="cannot forget"):
        cache.crop(-1)
    cache.layers[0].amount = None  # somebody else filled it
    with pytest.raises(UnsupportedCall, match="knows what masks 0 of them"):
        model(given["input_ids"][:, 3:4], past_key_values=cache)
    foreign = tf.DynamicCache()
    llama().float()(given["input_ids"][:, :3], past_key_values=foreign)
    with pytest.raises(UnsupportedCall, match="holds 3 tokens that another model put there"):
        model(given["input_ids"][:, 3:4], past_key_values=foreign)


def test_a_training_may_fill_a_cache() -> None:
    """Libraries do by default; weights are dropped as elsewhere."""
    model = rewritten("gpt2", False, ac.Selective()).train()
    given = inputs(False)
    torch.manual_seed(1)
    first = model(**given, use_cache=True).logits
    torch.manual_seed(1)
    assert torch.equal(model(**given, use_cache=True).logits, first)
    assert not torch.equal(model(**given, use_cache=True).logits, first)
    assert first.sum().isfinite()
