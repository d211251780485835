"""Every hand-written attention: numbers, gradients, what was found."""

from __future__ import annotations

from typing import Any

import claims
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attn_compiler as ac
from zoo import written_masks, written_scores
from zoo.entry import WIDTH, B, D, Entry, H, Site, T, site
from zoo.handwritten import ENTRIES, Outcome, check, expect, low_precision
from zoo.library import compiled
from zoo.written_cores import SCALE

NAMES = list(ENTRIES)
TRAINED = [name for name in NAMES if ENTRIES[name].training]
# spellings whose casts, masks or constants depend on the type
TYPED = (
    "in_float32", "cast_before", "everything_in_float32", "causal_chosen",
    "causal_added_before", "bert_padding", "scale_in_a_tensor", "buckets",
    "alibi_of_real_tokens", "sinks", "x_transformers_mask", "expanded", "sdpa_groups",
)  # fmt: skip
# symbolic sizes: these always, all others in the slow tier
DYNAMIC = frozenset((
    "plain", "time_first", "batched_heads", "expanded", "grouped", "over_time_major",
    "scale_given", "causal_compared", "causal_through_a_view", "window", "documents",
    "buckets", "alibi", "sinks", "mingpt", "x_transformers_mask", "multihead_causal_padding",
    "encoder_layer", "sdpa_causal", "offset", "offset_negative", "appended_prefill",
    "checkpointed", "branch", "flex_causal_blocks",
))  # fmt: skip


def alternately(names: list[str]) -> list[Any]:
    """Every second name now, the others in the slow tier."""
    return [pytest.param(n, marks=pytest.mark.slow if i % 2 else ()) for i, n in enumerate(names)]


@pytest.mark.parametrize("name", NAMES)
def test_inference(name: str) -> None:
    expect(ENTRIES[name], check(ENTRIES[name]).report)


@pytest.mark.parametrize("name", alternately(TRAINED))
def test_training(name: str) -> None:
    expect(ENTRIES[name], check(ENTRIES[name], training=True).report)


@pytest.mark.parametrize(
    "name", [n if n in DYNAMIC else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_dynamic_shapes(name: str) -> None:
    expect(ENTRIES[name], check(ENTRIES[name], dynamic=True).report, dynamic=True)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float16, torch.float64)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", TYPED)
def test_types(name: str, dtype: torch.dtype) -> None:
    entry: Entry = low_precision(ENTRIES[name], dtype)
    expect(entry, _both(entry).report)


def _both(entry: Entry) -> Outcome:
    check(entry)
    return check(entry, training=True)


# ---------------------------------------------------------------- dropout


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT * SCALE).softmax(-1), 0.4, training=True) @ v


def dropped_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)


@pytest.mark.parametrize("attend", [dropped, dropped_sdpa])
def test_dropout_of_the_probabilities(attend: object) -> None:
    """With the identity for values the output shows each probability: scaled up, or zero."""
    torch.manual_seed(0)
    q, k = torch.randn(40, H, T, T), torch.randn(40, H, T, T)
    v = torch.eye(T).expand(40, H, T, T)
    fast = compiled(_Bare(attend), dynamic=False)
    with torch.no_grad():
        out = fast(q, k, v)
    full = (q @ k.mT * (SCALE if attend is dropped else T**-0.5)).softmax(-1)
    kept = out != 0
    assert abs(kept.double().mean().item() - 0.6) < 0.015
    assert torch.allclose(out[kept], full[kept] / 0.6, rtol=1e-5)
    assert not torch.equal(fast(q, k, v) != 0, kept), "the same elements were dropped twice"


class _Bare(torch.nn.Module):
    def __init__(self, attend: object) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v)  # type: ignore[operator,no-any-return]


# ---------------------------------------------------------------- empty rows, and second use


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("empty_rows")])
def test_rows_without_keys_are_among_the_inputs(name: str) -> None:
    """The original gives NaN, zero, or a mean over keys there; so do we, says `test_inference`."""
    keep = ENTRIES[name].arguments()[1]
    assert not (keep[:, None, :] & torch.ones(T, T).tril().bool()).any(-1).all()


def test_one_compilation_serves_two_masks() -> None:
    """A mask handed in may hide every key of a row in one call and none in the next."""
    entry = site("", written_masks.given_bool, mask=None)
    module = Site(written_masks.given_bool)
    fast = compiled(module, dynamic=False)
    x = entry.inputs(torch.Generator().manual_seed(0))[0]
    for mask in (
        torch.ones(T, T).tril().bool(),
        torch.ones(T, T).tril(-1).bool(),
        torch.zeros(B, 1, T, T).bool(),
    ):
        if mask.dim() == 2:
            claims.same_numbers(module, fast, (x, mask))
        else:
            claims.same_numbers(module, compiled(module, dynamic=False), (x, mask))


@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_relative_positions_are_a_bias(scale: float) -> None:
    """Of two products with the queries, that with the keys is the attention's."""
    x = torch.randn(B, T, WIDTH)
    (found,) = ac.explain(Site(written_scores.RelativeKeys(scale)), (x,)).sites
    assert str(found.score).startswith("dot + "), found.score
    assert (found.query_heads, found.kv_heads) == (H, H)


def test_head_dim_is_not_a_sequence() -> None:
    """All sizes equal: the axes must be told apart by what is done with them."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(D, D, D, D).requires_grad_() for _ in range(3))
    for attend in ("bhtd", "bthd"):
        module = _Bare(_equal_sizes if attend == "bhtd" else _equal_sizes_time_first)
        claims.same_numbers(module, compiled(module, dynamic=False), (q, k, v), training=True)


def _equal_sizes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return written_masks.finish(
        written_masks.dots(q, k).masked_fill(~written_masks.tril(D), float("-inf")), v
    )


def _equal_sizes_time_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bthd,bshd->bhts", q, k) * SCALE
    return torch.einsum(
        "bhts,bshd->bthd", scores.masked_fill(~written_masks.tril(D), float("-inf")).softmax(-1), v
    )
