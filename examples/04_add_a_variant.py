"""A variant of your own: a spec, when it may replace an attention, and what computes it instead.

    softmax over k <= q   ->   softmax over q - size < k <= q

The whole variant stands in this file; nothing is registered. `rewrite` finds it through the spec.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import attn_compiler as ac
from attn_compiler.ir.expr import parse
from attn_compiler.ir.mask import Causal
from attn_compiler.ir.site import AttentionSite, Reason
from attn_compiler.variants.base import Fidelity, Lowering, Scope, Variant, VariantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Window(VariantSpec):
    """Every token sees itself and the `size - 1` before it."""

    size: int = 64

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ac.BadOption(f"Window has size={self.size}", do="give a number from 1")

    def variant(self) -> Variant:
        return WINDOW


def legality(site: AttentionSite, spec: Window) -> Iterator[Reason]:
    """Every reason why it may not replace a site."""
    if site.length is None:
        text = "the window counts tokens: rows have to be those of the keys"
        yield Reason("window.not_square", text, site.location)
    if not any(isinstance(term, Causal) for term in site.mask.terms):
        yield Reason("window.not_causal", "later tokens are seen too", site.location)


def lower(site: AttentionSite, spec: Window, length: int, slots: int) -> Lowering:
    """The same attention with one more condition in its mask."""
    near = parse(f"({site.program.mask}) & (k > q - {spec.size})")
    return Lowering(replace(site.program, mask=near))


WINDOW = Variant(
    name="window",
    spec=Window,
    scope=Scope.CORE,
    fidelity=Fidelity.CALIBRATED,  # the same parameters, another function: only where asked for
    legality=legality,
    lower=lower,
)


# ---------------------------------------------------------------- tried on a model


class Attention(nn.Module):
    """Causal attention; with a `window`, the plain way to compute what the variant computes."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.window: int | None = None
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        split = (B, T, self.heads, D // self.heads)
        q, k, v = (t.view(split).transpose(1, 2) for t in self.qkv(x_BTD).split(D, dim=2))
        scores_BHTS = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if self.causal:
            row = torch.arange(T)
            distance_TT = row[:, None] - row[None, :]
            seen_TT = distance_TT >= 0
            if self.window is not None:
                seen_TT = seen_TT & (distance_TT < self.window)
            scores_BHTS = scores_BHTS.masked_fill(~seen_TT, float("-inf"))
        y_BHTd = scores_BHTS.softmax(dim=-1) @ v
        return self.out(y_BHTd.transpose(1, 2).reshape(B, T, D))


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Attention(64, 4), Attention(64, 4, causal=False)).eval()
    x = torch.randn(2, 100, 64)

    new = ac.rewrite(model, (x,), to={"*": Window(size=16)})
    print(ac.last_report())

    model[0].window = 16
    with torch.no_grad():
        difference = (new(x) - model(x)).abs().max().item()
    print(f"largest difference: {difference:.1e}")


if __name__ == "__main__":
    main()
