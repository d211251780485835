"""Reports whose pages the tests look at, and a reader of HTML that complains."""

from __future__ import annotations

from functools import cache
from html.parser import HTMLParser
from typing import Any

import torch
from torch import Tensor, nn

import attn_compiler as ac
from attn_compiler.report import Report

WIDTH, HEADS, LENGTH = 32, 2, 53
_VOID = {"meta", "input", "br", "link", "img", "hr"}
# what asks the network for something, unless it stays in the page
_ADDRESSES = {"src", "href", "srcset", "action", "data", "poster", "xlink:href", "background"}


class Attention(nn.Module):
    """Causal; `weights` are also handed out, or gated before they meet the values."""

    def __init__(self, manner: str = "plain") -> None:
        super().__init__()
        self.qkv, self.manner = nn.Linear(WIDTH, 3 * WIDTH), manner

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        scores = 5.0 * torch.tanh(q @ k.transpose(-1, -2) / 4)
        above = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(above, float("-inf")).softmax(-1)
        used = weights * torch.sigmoid(weights) if self.manner == "gated" else weights
        out = (used @ v).transpose(1, 2).flatten(2)
        return out, weights if self.manner == "shown" else None


class Layer(nn.Module):
    def __init__(self, manner: str = "plain") -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention(manner)
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y, weights = self.attention(self.norm(x))
        x = x + y
        return x + self.down(self.up(x).relu()), weights


class Model(nn.Module):
    """Three layers that are rewritten, one that is kept, one that is left alone."""

    def __init__(self) -> None:
        super().__init__()
        manners = ("plain", "plain", "plain", "shown", "gated")
        self.layers = nn.ModuleList(map(Layer, manners))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        shown = []
        for layer in self.layers:
            x, weights = layer(x)
            if weights is not None:
                shown.append(weights)
        return x, shown


@cache
def explained() -> Report:
    """The report of the model above, made once."""
    torch.manual_seed(3)
    return ac.explain(Model().eval(), (torch.randn(2, LENGTH, WIDTH),), hardware="h200")


class Page(HTMLParser):
    """Reads a page.

    Attributes:
        complaints: tags that are not closed, not opened, or twice of one id.
        addresses: what links and sources lead to.
        ids: of elements.
        elements: tags with their attributes, in order.
        texts: all that is text outside of scripts and styles.
        data: content of JSON scripts.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.complaints: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[str] = []
        self.data: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.complaints += [f"{tag} is not closed" for tag in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        self.addresses += [str(v) for n, v in attrs if n in _ADDRESSES]
        if len(found) < len(attrs):
            self.complaints.append(f"{tag} has an attribute twice")
        if "id" in found:
            if found["id"] in self.ids:
                self.complaints.append(f"id {found['id']} twice")
            self.ids.append(str(found["id"]))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1] != tag:
            self.complaints.append(f"</{tag}> closes {self._open[-1:]} at {self.getpos()}")
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, text: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "script" and self.elements[-1][1].get("type") == "application/json":
            self.data.append(text)
        elif inside not in ("script", "style"):
            self.texts.append(text)

    def all(self, tag: str) -> list[dict[str, Any]]:
        """Attributes of every element of a kind."""
        return [found for name, found in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())
