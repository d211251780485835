"""rewrite(transformers model, to=ELAttention()): the same tokens through generate(), a cache of
hidden states.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from doors.cached import Counted
from torch import nn

import attn_compiler as ac
from attn_compiler.installed import base_of

tf = pytest.importorskip("transformers")
_PAIR = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 100,
}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
_SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, "hidden_size": 64}
_ROTARY = {
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_TOKENS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 4}
# the attentions with a cache, and the model
MODELS: dict[str, tuple[int, Any]] = {
    "bart": (4, lambda a: tf.BartForConditionalGeneration(tf.BartConfig(**_PAIR, **a))),
    "mbart": (
        4,
        lambda a: tf.MBartForConditionalGeneration(
            tf.MBartConfig(**_PAIR, **a, decoder_start_token_id=2)
        ),
    ),
    "marian": (4, lambda a: tf.MarianMTModel(tf.MarianConfig(**_PAIR, **_TOKENS, **a))),
    "pegasus": (4, lambda a: tf.PegasusForConditionalGeneration(tf.PegasusConfig(**_PAIR, **a))),
    "t5": (
        4,
        lambda a: tf.T5ForConditionalGeneration(tf.T5Config(**_T5, decoder_start_token_id=0, **a)),
    ),
    "mt5": (
        4,
        lambda a: tf.MT5ForConditionalGeneration(
            tf.MT5Config(**_T5, decoder_start_token_id=0, **a)
        ),
    ),
    "whisper": (
        4,
        lambda a: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(
                **(_PAIR | _TOKENS),
                num_mel_bins=8,
                max_source_positions=13,
                max_target_positions=40,
                suppress_tokens=None,
                begin_suppress_tokens=None,
                **a,
            )
        ),
    ),
    "gpt2": (
        2,
        lambda a: tf.GPT2LMHeadModel(
            tf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100, **a)
        ),
    ),
    "bloom": (
        2,
        lambda a: tf.BloomForCausalLM(
            tf.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=100)
        ),
    ),
    "opt": (2, lambda a: tf.OPTForCausalLM(tf.OPTConfig(**_SMALL, ffn_dim=96, **a))),
    # keys of which a part is rotated, that are normalised, or both
    "neox": (2, lambda a: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_SMALL, **_ROTARY, **a))),
    "gptj": (
        2,
        lambda a: tf.GPTJForCausalLM(
            tf.GPTJConfig(n_embd=64, n_layer=2, n_head=4, rotary_dim=4, vocab_size=100, **a)
        ),
    ),
    "stablelm": (
        2,
        lambda a: tf.StableLmForCausalLM(
            tf.StableLmConfig(**_SMALL, **_ROTARY, num_key_value_heads=4, **a)
        ),
    ),
    "phi": (
        2,
        lambda a: tf.PhiForCausalLM(tf.PhiConfig(**_SMALL, **_ROTARY, qk_layernorm=True, **a)),
    ),
    "exaone4": (
        2,
        lambda a: tf.Exaone4ForCausalLM(
            tf.Exaone4Config(
                **_SMALL,
                **_ROTARY,
                num_key_value_heads=4,
                head_dim=16,
                sliding_window=7,
                layer_types=["full_attention", "full_attention"],
                **a,
            )
        ),
    ),
}
# what the library has no other attention for
EAGER = frozenset({"gptj"})
WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 5},
    "several": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
}


def example(name: str) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(2)
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 26, generator=draw)}
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    return {"input_ids": torch.randint(4, 90, (2, 7), generator=draw), "attention_mask": mask}


def made(name: str, attention: str) -> tuple[nn.Module, nn.Module]:
    """A model whose random weights are large enough for other tokens at other places, and the same
    rewritten.
    """
    torch.manual_seed(0)
    model = MODELS[name][1]({"attn_implementation": attention}).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3 if weight.dim() > 1 else 1)
    kwargs = example(name)
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = torch.randint(4, 90, (2, 5))
    new = ac.rewrite(model, (), kwargs, to=ac.ELAttention())
    taken = [s for s in ac.last_report().sites if s.decision.accepted]
    assert len(taken) == MODELS[name][0], str(ac.last_report())
    assert {s.decision.variant for s in taken} == {"el"}
    return model, new


def same_tokens(name: str, attention: str, number: int) -> None:
    model, new = made(name, attention)
    for way, options in WAYS.items():

        def tokens(module: Any, options: dict[str, Any] = options) -> torch.Tensor:
            torch.manual_seed(3)
            lengths = {"max_new_tokens": number, "min_new_tokens": number}
            return module.generate(**example(name), **options, **lengths)  # type: ignore[no-any-return]

        expected = tokens(model)
        assert torch.equal(tokens(new), expected), way
        with Counted() as counted:
            # all kinds of calls are known by now
            assert torch.equal(tokens(new), expected), way
        # every layer of every step
        assert counted.found["el_attention"] >= (number - 1) * MODELS[name][0], way


def test_bart() -> None:
    same_tokens("bart", "sdpa", 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, a) for name in MODELS for a in ("eager", "sdpa") if a == "eager" or name not in EAGER],
)
def test_same_tokens(name: str, attention: str) -> None:
    same_tokens(name, attention, 32)


def diverse(model: Any, kwargs: dict[str, Any], groups: int = 2, each: int = 2) -> torch.Tensor:
    """Diverse beam search, of which the library has no more its own: groups one behind the other,
    a word that an earlier group has chosen in this step costs one nat (arXiv 1610.02424).
    """
    beams, rows = groups * each, 2 * groups * each
    given = {k: v.repeat_interleave(beams, 0) for k, v in kwargs.items()}
    past = tf.EncoderDecoderCache(tf.DynamicCache(), tf.DynamicCache())
    tokens, scores = torch.full((rows, 1), 2), torch.zeros(2, groups, each)
    scores[:, :, 1:] = -1e9
    for _ in range(9):
        with torch.no_grad():
            found = model(**given, decoder_input_ids=tokens[:, -1:], past_key_values=past)
        logs = found.logits[:, -1].log_softmax(-1).view(2, groups, each, -1)
        chosen, taken = [], torch.zeros(2, 1, logs.shape[-1])
        for group in range(groups):
            total = scores[:, group, :, None] + logs[:, group]
            best = (total - taken).flatten(1).topk(each).indices
            beam, word = best // logs.shape[-1], best % logs.shape[-1]
            scores[:, group] = total.flatten(1).gather(1, best)
            taken = taken.scatter_add(2, word[:, None], torch.ones(2, 1, each))
            chosen.append((beam + group * each, word))
        index = torch.stack([b for b, _ in chosen], 1).flatten(1) + torch.tensor([[0], [beams]])
        words = torch.stack([w for _, w in chosen], 1).flatten()
        past.reorder_cache(index.flatten())
        tokens = torch.cat([tokens[index.flatten()], words[:, None]], 1)
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_diverse_beams(name: str) -> None:
    model, new = made(name, "sdpa")
    expected = diverse(model, example(name))
    assert torch.equal(diverse(new, example(name)), expected)
    # the groups differ, or nothing was reordered between them
    assert (expected.view(2, 2, 2, -1)[:, 0] != expected.view(2, 2, 2, -1)[:, 1]).any()


@pytest.mark.slow
def test_weights_that_are_asked_for() -> None:
    model, new = made("bart", "eager")
    kwargs = {**example("bart"), "decoder_input_ids": torch.tensor([[5, 7, 11], [13, 17, 19]])}
    with torch.no_grad():
        ours, theirs = (m(**kwargs, output_attentions=True) for m in (new, model))
    for mine, other in zip(ours.cross_attentions, theirs.cross_attentions, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- bytes


def reachable(thing: Any, seen: set[int] | None = None) -> dict[int, int]:
    """Bytes of the storages of all tensors that can be reached from something."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, type | str | int | float | nn.Module):
        return {}
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        # one without a storage stands for another
        return {storage.data_ptr(): storage.nbytes()} | reachable(vars(thing), seen)
    children = list(getattr(thing, "__dict__", {}).values())
    children += thing.values() if isinstance(thing, dict) else ()
    children += thing if isinstance(thing, list | tuple) else ()
    return {k: v for child in children for k, v in reachable(child, seen).items()}


