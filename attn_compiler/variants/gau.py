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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from attn_compiler.errors import BadOption
from attn_compiler.ir.expr import Expr, Int, Read, depends, walk
from attn_compiler.ir.mask import Causal, Documents, Mask, Padding, Term
from attn_compiler.ir.piece import Piece
from attn_compiler.ir.site import AttentionSite, Reason
from attn_compiler.ir.soft import NotAttention
from attn_compiler.kernels import gau_unit
from attn_compiler.variants.base import (
    Fidelity,
    NewTensor,
    Replacement,
    Scope,
    Start,
    Variant,
    VariantSpec,
    Work,
    demand,
    demand_flag,
    demand_one_of,
    is_size,
    normal,
)

if TYPE_CHECKING:
    from attn_compiler.cost.letters import Cost

Auto = Literal["auto"]

# the paper's sizes, which it uses at widths from 512
_S, _EXPANSION, _CHUNK, _LEAST_WIDTH = 128, 2.0, 256, 512
# with them a pair has s / (6 D) more weights than a block of 12 D^2: 4.2 % at a width of 512
_PAPER_MATCH, _MATCH = 0.05, 0.02
_STD = 0.02
# offsets of a causal mask that lets a row see up to itself
_DIAGONALS = ("0", "S - T")


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
        init: "fresh", or "convert" from the block that is replaced.

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


def cost(spec: GAU, work: Work, *, causal: bool = False) -> Cost:
    """What a pair of units costs, which replaces a block, in the letters of `cost.letters`: d is
    the width s, e the expanded width, C the chunk. Numbers that the spec gives stand in their
    place; a chunk that is "auto" is a chunk, C.
    """
    from attn_compiler.variants.costs import gau, parts

    share = parts.visited(work, causal)
    found = gau.pair(work, chunked=spec.chunk is not None, share=share)
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


# ---------------------------------------------------------------- in a model


def legality(site: AttentionSite, spec: GAU) -> Iterator[Reason]:
    """Codes: those of `ir.blocks` (block.*) and `ir.feed_forward` (feed_forward.*), and gau.mask,
    .score, .convert.
    """
    yield from site.obstacles or ()
    if spec.init == "convert":
        text = "a start from the block's own weights is made by kernels.gau_convert, not in place"
        yield Reason("gau.convert", text, site.location)
    problem = _mask_problem(site.mask)
    if problem:
        yield Reason("gau.mask", f"{problem}: {site.mask}", site.location)
    if depends(site.program.score, "b"):
        text = "the scores depend on the example, and units have no place for that"
        yield Reason("gau.score", text, site.location)


def _mask_problem(mask: Mask) -> str:
    """Why units cannot keep to a mask, "" if they can."""
    if any(isinstance(t, Causal) and str(t.offset) not in _DIAGONALS for t in mask.terms):
        return "a row sees up to itself, and not less or more"
    known = (Causal, Padding, Documents)
    if all(isinstance(t, known) for t in mask.terms) and not any(map(_numbered, mask.terms)):
        return ""
    if not any(_read_by_row(t.expr) for t in mask.terms):
        return "units see all keys, or those before them, of a document, without padding"
    if depends(mask.expr, "h") or any(isinstance(n, Int) for n in walk(mask.expr)):
        return "the mask depends on the head, or on numbers that are known when it runs"
    return ""


def _numbered(term: Term) -> bool:
    """Does it depend on a number that is known only when it runs?"""
    return not isinstance(term, Causal) and any(isinstance(n, Int) for n in walk(term.expr))


def _read_by_row(expr: Expr) -> bool:
    """Does it read a tensor of rows and keys?"""
    reads = (n for n in walk(expr) if isinstance(n, Read))
    return any(all(any(depends(i, name) for i in r.index) for name in "qk") for r in reads)


def seen_by(mask: Mask) -> gau_unit.Seen:
    """What a unit has to know of a mask, beside whether it is causal."""
    named = [t for t in mask.terms if not isinstance(t, Causal)]
    if not all(isinstance(t, Padding | Documents) for t in named):
        return gau_unit.Seen(whole=str(mask.expr))
    padding = " & ".join(f"({t.expr})" for t in named if isinstance(t, Padding))
    documents = [t for t in named if isinstance(t, Documents)]
    numbers = [
        str(n)
        for t in documents
        for n in walk(t.expr)
        if isinstance(n, Read) and any(depends(i, "k") for i in n.index)
    ]
    return gau_unit.Seen(padding=padding, documents=numbers[0] if numbers else "")


