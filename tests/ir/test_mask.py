"""Masks: one truth, one form; names; tiles held against the whole grid."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_compiler.ir.evaluate import evaluate
from attn_compiler.ir.expr import (
    FALSE,
    TRUE,
    Call,
    Const,
    Expr,
    Int,
    Read,
    Var,
    depends,
    parse,
    walk,
)
from attn_compiler.ir.mask import (
    Mask,
    Tile,
    classify,
    normalise,
)

B, H = 2, 2
KINDS = ("int", "bool", "float")
NAMES = ("attention_mask", "ids", "bias")


def grid(
    expr: Expr, t: int, s: int, reads: Sequence[Tensor] = (), ints: Sequence[int] = ()
) -> Tensor:
    """The truth of every element, [B, H, T, S]."""
    env = {
        "b": torch.arange(B).view(B, 1, 1, 1),
        "h": torch.arange(H).view(H, 1, 1),
        "q": torch.arange(t).view(t, 1),
        "k": torch.arange(s),
    } | {"B": B, "H": H, "T": t, "S": s}
    return evaluate(expr, env, reads, ints).bool().expand(B, H, t, s)


def random_reads(t: int, s: int, seed: int) -> list[Tensor]:
    """An integer, a boolean and a float tensor (with NaN), each by batch and position."""
    generator = torch.Generator().manual_seed(seed)
    n = max(t, s)
    noise = torch.randint(-1, 3, (B, n), generator=generator).float()
    noise[torch.rand(B, n, generator=generator) < 0.2] = torch.nan
    return [
        torch.randint(-1, 3, (B, n), generator=generator),
        torch.rand(B, n, generator=generator) < 0.6,
        noise,
    ]


# ---------------------------------------------------------------- strategies

sizes = st.integers(1, 9)
numbers = st.integers(-9, 9).map(Const)
steps = st.integers(1, 5).map(Const)


def _reads(slot: int) -> st.SearchStrategy[Expr]:
    return st.sampled_from("qk").map(lambda i: Read(slot, (Var("b"), Var(i))))


def integers(depth: int, leaves: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    if not depth:
        return leaves
    inner = integers(depth - 1, leaves)
    two = st.tuples(inner, inner)
    return st.one_of(
        leaves,
        st.builds(Call, st.sampled_from(["add", "sub", "min", "max"]), two),
        st.builds(Call, st.sampled_from(["neg", "abs", "relu", "int"]), st.tuples(inner)),
        st.builds(Call, st.just("mul"), st.tuples(numbers, inner)),
        st.builds(Call, st.sampled_from(["floordiv", "mod"]), st.tuples(inner, steps)),
        st.builds(Call, st.just("floordiv"), st.tuples(inner, st.integers(-4, -1).map(Const))),
        st.builds(Call, st.just("where"), st.tuples(compared(inner), inner, inner)),
        compared(inner).map(lambda c: Call("int", (c,))),
    )


def compared(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    ops = st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne"])
    return st.builds(Call, ops, st.tuples(inner, inner))


def booleans(depth: int, leaves: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    if not depth:
        return leaves
    inner = booleans(depth - 1, leaves)
    return st.one_of(
        leaves,
        st.builds(Call, st.just("not"), st.tuples(inner)),
        st.builds(Call, st.sampled_from(["and", "or", "xor", "eq", "ne"]), st.tuples(inner, inner)),
        st.builds(Call, st.just("where"), st.tuples(inner, inner, inner)),
    )


plain = st.one_of(
    st.sampled_from([Var("q"), Var("k"), Var("q"), Var("k"), Var("T"), Var("S"), Int(0)]), numbers
)
structural = booleans(2, st.one_of(compared(integers(2, plain)), st.sampled_from([TRUE, FALSE])))
any_mask = booleans(
    2,
    st.one_of(
        compared(integers(2, st.one_of(plain, _reads(0)))),
        compared(st.one_of(_reads(0), _reads(2), plain)),
        _reads(0),
        _reads(1),
        st.sampled_from([TRUE, FALSE]),
    ),
)


@st.composite
def diagonals(draw: st.DrawFn) -> str:
    """A bound of the named families, spelled in one of several ways."""
    n, w, c = draw(st.integers(-4, 6)), draw(st.integers(1, 6)), draw(st.integers(2, 5))
    return draw(
        st.sampled_from(
            [
                f"k <= q + ({n})",
                f"~(k > q + ({n}))",
                "k - q <= S - T",
                f"q - k < {w}",
                f"abs(q - k) <= {w}",
                f"k < {w}",
                f"k >= {w}",
                f"q // {c} == k // {c}",
                f"k // {c} <= q // {c}",
                f"q < {w}",
                f"k != q + ({n})",
            ]
        )
    )


@st.composite
def families(draw: st.DrawFn) -> str:
    parts = [f"({draw(diagonals())})" for _ in range(draw(st.integers(1, 4)))]
    text = parts[0]
    for part in parts[1:]:
        negated = draw(st.sampled_from(["", "", "~"]))
        text = f"({text} {draw(st.sampled_from('&|'))} {negated}{part})"
    return text


# ---------------------------------------------------------------- one form


@settings(max_examples=150, deadline=None)
@given(any_mask, sizes, sizes, st.integers(-5, 5), st.integers(0, 99), st.booleans())
def test_normal_form_keeps_every_element(
    expr: Expr, t: int, s: int, n: int, seed: int, known: bool
) -> None:
    reads = random_reads(t, s, seed)
    normal = normalise(expr, KINDS if known else ())
    assert torch.equal(grid(normal, t, s, reads, (n,)), grid(expr, t, s, reads, (n,))), str(normal)
    mask = classify(expr, NAMES, KINDS if known else ())
    assert mask.expr == normal
    assert mask == str(mask)
    whole = torch.ones(B, H, t, s, dtype=torch.bool)
    for part in mask.split():
        whole = whole & grid(part, t, s, reads, (n,))
    assert torch.equal(whole, grid(expr, t, s, reads, (n,)))


@settings(max_examples=100, deadline=None)
@given(any_mask)
def test_normal_form_is_boolean_and_readable_again(expr: Expr) -> None:
    normal = normalise(expr)
    assert str(parse(str(normal))) == str(normal)
    value = evaluate(
        normal,
        {"b": 0, "h": 0, "q": 1, "k": 2, "B": 2, "H": 1, "T": 4, "S": 5},
        random_reads(4, 5, 0),
        (1,),
    )
    assert value.dtype is torch.bool


# ---------------------------------------------------------------- tiles


def _truth(part: Tensor) -> Tile:
    if not part.any():
        return Tile.SKIP
    return Tile.FULL if part.all() else Tile.PARTIAL


def _tiles(mask: Mask, whole: Tensor, ints: Sequence[int], exact: bool) -> None:
    t, s = whole.shape[-2:]
    given_sizes = {"B": B, "H": H, "T": t, "S": s}
    for (r0, r1), (c0, c1) in itertools.product(
        [(0, t), (0, 1), (t - 1, t), (t // 2, t + 3)], [(0, s), (0, 2), (s // 2, s), (s - 1, s + 2)]
    ):
        truth = _truth(whole[..., r0:r1, c0:c1])
        found = mask.tile((r0, r1), (c0, c1), given_sizes, ints)
        assert found is truth or (not exact and found is Tile.PARTIAL), (mask, r0, r1, c0, c1)
    for rows in [(0, t), (t // 2, t // 2 + 1), (t - 1, t)]:
        low, high = mask.key_range(rows, given_sizes, ints)
        columns = whole[..., rows[0] : rows[1], :].flatten(0, -2).any(0).nonzero()
        if exact:
            expected = (int(columns.min()), int(columns.max()) + 1) if len(columns) else (0, 0)
            assert (low, high) == expected, (mask, rows)
        elif len(columns):
            assert low <= columns.min() and columns.max() < high


@settings(max_examples=150, deadline=None)
@given(families(), sizes, sizes)
def test_tiles_of_the_named_families_are_exact(text: str, t: int, s: int) -> None:
    mask = classify(parse(text))
    _tiles(mask, grid(mask.expr, t, s), (), exact=True)


@settings(max_examples=150, deadline=None)
@given(any_mask, sizes, sizes, st.integers(-5, 5), st.integers(0, 99))
def test_tiles_of_any_mask_are_sound(expr: Expr, t: int, s: int, n: int, seed: int) -> None:
    reads = random_reads(t, s, seed)
    _tiles(classify(expr, kinds=KINDS), grid(expr, t, s, reads, (n,)), (n,), exact=False)


@settings(max_examples=100, deadline=None)
@given(structural, sizes, sizes, st.integers(-5, 5))
def test_tiles_without_integers_stay_sound(expr: Expr, t: int, s: int, n: int) -> None:
    """What is not given may be anything."""
    _tiles(classify(expr), grid(expr, t, s, (), (n,)), (), exact=False)


def test_long_sequences_are_answered_from_the_bounds() -> None:
    sizes_ = {"B": 1, "H": 1, "T": 10**6, "S": 10**6}
    mask = classify(parse("(k <= q) & (q - k < 128) & t0[b, k]"))
    assert mask.key_range((500_000, 500_064), sizes_) == (499_873, 500_064)
    assert mask.tile((0, 64), (64, 128), sizes_) is Tile.SKIP
    assert mask.tile((64, 128), (32, 64), sizes_) is Tile.PARTIAL
    causal = classify(parse("k <= q"))
    assert causal.tile((64, 128), (0, 64), sizes_) is Tile.FULL
    decode = classify(parse("k <= q + n0"))
    assert decode.key_range((0, 1), {"T": 1, "S": 4096}, (100,)) == (0, 101)


def test_reads_are_never_decided() -> None:
    mask = classify(parse("t0[b, k] & (k <= q)"))
    assert any(isinstance(n, Read) for n in walk(mask.expr))
    assert mask.tile((4, 8), (0, 4), {"T": 8, "S": 8}) is Tile.PARTIAL
    assert mask.tile((0, 4), (4, 8), {"T": 8, "S": 8}) is Tile.SKIP
    assert not depends(mask.split()[1], "q")
