"""SwitchHead out of trained attention: the exact start, and every step of the approximate one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attn_compiler.errors import BadOption
from attn_compiler.kernels.switchhead import (
    Mixture,
    Scores,
    rotary,
    switchhead_attention,
)
from attn_compiler.variants.conversion.alike import balanced_groups, similarity
from attn_compiler.variants.conversion.bases import aligned, narrowed, without_bias
from attn_compiler.variants.conversion.ordinary import (
    Moments,
    Ordinary,
    attended,
    moments,
    projected,
    split_in,
    split_out,
)
from attn_compiler.variants.switchhead_convert import (
    Converted,
    convert,
    duplicated,
    first_channels,
)

CAUSAL = Scores("score: dot; mask: k <= q; empty: any")
B, T, D = 3, 17, 23
WIDE = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=draw, dtype=WIDE)


def trained(heads: int = 6, kv_heads: int | None = None, d: int = 5, **more: object) -> Ordinary:
    kv = kv_heads or heads
    w_q, w_k, w_v = (normal(n, D, d, seed=i) / D**0.5 for i, n in ((1, heads), (2, kv), (3, kv)))
    w_o = normal(heads, d, D, seed=4) / (heads * d) ** 0.5
    return Ordinary(w_q, w_k, w_v, w_o, **({"scores": CAUSAL} | more))  # type: ignore[arg-type]


def alike(heads: int = 6, group: int = 3, **more: object) -> Ordinary:
    """Heads of a group attend nearly alike; groups are interleaved."""
    layer = trained(heads, **more)  # type: ignore[arg-type]
    first = [h % (heads // group) for h in range(heads)]
    w_q, w_k = (
        3 * w[first] + 0.1 * normal(*w.shape, seed=s) / D**0.5
        for s, w in ((7, layer.w_q), (8, layer.w_k))
    )
    return replace(layer, w_q=w_q, w_k=w_k)


def outputs(layer: Ordinary, x: Tensor) -> Tensor:
    layer = layer.each()
    values = projected(x, layer.w_v, layer.b_v)
    out = torch.einsum("bhtc,hcd->btd", attended(layer, x, x, values), layer.w_o)
    return out if layer.b_o is None else out + layer.b_o


def of(found: Converted, mixture: Mixture, x: Tensor, layer: Ordinary) -> Tensor:
    rotate = layer.rotate and (
        first_channels(layer.rotate[0], layer.head_dim),
        first_channels(layer.rotate[1], layer.head_dim),
    )
    scores = replace(layer.scores, scale=None)
    y = switchhead_attention(x, x, found.weights, mixture, scores, rotate=rotate)
    return y if found.bias is None else y + found.bias


# ---------------------------------------------------------------- exact

LAYERS: dict[str, Callable[[], Ordinary]] = {
    "plain": trained,
    "grouped keys": lambda: trained(6, 2),
    "biases": lambda: trained(6, 2, b_k=normal(2, 5), b_v=normal(2, 5, seed=1), b_o=normal(D)),
    "a scale of its own": lambda: trained(scores=replace(CAUSAL, scale=0.7)),
    "turned": lambda: trained(rotate=(turn(), turn())),
}


def turn() -> Callable[[Tensor], Tensor]:
    return partial(rotary, positions=torch.arange(T), share=1.0)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_duplicates_compute_the_same(name: str, k: int) -> None:
    layer, x = LAYERS[name](), normal(B, T, D)
    found = duplicated(layer, 4, k)
    mixture = Mixture(6, 4, k)
    y = of(found, mixture, x, layer)
    torch.testing.assert_close(y, outputs(layer, x), rtol=1e-12, atol=1e-13)


def test_two_of_equal_experts_are_bitwise_the_same_in_half_precision() -> None:
    """Gates of a half, values once: a / 2 + a / 2 = a in any precision."""
    layer = trained()
    narrow = Ordinary(
        *(w.bfloat16() for w in (layer.w_q, layer.w_k, layer.w_v, layer.w_o)), scores=CAUSAL
    )
    found = duplicated(narrow, 4, 2)
    assert torch.equal(found.weights.w_v[::4], narrow.w_v)
    assert torch.equal(found.weights.w_o[1::4], narrow.w_o)


def test_noise_breaks_ties_and_little_else() -> None:
    layer, x = trained(), normal(B, T, D)
    draw = torch.Generator().manual_seed(0)
    found = duplicated(layer, 4, 2, noise=0.02, generator=draw)
    y, exact = of(found, Mixture(6, 4, 2), x, layer), outputs(layer, x)
    assert 0 < (y - exact).norm() < 0.05 * exact.norm()
    assert found.weights.w_s is not None
    logits = x @ found.weights.w_s.mT
    assert 0.01 < float(logits.std()) < 0.04


@pytest.mark.parametrize(
    "layer",
    [
        trained(b_q=normal(6, 5)),
        trained(b_k=normal(6, 5), rotate=(turn(), turn())),
        trained(
            b_k=normal(6, 5), scores=Scores("score: 5.0 * tanh(dot / 5.0); mask: True; empty: any")
        ),
    ],
    ids=["queries", "turned keys", "keys under a tanh"],
)
def test_biases_without_a_place_are_refused(layer: Ordinary) -> None:
    with pytest.raises(BadOption, match="have no place"):
        duplicated(layer, 4, 2)


def test_reads_linear_layers() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(D + 1, 6, batch_first=True, dtype=WIDE)
    with torch.no_grad():
        model.in_proj_bias.normal_()[: D + 1].zero_()
        model.out_proj.bias.normal_()
    parts = model.in_proj_weight.chunk(3)
    biases = [b.view(6, -1) for b in model.in_proj_bias.chunk(3)]
    layer = Ordinary(
        *(split_in(w, 6) for w in parts), split_out(model.out_proj.weight, 6),
        None, biases[1], biases[2], model.out_proj.bias,
    )  # fmt: skip
    x = normal(B, T, D + 1)
    found = of(duplicated(layer, 3, 2), Mixture(6, 3, 2), x, layer)
    torch.testing.assert_close(found, model(x, x, x)[0], rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------- the steps


def test_likeness_of_maps() -> None:
    layer = alike(6, 3)
    x = 2 * normal(B, T, D)
    found = similarity(layer, [(x, x)])
    assert found.diagonal().tolist() == pytest.approx([1.0] * 6)
    torch.testing.assert_close(found, found.mT)
    same = torch.tensor([[i % 2 == j % 2 for j in range(6)] for i in range(6)])
    assert found[same].min() > found[~same].max()


def test_maps_that_share_no_key_are_not_alike() -> None:
    """Head h looks at token h, whatever the query."""
    unit = torch.eye(2, dtype=WIDE)
    layer = Ordinary(
        torch.full((2, 2, 1), 50.0, dtype=WIDE), unit.unsqueeze(2), unit.unsqueeze(2),
        unit.unsqueeze(1),
    )  # fmt: skip
    x = unit.unsqueeze(0)
    torch.testing.assert_close(similarity(layer, [(x, x)]), unit)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.randoms(use_true_random=False))
def test_groups_are_even_and_planted_ones_are_found(
    number: int, size: int, shuffle: object
) -> None:
    heads = list(range(number * size))
    shuffle.shuffle(heads)  # type: ignore[attr-defined]
    planted = sorted(tuple(sorted(heads[i * size : (i + 1) * size])) for i in range(number))
    likeness = torch.full((len(heads),) * 2, 0.3, dtype=WIDE)
    for group in planted:
        for i in group:
            likeness[i, list(group)] = 0.8
    assert sorted(balanced_groups(likeness, number)) == planted


@pytest.mark.parametrize("seed", range(5))
def test_no_swap_of_two_heads_helps(seed: int) -> None:
    x = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed), dtype=WIDE)
    likeness = x + x.mT

    def total(groups: object) -> float:
        return sum(float(likeness[i, j]) for g in groups for i, j in combinations(g, 2))  # type: ignore[attr-defined]

    groups = [list(g) for g in balanced_groups(likeness, 2)]
    best = total(groups)
    for i in range(4):
        for j in range(4):
            swapped = [list(g) for g in groups]
            swapped[0][i], swapped[1][j] = groups[1][j], groups[0][i]
            assert total(swapped) <= best + 1e-9


def moment_of(x: Tensor) -> Tensor:
    return x.flatten(0, -2).mT @ x.flatten(0, -2) / x[..., 0].numel()


def test_turning_keeps_products_and_brings_values_together() -> None:
    x, layer = normal(B, 40, D), trained(3)
    mixing = normal(3, 5, 5, seed=6)
    shared = layer.w_v[:1] + 0.1 * layer.w_v
    w_v = shared @ mixing
    second = moment_of(x)
    v, o = aligned(w_v, layer.w_o, second)
    torch.testing.assert_close(v @ o, w_v @ layer.w_o)
    eye = torch.eye(5, dtype=WIDE).expand(3, -1, -1)
    torch.testing.assert_close(v.mT @ second @ v, eye, rtol=1e-6, atol=1e-6)

    def apart(w: Tensor) -> float:
        values = torch.einsum("btd,hdc->hbtc", x, w)
        return float((values - values.mean(0)).norm() / values.norm())

    assert apart(v) < 0.2 < 0.5 < apart(w_v)


def test_narrower_products_are_the_best_of_their_rank() -> None:
    x, y = normal(B, 40, D), normal(B, 40, D, seed=1)
    a, b = normal(2, D, 7), normal(2, D, 7, seed=1)
    left, right = narrowed(a, b, 7, (moment_of(x), moment_of(y)))
    torch.testing.assert_close(left @ right.mT, a @ b.mT, rtol=1e-6, atol=1e-6)
    left, right = narrowed(a, b, 4, (moment_of(x), moment_of(y)))
    assert left.shape == right.shape == (2, D, 4)
    for h in range(2):
        whole = x.flatten(0, 1) @ a[h] @ b[h].mT @ y.flatten(0, 1).mT
        found = x.flatten(0, 1) @ left[h] @ right[h].mT @ y.flatten(0, 1).mT
        missed = torch.linalg.svdvals(whole)[4:].square().sum().sqrt()
        torch.testing.assert_close((whole - found).norm(), missed, rtol=1e-5, atol=0)


def test_biases_fold_into_weights_by_least_squares() -> None:
    x = normal(B, 40, D) + 0.7
    w, b = normal(2, D, 5), normal(2, 5)
    flat = x.flatten(0, 1)
    found = without_bias(w, b, Moments(flat.mean(0), moment_of(x)))
    best = torch.linalg.lstsq(flat.expand(2, -1, -1), flat @ w + b.unsqueeze(1)).solution
    torch.testing.assert_close(found, best)
    assert without_bias(w, None, Moments(flat.mean(0), moment_of(x))) is w


def test_moments_over_batches() -> None:
    a, b = normal(2, 7, D), normal(1, 5, D)
    target, source = moments([(a, b), (b, b)])
    flat = torch.cat([a.flatten(0, 1), b.flatten(0, 1)])
    torch.testing.assert_close(target.mean, flat.mean(0))
    torch.testing.assert_close(target.second, flat.mT @ flat / len(flat), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(source.mean, b.flatten(0, 1).mean(0))


# ---------------------------------------------------------------- the whole


def error(found: Converted, mixture: Mixture, x: Tensor, layer: Ordinary) -> float:
    exact = outputs(layer, x)
    return float((of(found, mixture, x, layer) - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [("plain", 5), ("plain", 9), ("plain", 15), ("plain", 4), ("grouped keys", 8), ("biases", 8),
     ("a scale of its own", 8), ("turned", 8)],
)  # fmt: skip
def test_converts(name: str, head_dim: int) -> None:
    layer = LAYERS[name]()
    mixture = Mixture(2, 3, 3)
    x = [normal(B, T, D, seed=s) for s in range(4)]
    found = convert(layer, mixture, head_dim, [(a, a) for a in x])
    w = found.weights
    assert w.w_q.shape == w.w_k.shape == (2, D, head_dim)
    assert w.w_v.shape == w.w_o.mT.shape == (6, D, head_dim)
    assert w.w_s is not None and w.w_d is not None and w.w_s.shape == w.w_d.shape == (6, D)
    assert sorted(h for g in found.groups for h in g) == list(range(6))
    # scaled as well as a number can
    bare = replace(layer, b_v=None, b_o=None)

    def squares(factor: float) -> float:
        scaled = Converted(replace(w, w_o=w.w_o * factor), None, found.groups)
        gaps = [of(scaled, mixture, a, bare) - outputs(bare, a) for a in x]
        return sum(float(gap.square().sum()) for gap in gaps)

    assert squares(1.0) < min(squares(0.999), squares(1.001), squares(0.0))


def test_heads_that_attend_alike_convert_well_in_blocks() -> None:
    layer, mixture = alike(6, 3), Mixture(2, 3, 3)
    x = [normal(B, T, D, seed=s) for s in range(6)]
    found = convert(layer, mixture, 15, [(a, a) for a in x])
    assert set(found.groups) == {(0, 2, 4), (1, 3, 5)}
    new = normal(B, T, D, seed=11)
    assert error(found, mixture, new, layer) < 0.35
    strangers = trained(6)
    other = convert(strangers, mixture, 15, [(a, a) for a in x])
    assert error(other, mixture, new, strangers) > 1.5 * error(found, mixture, new, layer)


def test_routers_follow_the_share_of_each_head() -> None:
    """Head 0 has its values where feature 0 is positive, head 1 where it is negative."""
    d, n = 4, 64
    w_v = torch.zeros(2, D, d, dtype=WIDE)
    w_v[0, 1, 0], w_v[1, 2, 0] = 1.0, 1.0
    layer = Ordinary(*(torch.zeros(2, D, d, dtype=WIDE),) * 2, w_v, normal(2, d, D), scores=CAUSAL)
    sign = normal(B, n).sign()
    x = 0.1 * normal(B, n, D)
    x[..., 0], x[..., 1], x[..., 2] = sign, (sign > 0) + 0.1, (sign < 0) + 0.1
    found = convert(layer, Mixture(1, 2, 1), 4, [(x, x)])
    assert found.weights.w_s is not None
    chosen = (x @ found.weights.w_s.mT).argmax(-1)
    assert ((chosen == 0) == (sign > 0)).double().mean() > 0.95


@pytest.mark.parametrize(
    ("layer", "mixture", "head_dim"),
    [
        (trained(), Mixture(2, 2, 2), 5),
        (trained(), Mixture(2, 3, 2, ("o",)), 5),
        (trained(rotate=(turn(), turn())), Mixture(2, 3, 2), 4),
    ],
    ids=["sizes", "experts elsewhere", "turned and narrower"],
)
def test_refusals(layer: Ordinary, mixture: Mixture, head_dim: int) -> None:
    x = normal(B, T, D)
    with pytest.raises(BadOption, match="cannot become such a SwitchHead"):
        convert(layer, mixture, head_dim, [(x, x)])


def test_one_router_and_the_dtype_of_the_layer() -> None:
    layer = trained()
    narrow = Ordinary(
        *(w.float() for w in (layer.w_q, layer.w_k, layer.w_v, layer.w_o)), scores=CAUSAL
    )
    x = normal(B, T, D).float()
    found = convert(narrow, Mixture(2, 3, 2, shared=True), 8, [(x, x)])
    assert found.weights.w_s is None and found.weights.w_d is not None
    assert found.weights.w_o.dtype == found.weights.w_d.dtype == torch.float32
