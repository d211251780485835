"""Attention over x where a cache holds features or sizes of keys besides: any heads, any beams."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_compiler.cache.maps import Beside, Maps, Norm, Rows
from attn_compiler.cache.parts import scores_beside, with_terms
from attn_compiler.cache.states import States
from attn_compiler.kernels.schema import attention

el = pytest.importorskip("attn_compiler.cache.el")

BATCH, BEAMS, HEADS, GROUPS, WIDTH, LENGTH = 3, 2, 6, 2, 13, 11
PLAIN, TURNED, VALUE = 5, 3, 7
CAPPED = "score: 2 * tanh(dot / 2); mask: t0[b, k]; empty: any"
SUMMED = "score: dot; mask: t0[b, k]; empty: any"


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


class Made:
    """Weights of one layer, of which a norm and a rotation make keys as models do."""

    def __init__(self, norm: str, beside: Beside | None) -> None:
        self.norm, self.beside = norm, beside
        size = PLAIN + (0 if beside is None else TURNED)
        self.size, inner = size, GROUPS * size
        length = size if norm != "all" else inner
        self.w_k, self.b_k = draw(inner, WIDTH) / 4, draw(inner)
        self.w_v, self.b_v = draw(GROUPS * VALUE, WIDTH) / 4, draw(GROUPS * VALUE)
        self.gain, self.bias = draw(length, seed=1).exp(), draw(length, seed=2)
        self.bias = self.bias if norm == "layer" else None
        self.offset = 0 if beside is None or beside.start else TURNED

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = x @ self.w_k.T + self.b_k, x @ self.w_v.T + self.b_v
        if self.norm == "all":
            k = torch.nn.functional.rms_norm(k, k.shape[-1:], self.gain, 1e-3)
        k, v = (t.unflatten(-1, (GROUPS, -1)).transpose(1, 2) for t in (k, v))
        if self.norm == "rms":
            k = torch.nn.functional.rms_norm(k, k.shape[-1:], self.gain, 1e-3)
        if self.norm == "layer":
            k = torch.nn.functional.layer_norm(k, k.shape[-1:], self.gain, self.bias, 1e-3)
        if self.beside is not None:
            turned = self.beside.of(k).sin().expand(*k.shape[:3], -1)
            rest = k[..., TURNED:] if self.beside.start == 0 else k[..., :-TURNED]
            k = torch.cat((turned, rest) if self.beside.start == 0 else (rest, turned), -1)
        return k, v

    def maps(self) -> Maps:
        whole, features = Rows(0, self.size, GROUPS, self.size), PLAIN
        norm, step = None, self.size
        if self.norm == "all":
            joined = Rows(0, GROUPS * self.size, 1, GROUPS * self.size)
            norm = Norm(False, 1e-3, joined, self.offset, step)
        elif self.norm:
            norm = Norm(self.norm == "layer", 1e-3, whole, self.offset, 0)
        rows = (Rows(self.offset, step, GROUPS, features), Rows(0, VALUE, GROUPS, VALUE))
        weights: list[Any] = [self.w_k, self.b_k, self.w_v, self.b_v]
        weights += [self.gain, self.bias] if norm is not None else []
        return Maps(weights, rows, self.beside, norm)


class Layer:
    """What `attend` reads of a layer of a cache."""

    def __init__(self, states: States, maps: Maps) -> None:
        self.states, self.maps = states, maps


BESIDE = [None, Beside(0, TURNED, GROUPS), Beside(PLAIN, TURNED, GROUPS), Beside(0, TURNED, 1)]
CASES = [c for c in itertools.product(["", "rms", "layer", "all"], BESIDE) if any(c)]


@pytest.mark.parametrize(("norm", "beside"), CASES)
@pytest.mark.parametrize("program", [SUMMED, CAPPED])
def test_one_step_over_what_is_kept(norm: str, beside: Beside | None, program: str) -> None:
    made = Made(norm, beside)
    maps, x = made.maps(), draw(BATCH, LENGTH, WIDTH)
    states = States(x[:, :7], borrowed=False, beside=maps.kept(x[:, :7], made(x[:, :7])[0]))
    states.append(x[:, 7:], maps.kept(x[:, 7:], made(x[:, 7:])[0]))
    states.repeat(BEAMS)
    key, value = (t.repeat_interleave(BEAMS, 0) for t in made(x))
    for ours, theirs in zip(states.keys_and_values(maps), (key, value), strict=True):
        assert torch.allclose(ours, theirs, 1e-12, 1e-12)
    q = draw(BATCH * BEAMS, HEADS, 1, made.size)
    mask = [torch.arange(LENGTH) < torch.arange(BATCH * BEAMS)[:, None] + 3]
    options = {"program": program, "scale": 0.7}
    found = el.attend(Layer(states, maps), q, mask, [], key_bias=program == CAPPED, **options)
    wanted, _ = attention(q, key, value, mask, [], None, dropout=0.0, **options)
    assert torch.allclose(found, wanted, 1e-11, 1e-12)


def test_what_is_kept_follows_the_batch() -> None:
    made = Made("layer", BESIDE[1])
    maps, x = made.maps(), draw(BATCH, LENGTH, WIDTH)
    key, value = made(x)
    states = States(x, borrowed=False, beside=maps.kept(x, key))
    states.select(torch.tensor([2, 2, 0]))
    states.shorten(4)
    expected = tuple(t[[2, 2, 0], :, :-4] for t in (key, value))
    for ours, theirs in zip(states.keys_and_values(maps), expected, strict=True):
        assert torch.allclose(ours, theirs, 1e-12, 1e-12)
    assert [t.shape for t in states.beside] == [
        (3, GROUPS, LENGTH - 4, TURNED),
        (3, GROUPS, LENGTH - 4, 1),
    ]


def test_scores_are_not_rounded_to_half_precision() -> None:
    q, keys = draw(4, HEADS, 1, 3).bfloat16(), draw(2, GROUPS, LENGTH, 3).bfloat16()
    found = scores_beside(q, keys, 0.5)
    wide = keys.double().repeat_interleave(2, 0).repeat_interleave(HEADS // GROUPS, 1)
    assert found.dtype is torch.float32
    assert torch.allclose(found.double(), 0.5 * q.double() @ wide.mT, 1e-6, 1e-6)


def test_terms_of_a_program() -> None:
    found = with_terms(CAPPED, (("size", 1), ("row", 2), ("pair", 3)))
    dot = "dot * t1[b, h, k] + t2[b, h, q] + t3[b, h, q, k]"
    assert found == f"score: 2 * tanh(({dot}) / 2); mask: t0[b, k]; empty: any"
