"""SwitchHead with feed_forward="sigma_moe": the attention and the net of a block, or neither."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import attn_compiler as ac
from tests.doors.switched import expected
from tests.ir.block_models import WIDTH, Net, Parallel, Post, Pre, RmsNorm

SPEC = ac.SwitchHead(heads=1, experts=3, k=2, head_dim=5, feed_forward="sigma_moe")
X = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))
SEEN = torch.ones(7, 7, dtype=torch.bool).tril()
LAYER, NET = {"w_q", "w_k", "w_v", "w_o", "w_s", "w_d"}, {"w_sel", "w_1", "w_2"}


def rewritten(model: nn.Module, *args: Any, to: Any = SPEC, **kwargs: Any) -> nn.Module:
    torch.manual_seed(5)
    found: nn.Module = ac.rewrite(model, args or (X,), kwargs, to=to, on_reject="raise")
    return found


def names(module: nn.Module, recurse: bool = True) -> set[str]:
    return {n for n, _ in module.named_parameters(recurse=recurse)}


def net_of(module: nn.Module, x: Tensor) -> Tensor:
    """The net of the paper in float64, four experts for a token."""
    w_sel, w_1, w_2 = (getattr(module, n).detach().double() for n in ("w_sel", "w_1", "w_2"))
    x = x.double()
    logits = x @ w_sel.mT
    chosen = torch.zeros_like(logits).scatter(-1, logits.topk(4, -1).indices, 1.0)
    hidden = torch.einsum("...d,ndg->...ng", x, w_1).relu()
    return torch.einsum("...ng,ngd,...n->...d", hidden, w_2, chosen * logits.sigmoid())


def layer_of(module: nn.Module, x: Tensor) -> Tensor:
    return expected(module, x, x, SPEC, SEEN)


def close(ours: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-4, atol=1e-5)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind", [Pre, pytest.param(Post, marks=SLOW), pytest.param(Parallel, marks=SLOW)]
)
def test_a_block_computes_the_layer_and_the_net_of_the_paper(kind: type[Pre]) -> None:
    new = rewritten(kind(rate=0.25)).eval()
    assert names(new.attend) == LAYER and names(new.net) == NET
    assert not list(new.net.children()) and not list(new.attend.children())
    exact = copy.deepcopy(new).double()
    x, first, second = X.double(), exact.first, exact.second
    a, f = partial(layer_of, new.attend), partial(net_of, new.net)
    if kind is Pre:
        h = x + a(first(x))
        wanted = h + f(second(h))
    elif kind is Post:
        h = first(x + a(x))
        wanted = second(h + f(h))
    else:
        wanted = x + a(first(x)) + f(first(x))
    close(new(X), wanted)
    (site,) = ac.last_report().sites
    assert (site.decision.variant, site.decision.fidelity) == ("switchall", "retrained")
    assert "2 of 3 experts on v, o" in site.facts["switchall"]
    assert "feed-forward net: 4 of 6 experts 3 wide, 504 parameters for 512" in str(
        ac.last_report()
    )


NETS = {
    "relu": lambda: Net(functional.relu),
    "silu": lambda: Net(functional.silu),
    "swiglu": lambda: Net(functional.silu, gated=True),
}


@SLOW
@pytest.mark.parametrize("name", NETS)
def test_nets_of_other_kinds(name: str) -> None:
    new = rewritten(Pre(net=NETS[name](), norm=RmsNorm))
    assert names(new.net) == NET
    exact = copy.deepcopy(new).double()
    x = X.double()
    h = x + layer_of(new.attend, exact.first(x))
    close(new(X), h + net_of(new.net, exact.second(h)))


@SLOW
def test_what_a_module_has_to_bear() -> None:
    old = Pre(net=Net(functional.silu, gated=True), norm=RmsNorm)
    new = rewritten(old)
    assert names(old.net) == {
        f"{m}.{n}" for m in ("up", "gate", "down") for n in ("weight", "bias")
    }
    y = new(X)
    for twin in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(twin(X), y)
        with torch.no_grad():
            twin.net.w_2.zero_()
        assert not torch.equal(twin(X), y)
    other = rewritten(Pre(net=Net(functional.silu, gated=True), norm=RmsNorm))
    with torch.no_grad():
        other.net.w_1.mul_(2.0)
    assert not torch.equal(other(X), y)
    other.load_state_dict(new.state_dict())
    assert torch.equal(other(X), y)
    close(new.double()(X.double()), y)
    new.float()
    longer = torch.randn(3, 11, WIDTH)
    close(new(longer)[:, :6], new(longer[:, :6]))
    assert torch.equal(torch.compile(new, backend="eager", fullgraph=True)(X), new(X))


class Dropping(Net):
    """A dropout on the hidden features."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.dropout(functional.gelu(self.up(x)), 0.5, self.training)
        return self.down(hidden)  # type: ignore[no-any-return]


