"""Selective attention in living models: against its definition, exact where it starts exact."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as ac

T, D, H = 29, 24, 3


class Attention(nn.Module):
    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(D, 3 * D), nn.Linear(D, D), causal

    def logits(self, x: Tensor) -> Tensor:
        q, k, _ = self.parts(x)
        return q @ k.transpose(-1, -2) * (D // H) ** -0.5

    def parts(self, x: Tensor) -> list[Tensor]:
        return [y.unflatten(-1, (H, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)]

    def forward(self, x: Tensor) -> Tensor:
        scores, (_, _, v) = self.logits(x), self.parts(x)
        if self.causal:
            length = x.shape[1]
            above = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(above, float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def draw(seed: int = 1, length: int = T) -> Tensor:
    return torch.randn(2, length, D, generator=torch.Generator().manual_seed(seed))


def selective(layer: Attention, x: Tensor, head: int) -> Tensor:
    """The definition: what earlier rows have selected is subtracted, never from the first token or
    from a row's own.
    """
    z, (_, _, v) = layer.logits(x), layer.parts(x)
    length = x.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool).tril(-1)
    earlier[:, 0] = False
    chosen = torch.where(earlier, torch.relu(z[:, head]), 0.0)
    masked = chosen.cumsum(1) - chosen  # by the rows before
    z = (z - masked[:, None]).masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf)
    return layer.out((z.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("head", [0, 2])
def test_numbers_and_gradients(model: Model, head: int) -> None:
    new = ac.rewrite(model, (draw(),), to=ac.Selective(head=head))
    x = draw(5, 37).requires_grad_()
    exact = selective(copy.deepcopy(model.layers[0]).double(), x.double(), head)
    ours = new.layers[0](x)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, model.layers[0](x), atol=1e-3)
    (wanted,) = torch.autograd.grad(exact.square().sum(), x)
    (found,) = torch.autograd.grad(ours.square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    site = ac.last_report().sites[0]
    assert site.decision.variant == "selective" and site.decision.fidelity == "calibrated"


def test_a_gate_starts_exact_and_is_trained(model: Model) -> None:
    new = ac.rewrite(model, (draw(),), to=ac.Selective(start="gate"))
    gates = [p for name, p in new.named_parameters() if "attn_gate" in name]
    assert len(gates) == 2 and all(float(g) == 0 for g in gates)
    x = draw(3)
    torch.testing.assert_close(new(x), model(x), rtol=1e-5, atol=1e-5)
    new(x).square().sum().backward()
    assert all(g.grad is not None and float(g.grad.abs()) > 0 for g in gates)
    with torch.no_grad():
        for gate in gates:
            gate.fill_(1.0)
    direct = ac.rewrite(model, (draw(),), to=ac.Selective())
    torch.testing.assert_close(new(x), direct(x), rtol=1e-5, atol=1e-5)


def test_an_ordinary_module(model: Model) -> None:
    x = draw(3)
    new = ac.rewrite(model, (x,), to=ac.Selective())
    expected = new(x)
    assert torch.equal(copy.deepcopy(new)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(new))(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(new, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    assert set(new.state_dict()) == set(model.state_dict())


def test_earlier_rows_never_see_later_ones(model: Model) -> None:
    new, x = ac.rewrite(model, (draw(),), to=ac.Selective()), draw(3)
    torch.testing.assert_close(new(x)[:, :11], new(x[:, :11]), rtol=1e-5, atol=1e-5)


def test_what_keeps_it_out(model: Model) -> None:
    def codes(to: ac.Selective, owner: nn.Module = model) -> set[str]:
        ac.rewrite(owner, (draw(),), to=to)
        return {r.code for site in ac.last_report().sites for r in site.decision.reasons}

    assert codes(ac.Selective(head=3)) == {"selective.head"}
    assert codes(ac.Selective(), Attention(causal=False)) == {"selective.not_causal"}


def test_a_backend_may_install_what_needs_no_tensor(model: Model) -> None:
    torch._dynamo.reset()
    options = {"to": ac.Selective(), "then": "eager"}
    compiled = torch.compile(model, backend="attn_compiler", options=options)
    x = draw(3)
    torch.testing.assert_close(compiled(x), ac.rewrite(model, (x,), to=ac.Selective())(x))
