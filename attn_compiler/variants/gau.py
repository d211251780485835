"""Gated attention units, and FLASH, their form in chunks: two of them replace a block.

    attention, feed-forward   ->   [U | V | Z] = silu(x W);  (U * relu(q k^T + b)^2 V) W_o,  twice

One head without a softmax; in chunks it costs the same for every token however long the sequence
is. New parameters: a model has to be trained with it. (FLASH is not FlashAttention.)

Source: Transformer Quality in Linear Time (arXiv 2202.10447) for the architecture and its sizes;
crossings are computed from its operations, against exact attention that keeps no T x T tensor.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from attn_compiler.errors import BadOption
from attn_compiler.variants.base import (
    VariantSpec,
    Work,
    demand,
    demand_flag,
    demand_one_of,
    is_size,
)

if TYPE_CHECKING:
    from attn_compiler.cost.letters import Cost

Auto = Literal["auto"]

# the paper's sizes, which it uses at widths from 512
_S, _EXPANSION, _CHUNK, _LEAST_WIDTH = 128, 2.0, 256, 512
# with them a pair has s / (6 D) more weights than a block of 12 D^2: 4.2 % at a width of 512
_PAPER_MATCH, _MATCH = 0.05, 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class GAU(VariantSpec):
    """Gated attention units.

    Attributes:
        chunk: tokens of a chunk; None attends to all pairs.
        s: width of queries and keys.
        expansion: expanded width over the width of the model.
        scale_mode: what divides the sum over keys: "rowcount" the keys of the row, "valid" those
            of the sequence, "chunk" a chunk's length, "seqlen" the length, "fixed(512)" a number.
        relative_bias: a learned bias by distance.
        rope: rotate queries and keys.
        init: "fresh", or "convert" from the block that is replaced, with calibration.

    Raises:
        BadOption: a field has a wrong value.
    """

    chunk: int | Auto | None = "auto"
    s: int | Auto = "auto"
    expansion: float | Auto = "auto"
    scale_mode: str = "rowcount"
    relative_bias: bool = True
    rope: bool = True
    init: Literal["fresh", "convert"] = "fresh"

    def __post_init__(self) -> None:
        good = self.chunk in ("auto", None) or is_size(self.chunk)
        demand(self, "chunk", good, 'give a whole number above 0, "auto", or None for all pairs')
        demand(self, "s", self.s == "auto" or is_size(self.s), 'give a number above 0, or "auto"')
        demand_flag(self, "relative_bias", "rope")
        if self.rope and isinstance(self.s, int):
            why = "a rotation turns channels in pairs"
            demand(self, "s", self.s % 2 == 0, "give an even number, or rope=False", why)
        width = self.expansion
        number = isinstance(width, int | float) and not isinstance(width, bool)
        good = width == "auto" or (number and 0 < float(width) < math.inf)
        demand(self, "expansion", good, 'give a number above 0, or "auto"')
        mode = self.scale_mode
        good = isinstance(mode, str) and bool(
            re.fullmatch(r"rowcount|valid|chunk|seqlen|fixed\([1-9]\d*\)", mode)
        )
        do = 'give "rowcount", "valid", "chunk", "seqlen" or "fixed(512)" with a length'
        demand(self, "scale_mode", good, do)
        if mode == "chunk":
            demand(self, "scale_mode", self.chunk is not None, "give chunk too", "no chunks")
        demand_one_of(self, "init", "fresh", "convert")
        if self.init == "convert":
            why = "a unit starts as a feed-forward net by a bias that shows a token itself alone"
            demand(self, "relative_bias", self.relative_bias, 'leave it True, or init="fresh"', why)


def cost(spec: GAU, work: Work, *, causal: bool = False, gpu: bool = False) -> Cost:
    """What a pair of units costs, which replaces a block, in the letters of `cost.letters`: d is
    the width s, e the expanded width, C the chunk. Numbers that the spec gives stand in their
    place; a chunk that is "auto" is a chunk, C.

    Args:
        gpu: by the generated kernels, which do more than has to be done.
    """
    from attn_compiler.variants.costs import gau, parts

    share = parts.visited(work, causal)
    found = gau.pair(work, chunked=spec.chunk is not None, share=share, gpu=gpu)
    expanded = None if spec.expansion == "auto" else spec.expansion
    return parts.filled(gau.expanded(found, expanded), d=spec.s, C=spec.chunk)


def filled(spec: GAU, *, width: int, replaced: int, length: int, causal: bool = True) -> GAU:
    """The spec with numbers for "auto".

    Args:
        spec: what is wanted.
        width: of the model.
        replaced: parameters of the block that is replaced.
        length: tokens of a sequence.
        causal: a token sees those before it.

    Raises:
        BadOption: s alone has more parameters than the block.
    """
    s, expansion = sizes(spec, width, replaced)
    chunk = spec.chunk
    if chunk == "auto":
        chunk = chunk_length(s, round(expansion * width), length, causal=causal)
        if chunk is None and spec.scale_mode == "chunk":
            chunk = _CHUNK
        if chunk is None:  # which has fewer parameters
            s, expansion = sizes(replace(spec, chunk=None), width, replaced)
    return replace(spec, chunk=chunk, s=s, expansion=expansion)


def second_of(spec: GAU) -> GAU:
    """The form of the unit in the place of the feed-forward net, given numbers for "auto": a
    converted one starts by seeing the token itself alone, so nothing may divide, and it has a table
    of distances.
    """
    if spec.init == "fresh":
        return spec
    return replace(spec, chunk=spec.chunk or _CHUNK, scale_mode="fixed(1)")


def sizes(spec: GAU, width: int, replaced: int) -> tuple[int, float]:
    """s and the expansion: the paper's 128 and 2 from a width of 512 on, where a pair then has
    about the parameters of the block; else a pair that matches them within 2 %.

    Raises:
        BadOption: s alone has more parameters than the block.
    """
    chunked = spec.chunk is not None
    if spec.s != "auto":
        s = spec.s
    else:
        s = _S if width >= _LEAST_WIDTH else max(16, 2 ** math.floor(math.log2(width / 4)))
    if spec.expansion != "auto":
        return s, spec.expansion
    if width >= _LEAST_WIDTH and s == _S:
        papers = 2 * parameters(width, s, round(_EXPANSION * width), chunked=chunked)
        if abs(papers / replaced - 1) <= _PAPER_MATCH:
            return s, _EXPANSION
    return s, _matching(width, s, replaced, chunked) / width


def _matching(width: int, s: int, replaced: int, chunked: bool) -> int:
    """The expanded width with which a pair has so many parameters, as round as 2 % allow."""
    fixed = parameters(width, s, 0, chunked=chunked)
    exact = (replaced / 2 - fixed) / (3 * width + 2)
    for multiple in (64, 16, 8, 1):
        expanded = multiple * round(exact / multiple)
        pair = 2 * parameters(width, s, expanded, chunked=chunked)
        if expanded > 0 and abs(pair / replaced - 1) <= _MATCH:
            return expanded
    raise BadOption(
        f"no pair of units with s={s} has about {replaced} parameters at a width of {width}",
        where="option s",
        do="give a smaller s, or s and expansion",
    )


def parameters(width: int, s: int, expanded: int, *, chunked: bool, biases: bool = True) -> int:
    """Parameters of one unit, without its table of relative positions: 3 D e + D s, a scale and an
    offset for two of q and k, for four in chunks, and biases 2 e + s + D.
    """
    weights = 3 * width * expanded + width * s
    scales = 2 * (4 if chunked else 2) * s
    return weights + scales + (2 * expanded + s + width) * int(biases)


def break_even_length(
    width: int,
    *,
    s: int = _S,
    expanded: int | None = None,
    chunk: int = _CHUNK,
    causal: bool = True,
) -> float:
    """Length from which a pair in chunks has less to do than a block with exact attention:
    5 s / f + C s / D + 2 C at an expansion of 2 (f 1/2 if causal). Below it, keep the block.

    Without chunks there is no such length: the pair's part that grows with the length is larger
    than the block's.
    """
    f, e = (0.5 if causal else 1.0), (2 * width if expanded is None else expanded)
    more = 6 * width * e + 2 * width * s - 12 * width**2
    return (more + 2 * f * chunk * (s + e) + 4 * s * e) / (2 * f * width)


def chunks_pay_from(s: int, expanded: int, *, chunk: int = _CHUNK, causal: bool = True) -> float:
    """Length from which chunks and a state have less to do than all pairs:
    C + 2 s e / (f (s + e)).
    """
    f = 0.5 if causal else 1.0
    return chunk + 2 * s * expanded / (f * (s + expanded))


def chunk_length(s: int, expanded: int, length: int, *, causal: bool = True) -> int | None:
    """The chunk where it is "auto": 256, or None (all pairs) where that is less to do."""
    return _CHUNK if length > chunks_pay_from(s, expanded, causal=causal) else None


def state_pays_from(width: int, *, s: int = _S, chunk: int = _CHUNK) -> float:
    """Tokens from which what a pair in chunks keeps for generation is smaller than the keys and
    values of a block: a float32 state and a chunk of 16-bit Z and V, at an expansion of 2.
    """
    e = 2 * width
    return 2 * (4 * s * e + 2 * chunk * (s + e)) / (2 * 2 * width)