@SLOW
@pytest.mark.parametrize("training", [False, True])
def test_dropout_of_the_hidden_features_stays(training: bool) -> None:
    new = rewritten(Pre(net=Dropping()).train(training)).eval()
    close(new(X), rewritten(Pre(net=Net()))(X))
    new.train()
    torch.manual_seed(0)
    first = new(X)
    assert not torch.equal(first, new(X))
    torch.manual_seed(0)
    assert torch.equal(first, new(X))


@SLOW
def test_experts_of_both_are_dropped_in_training_alone() -> None:
    new = rewritten(Pre(), to=replace(SPEC, expert_dropout=0.5)).eval()
    assert torch.equal(new(X), new(X))
    with torch.no_grad():
        new.attend.w_o.zero_()
    assert torch.equal(new(X), new(X))
    new.train()
    assert not torch.equal(new(X), new(X))


def test_every_new_parameter_learns_and_usage_tells_of_the_net() -> None:
    new = rewritten(Pre()).train()
    new(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in new.parameters())
    (found,) = ac.expert_usage(new, [((X,), {})]).values()
    assert set(found) == {"w_s", "w_d", "w_sel"}
    assert found["w_s"].shares.shape == (1, 3) and found["w_sel"].shares.shape == (1, 6)


# ---------------------------------------------------------------- both or neither


class Alone(Pre):
    """No net follows."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.attend(self.first(x)))  # type: ignore[no-any-return]


class Sines(Pre):
    def __init__(self) -> None:
        super().__init__(net=Net(torch.sin))


class Flipped(Pre):
    """The net is fine, and keys are normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = NormedKeys()


class NormedKeys(type(Pre().attend)):  # type: ignore[misc]
    def mixed(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        k = functional.normalize(k, dim=-1)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2)


class Shared(Pre):
    """Somebody else in the block reads a weight of the net."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.first(x))
        return x + self.net(self.second(x)) + self.net.down.bias.sin()  # type: ignore[no-any-return]


class Tied(nn.Module):
    """Two blocks, one net."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Pre(), Pre()
        self.two.net = self.one.net

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))  # type: ignore[no-any-return]


class Narrow(Pre):
    def __init__(self) -> None:
        super().__init__()
        self.net.up, self.net.down = nn.Linear(WIDTH, 3), nn.Linear(3, WIDTH)


REFUSED = {
    "no net": (Alone, "block.no_feed_forward"),
    "a net of sines": (Sines, "feed_forward.unlike"),
    "a layer that is none": (Flipped, "switchhead.qk_norm"),
    "a bias read elsewhere": (Shared, "feed_forward.shared"),
    "two blocks, one net": (Tied, "rewrite.shared_weight"),
    "a net of 3 channels": (Narrow, "switchall.sizes"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=SLOW if n in ("no net", "a net of sines") else ()) for n in REFUSED],
)
def test_a_block_is_left_alone_as_a_whole(name: str) -> None:
    kind, code = REFUSED[name]
    model = kind()
    before = list(model.state_dict())
    new = ac.rewrite(model, (X,), to=SPEC)
    report = ac.last_report()
    assert report.rewritten == 0 and list(new.state_dict()) == before
    assert {r.code for s in report.sites for r in s.decision.reasons} == {code}
    assert torch.equal(new(X), model(X))


def test_the_report_of_explain_and_of_a_backend() -> None:
    model = Pre()
    (site,) = ac.explain(model, (X,), to=SPEC).sites
    assert site.decision.accepted and "feed-forward net: 4 of 6" in site.facts["switchall"]
    assert hasattr(model.net, "up")
    torch._dynamo.reset()
    options = {"to": SPEC, "then": "eager"}
    torch.compile(model, backend="attn_compiler", options=options)(X)
    (site,) = ac.last_report().sites
    assert [r.code for r in site.decision.reasons] == ["needs_rewrite"]
