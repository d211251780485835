"""SPION in the middle of a training: dense first, sparse when the attention maps have settled.

    schedule = SpionSchedule(model, spec)
    for index, batch in enumerate(batches):  ...;  schedule.step(index)

A pattern is written into a buffer that the module has already: the optimiser, and whatever has been
compiled around the model, go on with what they have.

Source: SPION (arXiv 2309.12578), algorithm 1 and its authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attn_compiler.errors import BadOption
from attn_compiler.train.criterion import SwitchCriterion
from attn_compiler.train.spion import Layer, layers_of, watched, without_maps
from attn_compiler.variants.base import VariantSpec

_FILE = "spion_schedule.pt"  # in the folder of a Trainer's checkpoint


class SpionSchedule:
    """Dense at first; every so often it looks at the maps of a batch, and when they have settled it
    gives every layer its pattern. Call `step` after each batch of an ordinary training loop.

        new = rewrite(model, args, to=spec, calibration="later")
        schedule = SpionSchedule(new, spec)
        for index, batch in enumerate(batches):
            ...
            schedule.step(index)

    Patterns are written in place: an optimiser keeps its parameters, an outer torch.compile its
    code. A map is taken from the forward passes, in training mode, of every `every`-th batch: the
    first look is at batch every - 1, not at a model that has learned nothing. `max_lost_mass` plays
    no part: training goes on after the switch. Where several processes train, maps are summed over
    all of them, so that every one turns sparse after the same batch and with the same patterns: all
    of them call `step`.

    Attributes:
        sparse: have the patterns been put in?
        criterion: when they are.
        layers: the sites.
        switched: the batch after which they were put in, None before.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: VariantSpec,
        *,
        every: int = 200,
        percent: float = 15.0,
        skewness: float | None = 1.7,
        most: int | None = None,
    ) -> None:
        """
        Args:
            model: rewritten with SPION, every block kept (`rewrite(model, args, to=spec,
                calibration="later")`).
            spec: the SPION it was rewritten with.
            every: batches between two looks; the authors' are 200 to 500. Maps that change slowly
                look settled if looks are close.
            percent: change of the maps' distances that counts as settled.
            skewness: that the map of some layer must reach, so that a model that has learned
                nothing yet does not count as settled; None for the published rule.
            most: batches after which the patterns are put in, settled or not, found in the last of
                them (in the next where the training is resumed later than that).

        Raises:
            BadOption: the model has no such site or was rewritten with another spec, or an option
                has a wrong value.
        """
        if every < 1:
            raise BadOption(f"every={every}", where="option every", do="give a number from 1")
        self.layers = layers_of(model, lambda path: spec, fine=True)
        if not self.layers:
            raise without_maps()
        for layer in self.layers:
            layer.demand_fits()
        self.criterion = SwitchCriterion(percent, skewness=skewness)
        self.every, self.most = every, most
        self.sparse = False
        self.switched: int | None = None
        self._watch: Any = None
        self._waited = 0
        self._listen_if_due(0)

    def step(self, batch_index: int) -> bool:
        """Tell that a batch is done.

        Args:
            batch_index: its number, from 0.

        Returns:
            Were the patterns put in now?

        Raises:
            BadOption: a look was due, and no batch since has shown a layer.
        """
        if self.sparse:
            return False
        late = self.most is not None and batch_index + 1 >= self.most
        if self._looked() and (self.criterion.settled or late):
            self._put(batch_index)
            return True
        self._listen_if_due(batch_index + 1)
        return False

    def _looked(self) -> bool:
        """Have the maps of the batch that is done been taken, if they were due?"""
        if self._watch is None:
            return False
        self._waited += 1
        if not _everywhere(all(layer.rows for layer in self.layers), self.layers[0]):
            if self._waited > self.every:
                for layer in self.layers:
                    layer.demand_seen("the training", "call the model in training mode, or less")
            return False
        self._stop()
        _together(self.layers)
        for layer in self.layers:
            layer.demand_seen("the training", "give batches that are not all padding")
        self.criterion.look({x.path: _taken(x) for x in self.layers})
        return True

    def _listen_if_due(self, batch_index: int) -> None:
        """Will the maps of this batch be wanted?"""
        number = batch_index + 1
        if number % self.every == 0 or (self.most is not None and number >= self.most):
            self._listen()

    def _listen(self) -> None:
        if self._watch is None:
            for layer in self.layers:
                layer.forget()
            self._waited = 0
            self._watch = watched(self.layers, training=True)
            self._watch.__enter__()

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.__exit__(None, None, None)
            self._watch = None

    def _put(self, batch_index: int) -> None:
        self._stop()
        for layer in self.layers:
            layer.put(layer.pattern())
        self.sparse, self.switched = True, batch_index

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs beside the model's own state, which holds the
        patterns. Take it between a `step` and the next batch.
        """
        return {
            "criterion": self.criterion.state_dict(),
            "sparse": self.sparse,
            "switched": self.switched,
            "listens": self._watch is not None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; load the model's state as well.

        Raises:
            BadOption: it is not such a state.
        """
        if set(state) != set(self.state_dict()):
            raise BadOption("this is not the state of a SpionSchedule", where="option state")
        self.criterion.load_state_dict(state["criterion"])
        self.sparse, self.switched = bool(state["sparse"]), state["switched"]
        self._stop()
        if state["listens"]:
            self._listen()

    def callback(self) -> Any:
        """The same as a callback of transformers' Trainer, which calls `step`, stores the state in
        every checkpoint's folder, and takes it from there when a training is resumed. A training
        that is resumed from a folder outside its `output_dir` has to be told so twice: a callback
        sees TrainingArguments(resume_from_checkpoint=...) alone, and raises BadOption without it.
        """
        from transformers import TrainerCallback

        schedule = self

        class Switch(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                file = _folder(args, state) / _FILE
                if state.global_step and file.exists():
                    schedule.load_state_dict(torch.load(file, weights_only=True))

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                schedule.step(state.global_step - 1)

            def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.is_world_process_zero:
                    torch.save(schedule.state_dict(), _folder(args, state) / _FILE)

        return Switch()


def _taken(layer: Layer) -> Tensor:
    """What a row of a layer gave to each key on average; the layer keeps its sums by blocks alone.

    Those would hide most of what is learned behind the lengths of a batch's sequences, and the
    method compares the maps themselves.
    """
    assert layer.elements is not None
    found, layer.elements = (layer.elements.plain / layer.rows).float(), None
    return found


def _shared() -> bool:
    """Do several processes train?"""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _everywhere(here: bool, layer: Layer) -> bool:
    """Does it hold in all processes?"""
    if not _shared():
        return here
    flag = torch.tensor(int(here), device=layer.blocks.device)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def _together(layers: Sequence[Layer]) -> None:
    """Sums of maps over all processes: all have to turn sparse at once, and alike."""
    if not _shared():
        return
    for layer in layers:
        rows = torch.tensor(layer.rows, dtype=torch.float64, device=layer.blocks.device)
        assert layer.elements is not None
        for each in (layer.maps.convolved, layer.maps.plain, layer.elements.plain, rows):
            dist.all_reduce(each)
        layer.rows = float(rows)


def _folder(args: Any, state: Any) -> Path:
    """Of a Trainer's checkpoint of this step.

    Raises:
        BadOption: there is none.
    """
    given = getattr(args, "resume_from_checkpoint", None)
    folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    if not folder.exists() and isinstance(given, str):
        folder = Path(given)
    if state.global_step and not folder.exists():
        raise BadOption(
            f"the checkpoint of step {state.global_step} is not found",
            where="SpionSchedule.callback",
            why=[f"there is no folder {folder}", "it says whether the training is sparse"],
            do="give TrainingArguments(resume_from_checkpoint=...), too",
        )
    return folder
