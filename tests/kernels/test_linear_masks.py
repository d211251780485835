"""Which keys count for linear attention, and what a mask may not say."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Largest

from attn_compiler.errors import UnsupportedCall
from attn_compiler.ir.score import Program
from attn_compiler.kernels.linear_masks import counted, plain_mask, plain_score

B, T, S = 2, 5, 11
LATE = "k <= q + (S - T)"
VALID = torch.arange(S) >= torch.tensor([[0], [3]])
ROWS = torch.arange(S - T, S)[:, None]
SEEN = (torch.arange(S) <= ROWS) & VALID[:, None]


def text(mask: str, score: str = "dot") -> str:
    return f"score: {score}; mask: {mask}; empty: any"


@pytest.mark.parametrize(
    ("mask", "rows", "keys"), [(LATE, T, S), ("k <= q", S, S), ("1 == 1", 1, S)]
)
def test_all_keys_count(mask: str, rows: int, keys: int) -> None:
    assert counted(text(mask), [], [], (B, rows, keys)) is None


@pytest.mark.parametrize(
    ("mask", "read"),
    [(f"({LATE}) & t0[b, k]", VALID), ("t0[b, 0, q, k]", SEEN[:, None]), ("t0[b, q, k]", SEEN)],
)
def test_padding_is_found(mask: str, read: torch.Tensor) -> None:
    found = counted(text(mask), [read], [], (B, T, S))
    assert found is not None and torch.equal(found, VALID)


def test_numbers_that_are_added_may_forbid() -> None:
    added = torch.where(SEEN, 0.0, -1e9)[:, None]
    program = text("t0[b, 0, q, k] > -9000", "dot + t0[b, 0, q, k]")
    found = counted(program, [added], [], (B, T, S))
    assert found is not None and torch.equal(found, VALID)
    with pytest.raises(UnsupportedCall, match="adds nothing"):
        counted(program, [added + 0.5], [], (B, T, S))


def test_rows_of_padding_may_see_anything() -> None:
    valid = VALID.clone()
    valid[1, :8] = False  # two rows of padding
    seen = (torch.arange(S) <= ROWS) & valid[:, None]
    found = counted(text("t0[b, q, k]"), [seen | ~seen.any(-1, keepdim=True)], [], (B, T, S))
    assert found is not None and torch.equal(found, valid)


@pytest.mark.parametrize(
    ("mask", "read", "rows"),
    [
        ("t0[b, q, k]", SEEN & (torch.arange(S) > ROWS - 3), T),  # a window
        ("t0[b, q, k]", torch.ones_like(SEEN), T),  # both directions
        ("t0[b, k]", VALID, T),
        ("k <= q", VALID, T),  # from the first key on, and there are earlier ones
    ],
)
def test_other_masks_are_refused_when_they_are_seen(
    mask: str, read: torch.Tensor, rows: int
) -> None:
    with pytest.raises(UnsupportedCall, match="up to its own"):
        counted(text(mask), [read], [], (B, rows, S))


def test_a_padding_by_keys_is_read_in_linear_memory() -> None:
    length = 512
    valid = torch.ones(B, length, dtype=torch.bool)
    with Largest() as seen:
        counted(text("(k <= q) & t0[b, k]"), [valid], [], (B, length, length))
    assert seen.elements <= B * length


@pytest.mark.parametrize(
    ("program", "score", "mask"),
    [
        (text("k <= q"), True, True),
        (text(f"({LATE}) & t0[b, k]", "dot + t1[b, 0, q, k]"), True, True),
        (text("k <= q", "dot - t0[h] * float(q - k)"), False, True),
        (text("k <= q", "dot + t0[0, h, q, k]"), False, True),
        (text("k <= q", "2.0 * tanh(dot / 2.0)"), False, True),
        (text("(k <= q) & (k > q - 3)"), True, False),
        (text("k <= q + 1"), True, False),
        (text("t0[b, h, q, k]"), True, False),
        (text("(k <= q) & (t0[b, q] == t0[b, k])"), True, False),
    ],
)
def test_what_can_be_told_before(program: str, score: bool, mask: bool) -> None:
    found = Program.parse(program)
    assert plain_score(found) is score and plain_mask(found.mask) is mask
