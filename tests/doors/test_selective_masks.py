"""Selective attention in models with masks, biases and few kv heads, against its definition."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as ac

B, T, H, G, D = 2, 23, 6, 2, 5
HEAD, WINDOW, CAP = 4, 7, 3.0
SLOPES = torch.tensor([0.5, 0.25, 0.125, 1.0, 0.75, 0.3])
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 14, [3] * 5 + [4] * 1 + [5] * 17])
KEEP = torch.arange(T) >= torch.tensor([[0], [6]])


class Attention(nn.Module):
    """Few kv heads, and one more rule: `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.kv = nn.Linear(H * D, H * D), nn.Linear(H * D, 2 * G * D)
        self.out = nn.Linear(H * D, H * D)
        self.register_buffer("slopes", SLOPES.clone())

    def parts(self, x: Tensor) -> list[Tensor]:
        q, kv = self.q(x).unflatten(-1, (H, D)), self.kv(x).unflatten(-1, (2 * G, D))
        k, v = (y.repeat_interleave(H // G, 2) for y in kv.split(G, 2))
        return [y.transpose(1, 2) for y in (q, k, v)]

    def logits(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """What selects, and what is normalised."""
        z = q @ k.transpose(-1, -2) * D**-0.5
        if self.kind == "soft-cap":
            z = CAP * torch.tanh(z / CAP)
        if self.kind != "alibi":
            return z, z
        places = torch.arange(q.shape[2])
        far = (places[:, None] - places[None, :]).to(z.dtype)
        return z, z - self.slopes[:, None, None] * far

    def allowed(self, length: int, given: Tensor | None) -> Tensor:
        """[B or 1, T, T]."""
        i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
        seen = (j <= i)[None]
        if self.kind == "window":
            seen = seen & (i - j < WINDOW)
        if self.kind == "documents":
            assert given is not None
            seen = seen & (given[:, :, None] == given[:, None, :])
        if self.kind == "padding":
            assert given is not None
            seen = seen & given[:, None, :]
        return seen

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        q, k, v = self.parts(x)
        z = self.logits(q, k)[1]
        z = z.masked_fill(~self.allowed(x.shape[1], given)[:, None], float("-inf"))
        weights = z.softmax(-1)
        if self.kind == "padding":
            weights = torch.nan_to_num(weights)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def selective(layer: Attention, x: Tensor, given: Tensor | None, select_from: str) -> Tensor:
    """The definition, key by key. Who sees nobody before it is protected."""
    q, k, v = layer.parts(x)
    z, biased = layer.logits(q, k)
    source = (biased if select_from == "logits" else z)[:, HEAD]
    allowed = layer.allowed(x.shape[1], given).expand(B, -1, -1)
    before = allowed & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(-1)
    alone = ~before.any(-1)
    chosen = torch.where(before & ~alone[:, None, :], torch.relu(source), 0.0)
    amount = chosen.cumsum(1) - chosen
    weights = (biased - amount[:, None]).masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
    mixed = (torch.nan_to_num(weights) @ v).transpose(1, 2).flatten(2)
    return layer.out(mixed)


class Added(Attention):
    """A mask of zeros and large negative numbers is added, as libraries do."""

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        q, k, v = self.parts(x)
        weights = (self.logits(q, k)[1] + given).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("number", [-1e4, torch.finfo(torch.float32).min, -torch.inf])
def test_numbers_that_are_added_forbid(number: float) -> None:
    """Left padding and causality in one tensor, which only its numbers tell."""
    torch.manual_seed(2)
    layer = Added("padding").eval()
    for parameter in layer.parameters():
        parameter.data *= 3
    x, allowed = torch.randn(B, T, H * D), layer.allowed(T, KEEP)
    given = torch.zeros(B, 1, T, T).masked_fill(~allowed[:, None], number)
    new = ac.rewrite(layer, (x, given), to=ac.Selective(head=HEAD))
    assert [s.decision.variant for s in ac.last_report().sites] == ["selective"]
    exact = selective(copy.deepcopy(layer).double(), x.double(), KEEP, "qk")
    found = new(x, given)
    torch.testing.assert_close(found.double()[KEEP], exact[KEEP], rtol=1e-4, atol=1e-4)
    # a gate of 0 leaves all rows as they were, also those of padding, if they are any numbers
    gated = ac.rewrite(layer, (x, given), to=ac.Selective(head=HEAD, start="gate"))
    plain = layer(x, given)
    seen = plain.isfinite() & (KEEP[..., None] | (number < -1e4))
    torch.testing.assert_close(gated(x, given)[seen], plain[seen], rtol=1e-4, atol=1e-4)
    ac.rewrite(layer, (x, torch.zeros(B, 1, T, T)), to=ac.Selective(head=HEAD))
    (reason,) = ac.last_report().sites[0].decision.reasons
    assert reason.code == "verify.failed" and "no row see later keys" in reason.text


class Beside(Attention):
    """A bias that is handed in, and a large negative number where a key comes later."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__("plain")
        self.bias = bias

    def logits(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        z = super().logits(q, k)[0]
        return z, z + self.bias

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        assert given is not None
        q, k, v = self.parts(x)
        added = torch.where(self.allowed(T, None), given, torch.finfo(x.dtype).min)
        weights = (super().logits(q, k)[0] + added).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def test_a_bias_may_hold_the_mask() -> None:
    torch.manual_seed(2)
    bias = torch.randn(H, T, T)
    layer = Beside(bias).eval()
    x = torch.randn(B, T, H * D)
    new = ac.rewrite(layer, (x, bias), to=ac.Selective(head=HEAD), on_reject="raise")
    exact = selective(copy.deepcopy(layer).double(), x.double(), None, "qk")
    torch.testing.assert_close(new(x, bias).double(), exact, rtol=1e-4, atol=1e-4)


CASES = {
    "plain": None,
    "window": None,
    "soft-cap": None,
    "alibi": None,
    "documents": DOCUMENTS,
    "padding": KEEP,
}


@pytest.mark.parametrize("kind", CASES)
def test_rules_of_the_definition(kind: str) -> None:
    torch.manual_seed(2)
    layer, given = Attention(kind).eval(), CASES[kind]
    for parameter in layer.parameters():
        parameter.data *= 3
    x = torch.randn(B, T, H * D)
    args = (x,) if given is None else (x, given)
    sources = ("qk", "logits") if kind == "alibi" else ("qk",)
    for source in sources:
        spec = ac.Selective(head=HEAD, select_from=source)
        new = ac.rewrite(layer, args, to=spec, on_reject="raise")
        assert [s.decision.variant for s in ac.last_report().sites] == ["selective"]
        y = torch.randn(B, T, H * D, requires_grad=True)
        double = copy.deepcopy(layer).double()
        exact = selective(double, y.double(), given, source)
        found = new(y, *args[1:])
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, layer(y, *args[1:]), atol=1e-2)
        (wanted,) = torch.autograd.grad(exact.square().mean(), y)
        (grad,) = torch.autograd.grad(found.square().mean(), y)
        torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-4)


class HeadsFirst(nn.Module):
    """Weights of each head, as a tensor [heads, features, d] or beside one another."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.v = (nn.Parameter(torch.randn(H, H * D, D) / 2) for _ in range(2))

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.kind == "flat":
            return (x.flatten(0, 1) @ weight).view(H, *x.shape[:2], D)
        if self.kind == "einsum":
            return torch.einsum("btc,hcd->hbtd", x, weight)
        return torch.cat((x @ weight.transpose(0, 1).flatten(1)).split(D, 2))

    def forward(self, x: Tensor) -> Tensor:
        length, drop = x.shape[1], torch.zeros(len(x), x.shape[1], dtype=torch.bool)
        q, v = self.project(x, self.q), self.project(x, self.v)
        # the mask of the batch, once for each head
        drop = drop[:, None] if q.dim() == 4 else drop.repeat(H, 1)[:, None]
        drop = drop | torch.ones(length, length, dtype=torch.bool).triu(1)
        y = (q @ q.mT * D**-0.5).masked_fill(drop, float("-inf")).softmax(-1) @ v
        return y.reshape(H, *x.shape[:2], D).permute(1, 2, 0, 3).flatten(2)


@pytest.mark.parametrize("kind", ["flat", "einsum", "split"])
def test_one_head_selects_and_not_one_example(kind: str) -> None:
    torch.manual_seed(2)
    model, x = HeadsFirst(kind), torch.randn(B + 1, T, H * D)
    new = ac.rewrite(model, (x,), to=ac.Selective(head=1))
    assert ac.last_report().rewritten == 1
    found, last = new(x)[-1], new(torch.cat([torch.randn(B, T, H * D), x[-1:]]))[-1]
    torch.testing.assert_close(found, last)
    assert not torch.allclose(found, model(x)[-1], atol=1e-2)


@pytest.mark.parametrize("kind", ["flat", "einsum"])
def test_one_head_selects_where_sizes_are_known(kind: str) -> None:
    torch.manual_seed(2)
    model, x = HeadsFirst(kind), torch.randn(B + 1, T, H * D)
    options = {"to": ac.Selective(head=1), "then": "eager"}
    compiled = torch.compile(model, backend="attn_compiler", dynamic=False, options=options)
    found, last = compiled(x), compiled(torch.cat([torch.randn(B, T, H * D), x[-1:]]))[-1]
    assert ac.last_report().sites[0].query_heads == H
    torch.testing.assert_close(found[-1], last)
