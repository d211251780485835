"""What a mask means: a predicate over batch, head, row and column, its name, the tiles it lets in.

    ~(k > q) & (t0[b, k] == 1)   ->   causal & padding(attention_mask)

The names (q' = q + offset of the causal term where there is one):

    causal         k <= q                causal(+4)     k <= q + 4
    causal(S - T)  k <= q + S - T        window(w)      q' - k < w
    local(w)       |q - k| <= w          local(w, n)    |q + n - k| <= w
    chunked(c)     k // c == q' // c     chunked(c, n)  k // c == (q + n) // c
    prefix(n)      k < n                 none           every key may be seen
    padding(t)     t holds at key k      padding(~t)    t does not hold there
    tensor(t)      t holds at (q, k)     documents(t)   t at q equals t at k

joined by `&` and `|`. What has no name is written as it is, with tensors by name:
`causal & (k >= positions[b])`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from attn_compiler.ir.expr import SIZES, Expr, depends, parse
from attn_compiler.ir.predicate import Predicate, conjunction, conjuncts, negate, to_expr
from attn_compiler.ir.terms import (
    Causal,
    Chunked,
    Documents,
    Either,
    Local,
    Other,
    Padding,
    Prefix,
    Tensor,
    Term,
    Window,
    has_reads,
    name_terms,
    terms_text,
)
from attn_compiler.ir.tiles import Box, Tile, narrow, tile
from attn_compiler.ir.truth import truth

__all__ = [
    "Causal",
    "Chunked",
    "Documents",
    "Either",
    "Local",
    "Mask",
    "Other",
    "Padding",
    "Prefix",
    "Tensor",
    "Term",
    "Tile",
    "Window",
    "classify",
    "normalise",
]


def normalise(expr: Expr, kinds: Sequence[str] = ()) -> Expr:
    """The same truth in one form (see truth.py); `kinds` as for `classify`."""
    return to_expr(_known(expr, tuple(kinds), ())[0])


def classify(expr: Expr, names: Sequence[str] = (), kinds: Sequence[str] = ()) -> Mask:
    """Normalise a boolean expression and name its conjuncts.

    Args:
        expr: the predicate.
        names: how to call the tensor of each slot; `t0` ... where there is no name.
        kinds: "bool", "int", "float" or "" (not known) for the tensor of each slot. With kinds more
            spellings meet: of a tensor that may hold NaN, `~(k > t[q])` is not `k <= t[q]`.
    """
    found = _known(expr, tuple(kinds), ())[0]
    return Mask(to_expr(found), tuple(names), name_terms(conjuncts(found)), tuple(kinds))


@dataclass(frozen=True, eq=False)
class Mask:
    """A predicate that knows its name; equals masks, and strings as people write them."""

    expr: Expr
    names: tuple[str, ...]
    terms: tuple[Term, ...]
    kinds: tuple[str, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return terms_text(self.terms, self.names)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Mask):
            return self.expr == other.expr
        return self._is_called(other) if isinstance(other, str) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.expr)

    def _is_called(self, text: str) -> bool:
        """In any order of & and |; padding(t) and tensor(t) also fit any other condition on t."""
        own = str(self)
        if _canonical(text) in (_canonical(own), _canonical(own, loose=True)):
            return True
        try:
            return normalise(parse(text), self.kinds) == self.expr
        except ValueError:
            return False

    # ------------------------------------------------------------ for kernels

    def causal_offset(self) -> Expr | None:
        """The offset of the one causal term; it holds sizes and integers only."""
        found = [t.offset for t in self.terms if isinstance(t, Causal)]
        return found[0] if len(found) == 1 else None

    def padding(self) -> list[Expr]:
        """The conjuncts that read tensors by batch and key alone."""
        return [t.expr for t in self.terms if has_reads(t.expr) and not depends(t.expr, "q", "h")]

    @property
    def rest(self) -> Expr:
        """What is neither causal nor padding; TRUE if nothing is."""
        pads = self.padding()
        return self._all(
            [t for t in self.terms if not isinstance(t, Causal) and t.expr not in pads]
        )

    def split(self) -> tuple[Expr, Expr, Expr]:
        """(structural, key_only, other), TRUE where there is none; their conjunction is the mask.

        Structural has no reads and no b or h; key_only has no q; other is what is left.
        """
        groups: tuple[list[Term], list[Term], list[Term]] = ([], [], [])
        for term in self.terms:
            plain = not has_reads(term.expr) and not depends(term.expr, "b", "h")
            groups[0 if plain else 2 if depends(term.expr, "q") else 1].append(term)
        return self._all(groups[0]), self._all(groups[1]), self._all(groups[2])

    def without(self, *terms: Term) -> Mask:
        left = self._all([t for t in self.terms if t not in terms])
        return classify(left, self.names, self.kinds)

    def _all(self, terms: Sequence[Term]) -> Expr:
        return to_expr(conjunction(truth(t.expr, self.kinds) for t in terms))

    # ------------------------------------------------------------ tiles

    def key_range(
        self, rows: tuple[int, int], sizes: Mapping[str, int], ints: Sequence[int] = ()
    ) -> tuple[int, int]:
        """Half-open range of the columns that some of these rows may see; (0, 0) if none."""
        box = Box.of(rows, (0, sizes["S"]), sizes)
        found = narrow(self._known(sizes, ints)[0], box) if box is not None else None
        if found is None:
            return 0, 0
        low, high = found.ranges["k"]
        return int(low), int(high) + 1

    def row_range(
        self, cols: tuple[int, int], sizes: Mapping[str, int], ints: Sequence[int] = ()
    ) -> tuple[int, int]:
        """Half-open range of the rows that may see some of these columns; (0, 0) if none."""
        box = Box.of((0, sizes["T"]), cols, sizes)
        found = narrow(self._known(sizes, ints)[0], box) if box is not None else None
        if found is None:
            return 0, 0
        low, high = found.ranges["q"]
        return int(low), int(high) + 1

    def tile(
        self,
        rows: tuple[int, int],
        cols: tuple[int, int],
        sizes: Mapping[str, int],
        ints: Sequence[int] = (),
    ) -> Tile:
        """What the half-open tile holds as far as it lies in the grid; SKIP and FULL are proven."""
        return tile(*self._known(sizes, ints), Box.of(rows, cols, sizes))

    def _known(self, sizes: Mapping[str, int], ints: Sequence[int]) -> tuple[Predicate, Predicate]:
        values = [(n, sizes[n]) for n in SIZES if n in sizes]
        values.extend((f"n{i}", n) for i, n in enumerate(ints))
        return _known(self.expr, self.kinds, tuple(values))


@lru_cache(maxsize=1024)
def _known(
    expr: Expr, kinds: tuple[str, ...], values: tuple[tuple[str, int], ...]
) -> tuple[Predicate, Predicate]:
    """The mask and its opposite, with the numbers in place."""
    found = truth(expr, kinds, dict(values))
    return found, negate(found)


# ---------------------------------------------------------------- comparison with strings


def _canonical(text: str, loose: bool = False) -> str:
    """One text for all orders of & and |; `loose` keeps the bare name in padding() and tensor()."""
    try:
        return _canonical_ast(ast.parse(text, mode="eval").body, loose)
    except SyntaxError:
        return "".join(text.split())


def _canonical_ast(node: ast.expr, loose: bool) -> str:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
        parts = sorted({_canonical_ast(n, loose) for n in _operands(node, type(node.op))})
        return f"{type(node.op).__name__}({', '.join(parts)})"
    if (
        loose
        and isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("padding", "tensor")
        and node.args
    ):
        return f"{ast.unparse(node.func)}({_subject(node.args[0])})"
    return ast.unparse(node).replace("(+", "(")


def _operands(node: ast.expr, op: type[ast.operator]) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, op):
        yield from _operands(node.left, op)
        yield from _operands(node.right, op)
    else:
        yield node


def _subject(node: ast.expr) -> str:
    while isinstance(node, ast.UnaryOp | ast.Compare):
        node = node.operand if isinstance(node, ast.UnaryOp) else node.left
    return ast.unparse(node)
