"""What gated attention in chunks must keep to, whatever computes it.

Source: Transformer Quality in Linear Time (arXiv 2202.10447), and the worked example of a causal
and a bidirectional layer of four tokens, computed by hand.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from gau_cases import TENSORS, Case, mixed
from torch import Tensor

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
PREFIX_MODES = ("rowcount", "chunk", "fixed(5)")


def cut(given: dict[str, Any], stop: int, start: int = 0) -> dict[str, Any]:
    """The same of some tokens."""
    return {
        n: x if x is None or n in ("bias", "seed") else x[:, start:stop] for n, x in given.items()
    }


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("causal", "chunk", "expected"),
    [
        (True, 2, (0.25, 3, -2, 3)),
        (False, 2, (2.25, 4.5, 8, 15)),
        (True, 4, (0.0625, 0.75, 0, 1.875)),
    ],
)
def test_four_tokens(causal: bool, chunk: int, expected: tuple[float, ...]) -> None:
    case = Case(1, 4, 1, 1, chunk, causal, 1.0, "chunk", inside=True)
    columns = {
        "q": (1, 2, -1, 1), "k": (1, 1, 2, -1), "q_lin": (1, 1, 2, 3), "k_lin": (1, -1, 1, 1),
        "v": (1, 2, 3, 4), "gate": (1, 1, 2, 2),
    }  # fmt: skip
    given: dict[str, Any] = dict.fromkeys(TENSORS)
    given |= {n: torch.tensor(c, dtype=torch.float64).view(1, 4, 1) for n, c in columns.items()}
    assert torch.allclose(mixed(case, given).flatten(), torch.tensor(expected).double(), **TIGHT)


# ---------------------------------------------------------------- the past does not change


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 8, 32, None])
@pytest.mark.parametrize("mode", PREFIX_MODES)
def test_a_prefix_has_the_rows_of_the_whole(mode: str, chunk: int | None, inside: bool) -> None:
    if mode == "chunk" and chunk is None:
        return
    case = Case(chunk=chunk, scale_mode=mode, inside=inside, padded=True, packed=True)
    given = case.drawn()
    whole = mixed(case, given)
    for length in range(1, case.length):
        assert torch.allclose(mixed(case, cut(given, length)), whole[:, :length], **TIGHT)


@pytest.mark.parametrize("chunk", [4, None])
@pytest.mark.parametrize("mode", ["seqlen", "valid"])
def test_divisors_that_know_the_length_change_the_past(mode: str, chunk: int | None) -> None:
    case = Case(chunk=chunk, scale_mode=mode)
    given = case.drawn()
    assert not torch.allclose(mixed(case, cut(given, 21)), mixed(case, given)[:, :21], rtol=1e-3)


@pytest.mark.parametrize("place", [7, 8, 9])
def test_what_comes_later_is_not_seen(place: int) -> None:
    """The own chunk is not in the state: with it, its later tokens would be seen."""
    case = Case(chunk=4)
    given = case.drawn()
    other = {n: None if x is None else x.clone() for n, x in given.items()}
    for name in ("q", "k", "v", "q_lin", "k_lin", "gate"):
        other[name][:, place:] += 1
    before, after = mixed(case, given), mixed(case, other)
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.isclose(before[:, place:], after[:, place:]).all(-1).any()


# ---------------------------------------------------------------- chunks and all pairs


@pytest.mark.parametrize("chunk", [23, 24, 99])
def test_a_chunk_of_everything_is_all_pairs_if_causal(chunk: int) -> None:
    case = Case(chunk=chunk, padded=True, packed=True)
    given = case.drawn()
    pairs = mixed(case.but(chunk=None), given | {"q_lin": None, "k_lin": None})
    assert torch.allclose(mixed(case, given), pairs, **TIGHT)
    both = case.but(causal=False)
    assert not torch.allclose(
        mixed(both, given),
        mixed(both.but(chunk=None), given | {"q_lin": None, "k_lin": None}),
        rtol=1e-3,
    )


@pytest.mark.parametrize("chunk", [1, 2, 4, 8])
def test_the_linear_part_sees_the_chunks_before(chunk: int) -> None:
    case = Case(chunk=chunk, scale_mode="fixed(1)", gated=False, biased=False)
    given = case.drawn()
    given |= {"q": torch.zeros_like(given["q"])}
    number = torch.arange(case.length) // chunk
    mask = (number[:, None] > number).double()
    exact = (given["q_lin"] @ given["k_lin"].mT * mask) @ given["v"]
    assert torch.allclose(mixed(case, given), exact, **TIGHT)


@pytest.mark.parametrize("chunk", [4, None])
def test_squares_of_relu_are_homogeneous(chunk: int | None) -> None:
    case = Case(chunk=chunk, biased=False)
    given = case.drawn()
    no_lin = {} if chunk is None else {"q_lin": torch.zeros_like(given["q"])}
    near = mixed(case, given | no_lin)
    far = mixed(case, given) - near
    more = {n: given[n] * 3 for n in ("q", "q_lin") if given[n] is not None}
    assert torch.allclose(mixed(case, given | more), 9 * near + 3 * far, **TIGHT)


def test_a_scale_inside_is_its_square_outside() -> None:
    """relu(a S + b)^2 = a^2 relu(S + b / a)^2."""
    case = Case(chunk=None, scale=1.0, scale_mode="fixed(7)", inside=True)
    given = case.drawn()
    outside = case.but(scale_mode="fixed(49)", inside=False)
    exact = mixed(outside, given | {"bias": 7 * given["bias"]})
    assert torch.allclose(mixed(case, given), exact, **TIGHT)


# ---------------------------------------------------------------- padding and documents


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 19])
def test_padding_at_the_end_changes_nothing(length: int, causal: bool) -> None:
    case = Case(causal=causal)
    given = case.drawn()
    given["valid"] = (torch.arange(23) < length).expand(2, -1)
    padded = mixed(case, given)
    alone = mixed(case, cut(given, length) | {"valid": None})
    assert torch.allclose(padded[:, :length], alone, **TIGHT)
    assert not padded[:, length:].any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk", [4, None])
def test_documents_are_sequences_of_their_own(chunk: int | None, causal: bool) -> None:
    """In chunks, those that begin where a chunk does; without, all."""
    case = Case(chunk=chunk, causal=causal)
    given, borders = case.drawn(), (0, 8, 12, 23) if chunk else (0, 1, 9, 23)
    numbers = torch.tensor(borders[:-1]).repeat_interleave(torch.tensor(borders).diff())
    packed = mixed(case, given | {"documents": numbers.expand(2, -1)})
    for start, stop in pairwise(borders):
        alone = mixed(case, cut(given, stop, start))
        assert torch.allclose(packed[:, start:stop], alone, **TIGHT)


@pytest.mark.parametrize("causal", [True, False])
def test_documents_do_not_see_each_other(causal: bool) -> None:
    """Borders inside chunks, one that a number returns after, and one of a single token."""
    case = Case(causal=causal)
    given = case.drawn()
    numbers = torch.tensor([3] * 6 + [5] + [3] * 11 + [4] * 5).expand(2, -1)
    given["documents"] = numbers
    before = mixed(case, given)
    for inside in (slice(0, 6), slice(6, 7), slice(7, 18), slice(18, 23)):
        other = {n: x.clone() if isinstance(x, Tensor) else x for n, x in given.items()}
        for name in ("k", "v", "k_lin"):
            other[name][:, inside] += 1
        changed = (mixed(case, other) != before).any(-1).any(0)
        assert not changed[: inside.start].any() and not changed[inside.stop :].any()
        assert changed[inside].any()


def test_a_sequence_of_padding_is_zero() -> None:
    case = Case(padded=True)  # the last sequence has no valid token
    for causal in (True, False):
        assert not mixed(case.but(causal=causal), case.drawn())[-1].any()
