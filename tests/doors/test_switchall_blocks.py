"""SwitchHead with feed_forward="sigma_moe" in blocks with two attentions: all or none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import attn_compiler as ac
from tests.doors.decoders import (
    KEYS,
    ROWS,
    CrossFirst,
    CrossThenParallel,
    Decoder,
    E,
    EverySecond,
    Hooked,
    NoNet,
    Now,
    OneModule,
    Pair,
    Peeking,
    PostDecoder,
    TwoNets,
    X,
)
from tests.doors.switched import below, expected
from tests.doors.test_switchall import LAYER, NET, SPEC, close, names, net_of
from tests.ir.block_models import HEADS, WIDTH, Net, RmsNorm

SLOW = pytest.mark.slow


def rewritten(model: nn.Module, to: Any = SPEC, on_reject: str = "raise") -> Any:
    torch.manual_seed(5)
    return ac.rewrite(model, (X, E), to=to, on_reject=on_reject)


def own(new: Any, x: Tensor) -> Tensor:
    return expected(new.own, x, x, SPEC, below(ROWS))


def cross(new: Any, x: Tensor) -> Tensor:
    return expected(new.cross, x, E, SPEC, torch.ones(ROWS, KEYS, dtype=torch.bool))


def in_turn(new: Any, exact: Any, x: Tensor) -> Tensor:
    x = x + own(new, exact.first(x))
    x = x + cross(new, exact.second(x))
    return x + net_of(new.net, exact.third(x))


def behind(new: Any, exact: Any, x: Tensor) -> Tensor:
    x = exact.first(x + own(new, x))
    x = exact.second(x + cross(new, x))
    return exact.third(x + net_of(new.net, x))  # type: ignore[no-any-return]


def other_first(new: Any, exact: Any, x: Tensor) -> Tensor:
    x = x + cross(new, exact.second(x))
    x = x + own(new, exact.first(x))
    return x + net_of(new.net, exact.third(x))


def beside(new: Any, exact: Any, x: Tensor) -> Tensor:
    x = x + cross(new, exact.second(x))
    return x + own(new, exact.first(x)) + net_of(new.net, exact.first(x))


def swiglu() -> Decoder:
    return Decoder(net=Net(functional.silu, gated=True), norm=RmsNorm, rate=0.25)


FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Any, Tensor], Tensor]]] = {
    "pre": (Decoder, in_turn),
    "post": (PostDecoder, behind),
    "gated": (swiglu, in_turn),
    "cross first": (CrossFirst, other_first),
    "parallel": (CrossThenParallel, beside),
}


@pytest.mark.parametrize("form", [pytest.param(n, marks=() if n == "pre" else SLOW) for n in FORMS])
def test_both_layers_and_the_net_are_those_of_the_paper(form: str) -> None:
    make, wanted = FORMS[form]
    new = rewritten(make().eval())
    assert names(new.own) == names(new.cross) == LAYER and names(new.net) == NET
    assert not any(isinstance(m, nn.Linear) for m in new.modules())
    close(new(X, E), wanted(new, copy.deepcopy(new).double(), X.double()))
    first, last = (s.facts["switchall"] for s in ac.last_report().sites)
    assert "feed-forward net: with the last attention of the block" in first
    assert "feed-forward net: 4 of " in last


@SLOW
@pytest.mark.parametrize("form", ["post", "gated", "parallel"])
def test_all_parameters_learn_and_are_saved(form: str) -> None:
    make, _ = FORMS[form]
    new = rewritten(make().train())
    new(X, E).square().sum().backward()
    unread = {"third.weight", "third.bias"} if form == "parallel" else set()
    learnt = {n for n, p in new.named_parameters() if p.grad is not None and p.grad.any()}
    assert learnt == names(new) - unread
    y, other = new.eval()(X, E), ac.rewrite(make().eval(), (X, E), to=SPEC)
    assert not torch.equal(other(X, E), y)
    other.load_state_dict(new.state_dict())
    assert torch.equal(other(X, E), y)
    assert torch.equal(copy.deepcopy(other)(X, E), y)


@SLOW
def test_two_nets_are_two_blocks() -> None:
    new = rewritten(TwoNets())
    assert NET | {"w_sel_1", "w_1_1", "w_2_1"} <= names(new)
    told = [s.facts["switchall"] for s in ac.last_report().sites]
    assert all("feed-forward net: 4 of 6" in words for words in told)
    new(X, E).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in new.parameters())


@SLOW
@pytest.mark.parametrize("spec", [SPEC, ac.SwitchHead(heads=1, experts=3, k=2, head_dim=5)])
def test_two_attentions_in_one_module_keep_their_own_weights(spec: ac.SwitchHead) -> None:
    """A call in another dtype is analysed when it comes."""
    new = rewritten(OneModule().eval(), to=spec)
    y = new(X, E)
    close(new.double()(X.double(), E.double()), y)


@SLOW
def test_only_every_second_block_has_two() -> None:
    new = rewritten(EverySecond())
    assert ac.last_report().rewritten == 6
    assert not any(isinstance(m, nn.Linear) for m in new.modules())
    assert torch.equal(torch.compile(new, backend="eager", fullgraph=True)(X, E), new(X, E))


@SLOW
@pytest.mark.parametrize("before", [True, False])
def test_blocks_of_torch(before: bool) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(
                WIDTH, HEADS, 20, batch_first=True, norm_first=before
            )

        def forward(self, x: Tensor, e: Tensor) -> Tensor:
            return self.layer(x, e)  # type: ignore[no-any-return]

    new = rewritten(Whole())
    assert names(new.layer.self_attn) == names(new.layer.multihead_attn) == LAYER
    new(X, E).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in new.parameters())


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Decoder()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return checkpoint(self.block, x, e, use_reentrant=False)  # type: ignore[no-any-return]


@SLOW
def test_a_checkpointed_block_and_where_it_stands() -> None:
    """The block was analysed before, at the root of another model."""
    rewritten(Decoder())
    new = rewritten(Checkpointed())
    assert [s.path for s in ac.last_report().sites] == ["block.own", "block.cross"]
    new(X, E).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in new.parameters())


# ---------------------------------------------------------------- what is asked for


@SLOW
@pytest.mark.parametrize("stays", ["own", "cross"])
def test_an_attention_that_is_not_asked_for_stays(stays: str) -> None:
    """The net goes with the other one, wherever it stands in the block."""
    goes = "own" if stays == "cross" else "cross"
    new = rewritten(Decoder(), to={goes: SPEC}, on_reject="keep")
    assert names(getattr(new, goes)) == LAYER and names(new.net) == NET
    assert {n.split(".")[0] for n in names(getattr(new, stays))} == {"q", "k", "v", "o"}
    (site,) = (s for s in ac.last_report().sites if s.decision.accepted)
    assert "feed-forward net: 4 of 6" in site.facts["switchall"]


@SLOW
def test_an_attention_may_become_something_else() -> None:
    plain = ac.SwitchHead(heads=1, experts=3, k=2, head_dim=5)
    new = rewritten(Decoder(), to={"own": SPEC, "cross": plain})
    assert names(new.own) == names(new.cross) == LAYER and names(new.net) == NET
    kinds = [s.decision.variant for s in ac.last_report().sites]
    assert kinds == ["switchall", "switchhead"]


# ---------------------------------------------------------------- all or none


def sloped() -> Decoder:
    return Decoder(sloped=True)


REFUSED: dict[str, tuple[Callable[[], nn.Module], list[set[str]]]] = {
    "scores of one head": (sloped, [{"block.partly"}, {"switchhead.per_head"}]),
    "no net": (NoNet, [{"block.no_feed_forward"}] * 2),
    "a weight read elsewhere": (Peeking, [{"piece.read_elsewhere"}] * 2),
    "a net of two blocks": (lambda: Pair("net"), [{"rewrite.shared_weight"}] * 4),
    "an attention of two blocks": (lambda: Pair("cross"), [{"rewrite.shared_weight"}] * 4),
    "a hook on the net": (lambda: Hooked("net"), [{"feed_forward.unlike"}] * 2),
    "a hook on an attention": (
        lambda: Hooked("cross"),
        [{"block.outside", "owner.hooks"}] * 2,
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "scores of one head" else SLOW) for n in REFUSED]
)
def test_a_block_is_left_alone_as_a_whole(name: str) -> None:
    make, codes = REFUSED[name]
    model = make()
    before = list(model.state_dict())
    new = rewritten(model, on_reject="keep")
    report = ac.last_report()
    assert report.rewritten == 0 and list(new.state_dict()) == before
    assert [{r.code for r in s.decision.reasons} for s in report.sites] == codes
    assert torch.equal(new(X, E), model(X, E))
    if codes[0] == {"block.partly"}:
        text = report.sites[0].decision.reasons[0].text
        assert text.startswith("all attentions of a block are replaced or none")
        assert ": cross (decoders.py:" in text


@SLOW
def test_a_call_without_the_other_sequence_is_refused() -> None:
    new = rewritten(Now())
    with pytest.raises(ac.UnsupportedCall):
        new(X)
