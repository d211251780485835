"""The choice of experts: ties, gradients, dropout, what is reported."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels.routing import entropy, mean_choice, route, usage

B, T, D, H, E, K = 2, 11, 7, 3, 5, 2


def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, D, generator=draw, dtype=torch.float64)
    return x, torch.randn(H * E, D, generator=draw, dtype=torch.float64)


def test_takes_the_largest_of_every_head() -> None:
    x, w = drawn()
    found = route(x, w, heads=H, k=K)
    logits = torch.einsum("btd,hed->bthe", x, w.view(H, E, D))
    torch.testing.assert_close(found.logits, logits)
    assert found.index.shape == found.gate.shape == (B, T, H, K)
    assert found.index.dtype == torch.int32
    worst = found.gate.amin(-1)
    left = logits.sigmoid().scatter(-1, found.index.long(), 0.0)
    assert (left.amax(-1) < worst).all()
    torch.testing.assert_close(found.gate, logits.gather(-1, found.index.long()).sigmoid())


def test_chooses_by_logits_where_sigmoids_saturate() -> None:
    x = torch.ones(1, 1, 1)
    w = torch.tensor([[20.0], [30.0], [25.0]])
    assert w.sigmoid().unique().numel() == 1
    assert route(x, w, heads=1, k=2).index.flatten().tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_in_float32(dtype: torch.dtype) -> None:
    x, w = (t.to(dtype) for t in drawn())
    found = route(x, w, heads=H, k=K)
    exact = route(x.float(), w.float(), heads=H, k=K)
    assert found.gate.dtype == torch.float32 and torch.equal(found.gate, exact.gate)
    with torch.autocast("cpu", torch.bfloat16):
        inside = route(x.float(), w.float(), heads=H, k=K)
    assert torch.equal(inside.gate, exact.gate) and torch.equal(inside.index, exact.index)


def test_gradient_reaches_the_chosen_alone() -> None:
    x, w = drawn()
    found = route(x, w.requires_grad_(), heads=H, k=1)
    (grad,) = torch.autograd.grad(found.gate[0, 4, 1, 0], w)
    chosen = E + int(found.index[0, 4, 1, 0])
    gate = found.gate[0, 4, 1, 0].detach()
    expected = torch.zeros_like(grad)
    expected[chosen] = gate * (1 - gate) * x[0, 4]
    torch.testing.assert_close(grad, expected)
    assert torch.autograd.gradcheck(lambda x, w: route(x, w, heads=H, k=K).gate, drawn_grad())


def drawn_grad() -> tuple[Tensor, ...]:
    return tuple(t.requires_grad_() for t in drawn(1))


def test_dropout_forbids_choices_and_keeps_gates() -> None:
    x, w = drawn()
    plain = route(x, w, heads=H, k=1)
    seed = torch.tensor([5])
    found, again = (route(x, w, heads=H, k=1, dropout=0.4, seed=seed) for _ in range(2))
    assert torch.equal(found.index, again.index)
    moved = found.index != plain.index
    assert 0.2 < moved.double().mean() < 0.6
    gates = plain.logits.gather(-1, found.index.long()).sigmoid()
    assert torch.equal(found.gate, gates)
    other = route(x, w, heads=H, k=1, dropout=0.4, seed=seed + 1)
    assert not torch.equal(found.index, other.index)


def test_silent_experts_have_no_gate() -> None:
    x, w = drawn()
    settings = {"heads": H, "k": E, "dropout": 0.4, "seed": torch.tensor([5])}
    loud, silent = (route(x, w, **settings, silent=s) for s in (False, True))  # type: ignore[arg-type]
    off = silent.gate == 0
    assert 0.2 < off.double().mean() < 0.6
    assert (loud.gate > 0).all()
    assert torch.equal(loud.gate[~off], silent.gate[~off])
    leaf = w.clone().requires_grad_()
    route(x, leaf, **settings, silent=True).gate.sum().backward()  # type: ignore[arg-type]
    assert leaf.grad is not None and leaf.grad.isfinite().all()


@pytest.mark.parametrize(
    "change",
    [{"heads": 4}, {"k": 6}, {"k": 0}, {"dropout": 0.5}, {"seed": torch.tensor([1])},
     {"dropout": 1.0, "seed": torch.tensor([1])}],
)  # fmt: skip
def test_refusals(change: dict[str, object]) -> None:
    x, w = drawn()
    with pytest.raises(UnsupportedCall, match="experts cannot be chosen"):
        route(x, w, **({"heads": H, "k": K} | change))  # type: ignore[arg-type]


def test_usage_and_entropy() -> None:
    index = torch.tensor([[[[0, 1], [2, 2]], [[0, 2], [2, 2]]]])
    shares = usage(index, 3)
    assert shares.tolist() == [[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]]
    assert entropy(shares).tolist() == pytest.approx([1.5 * math.log(2), 0.0])
    even = mean_choice(torch.zeros(B, T, H, E))
    assert entropy(even).tolist() == pytest.approx([math.log(E)] * H)


def test_entropy_of_routers_has_a_gradient() -> None:
    x, w = drawn_grad()

    def regulariser(x: Tensor, w: Tensor) -> Tensor:
        return -entropy(mean_choice(route(x, w, heads=H, k=K).logits)).sum()

    assert torch.autograd.gradcheck(regulariser, (x, w))
    (grad,) = torch.autograd.grad(regulariser(x, w), w)
    with torch.no_grad():
        assert regulariser(x, w - 1e-3 * grad) < regulariser(x, w)
