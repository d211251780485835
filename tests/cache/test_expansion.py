"""Encoder states in generate(): once for each sample, whatever the number of beams."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from doors.test_rewrite_el_library import _PAIR, example, made
from torch import nn

import attn_compiler as ac
from attn_compiler.cache.expansion import materialised
from attn_compiler.cache.states import Repeated, States, whole
from attn_compiler.installed import base_of

tf = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A model, and the same rewritten."""
    return made("bart", "sdpa")


def states() -> torch.Tensor:
    return torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- rows without a storage


def test_it_is_the_copies_and_owns_nothing() -> None:
    x = states()
    wide, copies = Repeated(x, 2), x.repeat_interleave(2, 0)
    assert (wide.shape, wide.dtype, wide.device) == (copies.shape, copies.dtype, copies.device)
    assert wide.stride() == copies.stride() and wide.untyped_storage().nbytes() == 0
    weight = torch.randn(11, 7)
    for read in (
        lambda t: t + 1,
        lambda t: t[1:4],
        lambda t: nn.functional.linear(t, weight),
        lambda t: t.clone(),
        lambda t: t.to(torch.float64),
    ):
        found = read(wide)
        assert type(found) is torch.Tensor and torch.equal(found, read(copies))
    assert "Repeated" in repr(wide)


def test_a_cache_keeps_what_it_stands_for() -> None:
    x = states()
    wide = Repeated(x, 4)
    held = States(wide, borrowed=True)
    assert held.x is x and held.beams == 4 and held.stands_for(wide)
    assert not held.stands_for(Repeated(x + 1, 4))


def test_an_analysis_sees_ordinary_tensors() -> None:
    x = states()
    found = materialised((x, {"a": [Repeated(x, 2)]}))
    assert found[0] is x and type(found[1]["a"][0]) is torch.Tensor
    assert torch.equal(found[1]["a"][0], whole(Repeated(x, 2)))


# ---------------------------------------------------------------- the model's class


def beams(model: Any, **more: Any) -> torch.Tensor:
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    return model.generate(**example("bart"), **(options | more))  # type: ignore[no-any-return]


def given(model: nn.Module, **more: Any) -> list[Any]:
    """The encoder's states that each step of a generation is handed."""
    found: list[Any] = []
    hook = model.register_forward_pre_hook(
        lambda m, args, kwargs: found.append(kwargs["encoder_outputs"].last_hidden_state),
        with_kwargs=True,
    )
    with hook:
        beams(model, **more)
    return found


def test_every_step_is_handed_the_rows_of_all_beams(pair: tuple[Any, Any]) -> None:
    model, new = pair
    theirs, ours = given(model), given(new)
    assert len(ours) == len(theirs) == 6
    assert all(type(x) is Repeated and x.states is ours[0].states for x in ours)
    assert all(torch.equal(whole(x), y) for x, y in zip(ours, theirs, strict=True))
    # as many samples as rows: nothing to repeat
    assert not any(type(x) is Repeated for x in given(new, num_beams=1))


def test_the_class_looks_like_the_model_s_own(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, new = pair
    assert type(new) is not type(model) and isinstance(new, type(model))
    assert base_of(new) is type(model) and type(new).__name__ == type(model).__name__
    assert new.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="not_an_argument"):
        beams(new, not_an_argument=1)
    expected = beams(model)
    for twin in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert type(twin) is type(new) and torch.equal(beams(twin), expected)
    new.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded) is type(model) and torch.equal(beams(loaded), expected)


@pytest.mark.slow
def test_a_model_inside_of_another_one() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tf.BartForConditionalGeneration(tf.BartConfig(**_PAIR)).eval()

        def forward(self, **kwargs: Any) -> Any:
            return self.inner(**kwargs)

    model = Around()
    kwargs = {**example("bart"), "decoder_input_ids": torch.randint(4, 90, (2, 5))}
    new = ac.rewrite(model, (), kwargs, to=ac.ELAttention())
    assert type(new) is Around and given(new.inner)[0].untyped_storage().nbytes() == 0
    assert torch.equal(beams(new.inner), beams(model.inner))
    again = ac.rewrite(new, (), kwargs, to=ac.ELAttention())
    assert type(again.inner) is type(new.inner)
    exact = ac.rewrite(model, (), kwargs)
    assert type(exact.inner) is type(model.inner)


def test_more_than_states_is_copied_as_ever(pair: tuple[Any, Any]) -> None:
    model, new = pair
    outputs = model.get_encoder()(**example("bart"))
    more = tf.modeling_outputs.BaseModelOutputWithPooling(
        last_hidden_state=outputs.last_hidden_state, pooler_output=outputs.last_hidden_state[:, 0]
    )
    ids = torch.full((2, 1), 2)
    for held in (outputs, more):
        found = [
            m._expand_inputs_for_generation(
                expand_size=3,
                is_encoder_decoder=True,
                input_ids=ids,
                encoder_outputs=copy.copy(held),
            )
            for m in (model, new)
        ]
        assert torch.equal(found[0][0], found[1][0])
        rows = [f[1]["encoder_outputs"].last_hidden_state.shape[0] for f in found]
        assert rows == [6, 2 if held is outputs else 6]
    with pytest.raises(ValueError, match="encoder_outputs"):
        new._expand_inputs_for_generation(3, True, ids, encoder_outputs=None)
