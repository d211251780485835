"""SPION's attention as a program of the operator, in both softmax modes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attn_compiler.errors import BadOption
from attn_compiler.ir.expr import parse
from attn_compiler.ir.score import Program
from attn_compiler.kernels.library import attention
from attn_compiler.kernels.maps import add_blocks
from attn_compiler.kernels.pattern import pattern_of
from attn_compiler.kernels.pooled import BlockMap
from attn_compiler.kernels.sparse import sparse

LENGTH, BLOCK, SIDE = 37, 8, 5
SCALE = 0.6
BOTH = ("neg_inf", "zero_logit")
CAUSAL = Program(mask=parse("k <= q"))


def inputs(length: int = LENGTH, heads: int = 3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(length)
    return [
        torch.randn(2, heads, length, 4, generator=draw, dtype=torch.float64).requires_grad_()
        for _ in range(3)
    ]


def pattern(seed: int, *heads: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(*heads, SIDE, SIDE, generator=draw) > 0.6) | torch.eye(SIDE).bool()


def elements(kept: Tensor, length: int = LENGTH, block: int = BLOCK) -> Tensor:
    return kept.repeat_interleave(block, -1).repeat_interleave(block, -2)[..., :length, :length]


def attend(qkv: list[Tensor], program: Program, reads: list[Tensor]) -> Tensor:
    # the sink in double precision, to compare with double precision
    reads = [r.double().exp().round().log() if r.is_floating_point() else r for r in reads]
    out, _ = attention(*qkv, reads, [], None, program=str(program), scale=SCALE, dropout=0.0)
    return out


def zero_logit(qkv: list[Tensor], allowed: Tensor, left: Tensor) -> Tensor:
    """One more key, whose logit is 0 and whose value is 0, as often as keys are left out."""
    q, k, v = qkv
    s = (q @ k.transpose(-1, -2) * SCALE).masked_fill(~allowed, -torch.inf)
    top = s.amax(-1, keepdim=True).detach().clamp(min=0)
    e = torch.exp(s - top)
    return e @ v / (e.sum(-1, keepdim=True) + left.unsqueeze(-1) * torch.exp(-top))


def same(one: Tensor, other: Tensor, qkv: list[Tensor]) -> None:
    weight = torch.linspace(-1, 1, one.numel(), dtype=torch.float64).view(one.shape)
    pairs = [(one, other)]
    pairs += zip(
        torch.autograd.grad(one, qkv, weight), torch.autograd.grad(other, qkv, weight), strict=True
    )
    for a, b in pairs:
        assert (a - b).abs().max() < 1e-12


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_left_out_blocks_do_not_exist(seed: int, heads: bool, causal: bool) -> None:
    kept, qkv = pattern(seed, *([3] if heads else [])), inputs()
    program, reads = sparse(
        CAUSAL if causal else Program(), kept, block=BLOCK, length=LENGTH, slot=0
    )
    allowed = elements(kept)
    allowed = allowed.tril() if causal else allowed
    dense = scaled_dot_product_attention(*qkv, attn_mask=allowed, scale=SCALE)
    same(attend(qkv, program, reads), dense, qkv)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_left_out_keys_are_logits_of_zero(seed: int, heads: bool, causal: bool) -> None:
    kept, qkv = pattern(seed, *([3] if heads else [])), inputs()
    options: dict[str, Any] = {"block": BLOCK, "length": LENGTH, "softmax": "zero_logit"}
    program, reads = sparse(CAUSAL if causal else Program(), kept, slot=0, **options)
    every = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    every = every.tril() if causal else every
    allowed = elements(kept) & every
    same(attend(qkv, program, reads), zero_logit(qkv, allowed, (every & ~allowed).sum(-1)), qkv)


def test_a_row_of_four_keys() -> None:
    """Logits 2, 1, 1/2, -1, of which the first two are kept."""
    q = torch.ones(1, 1, 4, 1, dtype=torch.float64)
    k = torch.tensor([2, 1, 0.5, -1], dtype=torch.float64).view(1, 1, 4, 1)
    v = torch.eye(4, dtype=torch.float64)[None, None]
    kept = torch.tensor([[True, False], [True, True]])
    wanted = {
        "neg_inf": [0.731059, 0.268941, 0, 0],
        "zero_logit": [0.610296, 0.224515, 0, 0],
        "dense": [0.609460, 0.224208, 0.135989, 0.030343],
    }
    for softmax in BOTH:
        program, reads = sparse(Program(), kept, block=2, length=4, slot=0, softmax=softmax)  # type: ignore[arg-type]
        for row, name in ((0, softmax), (3, "dense")):
            out, _ = attention(
                q, k, v, reads, [], None, program=str(program), scale=1.0, dropout=0.0
            )
            assert out[0, 0, row].tolist() == pytest.approx(wanted[name], abs=1e-6)


@pytest.mark.parametrize("softmax", BOTH)
def test_all_blocks_are_dense_attention(softmax: Any) -> None:
    qkv, every = inputs(), torch.ones(SIDE, SIDE, dtype=torch.bool)
    for base in (Program(), CAUSAL):
        program, reads = sparse(base, every, block=BLOCK, length=LENGTH, slot=0, softmax=softmax)
        dense, _ = attention(*qkv, [], [], None, program=str(base), scale=SCALE, dropout=0.0)
        same(attend(qkv, program, reads), dense, qkv)


def test_the_diagonal_alone_is_local_attention() -> None:
    qkv, eye = inputs(40), torch.eye(SIDE, dtype=torch.bool)
    program, reads = sparse(Program(), eye, block=BLOCK, length=40, slot=0)
    pieces = [x.unflatten(2, (SIDE, BLOCK)) for x in qkv]
    local = scaled_dot_product_attention(*pieces, scale=SCALE).flatten(2, 3)
    same(attend(qkv, program, reads), local, qkv)


@pytest.mark.parametrize("softmax", BOTH)
def test_gradcheck(softmax: Any) -> None:
    qkv = inputs(heads=1)
    program, reads = sparse(CAUSAL, pattern(3), block=BLOCK, length=LENGTH, slot=0, softmax=softmax)
    assert torch.autograd.gradcheck(lambda *x: attend(list(x), program, reads), qkv, fast_mode=True)


def test_from_maps_to_attention() -> None:
    """Calibrate, make the pattern of each head, attend; what is lost bounds the difference."""
    qkv = inputs()
    q, k, v = (x.detach() for x in qkv)
    maps = BlockMap.zeros(LENGTH, block=BLOCK, filter=5, heads=(3,))
    add_blocks(3 * q, k, [], [], program=str(CAUSAL), scale=SCALE, into=maps)
    kept = pattern_of(maps, alpha=0.6, causal=True)
    assert kept.shape == (3, SIDE, SIDE) and not bool(kept.triu(1).any())
    program, reads = sparse(CAUSAL, kept, block=BLOCK, length=LENGTH, slot=0)
    qkv = [3 * q, k, v]
    dense, _ = attention(*qkv, [], [], None, program=str(CAUSAL), scale=SCALE, dropout=0.0)
    # |out - dense| <= 2 lost max |v| in each row, so in the mean
    error = (attend(qkv, program, reads) - dense).norm(dim=-1).mean((0, 2))
    lost = maps.lost(kept)
    assert bool((lost > 0).all()) and bool((error > 0).all())
    assert bool((error <= 2 * lost * v.norm(dim=-1).max()).all())


def test_texts() -> None:
    options: dict[str, Any] = {"block": BLOCK, "length": LENGTH}
    padded = Program(mask=parse("(k <= q) & t0[b, k]"), empty="uniform")
    program, reads = sparse(padded, pattern(1, 3), slot=1, softmax="zero_logit", **options)
    assert str(program.mask) == "t1[h, q // 8, k // 8] & ((k <= q) & t0[b, k])"
    assert str(program.sink) == "t2[h, q // 8]" and program.empty == "zero"
    assert [r.shape for r in reads] == [(3, 5, 5), (3, 5)]
    program, reads = sparse(Program(), pattern(1), slot=0, **options)
    assert str(program) == "score: dot; mask: t0[q // 8, k // 8]; empty: any" and len(reads) == 1


def test_how_many_are_left_out() -> None:
    eye = torch.eye(SIDE, dtype=torch.bool)
    for base, wanted in ((Program(), [29, 29, 29, 29, 32]), (CAUSAL, [0, 8, 16, 24, 32])):
        _, reads = sparse(base, eye, block=BLOCK, length=LENGTH, slot=0, softmax="zero_logit")
        assert reads[1].exp().tolist() == pytest.approx(wanted)
        assert (reads[1][0] == -math.inf) == (wanted[0] == 0)
    # the same mask, written with sizes
    shifted = Program(mask=parse("k <= q + (S - T)"))
    _, reads = sparse(shifted, eye, block=BLOCK, length=LENGTH, slot=0, softmax="zero_logit")
    assert reads[1].exp().tolist() == pytest.approx([0, 8, 16, 24, 32])
    # padding that is added
    padded = Program(parse("dot + t0[b, 0, 0, k]"))
    _, reads = sparse(padded, eye, block=BLOCK, length=LENGTH, slot=1, softmax="zero_logit")
    assert reads[1].exp().tolist() == pytest.approx([29, 29, 29, 29, 32])


@pytest.mark.parametrize(
    ("base", "kept", "message"),
    [
        (Program(), torch.ones(4, 4).bool(), "does not fit 37 tokens"),
        (Program(), torch.ones(5, 5), "does not fit 37 tokens"),
        (Program(mask=parse("k > q - 5")), pattern(0), "no meaning here"),
        (Program(mask=parse("k <= q + n0")), pattern(0), "no meaning here"),
        (Program(mask=parse("t0[b, q] == t0[b, k]")), pattern(0), "no meaning here"),
        (Program(sink=parse("t0[h]")), pattern(0), "no meaning here"),
        # a tensor's numbers may be a causal mask
        (Program(parse("dot + t0[b, 0, q, k]")), pattern(0), "no meaning here"),
        (CAUSAL, ~torch.eye(5).bool(), "diagonal is missing"),
    ],
)
def test_what_is_refused(base: Program, kept: Tensor, message: str) -> None:
    with pytest.raises(BadOption, match=message):
        sparse(base, kept, block=BLOCK, length=LENGTH, slot=1, softmax="zero_logit")
