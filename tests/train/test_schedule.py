"""A training that turns sparse: when, what it costs a compiler, and how it goes on after a stop."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from spion_cases import (
    SPEC,
    D,
    H,
    Model,
    T,
    Training,
    draw,
    patterns,
    rewritten_model,
    train_together,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import attn_compiler as ac
from attn_compiler.train import spion


def test_a_training_turns_sparse_without_a_new_trace() -> None:
    training = Training()
    variants = [len(layer._attn_variants) for layer in training.model.layers]
    turned = training.run(0, 12)
    # the looks are at batches 1, 3, 5, ...; the third is the first that can say yes
    assert len(turned) == 1 and turned[0] >= 5 and turned[0] % 2 == 1
    assert training.schedule.sparse and training.schedule.switched == turned[0]
    assert training.schedule.criterion.looks == (turned[0] + 1) // 2
    assert not any(p.all() for p in patterns(training.model))
    assert [len(layer._attn_variants) for layer in training.model.layers] == variants


def test_the_maps_themselves_are_looked_at_every_so_many_batches() -> None:
    training = Training(every=3)
    looks = []
    for index in range(7):
        training.run(index, index + 1)
        looks.append(training.schedule.criterion.looks)
    assert looks == [0, 0, 1, 1, 1, 2, 2]
    # the reference is the map of the third batch, when two steps had been made
    other = Training()
    other.run(0, 2)
    layer, x = other.model.layers[0], draw(2)
    q, k, _ = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in layer.qkv(x).chunk(3, -1))
    wanted = (q @ k.transpose(-1, -2) * (D // H) ** -0.5).softmax(-1).mean((0, 1))
    references = training.schedule.criterion.state_dict()["references"]
    torch.testing.assert_close(references["layers.0"], wanted, rtol=1e-5, atol=1e-8)


def test_maps_of_long_sequences_are_kept_small(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, small = Training(every=3), Training(every=3)
    whole.run(0, 3)
    monkeypatch.setattr(spion, "FINEST", T // 4)
    small.run(0, 3)
    maps = [t.schedule.criterion.state_dict()["references"]["layers.0"] for t in (whole, small)]
    assert [a.shape[0] for a in maps] == [T, T // 4]
    means = torch.nn.functional.avg_pool2d(maps[0][None], 4)[0]
    torch.testing.assert_close(maps[1], means)


def test_a_model_that_learns_nothing_stays_dense() -> None:
    assert Training().run(0, 12) != []
    ours = Training(skewness=1.7)
    assert ours.run(0, 12) == [] and ours.schedule.criterion.looks == 6


def test_a_compiled_training_is_compiled_once() -> None:
    torch._dynamo.reset()
    training, counter = Training(), CompileCounter()
    training.call = torch.compile(training.model, backend=counter, fullgraph=True)
    turned = training.run(0, 12)
    assert len(turned) == 1 and not any(p.all() for p in patterns(training.model))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 7])
def test_a_stopped_training_goes_on_as_if_nothing_were(stop: int, tmp_path: Path) -> None:
    whole, first, second = Training(), Training(), Training()
    turned = whole.run(0, 9)
    before = first.run(0, stop)
    torch.save(first.state(), tmp_path / "checkpoint.pt")
    second.load(torch.load(tmp_path / "checkpoint.pt"))
    assert before + second.run(stop, 9) == turned
    for ours, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(ours, other)
    assert all(map(torch.equal, patterns(whole.model), patterns(second.model)))
    assert second.schedule.switched == whole.schedule.switched


def test_a_limit_on_the_dense_phase() -> None:
    training = Training(percent=1e-9, most=5)
    assert training.run(0, 8) == [4]
    stopped = Training(percent=1e-9, most=5)
    stopped.run(0, 4)
    resumed = Training(percent=1e-9, most=5)
    resumed.load(stopped.state())
    # what it saw is gone with the process: no pattern out of nothing
    assert resumed.run(4, 8) == [4]
    late = Training(percent=1e-9, most=2)
    stopped = Training(percent=1e-9)
    stopped.run(0, 3)
    late.load(stopped.state())
    assert late.run(3, 8) == [3] and patterns(late.model)[0].sum() > 6


def test_an_evaluation_in_between_is_not_looked_at() -> None:
    training, other = Training(every=3), Training(every=3)
    for index in range(9):
        training.run(index, index + 1)
        other.run(index, index + 1)
        with torch.no_grad():
            other.model.eval()(draw(100 + index))
        other.model.train()
    assert training.schedule.criterion.changes == other.schedule.criterion.changes != {}


def test_what_a_schedule_refuses() -> None:
    model = Model()
    with pytest.raises(ac.BadOption, match="map of blocks"):
        ac.SpionSchedule(model, SPEC)
    new = rewritten_model()
    with pytest.raises(ac.BadOption, match="every=0"):
        ac.SpionSchedule(new, SPEC, every=0)
    schedule = ac.SpionSchedule(new, SPEC, every=2)
    with pytest.raises(ac.BadOption, match="not the state"):
        schedule.load_state_dict({"sparse": True})
    new.eval()
    with pytest.raises(ac.BadOption, match="training mode"):
        for index in range(4):
            new(draw(index))
            schedule.step(index)


@pytest.mark.parametrize("other", [{"block": 32}, {"per_head": True}, {"softmax": "zero_logit"}])
def test_another_spec_than_the_model_s(other: dict[str, Any]) -> None:
    with pytest.raises(ac.BadOption, match="another SPION"):
        ac.SpionSchedule(rewritten_model(), dataclasses.replace(SPEC, **other))


def test_a_model_may_be_moved_after_the_schedule_was_made() -> None:
    """Trainers move it to their device; its maps of blocks are then other tensors."""
    training, whole = Training(), Training()
    for layer in training.model.layers:
        layer.attn_blocks_0 = layer.attn_blocks_0.clone()
    assert training.run(0, 8) == whole.run(0, 8) != []
    assert all(map(torch.equal, patterns(whole.model), patterns(training.model)))


@pytest.mark.slow
def test_processes_turn_sparse_together(tmp_path: Path) -> None:
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(train_together, args=(str(tmp_path / "rendezvous"), results), nprocs=2, join=True)
    (turned, found), other = (results.get() for _ in range(2))
    assert len(turned) == 1 and other == (turned, found)
    assert not all(all(map(all, pattern)) for pattern in found)


def test_batches_of_padding_alone() -> None:
    mask = torch.zeros(2, draw().shape[1], dtype=torch.bool)
    torch.manual_seed(0)
    model = ac.rewrite(Model(), (draw(), mask), to=SPEC, calibration="later").train()
    schedule = ac.SpionSchedule(model, SPEC, every=1)
    model(draw(), mask)
    with pytest.raises(ac.BadOption, match="forbids every key"):
        schedule.step(0)


class Learner(Model):
    """As a Trainer wants it."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": super().forward(x).square().mean()}


