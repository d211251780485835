"""A model rewritten to EL-attention under what generate() and PyTorch offer besides plain decoding:
the same tokens as the model that it was made of.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
from typing import Any

import pytest
import torch
from doors.test_rewrite_el_library import example, made
from torch import Tensor, nn

tf = pytest.importorskip("transformers")
layer = pytest.importorskip("attn_compiler.cache.layer")

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("name", ["bart", "gpt2"])]
LENGTH = {"max_new_tokens": 10, "min_new_tokens": 10, "pad_token_id": 1}
BEAMS = {"do_sample": False, "num_beams": 3}
GREEDY = {"do_sample": False}


@functools.cache
def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The model, and the same rewritten."""
    return made(name, "sdpa")


def ran(model: Any, given: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(**given, **{**LENGTH, **options})


def same(name: str, given: dict[str, Any], **options: Any) -> Tensor:
    expected, found = (ran(model, given, **options) for model in pair(name))
    assert torch.equal(found, expected), options
    return expected  # type: ignore[no-any-return]


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(4, 90, (rows, length), generator=torch.Generator().manual_seed(length))


def kinds(past: Any) -> set[type]:
    return {type(held) for held in getattr(past, "self_attention_cache", past).layers}


# ---------------------------------------------------------------- generate()


def test_scores_and_states_that_are_returned(name: str) -> None:
    options = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    for way in (GREEDY, BEAMS):
        theirs, ours = (ran(m, example(name), **way, **options) for m in pair(name))
        assert torch.equal(ours.sequences, theirs.sequences)
        assert kinds(ours.past_key_values) == {layer.StatesLayer}
        states = "decoder_hidden_states" if "decoder_hidden_states" in theirs else "hidden_states"
        for key in ("logits", states):
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4)


def test_assistants(name: str) -> None:
    """Tokens that are taken back are cropped from the cache."""
    given = {"input_ids": torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7]])}
    expected = same(name, given, **GREEDY)
    assert torch.equal(same(name, given, prompt_lookup_num_tokens=3, **GREEDY), expected)
    helped = []
    for model in pair(name):
        helper = copy.deepcopy(model)
        with torch.no_grad():
            for weight in helper.parameters():
                weight.mul_(1 + 0.1 * torch.rand(weight.shape))
        helped.append(ran(model, given, assistant_model=helper, **GREEDY))
    assert all(torch.equal(found, expected) for found in helped)


def test_going_on_with_a_cache_that_was_returned(name: str) -> None:
    found = []
    for model in pair(name):
        given = example(name)
        first = ran(model, given, return_dict_in_generate=True, **GREEDY)
        text, past = torch.cat([first.sequences, tokens(2, 3)], 1), first.past_key_values
        if model.config.is_encoder_decoder:
            given["decoder_input_ids"] = text
        else:
            more = torch.ones(2, text.shape[1] - 7, dtype=torch.long)
            given = {
                "input_ids": text,
                "attention_mask": torch.cat([given["attention_mask"], more], 1),
            }
        twin = copy.deepcopy(past)
        found.append([ran(model, given, past_key_values=p, **GREEDY) for p in (past, twin, None)])
    for theirs, ours in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(found[1][0], found[1][1]) and torch.equal(found[1][0], found[1][2])


class Turned(tf.DynamicCache):
    """A cache whose `update` somebody wrote."""

    def update(self, keys: Tensor, values: Tensor, index: int, *more: Any) -> Any:
        return super().update(keys, -3 * values, index, *more)


@pytest.mark.parametrize("kind", [tf.DynamicCache, Turned])
def test_caches_of_the_user(name: str, kind: Any) -> None:
    found = []
    for model in pair(name):
        past = kind()
        if model.config.is_encoder_decoder:
            past = tf.EncoderDecoderCache(past, kind())
        found.append(ran(model, example(name), past_key_values=past, **BEAMS))
    assert torch.equal(*found)
    assert (layer.StatesLayer in kinds(past)) is (kind is tf.DynamicCache)
    plain = ran(pair(name)[0], example(name), **BEAMS)
    assert torch.equal(found[0], plain) is (kind is tf.DynamicCache)


