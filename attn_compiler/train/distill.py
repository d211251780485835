"""Teach a rewritten model what the original computed: layer by layer, then as a whole.

    1. every layer on the teacher's inputs     |y_student - y_teacher|^2 / |y_teacher|^2
    2. the whole model                         KL(teacher || student) of logits, or as in 1

In the first phase layers do not disturb each other and nothing else moves; the second lets them
settle. Routers learn faster than the rest, because only chosen gates hand them gradients.

Source: teacher-forced layers, then the model, as in conversions of attention (arXiv 2502.14837,
2406.06567); distillation (arXiv 1503.02531).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from attn_compiler.errors import BadOption
from attn_compiler.train.progress import bar

Batch = tuple[Sequence[Any], Mapping[str, Any]]
Loss = Callable[[Any, Any], Tensor]

_ROUTERS = ("w_s", "w_d", "w_sel")
_PHASES = ("layers", "model")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How it is trained.

    Attributes:
        router_rate: learning rate of routers over that of everything else.
        clip: largest norm of a gradient.
        warm_up: share of a phase in which the learning rate rises; then it falls as a cosine.
        checkpoint: a file that is written while it runs, and resumed from if it is there.
        save_every: steps between two writings.
        progress: draw a bar.
    """

    router_rate: float = 8.0
    clip: float = 1.0
    warm_up: float = 0.05
    checkpoint: str | Path | None = None
    save_every: int = 100
    progress: bool = True


_RECIPE = Recipe()


@dataclass(slots=True)
class Distilled:
    """What happened: the layers that were taught, and the losses of each phase, step by step."""

    layers: tuple[str, ...]
    losses: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in _PHASES})


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int | tuple[int, int],
    lr: float,
    layers: Sequence[str] | None = None,
    loss: Loss | None = None,
    recipe: Recipe = _RECIPE,
) -> Distilled:
    """Train `student`, in place, to compute what `teacher` computes.

    Parameters that do not require gradients stay as they are, and so do the modes of both models.

    Args:
        student: as it was rewritten.
        teacher: as it was; it is run without gradients.
        batches: (args, kwargs) of a call; gone through again as often as needed. Calls must not
            write into what they are given: no caches.
        steps: of each phase, or (layers, model); 0 leaves a phase out.
        lr: the highest learning rate of AdamW.
        layers: module paths that both have, whose first output tensors are compared; by default
            those whose own parameters differ.
        loss: of the outputs of student and teacher, for the second phase. By default KL of
            `.logits`, and without those the relative square of the first tensors.

    Returns:
        The losses.

    Raises:
        BadOption: layers that are not in both, no batches, or a checkpoint of another run.
    """
    counts = steps if isinstance(steps, tuple) else (steps, steps)
    paths = tuple(changed_layers(student, teacher) if layers is None else layers)
    _check_layers(student, teacher, paths, counts[0])
    run = _Run(student, recipe, lr, Distilled(paths))
    run.resume()
    objectives = (
        lambda batch: _layer_loss(student, teacher, paths, batch),
        lambda batch: _model_loss(student, teacher, loss or match, batch),
    )
    owned = [p for path in paths for p in student.get_submodule(path).parameters()]
    trained = (owned, list(student.parameters()))
    for phase, count, objective, parameters in zip(
        _PHASES, counts, objectives, trained, strict=True
    ):
        run.phase(phase, count, batches, objective, {id(p) for p in parameters})
    run.save()
    return run.result