def kept_bytes(model: nn.Module, beams: int, length: int) -> tuple[int, int]:
    """What generate() keeps of the input, and of what it has written: encoder states and the cache
    of cross-attention, the cache of self-attention.
    """
    given: list[Any] = []
    hook = model.register_forward_pre_hook(
        lambda m, args, kwargs: given.append(kwargs["encoder_outputs"]), with_kwargs=True
    )
    ids = torch.randint(4, 90, (2, length), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "return_dict_in_generate": True}
    past = model.generate(input_ids=ids, num_beams=beams, **options).past_key_values
    hook.remove()
    cross = reachable([past.cross_attention_cache, given[-1]])
    return sum(cross.values()), sum(reachable(past.self_attention_cache).values())


# 64 channels, 4 heads of 16 features: the rotated features of a key, and its sizes in float32
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rotated", "sizes"), [("neox", 4, 0), ("gptj", 4, 0), ("phi", 8, 4), ("exaone4", 0, 4)]
)
def test_bytes_of_a_cache_beside_x(name: str, rotated: int, sizes: int) -> None:
    """Width + heads x rotated features for each token, instead of 2 x heads x features."""
    model, new = made(name, "eager")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "return_dict_in_generate": True}
    theirs, ours = (
        sum(reachable(m.generate(**example(name), **options).past_key_values).values())
        for m in (model, new)
    )
    tokens = 2 * 2 * (7 + 4) * 4
    assert theirs == tokens * 2 * 64 and ours == tokens * (64 + 4 * rotated + sizes)


