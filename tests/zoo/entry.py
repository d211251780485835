"""One row of the hand-written zoo, and the projections that most rows share.

x -> q, k, v by head -> attend(q, k, v, ...) -> merge heads -> output projection
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

B, T, S, H, G, D = 2, 11, 7, 4, 2, 8
WIDTH = H * D
FULL = "none"
Attend = Callable[..., Any]


@dataclass(frozen=True)
class Entry:
    """An attention, its inputs, and what the compiler should find.

    Attributes:
        name: of the test.
        build: makes the module.
        inputs: makes the arguments from a generator.
        mask: how the text of the mask begins; `FULL` for none; None: not looked at. An offset may
            be S - T where the sizes are symbolic.
        heads: query heads; None: not looked at.
        kv_heads: key and value heads; None: not looked at.
        head_dim: features of a query.
        sites: attentions in one forward.
        training: False where the original itself has no gradient.
        refused: reason codes that a reader accepts in place of a rewrite; "" accepts any.
        why: the explanation of `refused`.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], tuple[Any, ...]]
    mask: str | None = FULL
    heads: int | None = H
    kv_heads: int | None = H
    head_dim: int | None = D
    sites: int = 1
    training: bool = True
    refused: tuple[str, ...] = ()
    why: str = ""

    def module(self) -> nn.Module:
        """The module with weights that depend on nothing but the row."""
        torch.manual_seed(0)
        return self.build()

    def arguments(self, seed: int = 0) -> tuple[Any, ...]:
        return self.inputs(torch.Generator().manual_seed(seed))

    def __str__(self) -> str:
        return self.name


def hidden(
    *more: Callable[[torch.Generator], Any], rows: int = T
) -> Callable[[torch.Generator], tuple[Any, ...]]:
    """Inputs: hidden states [B, rows, WIDTH] that require gradients, then `more`."""
    return lambda g: (
        torch.randn(B, rows, WIDTH, generator=g).requires_grad_(),
        *(m(g) for m in more),
    )


def normal(*shape: int, grad: bool = True) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(*shape, generator=g).requires_grad_(grad)


def constant(value: Any) -> Callable[[torch.Generator], Any]:
    return lambda g: value


class Site(nn.Module):
    """Separate projections around `attend(q, k, v, *extra)`."""

    def __init__(
        self,
        attend: Attend,
        *,
        kv_heads: int = H,
        value_dim: int = D,
        layout: str = "bhtd",
        cross: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.attend = attend
        self.kv_heads, self.value_dim, self.layout, self.cross = kv_heads, value_dim, layout, cross
        self.wq = nn.Linear(WIDTH, H * D, bias=bias)
        self.wk = nn.Linear(WIDTH, kv_heads * D, bias=bias)
        self.wv = nn.Linear(WIDTH, kv_heads * value_dim, bias=bias)
        self.wo = nn.Linear(H * value_dim, WIDTH, bias=bias)

    def forward(self, x: Tensor, *extra: Any) -> Tensor:
        source = extra[0] if self.cross else x
        rest = extra[1:] if self.cross else extra
        q = self.split(self.wq(x) * 2, H)
        k = self.split(self.wk(source) * 2, self.kv_heads)
        v = self.split(self.wv(source), self.kv_heads)
        return self.wo(self.merge(self.attend(q, k, v, *rest)))  # type: ignore[no-any-return]

    def split(self, x: Tensor, heads: int) -> Tensor:
        parts = x.view(x.shape[0], x.shape[1], heads, -1)
        return parts if self.layout == "bthd" else parts.transpose(1, 2)

    def merge(self, y: Tensor) -> Tensor:
        y = y if self.layout == "bthd" else y.transpose(1, 2)
        return y.reshape(y.shape[0], y.shape[1], -1)


def site(
    name: str,
    attend: Attend,
    *more: Callable[[torch.Generator], Any],
    mask: str | None = FULL,
    kv: int = H,
    found: int | None = -1,
    training: bool = True,
    refused: tuple[str, ...] = (),
    why: str = "",
    **options: Any,
) -> Entry:
    """A row made of `Site`; `attend` is a function or a class of module.

    `found` is the number of kv heads to be found, if it is not `kv`.
    """

    def build() -> nn.Module:
        return Site(attend() if isinstance(attend, type) else attend, kv_heads=kv, **options)

    kv_heads = kv if found == -1 else found
    inputs = hidden(*more)
    return Entry(
        name, build, inputs, mask, kv_heads=kv_heads, training=training, refused=refused, why=why
    )
