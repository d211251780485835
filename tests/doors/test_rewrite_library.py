"""rewrite(transformers model): caches, generation, checkpointing, saving."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import claims
import pytest
import torch
from doors.living import calls, in_graph
from torch import nn

import attn_compiler as ac

# whole library models through `rewrite`: minutes, so not in the default run
pytestmark = pytest.mark.slow

tf = pytest.importorskip("transformers")
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
_IMAGE = {k: v for k, v in _SMALL.items() if k != "vocab_size"}
_PAIR = {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
MODELS: dict[str, tuple[int, Any]] = {
    "gpt2": (
        2,
        lambda a: tf.GPT2LMHeadModel(
            tf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100, attn_implementation=a)
        ),
    ),
    "llama": (
        2,
        lambda a: tf.LlamaForCausalLM(
            tf.LlamaConfig(**_SMALL, num_key_value_heads=2, attn_implementation=a)
        ),
    ),
    "bert": (2, lambda a: tf.BertModel(tf.BertConfig(**_SMALL, attn_implementation=a))),
    "t5": (
        6,
        lambda a: tf.T5ForConditionalGeneration(
            tf.T5Config(**_T5, decoder_start_token_id=0, attn_implementation=a)
        ),
    ),
    "bart": (
        5,
        lambda a: tf.BartForConditionalGeneration(
            tf.BartConfig(d_model=64, vocab_size=100, **_PAIR, attn_implementation=a)
        ),
    ),
    # scores depend on how many values the cache holds
    "doge": (
        2,
        lambda a: tf.DogeForCausalLM(
            tf.DogeConfig(**_SMALL, num_key_value_heads=2, attn_implementation=a)
        ),
    ),
    "vit": (
        2,
        lambda a: tf.ViTModel(
            tf.ViTConfig(**_IMAGE, image_size=32, patch_size=8, attn_implementation=a)
        ),
    ),
}
GENERATE = ["gpt2", "llama", "t5", "bart", "doge"]
_made: dict[tuple[str, str], tuple[nn.Module, nn.Module, dict[str, Any]]] = {}


def example(name: str, padded: bool = True) -> dict[str, Any]:
    g = torch.Generator().manual_seed(2)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=g)}
    ids = torch.randint(3, 90, (2, 7), generator=g)
    mask = torch.ones(2, 7, dtype=torch.long)
    if padded:
        mask[1, :3] = 0
    found = {"input_ids": ids, "attention_mask": mask}
    if name in ("t5", "bart"):
        found["decoder_input_ids"] = torch.randint(3, 90, (2, 5), generator=g)
    return found


def pair(name: str, attention: str = "eager") -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """A model, the same rewritten, an example; made once, copied for each test."""
    if (name, attention) not in _made:
        torch.manual_seed(0)
        model = MODELS[name][1](attention).eval()
        kwargs = example(name)
        new = ac.rewrite(model, (), kwargs)
        report = ac.last_report()
        assert report.rewritten == len(report.sites) == MODELS[name][0], str(report)
        _made[name, attention] = model, new, kwargs
    model, new, kwargs = _made[name, attention]
    return copy.deepcopy(model), copy.deepcopy(new), kwargs


def first(model: nn.Module) -> Any:
    return lambda **kwargs: model(**kwargs)[0]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_same_numbers(name: str, attention: str) -> None:
    model, new, kwargs = pair(name, attention)
    with torch.no_grad():
        claims.same_numbers(model, new, (), kwargs)
    assert calls(new, **kwargs) == MODELS[name][0]


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", GENERATE)
def test_same_greedy_tokens(name: str, cache: str | None) -> None:
    model, new, kwargs = pair(name)
    kwargs = {k: v for k, v in kwargs.items() if "decoder" not in k}
    options = {
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
        "cache_implementation": cache,
        "disable_compile": True,
        "pad_token_id": 0,
    }
    expected = model.generate(**kwargs, **options)
    assert torch.equal(new.generate(**kwargs, **options), expected)
    # now all kinds of calls are known: every layer of every step runs the operator
    assert calls(new.generate, **kwargs, **options) >= 12 * 2
    assert torch.equal(new.generate(**kwargs, **options), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_returned_weights_are_those_of_the_original(name: str) -> None:
    model, new, kwargs = pair(name)
    with torch.no_grad():
        claims.same_numbers(model, new, (), {**kwargs, "output_attentions": True})


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_returned_hidden_states(name: str) -> None:
    model, new, kwargs = pair(name)
    with torch.no_grad():
        claims.same_numbers(model, new, (), {**kwargs, "output_hidden_states": True})


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model, new, _ = pair(name)
    kwargs = example(name, padded=False)
    found = []
    for module in (model, new):
        module.train()
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    new.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for module in (model, new):
        module(**kwargs)[0].square().mean().backward()
        found.append([p.grad for p in module.parameters() if p.grad is not None])
    for ours, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_save_pretrained(tmp_path: Path) -> None:
    model, new, kwargs = pair("llama")
    new.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(again) is type(model)
    with torch.no_grad():
        claims.same_numbers(model, again, (), kwargs)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_pickle(name: str) -> None:
    _, new, kwargs = pair(name)
    again = pickle.loads(pickle.dumps(new))
    assert calls(again, **kwargs) == MODELS[name][0]


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_outer_compile(name: str) -> None:
    model, new, kwargs = pair(name)
    seen: list[int] = []

    def look(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(in_graph(gm.graph))
        return gm.forward

    with torch.no_grad():
        claims.same_numbers(model, torch.compile(new, backend=look), (), kwargs)
    assert sum(seen) == MODELS[name][0]


def test_later_layers_follow_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_compiler import specialise

    traced: list[str] = []
    trace = specialise._trace
    monkeypatch.setattr(
        specialise,
        "_trace",
        lambda o, b, v, plan: traced.append(plan.prefix) or trace(o, b, v, plan),
    )
    monkeypatch.setattr(specialise, "_guides", {})
    config = tf.LlamaConfig(**{**_SMALL, "num_hidden_layers": 6}, attn_implementation="eager")
    model = tf.LlamaForCausalLM(config).eval()
    new = ac.rewrite(model, (torch.randint(3, 90, (2, 7)),))
    assert ac.last_report().rewritten == 6
    assert {path.rpartition(".layers.")[2].split(".")[0] for path in traced} == {"0"}
    idx = [layer._attn_variants[0].source.count(".update(") for layer in new.model.layers]
    assert idx == [1] * 6
    sources = [layer._attn_variants[0].source for layer in new.model.layers]
    assert ", 5)" in sources[5] and ", 5)" not in sources[4]