@pytest.mark.slow
def test_bytes_of_caches() -> None:
    """12 layers, 4 beams: an encoder state for each sample, instead of one for each beam and 2 x 12
    tensors of its size.
    """
    config = tf.BartConfig(**(_PAIR | {"decoder_layers": 12}), attn_implementation="sdpa")
    torch.manual_seed(0)
    model = tf.BartForConditionalGeneration(config).eval()
    kwargs = {**example("bart"), "decoder_input_ids": torch.randint(4, 90, (2, 5))}
    new = ac.rewrite(model, (), kwargs, to=ac.ELAttention())
    theirs, ours = kept_bytes(model, 4, 97), kept_bytes(new, 4, 97)
    state = 2 * 97 * 64 * 4
    assert theirs[0] == (2 * 12 + 1) * 4 * state and ours[0] == state
    assert theirs[1] == 2 * ours[1]


@pytest.mark.slow
def test_bytes_of_caches_of_a_large_model() -> None:
    """12 layers, 1024 wide, 16 heads, 4 beams, 1024 tokens of input: measured, and by the formulas
    layers x beams x 2 n e b beside the library's own copies of the states, and n D b.
    """
    sizes = {"d_model": 1024, "encoder_attention_heads": 16, "decoder_attention_heads": 16}
    config = tf.BartConfig(**(_PAIR | sizes | {"decoder_layers": 12}), attn_implementation="sdpa")
    torch.manual_seed(0)
    model = tf.BartForConditionalGeneration(config).eval()
    kwargs = {**example("bart"), "decoder_input_ids": torch.randint(4, 90, (2, 5))}
    theirs = kept_bytes(model, 4, 1024)
    ac.rewrite(model, (), kwargs, to=ac.ELAttention(), inplace=True)
    ours = kept_bytes(model, 4, 1024)
    state = 2 * 1024 * 1024 * 4
    assert theirs[0] == (12 * 4 * 2 + 4) * state and ours[0] == state
    assert theirs[0] >= 90 * ours[0] and theirs[1] == 2 * ours[1]
    # with the library's own expansion of the input the states stand there once for each beam
    model.__class__ = base_of(model)
    ours = kept_bytes(model, 4, 1024)
    assert ours[0] == 4 * state and theirs[0] >= 24 * ours[0] and theirs[1] == 2 * ours[1]