def replacement(site: AttentionSite, piece: Piece, spec: GAU) -> Replacement:
    """Two units for the block that was found; those that it has already stay.

    Raises:
        NotAttention: `gau.sizes`, no pair of units has about the parameters of the block;
            `gau.mask`, with a cache a row sees what comes after it, or a part of what went by.
    """
    facts, block = piece.facts, piece.facts["block"]
    before, causal, words = facts["before"], _is_causal(site, facts), ""
    if before is not None:
        made = before.spec
        fresh = {"dtype": facts["dtype"], "device": facts["device"]}
        tensors = tuple(replace(tensor, **fresh) for tensor in before.tensors)
    else:
        sizes = {"width": block.width, "replaced": block.replaced}
        try:
            made = filled(spec, **sizes, length=facts["rows"], causal=causal)
        except BadOption as error:
            raise NotAttention("gau.sizes", error.what) from error
        tensors = tuple(
            t for home in facts["homes"] for t in _tensors(made, block.width, home, facts)
        )
        words = _words(made, block, causal, facts["rows"])
    form = (
        ("chunk", made.chunk),
        ("causal", causal),
        ("scale_mode", made.scale_mode),
        ("rope", made.rope),
        ("dropout", site.dropout),
    )
    seen = seen_by(site.mask)
    _check_steps(site, facts, seen)
    options = (
        ("names", tuple(n for n in gau_unit.NAMES if n != "rel_bias" or made.relative_bias)),
        ("form", form),
        ("seen", (seen.padding, seen.documents, seen.whole)),
    )
    return Replacement(gau_unit.unit, tensors, options, made, words)


def _check_steps(site: AttentionSite, facts: Any, seen: gau_unit.Seen) -> None:
    """A cache holds the sum of all tokens before, so new ones see them all."""
    if facts["block"].update is None:
        return
    named = any(isinstance(t, Causal) for t in site.mask.terms)
    if seen.documents or not (named or seen.whole or facts["rows"] == 1):
        text = f"with a cache, units see all tokens up to each row: {site.mask}"
        raise NotAttention("gau.mask", text)


def _is_causal(site: AttentionSite, facts: Any) -> bool:
    """A block that goes on token by token sees those before."""
    named = any(isinstance(t, Causal) for t in site.mask.terms)
    return named or facts["block"].update is not None


def _tensors(spec: GAU, width: int, home: str, facts: Any) -> tuple[NewTensor, ...]:
    """Shapes as `kernels.gau_layer` has them, and how they start: see `fresh` there."""
    s, expanded = int(spec.s), round(float(spec.expansion) * width)
    rows = 2 if spec.chunk is None else 4
    drawn = Start(normal, (_STD,))
    shapes: dict[str, tuple[tuple[int, ...], float | Start]] = {
        "w_uvz": ((width, 2 * expanded + s), drawn),
        "b_uvz": ((2 * expanded + s,), 0.0),
        "gamma": ((rows, s), drawn),
        "beta": ((rows, s), 0.0),
        "w_o": ((expanded, width), drawn),
        "b_o": ((width,), 0.0),
    }
    if spec.relative_bias:
        table = (2, s) if spec.chunk is None else (2 * int(spec.chunk) - 1,)
        shapes["rel_bias"] = (table, drawn)
    return tuple(
        NewTensor(name, shape, facts["dtype"], start, True, home, facts["device"])
        for name, (shape, start) in shapes.items()
    )


def _words(spec: GAU, block: Any, causal: bool, length: int) -> str:
    """Sizes, and whether the planner would have kept the block."""
    s, expanded, chunk = int(spec.s), round(float(spec.expansion) * block.width), spec.chunk
    count = 2 * parameters(block.width, s, expanded, chunked=chunk is not None)
    kind = f"chunks of {chunk}" if chunk else "all pairs"
    text = f"two units, s {s}, {expanded} wide, {kind}; {count:,} parameters for {block.replaced:,}"
    if chunk is None:
        return f"{text}; never less to do than the block"
    crossing = break_even_length(
        block.width, s=s, expanded=expanded, chunk=int(chunk), causal=causal
    )
    less = f"less to do than the block from {crossing:.0f} tokens on"
    return f"{text}; {less}" + (f", and these are {length}" if length < crossing else "")


GAU_ = Variant(
    name="gau",
    spec=GAU,
    scope=Scope.BLOCK,
    fidelity=Fidelity.RETRAINED,
    legality=legality,
    replace=replacement,
)
