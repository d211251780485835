"""A model rewritten to EL-attention with transformers' static cache: hidden states in tensors that
are made once, the same tokens, and one graph for all steps.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from doors.cached import Counted
from doors.test_rewrite_el_library import EAGER, MODELS, WAYS, example, made, reachable
from torch import Tensor, fx, nn

import attn_compiler as ac

tf = pytest.importorskip("transformers")
layer = pytest.importorskip("attn_compiler.cache.layer")

pytestmark = pytest.mark.slow
STEPS, ROOM = 11, 24
LENGTH = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "pad_token_id": 1}
STATIC = {**LENGTH, "cache_implementation": "static", "disable_compile": True}


@functools.cache
def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The model, and the same rewritten."""
    return made(name, "eager" if name in EAGER else "sdpa")


def ran(model: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(**{**example("gpt2"), **STATIC, **options})


def layers(past: Any) -> list[Any]:
    """Of self-attention."""
    return list(getattr(past, "self_attention_cache", past).layers)


# Whisper's own generate() hands out another cache than it worked with
@pytest.mark.parametrize("name", [n for n in MODELS if n != "whisper"])
def test_same_tokens_from_half_the_bytes(name: str) -> None:
    model, new = pair(name)
    for way, options in WAYS.items():
        theirs = ran(model, **options, return_dict_in_generate=True)
        ours = ran(new, **options, return_dict_in_generate=True)
        assert torch.equal(ours.sequences, theirs.sequences), way
        with Counted() as counted:
            # all kinds of calls are known by now
            assert torch.equal(ran(new, **options), theirs.sequences), way
        assert counted.found["el_attention"] >= (STEPS - 1) * MODELS[name][0], way
        held = layers(ours.past_key_values)
        assert {type(one) for one in held} == {layer.StaticStatesLayer}
        sizes = [sum(reachable(layers(g.past_key_values)).values()) for g in (ours, theirs)]
        # a number of tokens beside each layer's tensors
        ours_, theirs_ = (size - 8 * len(held) for size in sizes)
        shape = held[0].states.x.shape
        beside = sum(t.nbytes for one in held for t in one.states.beside)
        assert theirs_ == len(held) * shape.numel() * 2 * 4
        assert ours_ == theirs_ / 2 + beside


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_prompt_without_padding(name: str) -> None:
    """Of a cache that is empty the library reads as many keys as the prompt has, without a mask."""
    given = {"input_ids": torch.randint(4, 90, (2, 7)), "attention_mask": None}
    for way in ("greedy", "beams"):
        options = {**given, **WAYS[way], "return_dict_in_generate": True}
        theirs, ours = (ran(m, **options) for m in pair(name))
        assert torch.equal(ours.sequences, theirs.sequences)
        assert {type(one) for one in layers(ours.past_key_values)} == {layer.StaticStatesLayer}


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_the_cache_after_a_reset(name: str) -> None:
    found, places = [], []
    for model in pair(name):
        config = model.config.get_text_config(decoder=True)
        past = tf.StaticCache(config=config, max_cache_len=ROOM)
        if model.config.is_encoder_decoder:
            past = tf.EncoderDecoderCache(past, tf.StaticCache(config=config, max_cache_len=7))
        for _ in range(2):
            given = {"past_key_values": past, "cache_implementation": None, "num_beams": 3}
            found.append(ran(model, **given, do_sample=False))
            one = layers(past)[0]
            places.append(one.states.x.data_ptr() if hasattr(one, "states") else 0)
            assert one.get_seq_length() == found[-1].shape[1] - 1
            past.reset()
            assert one.get_seq_length() == 0
    assert all(torch.equal(other, found[0]) for other in found)
    assert places[2] == places[3] != 0


def counts(graph: fx.GraphModule) -> dict[str, int]:
    """Calls of the operators in a graph."""
    names = [str(node.target) for node in graph.graph.nodes]
    kinds = ("el_attention", "attention")
    return {k: sum(n.startswith(f"attn_compiler.{k}.") for n in names) for k in kinds}


# of phi's keys a part is rotated, and all of them are normalised
@pytest.mark.parametrize("name", ["gpt2", "bart", "phi"])
def test_all_steps_are_one_graph(name: str) -> None:
    new, graphs = pair(name)[1], []

    def backend(graph: fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(counts(graph))
        return graph

    options = {"do_sample": True, "num_return_sequences": 2}
    expected = ran(new, **options)
    config = tf.CompileConfig(backend=backend, fullgraph=True, mode=None, dynamic=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    for _ in range(2):
        found = ran(new, **options, disable_compile=False, compile_config=config)
        assert torch.equal(found, expected)
    assert graphs == [{"el_attention": MODELS[name][0], "attention": 0}]


def test_a_window_keeps_its_keys() -> None:
    """Its static layer forgets tokens, which must not stay as states."""
    torch.manual_seed(0)
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96}
    config = tf.Exaone4Config(**sizes, **heads, **kinds, max_position_embeddings=64)
    model = tf.Exaone4ForCausalLM(config).eval()
    new = ac.rewrite(model, (), example("gpt2"), to=ac.ELAttention())
    theirs, ours = (ran(m, do_sample=False, return_dict_in_generate=True) for m in (model, new))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert type(layers(ours.past_key_values)[0]) is type(layers(theirs.past_key_values)[0])
