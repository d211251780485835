"""A fresh layer starts at the scale of the one that it replaces, each layer at its own."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as ac
from attn_compiler.kernels.routing import mixture_deviation
from tests.doors.switched import Fused, Separate

D, H, HEAD = 64, 8, 8


class Layer(nn.Module):
    """Attention of 8 heads, then a net; `scale` is the deviation of all weights."""

    def __init__(self, scale: float, packed: bool) -> None:
        super().__init__()
        self.maps = nn.Linear(D, 3 * D) if packed else None
        self.q, self.k, self.v = (None if packed else nn.Linear(D, D) for _ in range(3))
        self.out, self.norm, self.before = nn.Linear(D, D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=scale)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        if self.maps is not None:
            q, k, v = self.maps(y).chunk(3, -1)
        else:
            assert self.q is not None and self.k is not None and self.v is not None
            q, k, v = self.q(y), self.k(y), self.v(y)
        q, k, v = (t.unflatten(-1, (H, HEAD)).transpose(1, 2) for t in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(self.up(self.norm(x)).relu())  # type: ignore[no-any-return]


def replaced(scales: tuple[float, ...], packed: bool, to: ac.SwitchHead) -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(*(Layer(scale, packed) for scale in scales))
    new = ac.rewrite(model, (torch.randn(2, 32, D),), to=to, on_reject="raise")
    assert isinstance(new, nn.Sequential)
    return new


@pytest.mark.parametrize("packed", [False, True])
def test_deviations_are_those_of_the_weights_that_are_replaced(packed: bool) -> None:
    scales, spec = (0.02, 0.3), ac.SwitchHead(heads=2, experts=4, k=2, feed_forward="sigma_moe")
    new = replaced(scales, packed, spec)
    for layer, scale in zip(new, scales, strict=True):
        found = {n: p.detach() for n, p in layer.named_parameters() if p.dim() == 3}
        inner = found["w_q"].shape[-1]
        mixture = mixture_deviation(2, 4)
        wanted = dict.fromkeys(("w_q", "w_k", "w_1"), scale) | {"w_v": scale / mixture}
        wanted["w_o"] = scale / mixture * (D / (2 * inner)) ** 0.5
        for name, deviation in wanted.items():
            torch.testing.assert_close(float(found[name].std()), deviation, rtol=0.05, atol=0)


@pytest.mark.parametrize("feed_forward", [None, "sigma_moe"])
@torch.no_grad()
def test_the_first_outputs_are_about_as_large(feed_forward: Literal["sigma_moe"] | None) -> None:
    spec = ac.SwitchHead(heads=2, experts=4, k=2, feed_forward=feed_forward)
    new = replaced((0.05, 0.2), True, spec)
    x = torch.randn(8, 64, D)
    for layer, scale in zip(new, (0.05, 0.2), strict=True):
        ours = float((layer(x) - x).std())
        plain = Layer(scale, True)
        theirs = float((plain(x) - x).std())
        assert 0.8 < ours / theirs < 1.25, (ours, theirs)


def test_outputs_that_start_at_zero_do_so() -> None:
    torch.manual_seed(0)
    model = Separate()
    nn.init.zeros_(model.out.weight)
    new = ac.rewrite(model, (torch.randn(2, 11, 42),), to=ac.SwitchHead(), on_reject="raise")
    assert not new.w_o.any() and new.w_v.any()  # type: ignore[union-attr,operator]


def test_weights_that_nobody_has_filled_are_not_asked() -> None:
    torch.manual_seed(0)
    model, x = Separate(), torch.randn(2, 11, 42)
    nn.init.constant_(model.q.weight, float("nan"))
    new = ac.rewrite(model, (x,), to=ac.SwitchHead(), on_reject="raise")
    torch.testing.assert_close(float(new.w_q.detach().std()), 42**-0.5, rtol=0.1, atol=0)  # type: ignore[operator,union-attr]
    assert new(x).isfinite().all()


def test_weights_without_numbers_are_not_asked() -> None:
    with torch.device("meta"):
        model, x = Fused(), torch.randn(2, 11, 42)
    new = ac.rewrite(model, (x,), to=ac.SwitchHead(), on_reject="raise")
    assert all(p.is_meta for p in new.parameters()) and new(x).shape == x.shape


@pytest.mark.parametrize(("k", "experts"), [(1, 1), (1, 3), (2, 4), (3, 16)])
def test_what_a_mixture_keeps_of_a_deviation(k: int, experts: int) -> None:
    draw = torch.Generator().manual_seed(0)
    gates = torch.randn(200_000, experts, generator=draw).topk(k).values.sigmoid()
    drawn = float(gates.square().sum(1).mean().sqrt())
    torch.testing.assert_close(mixture_deviation(k, experts), drawn, rtol=5e-3, atol=0)