def test_one_batch_after_another(name: str) -> None:
    for rows, length in ((4, 3), (1, 9), (3, 1), (1, 1), (2, 13)):
        ids = tokens(rows, length)
        for way in (GREEDY, BEAMS):
            same(name, {"input_ids": ids}, **way)
            same(name, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **way)


def test_padding_and_rows_that_are_equal(name: str) -> None:
    """Equal rows are kept once, and see different parts of it."""
    padded, mask = tokens(4, 9), torch.ones(4, 9, dtype=torch.long)
    for row, count in enumerate((0, 3, 8, 5)):
        mask[row, :count], padded[row, :count] = 0, 1
    equal = tokens(1, 9).repeat(4, 1)
    for ids in (padded, equal):
        for way in (GREEDY, BEAMS, {"do_sample": True, "num_return_sequences": 2}):
            same(name, {"input_ids": ids, "attention_mask": mask}, **way)


def test_without_a_cache_and_with_one_that_is_quantised(name: str) -> None:
    same(name, example(name), use_cache=False, **GREEDY)
    with torch.inference_mode():
        same(name, example(name), **BEAMS)
    if name == "gpt2":  # the library has none for the other
        options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
        same(name, example(name), **options, **GREEDY)


# ---------------------------------------------------------------- an ordinary module


def test_copies_compute_with_their_own_weights(name: str) -> None:
    model, new = made(name, "sdpa")  # nobody has hung anything on it yet
    file = io.BytesIO()
    torch.save(new, file)
    file.seek(0)
    copies = [pickle.loads(pickle.dumps(new)), copy.deepcopy(new)]
    copies.append(torch.load(file, weights_only=False))
    for module in (model, *copies):
        with torch.no_grad():
            for weight in module.parameters():
                weight.mul_(1.1)
    expected = ran(model, example(name), **BEAMS)
    for twin in copies:
        found = ran(twin, example(name), return_dict_in_generate=True, **BEAMS)
        assert torch.equal(found.sequences, expected)
        assert kinds(found.past_key_values) == {layer.StatesLayer}


@pytest.mark.parametrize("checkpoints", [False, True])
def test_training(name: str, checkpoints: bool) -> None:
    found = []
    for original in pair(name):
        model = copy.deepcopy(original).train()
        for module in model.modules():
            for key, value in list(vars(module).items()):
                if isinstance(value, float) and ("drop" in key or key == "p"):
                    setattr(module, key, 0.0)
        if checkpoints:
            model.gradient_checkpointing_enable()
        model(**example(name), labels=tokens(2, 7)).loss.backward()
        found.append([weight.grad for weight in model.parameters() if weight.grad is not None])
    for theirs, ours in zip(*found, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * scale)


def test_a_compiled_forward(name: str) -> None:
    expected = ran(pair(name)[0], example(name), **BEAMS)
    model = copy.deepcopy(pair(name)[1])
    # calls unlike the example are analysed where nothing is traced
    ran(model, example(name), **BEAMS)
    model.forward = torch.compile(model.forward, backend="eager")
    found = ran(model, example(name), return_dict_in_generate=True, **BEAMS)
    assert torch.equal(found.sequences, expected)
    assert kinds(found.past_key_values) == {layer.StatesLayer}


def test_autocast(name: str) -> None:
    """Beside float64, and not by tokens: a tie is broken by rounding."""
    model, new = pair(name)
    wide, given = copy.deepcopy(model).double(), example(name)
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = tokens(2, 5)
    errors = []
    with torch.no_grad():
        exact = wide(**given).logits
        for module in (new, model):
            with torch.autocast("cpu", torch.bfloat16):
                errors.append((module(**given).logits.double() - exact).square().mean().sqrt())
    assert errors[0] <= 1.2 * errors[1]
