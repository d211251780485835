"""Masks, as people write them: how the condition is made and how it reaches the scores."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.conditions import (
    CONDITIONS,
    by_indices,
    counted,
    tril,
)
from zoo.entry import WIDTH, B, D, Entry, H, S, Site, T, constant, hidden, normal, site

SCALE = 1 / math.sqrt(D)
INF = float("-inf")


def dots(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * SCALE


def finish(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v


# ---------------------------------------------------------------- how it reaches the scores


def filled(s: Tensor, allowed: Tensor) -> Tensor:
    return s.masked_fill(~allowed, INF)


def filled_finite(s: Tensor, allowed: Tensor) -> Tensor:
    return s.masked_fill(allowed == 0, -1e9)


def chosen(s: Tensor, allowed: Tensor) -> Tensor:
    return torch.where(allowed, s, torch.finfo(s.dtype).min)


def chosen_tensor(s: Tensor, allowed: Tensor) -> Tensor:
    return torch.where(allowed, s, torch.full([], INF, dtype=s.dtype))


def added(s: Tensor, allowed: Tensor) -> Tensor:
    return s + torch.zeros_like(allowed, dtype=s.dtype).masked_fill(~allowed, INF)


def added_before(s: Tensor, allowed: Tensor) -> Tensor:
    return (
        torch.zeros(allowed.shape, dtype=s.dtype).masked_fill_(
            allowed.logical_not(), torch.finfo(s.dtype).min
        )
        + s
    )


def added_product(s: Tensor, allowed: Tensor) -> Tensor:
    return s + (1.0 - allowed.to(s.dtype)) * -10000.0


def multiplied(s: Tensor, allowed: Tensor) -> Tensor:
    bits = allowed.to(s.dtype)
    return s * bits - 1e4 * (1 - bits)


def factors(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Two masks of zeros and ones, multiplied."""
    t, n = q.shape[-2], k.shape[-2]
    allowed = torch.ones(t, n).tril(n - t) * keep[:, None, None, :].to(q.dtype)
    return finish(dots(q, k) + (1.0 - allowed) * torch.finfo(q.dtype).min, v)


def filled_then_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~tril(q.shape[-2]), float("-inf"))
    return (scores / math.sqrt(q.shape[-1])).softmax(-1) @ v


def filled_on_the_diagonal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = dots(q, k)
    scores.diagonal(dim1=-2, dim2=-1).fill_(float("-inf"))
    return finish(scores, v)


def filled_by_counting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores, rows = dots(q, k), torch.arange(1, 4)
    scores[:, :, rows, rows] = float("-inf")
    scores[:, :, rows, -rows] = float("-inf")  # from the end
    return finish(scores, v)


def filled_with_itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=q.dtype).triu(diagonal=1)
    mask.masked_fill_(mask.bool(), torch.finfo(q.dtype).min)
    return finish(dots(q, k) + mask, v)


def in_place(s: Tensor, allowed: Tensor) -> Tensor:
    return s.masked_fill_(~allowed, INF)


def through_a_view(s: Tensor, allowed: Tensor) -> Tensor:
    s.view(-1, *s.shape[-2:]).masked_fill_(~allowed, INF)
    return s


def through_a_slice(s: Tensor, allowed: Tensor) -> Tensor:
    for row in range(s.shape[-2]):
        s[:, :, row, row + 1 :] = INF
    return s


def by_setitem(s: Tensor, allowed: Tensor) -> Tensor:
    s[..., ~allowed] = INF
    return s


def added_in_place(s: Tensor, allowed: Tensor) -> Tensor:
    s += torch.triu(torch.full(s.shape[-2:], INF), diagonal=1)
    return s


def by_triu_of_scores(s: Tensor, allowed: Tensor) -> Tensor:
    return s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), INF)


PLACES = (
    filled, filled_finite, chosen, chosen_tensor, added, added_before, added_product,
    multiplied, in_place, through_a_view, by_setitem, added_in_place, by_triu_of_scores,
)  # fmt: skip

# -1e4 forbids nothing as surely as -inf does: it stays arithmetic
FINITE = (added_product, multiplied)


