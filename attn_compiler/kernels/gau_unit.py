"""A gated attention unit in a rewritten model: which tokens count, then the layer or a step of it.

    mask of the model -> valid, documents;   gau_layer(x, ...)   or   kept.step(x, ...) with a cache

A mask that the model hands over ready made, one truth for each row and key, says only when it runs
whether it is causal: then it is looked at there. It has to be causal or not, and padding, and
without a cache documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from attn_compiler.errors import UnsupportedCall, require
from attn_compiler.ir.evaluate import evaluate
from attn_compiler.ir.expr import parse
from attn_compiler.kernels.gau_layer import GauForm, GauParameters, gau_layer

NAMES = ("w_uvz", "b_uvz", "gamma", "beta", "w_o", "b_o", "rel_bias")


class Kept(Protocol):
    """What a cache holds of the tokens before, for the units of one block."""

    length: int

    def step(
        self,
        number: int,
        x: Tensor,
        unit: tuple[GauParameters, GauForm],
        valid: Tensor | None,
        seed: Tensor | None,
    ) -> Tensor: ...

    def counted(self, number: int) -> Tensor | None: ...


@dataclass(frozen=True, slots=True)
class Past:
    """What a cache says of the tokens before.

    Attributes:
        length: how many there are.
        counted: [B] how many of them are no padding, None before the first.
    """

    length: int
    counted: Tensor | None


@dataclass(frozen=True, slots=True)
class Seen:
    """Who is seen, as texts of expressions over `b` and `k`, and `q`; "" where there is none.

    Attributes:
        padding: is key k no padding?
        documents: number of key k's document.
        whole: may row q see key k?
    """

    padding: str = ""
    documents: str = ""
    whole: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a unit.

    Attributes:
        number: 0 in the place of attention, 1 in that of the feed-forward net.
        x: [B, T, D].
        weights, form: what it computes.
        valid, documents: [B, T] which tokens count, and of which document they are, or None.
    """

    number: int
    x: Tensor
    weights: GauParameters
    form: GauForm
    valid: Tensor | None
    documents: Tensor | None


_answers: list[Callable[[Call], Tensor]] = []


@contextmanager
def answered(answer: Callable[[Call], Tensor]) -> Iterator[None]:
    """Let somebody else say what units compute, while the context lasts: a teacher, for example."""
    _answers.append(answer)
    try:
        yield
    finally:
        _answers.remove(answer)


def unit(
    x: Tensor,
    kept: Kept | None,
    *rest: Any,
    reads: int,
    names: tuple[str, ...],
    number: int,
    forms: tuple[tuple[tuple[str, Any], ...], ...],
    seen: tuple[str, str, str],
) -> Tensor:
    """One unit of a block.

    Args:
        x: [B, T, D], normed if the block norms before its branches.
        kept: what a cache holds, None without one.
        rest: tensors that the mask reads, then weights.
        reads: how many tensors the mask reads.
        names: of the weights.
        number: 0 in the place of attention, 1 in that of the feed-forward net.
        forms: fields of `GauForm`, of the first and of the second unit.
        seen: fields of `Seen`.

    Returns:
        [B, T, D], before the residual.

    Raises:
        UnsupportedCall: the mask is neither causal nor for both directions, with padding and, where
            there is no cache, documents.
    """
    given: dict[str, Any] = dict.fromkeys(NAMES)
    weights = GauParameters(**given | dict(zip(names, rest[reads:], strict=True)))
    chosen, masks = GauForm(**dict(forms[number])), Seen(*seen)
    past = None if kept is None else Past(kept.length, kept.counted(number))
    valid, documents, causal = _counts(x, past, rest[:reads], masks, chosen.causal)
    if causal != chosen.causal:
        chosen = replace(chosen, causal=causal)
    if _answers and not isinstance(x, FakeTensor):
        return _answers[-1](Call(number, x, weights, chosen, valid, documents))
    seed = None
    if chosen.dropout:
        seed = torch.randint(2**62, [1], dtype=torch.int64, device=x.device)
    if kept is not None:
        return kept.step(number, x, (weights, chosen), valid, seed)
    return gau_layer(x, weights, chosen, valid=valid, documents=documents, seed=seed)


# ---------------------------------------------------------------- which tokens count


def _counts(
    x: Tensor, past: Past | None, reads: Sequence[Tensor], masks: Seen, causal: bool
) -> tuple[Tensor | None, Tensor | None, bool]:
    """valid [B, T] and documents [B, T] of the new tokens, and the direction."""
    start = 0 if past is None else past.length
    keys = torch.arange(start, start + x.shape[1], device=x.device)
    env = {"b": torch.arange(x.shape[0], device=x.device)[:, None], "k": keys}
    valid = documents = None
    if masks.padding:
        valid = evaluate(parse(masks.padding), env, reads).expand(x.shape[:2])
    if masks.documents:
        documents = evaluate(parse(masks.documents), env, reads).expand(x.shape[:2])
    if masks.whole:
        return _looked_at(x, past, reads, masks.whole, causal)
    return valid, documents, causal


def _looked_at(
    x: Tensor, past: Past | None, reads: Sequence[Tensor], text: str, causal: bool
) -> tuple[Tensor, Tensor | None, bool]:
    """The same of a mask over rows and keys."""
    start, rows = 0 if past is None else past.length, x.shape[1]
    index = torch.arange(start + rows, device=x.device)
    places = torch.arange(x.shape[0], device=x.device)[:, None, None]
    env = {"b": places, "q": torch.arange(rows, device=x.device)[:, None], "k": index}
    whole = evaluate(parse(text), env, reads).expand(x.shape[0], rows, start + rows)
    valid = whole[:, :, start:].diagonal(dim1=1, dim2=2)
    if isinstance(x, FakeTensor):
        require(not torch.compiler.is_exporting(), "a mask whose form is known without its values")
        return valid, None, causal
    # padding is seen by no row; what rows of padding see does not matter
    stray = bool((whole[:, :, start:] & ~valid[:, None, :]).any())
    new = whole[:, :, start:] & valid[:, :, None]
    documents = None if past is not None else _documents(new, valid)
    pairs = valid[:, :, None] & valid[:, None, :]
    if documents is not None:
        pairs &= documents[:, :, None] == documents[:, None, :]
    below = pairs.tril()
    if not stray and torch.equal(new, below) and _same_past(whole[:, :, :start], valid, past):
        return valid, documents, past is not None or causal or not torch.equal(below, pairs)
    if not stray and past is None and torch.equal(new, pairs):
        return valid, documents, False
    raise UnsupportedCall(
        "a mask that gated attention units cannot keep to",
        why=("it is neither causal nor for both directions, with padding and documents",),
        do="give no mask, or one of padding, or of documents where there is no cache",
    )


def _documents(seen: Tensor, valid: Tensor) -> Tensor | None:
    """[B, T] the first token that each sees, which tells documents apart; None if there is one."""
    # padding belongs to what came before it
    first = seen.view(torch.uint8).argmax(2).cummax(1).values
    after = valid & valid.cumsum(1).gt(1)  # the first of all may stand behind padding
    return first if bool((first.diff(dim=1).ne(0) & after[:, 1:]).any()) else None


def _same_past(whole: Tensor, valid: Tensor, past: Past | None) -> bool:
    """Do the rows see as many keys of a cache as it counts?"""
    if past is None or past.counted is None:
        return True
    return bool(((whole.sum(-1) == past.counted[:, None]) | ~valid).all())
