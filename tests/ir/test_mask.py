"""Masks: one truth, one form; names; tiles held against the whole grid."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import pytest
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
    Causal,
    Chunked,
    Documents,
    Either,
    Local,
    Mask,
    Other,
    Padding,
    Prefix,
    Tile,
    Window,
    classify,
    normalise,
)
from attn_compiler.ir.mask import (
    Tensor as TensorTerm,
)
from attn_compiler.ir.truth import truth

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


EQUAL = {
    "k <= q": [
        "q >= k",
        "~(k > q)",
        "~(q < k)",
        "k - q <= 0",
        "q - k + 0 >= 0",
        "k < q + 1",
        "-q <= -k",
        "2 * k <= 2 * q + 1",
        "where(k > q, False, True)",
        "where(k <= q, True, False)",
        "where(k > q, -inf, 0.0) == 0",
        "where(k > q, -inf, 0.0) > -inf",
        "where(k > q, 1, 0) == 0",
        "int(k > q) == 0",
        "1 - int(k > q)",
        "bool(int(k <= q))",
        "float(k) <= float(q)",
        "True & (k <= q) & (k <= q)",
        "(k <= q) | False",
        "(k <= q) & (k >= 0) & (k < S)",
        "(k <= q) & (k <= q + 5)",
        "(k <= q) | (k <= q - 5)",
        "(k <= q) & (k <= S + 3)",
        "(k > q) ^ True",
        "(k <= q) == True",
        "min(k, q) == k",
        "max(q - k, 0) == q - k",
        "max(k - q, 0) <= 0",
        "relu(k - q) == 0",
        "~((k > q) | False)",
        "(k <= q) & ((k <= q) | t0[b, k])",
        "(k <= q) | ((k <= q) & t0[b, k])",
        "((k <= q) & t0[b, k]) | ((k <= q) & ~t0[b, k])",
        "where(t0[b, k], k <= q, q >= k)",
    ],
    "k <= q + S - T": [
        "k <= q + (S - T)",
        "k - (S - T) <= q",
        "q + S - T - k >= 0",
        "k - S < q - T + 1",
    ],
    "k >= q - 127": ["(q - k) < 128", "k > q - 128", "q - 127 <= k", "~(q - k >= 128)"],
    "(k <= q + 64) & (k >= q - 64)": [
        "abs(q - k) <= 64",
        "abs(k - q) < 65",
        "max(q - k, k - q) <= 64",
        "~(abs(q - k) > 64)",
    ],
    "k // 128 == q // 128": [
        "q // 128 == k // 128",
        "floor(q / 128) == floor(k / 128)",
        "int(trunc(q / 128)) == int(trunc(k / 128))",
        "k - k % 128 == q - q % 128",
        "(k // 128) * 128 == (q // 128) * 128",
        "~(q // 128 != k // 128)",
    ],
    "k <= 8 * (q // 8) + 7": ["k // 8 <= q // 8", "q // 8 >= k // 8", "k < 8 * (q // 8 + 1)"],
    "t0[b, k] != 0": [
        "t0[b, k]",
        "bool(t0[b, k])",
        "~~t0[b, k]",
        "~(t0[b, k] == 0)",
        "0 != t0[b, k + 0]",
        "t0[b, k] != 0.0",
        "t0[b, k] != False",
        "where(t0[b, k], True, False)",
        "where(t0[b, k] == 0, -inf, 0.0) == 0.0",
    ],
    "t0[b, k] == 1": ["1 - t0[b, k] == 0", "~bool(1.0 - t0[b, k])", "t0[b, k] == 1.0"],
    "t0[b, k] == t0[b, q]": ["t0[b, q] == t0[b, k]", "t0[b, q] - t0[b, k] == 0"],
    "(k <= q) & (t0[b, k] != 0)": [
        "t0[b, k] & (q >= k)",
        "where(t0[b, k], where(k > q, False, True), False)",
        "~(~t0[b, k] | (k > q))",
        "(k <= q) & ((k > q) | t0[b, k])",
        "int(k <= q) * int(bool(t0[b, k])) == 1",
        "min(k <= q, bool(t0[b, k]))",
    ],
    "(k <= 4) | (k <= q)": ["(k <= q) | (k < 5)", "~((k > q) & (k >= 5))", "k <= max(q, 4)"],
    "(k <= q) & ((t0[b, k] != 0) | (t1[b, k] != 0))": [
        "((k <= q) & t0[b, k]) | ((k <= q) & t1[b, k])",
    ],
    "k == q": ["(k <= q) & (k >= q)", "q - k == 0", "abs(q - k) <= 0", "~(q != k)", "abs(q-k) < 1"],
    "True": ["k >= 0", "q < T", "k <= S - 1", "k < S + T", "(k > q) | (k <= q)", "q >= k - S + 1"],
    "False": [
        "k < 0",
        "k >= S",
        "(k > q) & (k < q)",
        "(k <= 3) & (k >= 5)",
        "q - T >= 0",
        "(k <= 0) & (k != 0)",
        "k - where(k < 1, -1, k - 1) != 1",
    ],
}


@pytest.mark.parametrize(
    ("normal", "spelling"), [(n, s) for n, spellings in EQUAL.items() for s in (n, *spellings)]
)
def test_equal_spellings_have_one_text(normal: str, spelling: str) -> None:
    assert str(normalise(parse(spelling))) == normal


@pytest.mark.parametrize(
    ("kinds", "spelling", "normal"),
    [
        ("", "~(k > t0[b, q])", "~(k > t0[b, q])"),  # t0 may hold NaN
        ("int", "~(k > t0[b, q])", "k <= t0[b, q]"),
        ("int", "t0[b, q] * t0[b, k]", "(t0[b, k] != 0) & (t0[b, q] != 0)"),
        ("bool", "t0[b, k] == 1", "t0[b, k]"),
        ("bool", "t0[b, k] == False", "~t0[b, k]"),
        ("bool", "1 - int(t0[b, k]) != 0", "~t0[b, k]"),
        ("bool", "t0[b, k] + t0[b, q]", "t0[b, k] | t0[b, q]"),
        ("int", "t0[b, k] < 5", "t0[b, k] <= 4"),
        ("float", "t0[b, k] < 5", "t0[b, k] < 5"),
        ("float", "~(t0[b, k] < 5)", "~(t0[b, k] < 5)"),
    ],
)
def test_the_kind_of_a_tensor_decides_what_may_be_said(
    kinds: str, spelling: str, normal: str
) -> None:
    assert str(normalise(parse(spelling), (kinds,))) == normal


def test_a_usual_mask_takes_about_a_millisecond() -> None:
    expr = parse("where(~((k > q + (S - T)) | (q + S - T - k >= 128)), t0[b, k] != 0, False)")
    truth(expr)
    spent = []
    for _ in range(20):
        start = time.perf_counter()
        truth(expr)
        spent.append(time.perf_counter() - start)
    assert min(spent) < 3e-3  # measured 0.5e-3 alone; other processes may share the machine


# ---------------------------------------------------------------- names

NAMED = [
    ("k <= q", "causal"),
    ("k <= q + 4", "causal(+4)"),
    ("k <= q - 1", "causal(-1)"),
    ("k <= q + (S - T)", "causal(S - T)"),
    ("k <= q + n0", "causal(n0)"),
    ("(k <= q) & (q - k < 128)", "causal & window(128)"),
    ("(q - k < n1) & (k <= q)", "causal & window(n1)"),
    ("(k <= q + S - T) & (q + S - T - k < 128)", "causal(S - T) & window(128)"),
    ("(k <= q + 4) & (k > q - 10)", "causal(+4) & window(14)"),
    ("(k <= q + n0) & (k > q + n0 - 9)", "causal(n0) & window(9)"),
    ("abs(q - k) <= 64", "local(64)"),
    ("abs(q - k) <= n0", "local(n0)"),
    ("abs(q + S - T - k) <= 64", "local(64, S - T)"),
    ("q // 128 == k // 128", "chunked(128)"),
    ("(k <= q + n0) & ((q + n0) // 128 == k // 128)", "causal(n0) & chunked(128)"),
    ("(k <= q) & ((q + S - T) // 8 == k // 8)", "causal & chunked(8, S - T)"),
    ("(k <= q + 16) & ((q + 16) // 8 == k // 8)", "causal(+16) & chunked(8)"),
    ("k < 5", "prefix(5)"),
    ("k < n0", "prefix(n0)"),
    ("k < t1[b]", "prefix(ids[b])"),
    ("(k <= q) | (k < 5)", "causal | prefix(5)"),
    ("((k < 5) | (k <= q)) & t0[b, k]", "(causal | prefix(5)) & padding(attention_mask)"),
    ("t0[b, k]", "padding(attention_mask)"),
    ("t0[k] != 0", "padding(attention_mask)"),
    ("t0[b, 0, 0, k + n0] == 1", "padding(attention_mask)"),
    ("~t0[b, k]", "padding(~attention_mask)"),
    ("t0[b, k] > 0", "padding(attention_mask > 0)"),
    ("t1[b, k] != 50256", "padding(ids != 50256)"),
    ("t0[b, k] & (k <= q)", "causal & padding(attention_mask)"),
    ("t1[b, q] == t1[b, k]", "documents(ids)"),
    ("(k <= q) & (t1[b, q + S - T] == t1[b, k])", "causal & documents(ids)"),
    ("t0[b, q] == t1[b, k]", "documents(attention_mask, ids)"),
    ("t2[b, h, q, k]", "tensor(bias)"),
    ("t2[0, 0, q + n0, k] != 0", "tensor(bias)"),
    ("~t2[q, k]", "tensor(~bias)"),
    ("t2[q, k] >= 0.5", "tensor(bias >= 0.5)"),
    ("True", "none"),
    ("t9[b, k]", "padding(t9)"),
    ("k <= t0[q]", "k <= attention_mask[q]"),
    ("(k <= q) & (k >= t1[b])", "causal & (k >= ids[b])"),
    ("(k <= q) & t0[b, q]", "causal & (attention_mask[b, q] != 0)"),
    ("k != q", "k != q"),
    ("k >= q", "k >= q"),
    ("(k <= q) & (k <= q + S - T)", "causal & causal(S - T)"),
    ("~((k <= q) & t0[b, k])", "padding(~attention_mask) | (k >= q + 1)"),
]


@pytest.mark.parametrize(("spelling", "name"), NAMED)
def test_names(spelling: str, name: str) -> None:
    mask = classify(parse(spelling), NAMES)
    assert str(mask) == name
    assert mask == name
    assert mask == spelling
    assert mask == classify(mask.expr, NAMES)


def test_strings_compare_by_meaning_of_the_grammar() -> None:
    mask = classify(parse("(k <= q + 4) & (q - k < 28) & ~t0[b, k]"), NAMES)
    assert mask == "causal(+4) & window(32) & padding(~attention_mask)"
    assert mask == "padding( ~attention_mask )&window(32) & causal(4)"
    assert mask == "causal(+4) & window(32) & padding(attention_mask)"  # which keys, not how
    assert mask == "(k - 4 <= q) & (q - k < 28) & (t0[b, k] == 0)"
    for wrong in ("causal(+4)", "causal(+4) | window(32)", "none", "", "((", "padding(ids)"):
        assert mask != wrong
    assert mask != 3
    either = classify(parse("(k <= q) | (k < 5)"))
    assert either == "prefix(5) | causal"
    assert either != "prefix(5) & causal"
    assert len({either, classify(parse("~((k > q) & (k >= 5))"))}) == 1


def test_terms_carry_their_numbers() -> None:
    text = "(k <= q + S - T) & (q + S - T - k < 9) & t0[b, k] & (t1[b, q] == t1[b, k])"
    causal, window, padding, documents = classify(parse(text)).terms
    assert isinstance(causal, Causal)
    assert isinstance(window, Window)
    assert str(causal.offset) == str(window.offset) == "S - T"
    assert window.width == Const(9)
    assert isinstance(padding, Padding)
    assert padding.slot == 0
    assert isinstance(documents, Documents)
    assert documents.slots == (1,)
    kinds = [
        ("abs(q - k) <= 3", Local),
        ("q // 4 == k // 4", Chunked),
        ("k < 3", Prefix),
        ("t0[q, k]", TensorTerm),
        ("(k < 3) | (k <= q)", Either),
        ("k != 3", Other),
    ]
    for spelling, kind in kinds:
        (term,) = classify(parse(spelling)).terms
        assert type(term) is kind


def test_parts_for_kernels() -> None:
    mask = classify(
        parse("(k <= q + S - T) & (k < 9) & t0[b, k] & (t1[b, q] == t1[b, k]) & t2[b, h, k]")
    )
    assert [str(p) for p in mask.split()] == [
        "(k <= 8) & (k <= q + S - T)",
        "(t0[b, k] != 0) & (t2[b, h, k] != 0)",
        "t1[b, k] == t1[b, q]",
    ]
    assert str(mask.causal_offset()) == "S - T"
    assert [str(p) for p in mask.padding()] == ["t0[b, k] != 0"]
    assert str(mask.rest) == "(k <= 8) & (t1[b, k] == t1[b, q]) & (t2[b, h, k] != 0)"
    less = mask.without(*(t for t in mask.terms if not isinstance(t, Causal)))
    assert less == "causal(S - T)"
    nothing = less.without(*less.terms)
    assert nothing == "none"
    assert nothing.split() == (TRUE, TRUE, TRUE)
    assert nothing.causal_offset() is None
    assert nothing.rest == TRUE


def test_a_false_mask_shows_no_key() -> None:
    mask = classify(parse("(k > q) & (k <= q)"))
    assert mask.expr == FALSE
    assert str(mask) == "False"
    assert mask.tile((0, 4), (0, 4), {"T": 4, "S": 4}) is Tile.SKIP
    assert mask.key_range((0, 4), {"T": 4, "S": 4}) == (0, 0)


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
