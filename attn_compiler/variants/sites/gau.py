"""Gated attention units in a living model: which blocks they may replace, and by what.

    x + attention(norm x), h + net(norm h)   ->   x + unit(norm x), h + unit(norm h)

Norms, residuals and the dropouts upon the branches stay as they are. The first unit stands in the
module of the attention, the second in that of the feed-forward net.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from attn_compiler.errors import BadOption
from attn_compiler.ir.expr import Expr, Int, Read, depends, walk
from attn_compiler.ir.mask import Causal, Documents, Mask, Padding, Term
from attn_compiler.ir.no_attention import NotAttention
from attn_compiler.ir.piece import Piece
from attn_compiler.ir.site import AttentionSite, Reason
from attn_compiler.kernels import gau_unit
from attn_compiler.kernels.gau_layer import deviations
from attn_compiler.variants.base import (
    Fidelity,
    NewTensor,
    Replacement,
    Scope,
    Variant,
)
from attn_compiler.variants.gau import GAU, break_even_length, filled, parameters, second_of
from attn_compiler.variants.starts import Like, Start, normal

if TYPE_CHECKING:
    from attn_compiler.ir.affine import LinearMap

# offsets of a causal mask that lets a row see up to itself
_DIAGONALS = ("0", "S - T")


def legality(site: AttentionSite, spec: GAU) -> Iterator[Reason]:
    """Codes: those of `ir.blocks` (block.*) and `ir.feed_forward` (feed_forward.*), and gau.mask
    and gau.score.
    """
    yield from site.obstacles or ()
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
            `gau.mask`, with a cache a row sees what comes after it, or a part of what went by, or
            the mask reads what is made on the way.
    """
    facts, block = piece.facts, piece.facts["block"]
    before, causal, words = facts["before"], _is_causal(site, facts), ""
    if before is not None:
        made = before.spec
        if facts["rows"] == 1 and before.causal is not None:
            causal = before.causal  # one row sees itself alone in either direction
        fresh = {"dtype": facts["dtype"], "device": facts["device"]}
        tensors = tuple(replace(tensor, **fresh) for tensor in before.tensors)
    else:
        sizes = {"width": block.width, "replaced": block.replaced}
        try:
            made = filled(spec, **sizes, length=facts["rows"], causal=causal)
        except BadOption as error:
            raise NotAttention("gau.sizes", error.what) from error
        tensors = tuple(
            tensor
            for home, one, last in zip(
                facts["homes"],
                (made, second_of(made)),
                (block.out, block.net.down),
                strict=True,
            )
            for tensor in _tensors(one, last, home, facts)
        )
        words = _words(made, block, causal, facts["rows"])
    forms = tuple(
        (
            ("chunk", one.chunk),
            ("causal", causal),
            ("scale_mode", one.scale_mode),
            ("rope", one.rope),
            ("dropout", site.dropout),
        )
        for one in (made, second_of(made))
    )
    seen = seen_by(site.mask)
    _check_seen(site, facts, seen)
    options = (
        ("names", tuple(n for n in gau_unit.NAMES if n != "rel_bias" or made.relative_bias)),
        ("forms", forms),
        ("seen", (seen.padding, seen.documents, seen.whole)),
    )
    held = block.held()
    return Replacement(gau_unit.unit, tensors, options, made, words, origin=held, causal=causal)


def _check_seen(site: AttentionSite, facts: Any, seen: gau_unit.Seen) -> None:
    """The mask can be read, and a cache holds the sum of all tokens before: new ones see them."""
    if facts["reads"] is None and seen != gau_unit.Seen():
        raise NotAttention("gau.mask", f"the mask reads what is made on the way: {site.mask}")
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


def _tensors(spec: GAU, last: LinearMap, home: str, facts: Any) -> tuple[NewTensor, ...]:
    """Shapes as `kernels.gau_layer` has them, and how they start: see `fresh` there. The map of the
    outputs starts at the scale of `last`, the branch's: how far a branch changes its residual is
    chosen with how deep a model is, and how its embeddings start.
    """
    width: int = facts["block"].width
    s, expanded = int(spec.s), round(float(spec.expansion) * width)
    chunk = None if spec.chunk is None else int(spec.chunk)
    rows = 2 if chunk is None else 4
    of = deviations((width, expanded, s), chunk)
    drawn = {name: Start(normal, (deviation,)) for name, deviation in of.items()}
    like = Like((last.weight,), math.sqrt(last.width / expanded))
    drawn["w_o"] = replace(drawn["w_o"], like=like)
    shapes: dict[str, tuple[tuple[int, ...], float | Start]] = {
        "w_uvz": ((width, 2 * expanded + s), drawn["w_uvz"]),
        "b_uvz": ((2 * expanded + s,), 0.0),
        "gamma": ((rows, s), 1.0),
        "beta": ((rows, s), 0.0),
        "w_o": ((expanded, width), drawn["w_o"]),
        "b_o": ((width,), 0.0),
    }
    if spec.relative_bias:
        table = (2, s) if chunk is None else (2 * chunk - 1,)
        shapes["rel_bias"] = (table, drawn["rel_bias"])
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
