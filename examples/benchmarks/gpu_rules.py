"""Scores and masks in two languages: as a program of ours, and as FlexAttention's functions.

"(k <= q) & (k > q - n0)", n0 = T / 8   ==   lambda b, h, q, k: (k <= q) & (k > q - T // 8)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from attn_compiler.ir.score import Program
from attn_compiler.kernels.blocks import listed

# rows and keys of a block of a block map
BLOCK = 128
_CAP = 30.0
_DOCUMENTS = 8
Mod = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Sizes:
    B: int
    H: int
    G: int
    T: int
    S: int
    d: int


def _nothing(s: Sizes, reads: list[Tensor]) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Rule:
    """What stands between q.k and the softmax.

    Attributes:
        score, mask, empty: of our program.
        ints: its integers, from the sizes.
        reads: its tensors, from the sizes and the share of blocks that is kept; on the CPU.
        flex_score, flex_mask: FlexAttention's functions, from sizes and reads; None is none.
        band: how far a row sees to the left and to the right, from the sizes; None where what it
            sees is no band.
        share: of all scores of a head, those that count as work, from sizes and reads.
        extra: the score does more than the mask.
    """

    score: str = "dot"
    mask: str = "True"
    empty: str = "any"
    ints: Callable[[Sizes], tuple[int, ...]] = lambda s: ()
    reads: Callable[[Sizes, float], list[Tensor]] = lambda s, density: []
    flex_score: Callable[[Sizes, list[Tensor]], Mod | None] = _nothing
    flex_mask: Callable[[Sizes, list[Tensor]], Mod | None] = _nothing
    band: Callable[[Sizes], tuple[int | None, int | None]] | None = lambda s: (None, 0)
    share: Callable[[Sizes, list[Tensor]], float] = lambda s, reads: 0.5
    extra: bool = False

    @property
    def program(self) -> str:
        text = f"score: {self.score}; mask: {self.mask}; empty: {self.empty}"
        return str(Program.parse(text))

    def block_mask(self, s: Sizes, reads: list[Tensor], device: torch.device) -> BlockMask | None:
        """FlexAttention's list of blocks."""
        mask = self.flex_mask(s, reads)
        if mask is None:
            return None
        if self is RULES["blocks"]:
            # from the map itself: every block of it counts in full
            kept = reads[0][None]
            found = listed(kept, kept)
            lists = found.part_count, found.part_index, found.full_count, found.full_index
            return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=mask)
        batch = s.B if reads else None
        return create_block_mask(mask, batch, None, s.T, s.S, device=device)


# ---------------------------------------------------------------- tensors


def _slopes(s: Sizes, density: float) -> list[Tensor]:
    """2^(-8/H), 2^(-16/H), ...: Press et al. 2022."""
    return [2.0 ** (-8.0 * torch.arange(1, s.H + 1) / s.H)]


def _documents(s: Sizes, density: float) -> list[Tensor]:
    """The number of its document for each token; documents of any length, others in each batch."""
    draw = torch.Generator().manual_seed(s.T)
    starts = torch.rand(s.B, s.S, generator=draw).argsort(-1)[:, : _DOCUMENTS - 1]
    marks = torch.zeros(s.B, s.S, dtype=torch.int32).scatter_(1, starts, 1)
    return [marks.cumsum(-1, dtype=torch.int32)]


def _map(s: Sizes, density: float) -> list[Tensor]:
    """[H, rows / 128, keys / 128]: in each row of blocks the same number, drawn at random."""
    rows, keys = -(-s.T // BLOCK), -(-s.S // BLOCK)
    draw = torch.rand(s.H, rows, keys, generator=torch.Generator().manual_seed(s.T))
    kept = max(1, round(density * keys))
    return [draw.argsort(-1).argsort(-1) < kept]


# ---------------------------------------------------------------- how much of it


def _window_share(s: Sizes, reads: list[Tensor]) -> float:
    width = _window(s)[0]
    return sum(min(q + 1, width) for q in range(s.T)) / (s.T * s.S)


def _documents_share(s: Sizes, reads: list[Tensor]) -> float:
    pairs = 0
    for ids in reads[0].cpu():
        pairs += sum(n * (n + 1) // 2 for n in torch.bincount(ids).tolist())
    return pairs / (s.B * s.T * s.S)


def _window(s: Sizes) -> tuple[int, ...]:
    return (max(1, s.T // 8),)


def _causal(s: Sizes, reads: list[Tensor]) -> Mod:
    return lambda b, h, q, k: k <= q


def _flex_documents(s: Sizes, reads: list[Tensor]) -> Mod:
    ids = reads[0]
    return lambda b, h, q, k: (ids[b, q] == ids[b, k]) & (k <= q)


def _flex_window(s: Sizes, reads: list[Tensor]) -> Mod:
    (width,) = _window(s)
    return lambda b, h, q, k: (k <= q) & (k > q - width)


def _flex_blocks(s: Sizes, reads: list[Tensor]) -> Mod:
    kept = reads[0]
    return lambda b, h, q, k: kept[h, q // BLOCK, k // BLOCK]


def _flex_softcap(s: Sizes, reads: list[Tensor]) -> Mod:
    return lambda score, b, h, q, k: _CAP * torch.tanh(score / _CAP)


def _flex_alibi(s: Sizes, reads: list[Tensor]) -> Mod:
    slopes = reads[0]
    return lambda score, b, h, q, k: score - slopes[h] * (q - k)


_everything: Any = lambda s: (None, None)  # noqa: E731
RULES: dict[str, Rule] = {
    "full": Rule(band=_everything, share=lambda s, reads: 1.0),
    "causal": Rule(mask="k <= q", flex_mask=_causal),
    "softcap": Rule(
        f"{_CAP} * tanh(dot / {_CAP})", "k <= q",
        flex_score=_flex_softcap, flex_mask=_causal, extra=True,
    ),
    "alibi": Rule(
        "dot - t0[h] * float(q - k)", "k <= q", reads=_slopes,
        flex_score=_flex_alibi, flex_mask=_causal, extra=True,
    ),
    "documents": Rule(
        mask="(t0[b, q] == t0[b, k]) & (k <= q)", reads=_documents,
        flex_mask=_flex_documents, band=None, share=_documents_share,
    ),
    "window": Rule(
        mask="(k <= q) & (k > q - n0)", ints=_window, flex_mask=_flex_window,
        band=lambda s: (_window(s)[0] - 1, 0), share=_window_share,
    ),
    "blocks": Rule(
        mask=f"t0[h, q // {BLOCK}, k // {BLOCK}]", empty="zero", reads=_map,
        flex_mask=_flex_blocks, band=None,
        share=lambda s, reads: float(reads[0].float().mean()),
    ),
}  # fmt: skip
