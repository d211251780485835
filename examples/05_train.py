"""Train a rewritten model of transformers: an ordinary loop, an ordinary optimiser.

new = ac.rewrite(model, kwargs=batch)

The loss of both models is followed over the same batches; what is saved is an ordinary checkpoint.
"""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import attn_compiler as ac

STEPS, LENGTH, WORDS = 20, 48, 32


def batch(step: int) -> dict[str, Tensor]:
    """Sentences that count upwards from a word of their own."""
    start = torch.randint(0, WORDS, (8, 1), generator=torch.Generator().manual_seed(step))
    ids = (start + torch.arange(LENGTH)) % WORDS
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def train(model: nn.Module) -> list[float]:
    """The loss of each step."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        loss = model(**batch(step)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=WORDS,
        attn_implementation="eager", use_cache=False, bos_token_id=None, eos_token_id=None,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    new = ac.rewrite(model, kwargs=batch(0))
    print(ac.last_report())

    ours, theirs = train(new), train(model)
    print(f"loss {ours[0]:.3f} -> {ours[-1]:.3f}")

    # an ordinary checkpoint: the original class reads it
    with tempfile.TemporaryDirectory() as folder:
        new.save_pretrained(folder)
        again = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager")
    assert again.state_dict().keys() == model.state_dict().keys()
    # training makes rounding errors grow: only the first steps can be compared
    difference = max(abs(a - b) for a, b in zip(ours[:3], theirs[:3], strict=True))
    print(f"largest difference: {difference:.1e}; over {STEPS} steps both learn")


if __name__ == "__main__":
    main()
