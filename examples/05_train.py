"""Train a rewritten model with Hugging Face's Trainer: it sees an ordinary model.

new = ac.rewrite(model, kwargs=batch)
Trainer(new, arguments, train_dataset=sentences).train()

Both models are trained on the same batches; what is saved is an ordinary checkpoint.
"""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

import attn_compiler as ac

STEPS, BATCH, LENGTH, WORDS = 20, 8, 48, 32


class Sentences(Dataset[dict[str, Tensor]]):
    """Sentences that count upwards from a word of their own."""

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = torch.randint(0, WORDS, (1,), generator=torch.Generator().manual_seed(index))
        ids = (start + torch.arange(LENGTH)) % WORDS
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def train(model: PreTrainedModel, folder: str) -> list[float]:
    """The loss of each step; the checkpoint is left in a folder."""
    arguments = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=3e-3,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Sentences())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def main() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=WORDS,
        attn_implementation="eager", use_cache=False, bos_token_id=None, eos_token_id=None,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    sentences = Sentences()
    batch = torch.utils.data.default_collate([sentences[i] for i in range(BATCH)])
    new = ac.rewrite(model, kwargs=batch)
    print(ac.last_report())

    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
        losses, expected = train(new, ours), train(model, theirs)
        # an ordinary checkpoint: the original class reads it
        again = GPT2LMHeadModel.from_pretrained(ours, attn_implementation="eager")
    assert again.state_dict().keys() == model.state_dict().keys()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    # training makes rounding errors grow: only the first steps can be compared
    difference = max(abs(a - b) for a, b in zip(losses[:3], expected[:3], strict=True))
    print(f"largest difference: {difference:.1e}; over {STEPS} steps both learn")


if __name__ == "__main__":
    main()