def changed_layers(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Paths of modules whose own parameters differ in name or shape; the outermost ones.

    A module whose children are other modules than before counts as changed too.
    """
    there = dict(teacher.named_modules())
    found: list[str] = []
    for path, module in student.named_modules():
        other = there.get(path)
        inside = any(not f or path.startswith(f + ".") for f in found)
        if other is not None and not inside and _differ(module, other):
            found.append(path)
    return found


def _differ(module: nn.Module, other: nn.Module) -> bool:
    if any(site.decision.taken for site in module.__dict__.get("_attn_sites", ())):
        return True  # what stands in its children is called by itself now
    ours, theirs = (
        {name: p.shape for name, p in m.named_parameters(recurse=False)} for m in (module, other)
    )
    children, others = ({name for name, _ in m.named_children()} for m in (module, other))
    return ours != theirs or children != others


def _check_layers(student: nn.Module, teacher: nn.Module, paths: Sequence[str], steps: int) -> None:
    both = {n for n, _ in student.named_modules()} & {n for n, _ in teacher.named_modules()}
    missing = [path for path in paths if path not in both]
    if missing or (steps and not paths):
        raise BadOption(
            f"no layers {', '.join(missing)}" if missing else "no layer differs",
            where="option layers",
            why=["student and teacher are compared module by module"],
            do="give paths of modules that both models have",
        )


# ---------------------------------------------------------------- losses


def match(ours: Any, theirs: Any) -> Tensor:
    """KL(teacher || student) per row of logits; of other outputs the relative square."""
    a, b = getattr(ours, "logits", None), getattr(theirs, "logits", None)
    if a is None or b is None:
        return relative(first_tensor(ours), first_tensor(theirs))
    a, b = (log_softmax(x.float().flatten(0, -2), -1) for x in (a, b))
    return kl_div(a, b, reduction="batchmean", log_target=True)


def relative(ours: Tensor, theirs: Tensor) -> Tensor:
    """|ours - theirs|^2 / |theirs|^2, at least in float32."""
    wide = torch.promote_types(theirs.dtype, torch.float32)
    ours, theirs = ours.to(wide), theirs.to(wide)
    return (ours - theirs).square().mean() / theirs.square().mean().clamp_min(1e-12)


def first_tensor(output: Any) -> Tensor:
    """The tensor that a module puts out, alone, or first in a tuple or a mapping.

    Raises:
        BadOption: there is none.
    """
    while not isinstance(output, Tensor):
        values = list(output.values()) if isinstance(output, Mapping) else output
        if not isinstance(values, list | tuple) or not values:
            raise BadOption(
                f"a module put out {type(output).__name__}, and no tensor",
                where="option layers",
                do="give layers that put out a tensor, or a tuple that begins with one",
            )
        output = values[0]
    return output


def _layer_loss(
    student: nn.Module, teacher: nn.Module, paths: Sequence[str], batch: Batch
) -> Tensor:
    """Mean over layers; every call of one counts."""
    args, kwargs = batch
    with torch.no_grad(), _listening(teacher, paths) as calls:
        teacher(*args, **kwargs)
    losses = [
        relative(first_tensor(student.get_submodule(path)(*given, **named)), wanted)
        for path, given, named, wanted in calls
    ]
    if not losses:
        raise BadOption(
            f"the model did not run {', '.join(paths)}",
            where="option layers",
            do="give layers that the batches pass through",
        )
    return torch.stack(losses).mean()


@contextmanager
def _listening(
    model: nn.Module, paths: Sequence[str]
) -> Iterator[list[tuple[str, tuple[Any, ...], dict[str, Any], Tensor]]]:
    """Path, arguments without caches, and output of every call of some modules."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Tensor]] = []

    def hear(path: str) -> Callable[..., None]:
        def call(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            named = {name: _no_cache(value) for name, value in kwargs.items()}
            calls.append((path, tuple(map(_no_cache, args)), named, first_tensor(out)))

        return call

    handles = [
        model.get_submodule(path).register_forward_hook(hear(path), with_kwargs=True)
        for path in paths
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _no_cache(value: Any) -> Any:
    """A model makes a cache by itself: by now it holds what the teacher wrote."""
    return None if hasattr(value, "update") and hasattr(value, "get_seq_length") else value


def _model_loss(student: nn.Module, teacher: nn.Module, loss: Loss, batch: Batch) -> Tensor:
    args, kwargs = batch
    with torch.no_grad():
        wanted = teacher(*args, **kwargs)
    return loss(student(*args, **kwargs), wanted)


# ---------------------------------------------------------------- training


def rate(step: int, steps: int, warm_up: float) -> float:
    """Of the highest learning rate: up in a line, down as half a cosine."""
    rising = max(1, round(warm_up * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


class _Run:
    """A run that can be interrupted: everything that a step changes is in `state`."""

    def __init__(self, student: nn.Module, recipe: Recipe, lr: float, result: Distilled) -> None:
        self.student, self.recipe, self.lr, self.result = student, recipe, lr, result
        self._phase = ""
        self._optimizer: torch.optim.AdamW | None = None
        self._resumed: dict[str, Any] = {"phase": None}

    def phase(
        self,
        name: str,
        steps: int,
        batches: Iterable[Batch],
        objective: Callable[[Batch], Tensor],
        trained: set[int],
    ) -> None:
        losses = self.result.losses[name]
        if len(losses) >= steps:
            return
        chosen = [(n, p) for n, p in self.student.named_parameters() if id(p) in trained]
        self._phase, self._optimizer = name, _optimizer(chosen, self.lr, self.recipe)
        if self._resumed["phase"] == name:
            self._optimizer.load_state_dict(self._resumed["optimizer"])
        stream = islice(_again(batches), len(losses), None)
        with bar(name, steps, len(losses), shown=self.recipe.progress) as advance:
            for step in range(len(losses), steps):
                share = rate(step, steps, self.recipe.warm_up)
                losses.append(self._step(objective(next(stream)), share))
                advance(losses[-1])
                if (step + 1) % self.recipe.save_every == 0:
                    self.save()

    def _step(self, loss: Tensor, share: float) -> float:
        """One step of the optimiser at a share of the learning rate. Gradients that others left in
        the parameters do not count, and are gone afterwards.
        """
        assert self._optimizer is not None
        groups = self._optimizer.param_groups
        parameters = [p for group in groups for p in group["params"]]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, grad in zip(parameters, found, strict=True):
            parameter.grad = grad
        nn.utils.clip_grad_norm_(parameters, self.recipe.clip)
        for group in groups:
            group["lr"] = self.lr * group["rate"] * share
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())

    def _identity(self) -> dict[str, Any]:
        """What has to be the same in the run that is continued."""
        shapes = {n: list(p.shape) for n, p in self.student.named_parameters()}
        return {"layers": list(self.result.layers), "shapes": shapes, "lr": self.lr}

    def save(self) -> None:
        """Write the checkpoint; it appears whole or not at all."""
        if self.recipe.checkpoint is None:
            return
        path = Path(self.recipe.checkpoint)
        state = {
            "identity": self._identity(),
            "student": self.student.state_dict(),
            "phase": self._phase,
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "losses": self.result.losses,
            "random": torch.get_rng_state(),
            "random of GPUs": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        temporary = path.with_name(path.name + ".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one.

        Raises:
            BadOption: it was written by a run with other layers, parameters or learning rate.
        """
        path = self.recipe.checkpoint
        if path is None or not Path(path).exists():
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["identity"] != self._identity():
            raise BadOption(
                f"{path} was written by another run",
                where="option checkpoint",
                why=["layers, shapes of parameters and learning rate have to be the same"],
                do="remove the file, or name another",
            )
        self.student.load_state_dict(state["student"])
        self.result.losses = state["losses"]
        self._resumed = state
        torch.set_rng_state(state["random"])
        if len(state["random of GPUs"]) == torch.cuda.device_count() > 0:
            torch.cuda.set_rng_state_all(state["random of GPUs"])


def _optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], lr: float, recipe: Recipe
) -> torch.optim.AdamW:
    """Routers in a group of their own."""
    groups: dict[float, list[nn.Parameter]] = {1.0: [], recipe.router_rate: []}
    for name, parameter in parameters:
        if parameter.requires_grad:
            router = name.rpartition(".")[2] in _ROUTERS
            groups[recipe.router_rate if router else 1.0].append(parameter)
    given = [{"params": found, "rate": times} for times, found in groups.items() if found]
    return torch.optim.AdamW(given, lr=lr, weight_decay=0.0)


def _again(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, from the start when they end.

    Raises:
        BadOption: there are none, or they can be gone through only once and were too few.
    """
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise BadOption(
                "there are no more batches",
                where="option batches",
                do="give a list, or what can be gone through again",
            )
