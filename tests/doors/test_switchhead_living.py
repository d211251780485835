"""Rewritten to SwitchHead and SwitchAll: in other compilers, in parallel training, in half
precision, and with every option, in models of a library that are wider than a toy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as ac
from tests.doors.test_switchhead_library import inputs
from tests.ir.block_models import WIDTH, Pre

tf = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
BOTH = {"feed_forward": "sigma_moe"}
X = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))
WORDS, WIDE = 101, 96


def llama() -> Any:
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=WORDS, hidden_size=WIDE, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=64,
        )
    )  # fmt: skip


def gpt2() -> Any:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=WORDS, n_positions=64, n_embd=WIDE, n_layer=2, n_head=8,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def bart() -> Any:
    return tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=WORDS, d_model=WIDE, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=8, decoder_attention_heads=8, encoder_ffn_dim=200,
            decoder_ffn_dim=200, max_position_embeddings=64, pad_token_id=1, bos_token_id=0,
            eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
        )
    )  # fmt: skip


def rewritten(model: nn.Module, *args: Any, to: Any, **kwargs: Any) -> Any:
    torch.manual_seed(5)
    return ac.rewrite(model, args, kwargs, to=to, on_reject="raise")


def close(ours: Tensor, theirs: Tensor) -> None:
    """Tokens of an expert are multiplied together: others beside them round differently."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


OPTIONS: list[dict[str, Any]] = [
    {"experts_on": ("q", "k", "v", "o"), "heads": 2, "experts": 2, "k": 1},
    {"experts_on": ("k", "o"), "shared_selection": True},
    {"shared_selection": True, "expert_dropout": 0.25, **BOTH},
    {"experts_on": ("q",), **BOTH},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_every_option_in_a_library_model(make: Any, options: dict[str, Any]) -> None:
    """Padding is not seen, a cache gives what the whole sequence gives, all parameters learn."""
    given = inputs()
    new = rewritten(make().train(), **given, to=ac.SwitchHead(**options))
    loss = new(**given, labels=given["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in new.named_parameters() if "w_" in n)
    new.eval()
    changed = given["input_ids"].clone()
    changed[0, :3] = 5
    with torch.no_grad():
        want = new(**given).logits
        found = new(changed, attention_mask=given["attention_mask"]).logits
    close(found[0, 3:], want[0, 3:])
    written = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    whole = new.generate(**given, use_cache=False, **written)
    assert torch.equal(new.generate(**given, **written), whole)


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_two_sequences_with_every_option(options: dict[str, Any]) -> None:
    given = inputs() | {"decoder_input_ids": inputs()["input_ids"][:, :5]}
    new = rewritten(bart().eval(), **given, to=ac.SwitchHead(**options))
    assert ac.last_report().rewritten == 6
    changed = given["input_ids"].clone()
    changed[0, :3] = 5
    with torch.no_grad():
        want = new(**given).logits
        close(new(**given | {"input_ids": changed}).logits, want)
    written = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    whole = new.generate(**inputs(), use_cache=False, **written)
    assert torch.equal(new.generate(**inputs(), **written), whole)


def mbart() -> Any:
    """Norms before the branches."""
    config = bart().config.to_dict() | {"model_type": "mbart"}
    return tf.MBartForConditionalGeneration(tf.MBartConfig(**config))


@pytest.mark.parametrize("make", [bart, mbart])
def test_blocks_with_two_attentions_generate(make: Any) -> None:
    """Padding is not seen, all parameters learn, and caches give what whole sequences give."""
    given = inputs() | {"decoder_input_ids": inputs()["input_ids"][:, :5].contiguous()}
    new = rewritten(make().train(), **given, to=ac.SwitchHead(**BOTH))
    report = ac.last_report()
    assert report.rewritten == 6
    assert not any(n.endswith("fc1.weight") for n, _ in new.named_parameters())
    new(**given, labels=given["decoder_input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in new.named_parameters() if "w_" in n)
    new.eval()
    changed = given["input_ids"].clone()
    changed[0, :3] = 5
    with torch.no_grad():
        close(new(**given | {"input_ids": changed}).logits, new(**given).logits)
    written = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for beams in (1, 3):
        whole = new.generate(**inputs(), use_cache=False, num_beams=beams, **written)
        assert torch.equal(new.generate(**inputs(), num_beams=beams, **written), whole)


def test_biases_of_heads_keep_a_block_as_it_is() -> None:
    """T5's self-attention stays, and so does all of its block."""
    config = tf.T5Config(
        vocab_size=WORDS, d_model=WIDE, d_kv=12, d_ff=200, num_layers=1, num_heads=8,
        pad_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    given = inputs() | {"decoder_input_ids": inputs()["input_ids"][:, :5]}
    ac.rewrite(tf.T5ForConditionalGeneration(config).eval(), (), given, to=ac.SwitchHead(**BOTH))
    report = ac.last_report()
    assert report.rewritten == 0
    codes = [{r.code for r in s.decision.reasons} for s in report.sites]
    assert codes == [{"switchhead.per_head"}, {"switchhead.per_head"}, {"block.partly"}]


# ---------------------------------------------------------------- the world around


@pytest.fixture
def group() -> Iterator[None]:
    """A world of one process."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29561"}
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("more", [{}, BOTH])
def test_training_in_parallel(group: None, more: dict[str, Any]) -> None:
    new = rewritten(Pre(), X, to=ac.SwitchHead(**more))
    new(X).square().sum().backward()
    want = [p.grad.clone() for p in new.parameters()]
    new.zero_grad()
    wrapped = nn.parallel.DistributedDataParallel(new)
    wrapped(X).square().sum().backward()
    for parameter, grad in zip(new.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize("more", [{}, BOTH])
def test_inductor_around_it(more: dict[str, Any]) -> None:
    new = rewritten(Pre(), X, to=ac.SwitchHead(**more))
    torch._dynamo.reset()
    compiled = torch.compile(new, fullgraph=True)
    torch.testing.assert_close(compiled(X), new(X), rtol=1e-4, atol=1e-5)
    grads = []
    for model in (compiled, new):
        new.zero_grad()
        model(X).square().sum().backward()
        grads.append([p.grad.clone() for p in new.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_where_every_expert_is_chosen(dtype: torch.dtype) -> None:
    """Else roundings may choose others."""
    model = Pre()
    model.net.up, model.net.down = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH)
    new = rewritten(model, X, to=ac.SwitchHead(heads=1, experts=2, k=2, **BOTH))
    assert len(new.net.w_sel) == 4
    exact = new(X)
    with torch.autocast("cpu", dtype):
        y = new(X)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in new.parameters())
    assert float((y.float() - exact).abs().max() / exact.abs().max()) < 4 * torch.finfo(dtype).eps
