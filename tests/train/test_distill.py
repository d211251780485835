"""Distillation: it teaches, resumes exactly, leaves alone what it should, says what is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_compiler.errors import BadOption
from attn_compiler.kernels.switchhead import Mixture, Weights, switchhead_attention
from attn_compiler.train.distill import (
    Recipe,
    changed_layers,
    distill,
    first_tensor,
    match,
    rate,
    relative,
)
from attn_compiler.variants.switchhead_fresh import Drawing, fresh

D, T = 12, 7
QUIET = Recipe(progress=False)
MIXTURE = Mixture(2, 3, 2)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 4, batch_first=True)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        return scale * self.attention(x, x, x)[0], None


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        drawing = Drawing(generator=torch.Generator().manual_seed(3))
        weights = fresh(MIXTURE, D, 8, drawing)
        for name in Weights.__slots__:
            setattr(self, name, nn.Parameter(getattr(weights, name)))

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        weights = Weights(*(getattr(self, n) for n in Weights.__slots__))
        return scale * switchhead_attention(x, x, weights, MIXTURE), None


class Model(nn.Module):
    def __init__(self, kind: Callable[[], nn.Module], layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(layers))
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = x + layer(self.norm(x), scale=1.5)[0]
        return SimpleNamespace(logits=self.head(x))


def models() -> tuple[Model, Model]:
    """Student and teacher, equal but for the layers."""
    torch.manual_seed(0)
    teacher, student = Model(Dense), Model(Sparse)
    student.norm.load_state_dict(teacher.norm.state_dict())
    student.head.load_state_dict(teacher.head.state_dict())
    return student, teacher


def batches(count: int = 3) -> list[tuple[tuple[Tensor], dict[str, Any]]]:
    draw = torch.Generator().manual_seed(1)
    return [((torch.randn(4, T, D, generator=draw),), {}) for _ in range(count)]


def test_teaches_layers_and_then_the_model() -> None:
    student, teacher = models()
    before = copy.deepcopy(teacher.state_dict())
    given = batches(1)
    untaught = float(match(student(*given[0][0]), teacher(*given[0][0])))
    done = distill(student, teacher, given, steps=(60, 30), lr=0.02, recipe=QUIET)
    assert done.layers == ("layers.0", "layers.1")
    layers, model = done.losses["layers"], done.losses["model"]
    assert (len(layers), len(model)) == (60, 30)
    assert layers[-1] < 0.5 * layers[0]
    assert model[-1] < 0.5 * untaught
    for name, x in teacher.state_dict().items():
        assert torch.equal(x, before[name])
    assert not any(m._forward_hooks for m in teacher.modules())


def test_the_first_phase_moves_nothing_but_the_layers() -> None:
    student, teacher = models()
    student.layers[1].w_k.requires_grad_(False)
    frozen = copy.deepcopy(student.state_dict())
    student.head.weight.grad = torch.ones_like(student.head.weight)
    distill(student, teacher, batches(), steps=(3, 0), lr=0.01, recipe=QUIET)
    moved = {n for n, x in student.state_dict().items() if not torch.equal(x, frozen[n])}
    assert moved == {
        f"layers.{i}.{n}" for i in (0, 1) for n in Weights.__slots__ if (i, n) != (1, "w_k")
    }


def test_routers_learn_faster() -> None:
    student, teacher = models()
    before = copy.deepcopy(student.state_dict())
    recipe = replace(QUIET, router_rate=5.0, warm_up=0.0)
    distill(student, teacher, batches(), steps=(1, 0), lr=1e-3, recipe=recipe)
    step = {n: float((x - before[n]).abs().max()) for n, x in student.state_dict().items()}
    # the first step of Adam is the learning rate
    assert step["layers.0.w_q"] == pytest.approx(1e-3, rel=1e-2)
    assert step["layers.0.w_s"] == pytest.approx(5e-3, rel=1e-2)
    assert step["layers.0.w_d"] == pytest.approx(5e-3, rel=1e-2)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop", [2, 4, 6, 7])
def test_resumes_as_if_nothing_had_happened(stop: int, tmp_path: Path) -> None:
    """A run that dies in its `stop`th step, in either phase or between them."""
    student, teacher = models()
    whole = distill(student, teacher, batches(), steps=(4, 5), lr=0.01, recipe=QUIET)
    again, _ = models()
    recipe = replace(QUIET, checkpoint=tmp_path / "state.pt", save_every=2)
    calls = 0

    def dying(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > stop:
            raise Stopped

    handle = teacher.register_forward_pre_hook(dying)
    with pytest.raises(Stopped):
        distill(again, teacher, batches(), steps=(4, 5), lr=0.01, recipe=recipe)
    handle.remove()
    fresh_start, _ = models()
    resumed = distill(fresh_start, teacher, batches(), steps=(4, 5), lr=0.01, recipe=recipe)
    assert resumed.losses == whole.losses
    for name, x in student.state_dict().items():
        assert torch.equal(x, fresh_start.state_dict()[name]), name
    # a run that is done does nothing more
    third, _ = models()
    assert distill(third, teacher, [], steps=(4, 5), lr=0.01, recipe=recipe).losses == whole.losses


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    student, teacher = models()
    recipe = replace(QUIET, checkpoint=tmp_path / "state.pt")
    distill(student, teacher, batches(), steps=(1, 0), lr=0.01, recipe=recipe)
    for lr, layers in ((0.02, None), (0.01, ["layers.0"])):
        with pytest.raises(BadOption, match="another run"):
            distill(student, teacher, batches(), steps=(1, 0), lr=lr, layers=layers, recipe=recipe)


@pytest.mark.parametrize(
    ("given", "layers", "message"),
    [
        (batches(), ["layers.7"], r"no layers layers\.7"),
        (batches(), [], "no layer differs"),
        ([], None, "no more batches"),
        (batches(), ["layers.0.attention.out_proj"], "no layers"),
    ],
)
def test_refusals(given: Any, layers: list[str] | None, message: str) -> None:
    student, teacher = models()
    with pytest.raises(BadOption, match=message):
        distill(student, teacher, given, steps=1, lr=0.01, layers=layers, recipe=QUIET)


def test_layers_that_do_not_run_are_refused() -> None:
    student, teacher = models()
    for model in (student, teacher):
        model.idle = nn.Linear(2, 2)
    with pytest.raises(BadOption, match="did not run idle"):
        distill(student, teacher, batches(), steps=1, lr=0.01, layers=["idle"], recipe=QUIET)


def test_finds_the_layers_that_changed() -> None:
    student, teacher = models()
    assert changed_layers(student, teacher) == ["layers.0", "layers.1"]
    assert changed_layers(teacher, copy.deepcopy(teacher)) == []


def test_losses() -> None:
    a, b = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    p, q = b.softmax(-1), a.softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1).mean()
    found = match(SimpleNamespace(logits=a), SimpleNamespace(logits=b))
    torch.testing.assert_close(found, expected)
    assert float(match((a, None), (a, None))) == 0
    assert float(relative(a, torch.zeros_like(a) + 1e-3 * a)) > 1
    assert float(relative(1.5 * a, a)) == pytest.approx(0.25)
    assert first_tensor({"x": (a, 1)}) is a
    with pytest.raises(BadOption, match="no tensor"):
        first_tensor((3, a))
    given = {"loss": lambda ours, theirs: (ours.logits - theirs.logits).abs().mean()}
    student, teacher = models()
    done = distill(student, teacher, batches(), steps=(0, 2), lr=0.01, recipe=QUIET, **given)
    assert done.losses["layers"] == [] and len(done.losses["model"]) == 2


def test_the_learning_rate_rises_and_falls() -> None:
    shares = [rate(step, 100, 0.1) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert shares[10:] == sorted(shares[10:], reverse=True) and shares[10] == 1.0
    assert 0 < shares[-1] < 0.01


def test_says_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = models()
    distill(student, teacher, batches(), steps=(2, 1), lr=0.01)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["layers 1/2", "layers 2/2", "model 1/1"]
    assert all("loss " in line for line in lines)
    distill(student, teacher, batches(), steps=(2, 1), lr=0.01, recipe=QUIET)
    assert capsys.readouterr().err == ""


def test_draws_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    student, teacher = models()
    distill(student, teacher, batches(), steps=(2, 0), lr=0.01)
    assert "2/2" in capsys.readouterr().err
