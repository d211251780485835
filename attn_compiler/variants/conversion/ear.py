"""What stands around one attention of a living model to hear it, and to ask it questions.

    y = o_proj(attention(q_proj(x), k_proj(x), v_proj(x)))
        ->   e = ear;  q, k, v = attention's inputs, made of enter(e, x)
             y = heard(e, o_proj(choose(e, attention(q, k, v), asked(e, q, v))), x, q, k, v)

As long as nobody asks, the functions hand on what they are given, and the ear keeps the inputs of
the layer. While somebody asks, the maps read the question instead of their inputs, and the answers
are kept: a linear map is known by what it makes of unit vectors. It looks at no name and no
spelling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

# how large unit vectors are: a bias beside them is lost in rounding
LARGE = 2.0**40


@dataclass(frozen=True, slots=True)
class Question:
    """What all maps of a model read in one run.

    Attributes:
        kind: zeros; unit vectors, row by row; or one random vector for all rows of a sample.
        number: of the run, from 0: unit vectors go on where the last run ended.
    """

    kind: Literal["zero", "units", "constant"]
    number: int = 0

    def rows(self, like: Tensor) -> Tensor:
        """[B, T, n], for a tensor of this shape."""
        batch, rows, width = like.shape
        made = like.new_zeros(like.shape)  # in order, whatever strides the inputs have
        if self.kind == "units":
            first = self.number * batch * rows
            count = max(0, min(width - first, batch * rows))
            flat = made.view(-1, width)
            flat[:count, first : first + count].fill_diagonal_(LARGE)
        elif self.kind == "constant":
            draw = torch.Generator().manual_seed(self.number)
            vectors = torch.randn(batch, 1, width, generator=draw, dtype=torch.float64)
            made = made + vectors.to(like)
        return made


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a layer.

    Attributes:
        x_q, x_k, x_v: [B, T, D] and twice [B, S, D]; one tensor may stand for several.
        reads, ints: of the program of its scores.
        y: [B, T, D].
        cached: were there keys before those of `x_k`?
    """

    x_q: Tensor
    x_k: Tensor
    x_v: Tensor
    reads: tuple[Tensor, ...]
    ints: tuple[int, ...]
    y: Tensor
    cached: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What a question was answered with: queries [B, H, T, d], keys [B, G, S, d], values
    [B, G, S, dv], and what the last map makes of results, [B, T, D].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    y: Tensor


class Ear(nn.Module):
    """See the file.

    Attributes:
        question: what is asked now; None for nothing.
        calls: what was heard.
        answers: to questions.
        program, scale: of the scores.
        turns: are queries and keys rotated?
    """

    def __init__(self) -> None:
        super().__init__()
        self.question: Question | None = None
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.calls: list[Call] = []
        self.answers: list[Answer] = []
        self.program, self.scale, self.turns = "", 1.0, False


def _turned(x: Tensor, swapped: bool) -> Tensor:
    return x.transpose(0, 1) if swapped else x


def enter(ear: Ear, x: Tensor, swapped: bool) -> Tensor:
    """The input of a map, or the question; `swapped` is [T, B, D]."""
    if ear.question is None:
        return x
    return _turned(ear.question.rows(_turned(x, swapped)), swapped)


def asked(ear: Ear, q: Tensor, v: Tensor) -> Tensor:
    """Results [B, H, T, dv] to ask the last map with."""
    batch, heads, rows, _ = q.shape
    if ear.question is None:
        return v.new_zeros(()).expand(batch, heads, rows, v.shape[3])
    like = v.new_empty(()).expand(batch, rows, heads * v.shape[3])
    return ear.question.rows(like).view(batch, rows, heads, -1).transpose(1, 2)


def choose(ear: Ear, result: Tensor, question: Tensor) -> Tensor:
    """The result of the attention, or the question."""
    return result if ear.question is None else question


def heard(
    ear: Ear,
    y: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    made: tuple[Tensor, Tensor, Tensor],
    read: tuple[Sequence[Tensor], Sequence[int]],
    scores: tuple[str, float],
    turns: bool,
    swapped: bool,
) -> Tensor:
    """Keep what was heard; what comes after the layer reads no answers."""
    (ear.program, ear.scale), ear.turns = scores, turns
    if ear.question is not None:
        ear.answers.append(Answer(*(x.detach() for x in (*made, _turned(y, swapped)))))
        return torch.zeros_like(y)
    once = {id(x): _turned(x.detach(), swapped) for x in inputs}  # one tensor stays one
    x_q, x_k, x_v = (once[id(x)] for x in inputs)
    reads, ints = tuple(t.detach() for t in read[0]), tuple(read[1])
    cached = made[1].shape[2] != x_k.shape[1]
    ear.calls.append(Call(x_q, x_k, x_v, reads, ints, _turned(y.detach(), swapped), cached))
    return y
