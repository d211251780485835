"""Users' mistakes: one clear error, and the model is as before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from doors.living import WIDTH, Block, CausalAttention, Traceable
from torch import fx, nn

import attn_compiler as ac

X = torch.randn(2, 7, WIDTH)


@pytest.mark.parametrize("door", [ac.rewrite, ac.explain])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"to": "quickest"}, "quickest"),
        ({"to": {"own": 3}}, "option to is 3"),
        ({"to": {3: "fastest"}}, "key of option to"),
        ({"hardware": "h2000"}, "hardware"),
    ],
    ids=["spec", "spec_in_dict", "key", "hardware"],
)
def test_a_wrong_option(door: Callable[..., Any], options: dict[str, Any], text: str) -> None:
    with pytest.raises(ac.BadOption, match=text) as error:
        door(Block(), (X,), **options)
    assert "do: " in str(error.value)


def test_a_wrong_on_reject() -> None:
    with pytest.raises(ac.BadOption, match="on_reject"):
        ac.rewrite(Block(), (X,), on_reject="ignore")
    with pytest.raises(ac.BadOption, match="on_reject"):
        ac.fx_pass(on_reject="ignore")


def test_calibration_has_no_use_here() -> None:
    with pytest.raises(ac.BadOption, match="calibration"):
        ac.rewrite(Block(), (X,), calibration=[((X,), {})])


@pytest.mark.parametrize("inplace", [True, False])
def test_a_glob_that_names_no_attention(inplace: bool) -> None:
    model = Block().eval()
    with pytest.raises(ac.BadOption, match=r'no attention is at "encoder\.\*"') as error:
        ac.rewrite(model, (X,), to={"encoder.*": "fastest"}, inplace=inplace)
    assert "'own'" in str(error.value)
    assert type(model.own) is CausalAttention
    with pytest.raises(ac.BadOption, match="no attention"):
        ac.explain(model, (X,), to={"encoder.*": "fastest"})


def test_a_glob_chooses() -> None:
    new = ac.rewrite(Block().eval(), (X,), to={"own": ac.Flash()})
    report = ac.last_report()
    assert {s.path for s in report.sites if s.decision.accepted} == {"own"}
    kept = [s for s in report.sites if not s.decision.accepted]
    assert {r.code for s in kept for r in s.decision.reasons} == {"config.not_selected"}
    assert type(new.own) is not CausalAttention


def test_what_a_glob_leaves_out_draws_no_other_attention_up_to_itself() -> None:
    pair = nn.Sequential(CausalAttention(), nn.Sequential(CausalAttention(), CausalAttention()))
    new = ac.rewrite(pair.eval(), (X,), to={"1.1": ac.Flash()})
    changed = [path for path, module in new.named_modules() if hasattr(module, "_attn_sites")]
    assert changed == ["1.1"]


@pytest.mark.parametrize("door", [ac.rewrite, ac.explain])
def test_missing_example_inputs(door: Callable[..., Any]) -> None:
    for model in (Block(), fx.symbolic_trace(Traceable())):
        with pytest.raises(ac.BadOption, match="example inputs are missing"):
            door(model)
    with pytest.raises(ac.BadOption, match="args is a Tensor"):
        door(Block(), X)
    with pytest.raises(ac.BadOption, match="does not fit"):
        door(Block(), (X, X, X))


def test_a_pass_without_example_inputs() -> None:
    gm = fx.symbolic_trace(Traceable())
    before = gm.code
    with pytest.raises(ac.BadOption, match="example inputs are missing") as error:
        ac.fx_pass()(gm, X)
    assert "mask" in str(error.value) and gm.code == before
    with pytest.raises(ac.BadOption, match="cannot be run"):
        ac.fx_pass()(gm, X, torch.zeros(3, 3, 3, 3, 3))
    with pytest.raises(ac.BadOption, match="was given a Block"):
        ac.fx_pass()(Block())


def test_not_a_model() -> None:
    for door in (ac.rewrite, ac.explain):
        with pytest.raises(ac.BadOption, match="the model is a int"):
            door(3)


@pytest.mark.parametrize("inplace", [True, False])
def test_on_reject_raise(inplace: bool) -> None:
    class Shows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = CausalAttention()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.own(x)
            weights = (x @ x.mT).softmax(-1)
            return weights @ x, weights

    model = Shows().eval()
    with pytest.raises(ac.NoLegalVariant, match=r"attention\.second_reader"):
        ac.rewrite(model, (X,), on_reject="raise", inplace=inplace)
    assert type(model.own) is CausalAttention


def test_errors_of_the_model_are_its_own() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError("of the model")

    for door in (ac.rewrite, ac.explain):
        with pytest.raises(ZeroDivisionError, match="of the model"):
            door(Fails(), (X,))


def test_errors_survive_pickle() -> None:
    with pytest.raises(ac.BadOption) as error:
        ac.rewrite(Block())
    again = copy.deepcopy(error.value)
    assert str(again) == str(error.value)