def _attend(
    condition: Callable[[int], Tensor], place: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return finish(place(dots(q, k), condition(q.shape[-2])), v)

    return attend


# ---------------------------------------------------------------- other rules


def _rule(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        rows, columns = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None, :]
        return finish(dots(q, k).masked_fill(~rule(rows, columns, *more), INF), v)

    return attend


def window(rows: Tensor, columns: Tensor) -> Tensor:
    return (columns <= rows) & (rows - columns < 4)


def both_sides(rows: Tensor, columns: Tensor) -> Tensor:
    return (rows - columns).abs() <= 2


def chunks(rows: Tensor, columns: Tensor) -> Tensor:
    return (rows // 3 == columns // 3) & (columns <= rows)


def dilated(rows: Tensor, columns: Tensor) -> Tensor:
    return (columns <= rows) & ((rows - columns) % 2 == 0)


def first_and_recent(rows: Tensor, columns: Tensor) -> Tensor:
    return (columns <= rows) & ((rows - columns < 3) | (columns < 2))


def fixed_prefix(rows: Tensor, columns: Tensor) -> Tensor:
    return (columns <= rows) | (columns < 5)


def prefix_of_each(rows: Tensor, columns: Tensor, lengths: Tensor) -> Tensor:
    return (columns <= rows) | (columns < lengths[:, None, None, None])


def documents(rows: Tensor, columns: Tensor, ids: Tensor) -> Tensor:
    return (ids[:, None, :, None] == ids[:, None, None, :]) & (columns <= rows)


def lengths_of_each(rows: Tensor, columns: Tensor, lengths: Tensor) -> Tensor:
    return columns < lengths.view(-1, 1, 1, 1)


def causal_and_padding(rows: Tensor, columns: Tensor, keep: Tensor) -> Tensor:
    return (columns <= rows) & keep[:, None, None, :]


def bert_padding(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
    extended = (1.0 - attention_mask[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    return finish(dots(q, k) + extended, v)


def padding_filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    hidden_keys = (mask == 0).view(mask.shape[0], 1, 1, -1).expand(-1, H, q.shape[2], -1)
    return finish(dots(q, k).masked_fill(hidden_keys, torch.finfo(q.dtype).min), v)


def two_masks(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    s = dots(q, k).masked_fill(~tril(q.shape[2]), INF)
    return finish(s.masked_fill(~keep[:, None, None, :], torch.finfo(s.dtype).min), v)


def joined_masks(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    t = q.shape[2]
    causal = torch.triu(torch.full((t, t), torch.finfo(q.dtype).min, dtype=q.dtype), diagonal=1)
    joined = causal[None, None].expand(keep.shape[0], 1, t, t).clone()
    joined = joined.masked_fill(
        (joined + keep[:, None, None, :] * 1.0) == 0, torch.finfo(q.dtype).min
    )
    return finish(dots(q, k) + joined, v)


def offset(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t, s = q.shape[-2], k.shape[-2]
    return finish(
        dots(q, k).masked_fill(~torch.ones(t, s, dtype=torch.bool).tril(diagonal=s - t), INF), v
    )


def top_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return finish(dots(q, k).masked_fill(torch.ones(q.shape[-2], k.shape[-2]).tril() == 0, INF), v)


def given_bool(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return finish(dots(q, k).masked_fill(~mask, INF), v)


def given_float(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return finish(mask + dots(q, k), v)


def empty_rows_cleared(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    s = dots(q, k).masked_fill(~keep[:, None, None, :] | ~tril(q.shape[2]), INF)
    return s.softmax(-1).nan_to_num(0.0) @ v


def first_key_forbidden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = dots(q, k)
    s[..., 0] = -1e4
    return finish(s, v)


def weights_masked_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = dots(q, k)
    e = torch.exp(s - s.amax(-1, keepdim=True)) * tril(q.shape[2])
    return (e / e.sum(-1, keepdim=True)) @ v


def sdpa_empty_rows(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=keep[:, None, None, :] & tril(q.shape[2])
    )


def pixels(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """The keys are the pixels of an image, row by row, and so is their mask."""
    grid = seen.expand(q.shape[0], *seen.shape[-2:])
    return finish(dots(q, k) + (~grid).flatten(1)[:, None, None].to(q.dtype) * -1e9, v)


class Buffer(nn.Module):
    """The condition is a buffer, larger than the sequence."""

    def __init__(self, kind: type | None = None) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t, s = q.shape[-2], k.shape[-2]
        return finish(dots(q, k).masked_fill(self.bias[:, :, s - t : s, :s] == 0, INF), v)


def _keep(*counts: int) -> Callable[[torch.Generator], Tensor]:
    return constant(torch.arange(T)[None, :] < torch.tensor(counts)[:, None])


def _left(*counts: int) -> Callable[[torch.Generator], Tensor]:
    return constant(torch.arange(T)[None, :] >= torch.tensor(counts)[:, None])


def _random_mask(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: (torch.rand(*shape, generator=g) < 0.6) | (torch.arange(shape[-1]) == 0)


LENGTHS = constant(torch.tensor([T, 5]))
IDS = constant(torch.tensor([[0] * 4 + [1] * 5 + [2] * 2, [0] * 7 + [1] * 4]))
CROSS = normal(B, S, WIDTH)
LONGER = normal(B, 17, WIDTH)

ENTRIES: tuple[Entry, ...] = (
    *(site(f"causal_{c.__name__}", _attend(c, filled), mask="causal") for c in CONDITIONS),
    *(
        site(f"causal_{p.__name__}", _attend(tril, p), mask="none" if p in FINITE else "causal")
        for p in PLACES
    ),
    site(
        "causal_through_a_slice",
        _attend(tril, through_a_slice),
        mask=None,
        refused=("attention.scores_twice",),
        why="row after row is written: no expression over all rows",
    ),
    site("causal_counted", _attend(counted, filled), mask=None),
    site("causal_by_indices", _attend(by_indices, filled), mask="causal"),
    site("causal_buffer", Buffer, mask=None),
    site("window", _rule(window), mask="causal & window(4)"),
    site("both_sides", _rule(both_sides), mask=None),
    site("chunks", _rule(chunks), mask="causal"),
    site("dilated", _rule(dilated), mask="causal"),
    site("first_and_recent", _rule(first_and_recent), mask="causal"),
    site("fixed_prefix", _rule(fixed_prefix), mask="causal | prefix(5)"),
    site(
        "prefix_of_each",
        _rule(prefix_of_each),
        constant(torch.tensor([3, 6])),
        mask="causal | prefix(",
    ),
    site("documents", _rule(documents), IDS, mask="causal & documents("),
    site("lengths", _rule(lengths_of_each), LENGTHS, mask="prefix("),
    site("causal_and_padding", _rule(causal_and_padding), _keep(T, 6), mask="causal & padding("),
    site(
        "bert_padding",
        bert_padding,
        constant((torch.arange(T) < torch.tensor([[T], [6]])).long()),
        # an integer could be more than 0 or 1: what is added stays arithmetic
        mask="none",
    ),
    site(
        "padding_filled",
        padding_filled,
        constant((torch.arange(T) < torch.tensor([[T], [6]])).int()),
        mask="padding(",
    ),
    # -inf and finfo.min in one row without keys are neither uniform nor NaN: both stay arithmetic
    site("two_masks", two_masks, _keep(T, 6), mask="none"),
    site(
        "pixels",
        pixels,
        normal(B, 12, WIDTH),
        constant(torch.arange(12).view(3, 4) < torch.tensor([12, 7])[:, None, None]),
        cross=True,
        mask=None,
    ),
    site("filled_on_the_diagonal", filled_on_the_diagonal, mask="k != q"),
    site("filled_by_counting", filled_by_counting, mask=None),
    site("filled_with_itself", filled_with_itself, mask="causal"),
    site("filled_then_scaled", filled_then_scaled, mask="causal"),
    site("factors", factors, _keep(T, 6), mask="causal & padding("),
    site("joined_masks", joined_masks, _keep(T, 6), mask="causal & padding("),
    site("offset", offset, LONGER, cross=True, mask="causal(+6)"),
    site("top_left", top_left, LONGER, cross=True, mask="causal"),
    site("offset_negative", offset, CROSS, cross=True, mask=None),
    site("given_bool", given_bool, _random_mask(T, T), mask="tensor("),
    site("given_bool_of_each_head", given_bool, _random_mask(B, H, T, T), mask="tensor("),
    site("given_float", given_float, normal(T, T, grad=False), mask=None),
    site("given_float_gradient", given_float, normal(1, H, T, T), mask=None),
    site("empty_rows_nan", _rule(causal_and_padding), _left(0, 3), mask="causal & padding("),
    site("empty_rows_uniform", two_masks, _left(0, 3), mask=None),
    site("empty_rows_added", joined_masks, _left(0, 3), mask=None),
    site(
        "empty_rows_cleared",
        empty_rows_cleared,
        _left(0, 3),
        mask="causal & padding(",
        training=False,
    ),
    site("empty_rows_sdpa", sdpa_empty_rows, _left(0, 3), mask="causal & padding("),
    site("first_key_forbidden", first_key_forbidden, mask=None),
    site(
        "weights_masked_by_hand",
        weights_masked_by_hand,
        mask=None,
        refused=("not_attention.no_softmax",),
        why="the exponentials are masked, not the scores",
    ),
    Entry(
        "buffer_and_cross",
        lambda: Site(Buffer(), cross=True),
        hidden(normal(B, 13, WIDTH)),
        mask=None,
    ),
)