class Sequences(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": draw(index)[0]}


def trained(folder: Path, resume: Path | None = None, **options: Any) -> Training:
    """By transformers' Trainer, which saves after 4 and 8 of 10 steps."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    torch.manual_seed(0)
    new = ac.rewrite(Learner(), (draw(),), to=SPEC, calibration="later").train()
    training = Training.__new__(Training)
    training.model, training.schedule = new, ac.SpionSchedule(new, SPEC, every=2, skewness=None)
    arguments = TrainingArguments(
        str(folder), max_steps=10, per_device_train_batch_size=2, save_steps=4, seed=0,
        report_to="none", use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    callbacks = [training.schedule.callback()]
    trainer = Trainer(new, arguments, train_dataset=Sequences(), callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return training


def test_a_trainer_drives_it_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    whole, checkpoint = trained(tmp_path / "whole"), tmp_path / "whole" / "checkpoint-8"
    switched = whole.schedule.switched
    assert switched is not None and 4 < switched < 8
    seconds = [
        trained(tmp_path / "whole", tmp_path / "whole" / "checkpoint-4"),  # before the switch
        trained(tmp_path / "other", checkpoint, resume_from_checkpoint=str(checkpoint)),
    ]
    for second in seconds:
        assert second.schedule.switched == switched and second.schedule.sparse
        for ours, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
            assert torch.equal(ours, other)
        assert all(map(torch.equal, patterns(whole.model), patterns(second.model)))
    with pytest.raises(ac.BadOption, match="checkpoint of step 8 is not found"):
        trained(tmp_path / "another", checkpoint)
