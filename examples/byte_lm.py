"""A small language model over bytes, written plainly, and text to train it on.

    x = x + attention(norm(x));  x = x + feed_forward(norm(x));  logits = head(norm(x))

The text is the source code of Python's standard library, which is installed wherever this runs:
about 13 MB. Every twentieth file is held out.

Source: a decoder as in Llama (arXiv 2302.13971) with rotation (arXiv 2104.09864), one feed-forward
matrix fewer.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

_HELD_OUT = 20
# tests hold long tables of data, the others are no part of the library
_LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib"}


# ---------------------------------------------------------------- the model


@dataclass(frozen=True, slots=True)
class Sizes:
    """Width D, heads H, layers, and the longest sequence T."""

    width: int = 128
    heads: int = 4
    layers: int = 4
    length: int = 256


class Attention(nn.Module):
    """Causal attention with rotated queries and keys, as its formula says it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.dim = sizes.heads, sizes.width // sizes.heads
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width, bias=False)
        self.out = nn.Linear(sizes.width, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.dim)).unbind(2)
        q, k = rotated(q.transpose(1, 2)), rotated(k.transpose(1, 2))
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.transpose(-1, -2) * self.dim**-0.5).masked_fill(later, float("-inf"))
        mixed = scores.softmax(-1).to(v.dtype) @ v.transpose(1, 2)
        return self.out(mixed.transpose(1, 2).flatten(2))


def rotated(x: Tensor) -> Tensor:
    """Channels turned in pairs by their position, [B, H, T, d]."""
    length, dim = x.shape[-2:]
    rates = 10000.0 ** (-torch.arange(0, dim, 2, device=x.device) / dim)
    angle = torch.arange(length, device=x.device).unsqueeze(1) * rates
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(sizes.width), nn.LayerNorm(sizes.width)
        self.attention, self.feed_forward = Attention(sizes), FeedForward(sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.feed_forward(self.between(x))


class ByteModel(nn.Module):
    """Bytes [B, T] -> logits [B, T, 256] of the bytes that follow."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, 256, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)
        for block in self.blocks:
            for last in (block.attention.out, block.feed_forward.down):
                nn.init.normal_(last.weight, std=0.02 / (2 * sizes.layers) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def bits(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss, in bits per byte."""
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten()) / 0.6931471805599453


# ---------------------------------------------------------------- the text


@dataclass(frozen=True, slots=True)
class Corpus:
    """Bytes to train on and bytes held out, [N] each, and what they are."""

    train: Tensor
    held_out: Tensor
    words: str

    def batches(self, count: int, batch: int, length: int, seed: int) -> Iterator[Tensor]:
        """`count` draws of windows to train on, [batch, length + 1], the same for equal seeds."""
        draw = torch.Generator().manual_seed(seed)
        for _ in range(count):
            starts = torch.randint(len(self.train) - length, (batch, 1), generator=draw)
            yield self.train[starts + torch.arange(length + 1)].long()

    def windows(self, count: int, batch: int, length: int, part: int = 0) -> list[Tensor]:
        """`count` windows out of the held-out text at even distances, [batch, length + 1] each;
        part 0 and part 1 share no window.
        """
        starts = torch.linspace(0, len(self.held_out) - length - 1, 2 * count).long()[part::2]
        found = self.held_out[starts.unsqueeze(1) + torch.arange(length + 1)].long()
        return list(found.split(batch))


def corpus(folder: Path | None = None) -> Corpus:
    """The sources of the standard library, or all Python files of a folder, by name of file."""
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    files = sorted(
        (path for path in root.rglob("*.py") if not _LEFT_OUT & {*path.relative_to(root).parts}),
        key=lambda path: path.relative_to(root).as_posix(),
    )
    texts = [path.read_bytes() for path in files]
    held = b"".join(texts[::_HELD_OUT])
    train = b"".join(text for i, text in enumerate(texts) if i % _HELD_OUT)
    mark = hashlib.sha256(train + held).hexdigest()[:16]
    words = f"{len(files)} files, {len(train)} bytes, {len(held)} held out, sha256 {mark}"
    return Corpus(_tensor(train), _tensor(held), words)


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
