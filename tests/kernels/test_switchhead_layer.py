"""A layer of SwitchHead: the worked example, what must not change it, exact embeddings of ordinary
attention, caches, positions, counts of operations.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_compiler.errors import UnsupportedCall
from attn_compiler.ir.score import Program
from attn_compiler.kernels import experts
from attn_compiler.kernels.experts import expert_merge, expert_project
from attn_compiler.kernels.library import attention, register_flops
from attn_compiler.kernels.relative import programs, relative_positions
from attn_compiler.kernels.routing import Routes, route
from attn_compiler.kernels.switchhead import (
    Mixture,
    Scores,
    Weights,
    Written,
    attend,
    destination,
    keys_values,
    rotary,
    switchhead_attention,
)

CAUSAL = Scores("score: dot; mask: k <= q; empty: any")
OFFSET = Scores("score: dot; mask: k <= q + (S - T); empty: any")
B, T, S, D, C = 2, 7, 11, 13, 5
WIDE = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=draw, dtype=WIDE)


def drawn(mixture: Mixture, *, seed: int = 0) -> Weights:
    """Random weights of a layer D wide with heads C wide."""
    h, e = mixture.heads, mixture.experts

    def number(name: str) -> int:
        return h * e if name in mixture.experts_on else h

    source = not mixture.shared and bool({"k", "v"} & set(mixture.experts_on))
    return Weights(
        normal(number("q"), D, C, seed=seed + 1) / D**0.5,
        normal(number("k"), D, C, seed=seed + 2) / D**0.5,
        normal(number("v"), D, C, seed=seed + 3) / D**0.5,
        normal(number("o"), C, D, seed=seed + 4) / C**0.5,
        normal(h * e, D, seed=seed + 5) if source else None,
        normal(h * e, D, seed=seed + 6),
    )


def by_equations(
    x_q: Tensor, x_kv: Tensor, weights: Weights, mixture: Mixture, allowed: Tensor
) -> Tensor:
    """Head by head, expert by expert."""

    def mix(
        name: str, x: Tensor, w: Tensor, router: Tensor | None, source: Tensor, head: int
    ) -> Tensor:
        if name not in mixture.experts_on:
            return x @ w[head]
        assert router is not None
        mine = slice(head * mixture.experts, (head + 1) * mixture.experts)
        logits = source @ router[mine].mT
        kept = logits >= logits.sort(-1).values[..., -mixture.k, None]
        gates = logits.sigmoid() * kept
        return sum(gates[..., i, None] * (x @ m) for i, m in enumerate(w[mine]))  # type: ignore[return-value]

    total = torch.zeros_like(x_q)
    source_router = weights.w_d if mixture.shared else weights.w_s
    for head in range(mixture.heads):
        q = mix("q", x_q, weights.w_q, weights.w_d, x_q, head)
        k = mix("k", x_kv, weights.w_k, source_router, x_kv, head)
        v = mix("v", x_kv, weights.w_v, source_router, x_kv, head)
        p = (q @ k.mT / C**0.5).masked_fill(~allowed, -torch.inf).softmax(-1)
        total = total + mix("o", p @ v, weights.w_o, weights.w_d, x_q, head)
    return total


MIXTURES = {
    "v and o": Mixture(2, 5, 2),
    "many active": Mixture(3, 4, 3),
    "all active": Mixture(2, 3, 3),
    "o alone, one expert": Mixture(4, 1, 1, ("o",)),
    "o": Mixture(2, 5, 2, ("o",)),
    "v": Mixture(2, 5, 2, ("v",)),
    "k and o": Mixture(2, 3, 1, ("k", "o")),
    "all four": Mixture(2, 4, 2, ("q", "k", "v", "o")),
    "shared": Mixture(2, 5, 2, shared=True),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_is_what_the_equations_say(name: str) -> None:
    mixture = MIXTURES[name]
    weights, x, y = drawn(mixture), normal(B, T, D), normal(B, S, D, seed=9)
    causal = torch.ones(T, T).tril().bool()
    found = switchhead_attention(x, x, weights, mixture, CAUSAL)
    torch.testing.assert_close(found, by_equations(x, x, weights, mixture, causal))
    crossed = switchhead_attention(x, y, weights, mixture)
    everything = torch.ones(T, S).bool()
    torch.testing.assert_close(crossed, by_equations(x, y, weights, mixture, everything))


def test_worked_example() -> None:
    a = math.log(3)
    w_s = torch.tensor([[a, -a], [-a, a]], dtype=WIDE)
    weights = Weights(
        torch.zeros(1, 2, 1, dtype=WIDE),
        torch.zeros(1, 2, 1, dtype=WIDE),
        torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]], dtype=WIDE),
        torch.tensor([[[1.0, -1.0]], [[2.0, 0.0]]], dtype=WIDE),
        w_s.requires_grad_(),
        (-w_s.detach()).requires_grad_(),
    )
    x = torch.eye(2, dtype=WIDE).unsqueeze(0)
    one, two = Mixture(1, 2, 1), Mixture(1, 2, 2)
    for mixture, v, y in (
        (one, [0.75, 3.0], [[1.125, 0.0], [1.40625, -1.40625]]),
        (two, [1.5, 3.5], [[2.625, -0.375], [3.125, -1.875]]),
    ):
        mixed = keys_values(x, weights, mixture).v.flatten()
        torch.testing.assert_close(mixed, torch.tensor(v, dtype=WIDE))
        found = switchhead_attention(x, x, weights, mixture, CAUSAL)
        torch.testing.assert_close(found[0], torch.tensor(y, dtype=WIDE))
    loss = switchhead_attention(x, x, weights, one, CAUSAL)[..., 0].sum()
    d_s, d_d = torch.autograd.grad(loss, (weights.w_s, weights.w_d))  # type: ignore[arg-type]
    torch.testing.assert_close(d_s, torch.tensor([[0.3515625, 0], [0, 0.28125]], dtype=WIDE))
    torch.testing.assert_close(d_d, torch.tensor([[0, 0.3515625], [0.28125, 0]], dtype=WIDE))


# ---------------------------------------------------------------- invariants


def test_experts_have_no_order() -> None:
    """Those of V move with rows of its router, and nothing else has to; likewise those of O."""
    mixture = Mixture(2, 5, 2)
    weights, x = drawn(mixture), normal(B, T, D)
    expected = switchhead_attention(x, x, weights, mixture, CAUSAL)
    order = torch.cat([torch.randperm(5), 5 + torch.randperm(5)])
    assert weights.w_s is not None and weights.w_d is not None
    for moved in (
        replace(weights, w_v=weights.w_v[order], w_s=weights.w_s[order]),
        replace(weights, w_o=weights.w_o[order], w_d=weights.w_d[order]),
    ):
        found = switchhead_attention(x, x, moved, mixture, CAUSAL)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    wrong = replace(weights, w_v=weights.w_v[order])
    assert not torch.allclose(switchhead_attention(x, x, wrong, mixture, CAUSAL), expected)


@pytest.mark.parametrize("name", MIXTURES)
def test_later_tokens_change_nothing(name: str) -> None:
    mixture = MIXTURES[name]
    weights, x = drawn(mixture), normal(B, T, D)
    before = switchhead_attention(x, x, weights, mixture, CAUSAL)
    later = x.clone()
    later[:, 4:] = normal(B, T - 4, D, seed=3)
    after = switchhead_attention(later, later, weights, mixture, CAUSAL)
    torch.testing.assert_close(after[:, :4], before[:, :4], rtol=1e-13, atol=1e-14)
    # rows of an expert are multiplied together, so that roundings may differ; choices do not
    for router in (weights.w_s, weights.w_d):
        if router is not None:
            sizes = {"heads": mixture.heads, "k": mixture.k}
            ours, theirs = (route(tokens, router, **sizes).index for tokens in (x, later))
            assert torch.equal(ours[:, :4], theirs[:, :4])
    assert not torch.allclose(after[:, 4:], before[:, 4:])


def test_gradients_of_everything() -> None:
    for mixture in (
        Mixture(2, 3, 2),
        Mixture(2, 3, 1, ("q", "k", "v", "o")),
        Mixture(2, 3, 2, shared=True),
    ):
        weights, x, y = drawn(mixture), normal(1, 3, D), normal(1, 4, D, seed=2)
        names = [n for n in Weights.__slots__ if getattr(weights, n) is not None]
        leaves = [getattr(weights, n).requires_grad_() for n in names]

        def layer(
            x: Tensor, y: Tensor, *leaves: Tensor, mixture: Mixture = mixture, names: Any = names
        ) -> Tensor:
            given = dict.fromkeys(Weights.__slots__) | dict(zip(names, leaves, strict=True))
            return switchhead_attention(x, y, Weights(**given), mixture)

        inputs = (x.requires_grad_(), y.requires_grad_(), *leaves)
        assert torch.autograd.gradcheck(layer, inputs, fast_mode=True)
    # an expert that nobody chose learns nothing, nor does its row of the router
    mixture = Mixture(1, 3, 1)
    weights, x = drawn(mixture), normal(1, 2, D)
    routes = keys_values(x, weights, mixture).routes
    assert routes is not None
    unused = sorted({0, 1, 2} - set(routes.index.flatten().tolist()))
    assert unused and weights.w_s is not None
    weights.w_s.requires_grad_()
    switchhead_attention(x, x, weights, mixture).sum().backward()
    assert weights.w_s.grad is not None and not weights.w_s.grad[unused].any()


def test_seeds_and_dropout() -> None:
    mixture = Mixture(2, 5, 2, dropout=0.5)
    weights, x = drawn(mixture), normal(B, T, D)
    run = partial(switchhead_attention, x, x, weights, mixture, CAUSAL)
    seed = torch.tensor([3])
    assert torch.equal(run(seed=seed), run(seed=seed))
    assert not torch.allclose(run(seed=seed), run(seed=seed + 1))
    # without a seed nothing is dropped
    plain = switchhead_attention(x, x, weights, replace(mixture, dropout=0.0), CAUSAL)
    assert torch.equal(run(), plain)
    source, target = (
        keys_values(x, weights, mixture, seed=seed),
        destination(x, weights, mixture, seed),
    )
    assert source.routes is not None and target is not None
    same = route(x, weights.w_s, heads=2, k=2, dropout=0.5, seed=seed)  # type: ignore[arg-type]
    assert torch.equal(source.routes.index, same.index)
    other = route(x, weights.w_d, heads=2, k=2, dropout=0.5, seed=seed)  # type: ignore[arg-type]
    assert not torch.equal(target.index, other.index)  # sides draw for themselves


def test_experts_without_a_router_are_refused() -> None:
    mixture = Mixture(2, 5, 2)
    weights, x = drawn(mixture), normal(B, T, D)
    for name in ("w_s", "w_d"):
        with pytest.raises(UnsupportedCall, match="no routes"):
            switchhead_attention(x, x, replace(weights, **{name: None}), mixture)


def test_autocast_reaches_the_experts() -> None:
    mixture = Mixture(2, 5, 2)
    weights = drawn(mixture)
    narrow = Weights(*(getattr(weights, n).float() for n in Weights.__slots__))
    x = normal(B, T, D).float()
    exact = switchhead_attention(x.double(), x.double(), weights, mixture, CAUSAL)
    with torch.autocast("cpu", torch.bfloat16):
        found = switchhead_attention(x, x, narrow, mixture, CAUSAL)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() < 0.03 * exact.abs().max()


# ---------------------------------------------------------------- ordinary attention, exactly


def ordinary(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor) -> Tensor:
    q, k, v = (torch.einsum("btd,hdc->bhtc", x, w) for w in (w_q, w_k, w_v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return torch.einsum("bhtc,hcd->btd", out, w_o)


def heads_of(heads: int, width: int = C) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (normal(heads, D, width, seed=i) / D**0.5 for i in (1, 2, 3))
    return q, k, v, normal(heads, width, D, seed=4) / width**0.5


def test_one_expert_with_a_router_of_zeros_is_ordinary() -> None:
    x, (w_q, w_k, w_v, w_o) = normal(B, T, D), heads_of(3)
    weights = Weights(w_q, w_k, w_v, 2 * w_o, None, torch.zeros(3, D, dtype=WIDE))
    found = switchhead_attention(x, x, weights, Mixture(3, 1, 1, ("o",)), CAUSAL)
    torch.testing.assert_close(found, ordinary(x, w_q, w_k, w_v, w_o), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_equal_experts_are_ordinary_times_a_number(k: int) -> None:
    x, (w_q, w_k, w_v, w_o) = normal(B, T, D), heads_of(3)
    zeros = torch.zeros(3 * 5, D, dtype=WIDE)
    copies = (w.repeat_interleave(5, 0) for w in (w_v, w_o))
    weights = Weights(w_q, w_k, *copies, zeros, zeros)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = switchhead_attention(leaf, leaf, weights, Mixture(3, 5, k), CAUSAL)
    expected = ordinary(other, w_q, w_k, w_v, w_o)
    torch.testing.assert_close(found, (k / 2) ** 2 * expected, rtol=1e-12, atol=1e-13)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert leaf.grad is not None and other.grad is not None
    torch.testing.assert_close(leaf.grad, (k / 2) ** 4 * other.grad, rtol=1e-11, atol=1e-12)


def all_open(batch: int, length: int, heads: int, experts: int) -> Routes:
    index = torch.arange(experts, dtype=torch.int32).expand(batch, length, heads, -1)
    ones = torch.ones(index.shape, dtype=WIDE)
    return Routes(index, ones, ones)


def with_open_gates(x: Tensor, weights: Weights, mixture: Mixture, scale: float) -> Tensor:
    routes = all_open(*x.shape[:2], mixture.heads, mixture.experts)
    written = keys_values(x, weights, mixture, routes=routes)
    return attend(x, written, weights, mixture, replace(CAUSAL, scale=scale), routes=routes)


def test_blocks_of_channels_are_ordinary() -> None:
    """Expert e keeps block e of the channels of its head, on both sides."""
    x, (w_q, w_k, w_v, w_o) = normal(B, T, D), heads_of(2, 6)
    block = torch.arange(6).view(3, 2)
    kept = torch.zeros(3, 6, dtype=WIDE).scatter_(1, block, 1.0)
    v = (w_v.unsqueeze(1) * kept[None, :, None]).flatten(0, 1)
    o = (w_o.unsqueeze(1) * kept[None, :, :, None]).flatten(0, 1)
    weights = Weights(w_q, w_k, v, o, None, None)
    found = with_open_gates(x, weights, Mixture(2, 3, 3), 6**-0.5)
    torch.testing.assert_close(found, ordinary(x, w_q, w_k, w_v, w_o), rtol=1e-12, atol=1e-13)


def test_heads_that_attend_alike_merge() -> None:
    """Values of the group's heads lie beside each other: heads of values are wider than of keys."""
    x, (w_q, w_k, w_v, w_o) = normal(B, T, D), heads_of(6)
    alike_q, alike_k = (w[::3].repeat_interleave(3, 0) for w in (w_q, w_k))
    v = torch.zeros(2, 3, D, 3, C, dtype=WIDE)
    o = torch.zeros(2, 3, 3, C, D, dtype=WIDE)
    for e in range(3):
        v[:, e, :, e] = w_v.view(2, 3, D, C)[:, e]
        o[:, e, e] = w_o.view(2, 3, C, D)[:, e]
    weights = Weights(w_q[::3], w_k[::3], v.view(6, D, 3 * C), o.view(6, 3 * C, D), None, None)
    found = with_open_gates(x, weights, Mixture(2, 3, 3), C**-0.5)
    expected = ordinary(x, alike_q, alike_k, w_v, w_o)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_experts_that_are_not_blocks_have_cross_terms() -> None:
    x, (w_q, w_k, w_v, w_o) = normal(B, T, D), heads_of(6)
    weights = Weights(w_q[::3], w_k[::3], w_v, w_o, None, None)
    found = with_open_gates(x, weights, Mixture(2, 3, 3), C**-0.5)
    alike = (w[::3].repeat_interleave(3, 0) for w in (w_q, w_k))
    expected = ordinary(x, *alike, w_v, w_o)
    assert (found - expected).norm() > 0.5 * expected.norm()


# ---------------------------------------------------------------- caches and positions


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("turned", [False, True])
def test_steps_over_a_cache_are_the_whole(name: str, turned: bool) -> None:
    mixture = MIXTURES[name]
    weights, x = drawn(mixture), normal(B, S, D)

    def turn(first: int, last: int) -> Any:
        return partial(rotary, positions=torch.arange(first, last), share=0.8) if turned else None

    whole = turn(0, S)
    rotate = (whole, whole) if turned else None
    expected = switchhead_attention(x, x, weights, mixture, CAUSAL, rotate=rotate)
    cache, found, first = None, [], 0
    for last in (4, 5, 6, S):
        new = x[:, first:last]
        here = turn(first, last)
        written = keys_values(new, weights, mixture, rotate=here)
        if cache is not None:
            pairs = ((cache.k, written.k), (cache.v, written.v))
            written = Written(*(torch.cat(pair, 2) for pair in pairs))
        cache = written
        routes = destination(new, weights, mixture)
        found.append(attend(new, cache, weights, mixture, OFFSET, rotate=here, routes=routes))
        first = last
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-12, atol=1e-13)
    assert cache is not None and cache.k.shape == cache.v.shape == (B, mixture.heads, S, C)


def test_rotation_sees_distances_alone() -> None:
    mixture = Mixture(2, 5, 2)
    weights, x = drawn(mixture), normal(B, T, D)
    found = []
    for first in (0, 1000):
        turn = partial(rotary, positions=torch.arange(first, first + T), share=0.8)
        found.append(switchhead_attention(x, x, weights, mixture, CAUSAL, rotate=(turn, turn)))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-11)
    plain = switchhead_attention(x, x, weights, mixture, CAUSAL)
    assert not torch.allclose(found[0], plain)


def test_rotation_is_complex_multiplication_and_leaves_the_rest() -> None:
    x = normal(1, 2, T, 11)
    found = rotary(x, torch.arange(T), share=0.5, base=100.0)
    assert torch.equal(found[..., 4:], x[..., 4:])  # half of 11, made even
    angles = torch.arange(T)[:, None] * torch.tensor([1.0, 0.1], dtype=WIDE)
    turned = torch.complex(x[..., :2], x[..., 2:4]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(found[..., :4], torch.cat([turned.real, turned.imag], -1))


@pytest.mark.parametrize("rows", [S, T, 1])
def test_relative_positions(rows: int) -> None:
    """The last rows of a longer context."""
    mixture, width = Mixture(2, 5, 2), 12
    weights, x = drawn(mixture), normal(B, S, D)
    w_p = normal(2, width, C)
    program, _ = programs(Program.parse(OFFSET.program), 0, 0)
    scores = Scores(program, offsets=relative_positions(w_p, rows, S, S - rows))
    found = switchhead_attention(x[:, S - rows :], x, weights, mixture, scores)
    expected = torch.empty(B, 2, rows, S, dtype=WIDE)
    q = torch.einsum("btd,hdc->bhtc", x[:, S - rows :], weights.w_q)
    k = torch.einsum("btd,hdc->bhtc", x, weights.w_k)
    for i in range(rows):
        for j in range(S):
            n = i + S - rows - j
            angles = n / 10000 ** (torch.arange(0, width, 2, dtype=WIDE) / width)
            p = torch.einsum("d,hdc->hc", torch.cat([angles.sin(), angles.cos()]), w_p)
            expected[:, :, i, j] = ((q[:, :, i] * (k[:, :, j] + p)).sum(-1)) / C**0.5
    allowed = torch.ones(rows, S).tril(S - rows).bool()
    p = expected.masked_fill(~allowed, -torch.inf).softmax(-1)
    mixed = keys_values(x, weights, mixture).v
    routes = destination(x[:, S - rows :], weights, mixture)
    assert routes is not None
    y = expert_merge(p @ mixed, weights.w_o, routes.index, routes.gate, experts=5)
    torch.testing.assert_close(found, y, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------- operations

# width, heads, experts, active, head width, tokens: millions of multiply-adds of a layer
COUNTED = {
    "RoPE 45M": ((412, 2, 5, 3, 64, 512), 287.7),
    "RoPE 243M": ((1024, 4, 4, 2, 100, 1024), 3390.6),
}


@pytest.mark.parametrize("name", COUNTED)
def test_operations_are_those_of_the_exact_count(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    register_flops()
    experts.register_flops()
    (width, h, e, k, c, length), expected = COUNTED[name]
    with torch.device("meta"):
        shapes = ((h, width, c), (h, width, c), (h * e, width, c), (h * e, c, width))
        weights = Weights(
            *(torch.empty(s) for s in shapes), torch.empty(h * e, width), torch.empty(h * e, width)
        )
        x = torch.empty(1, length, width)
        with FlopCounterMode(display=False) as counter:
            switchhead_attention(x, x, weights, Mixture(h, e, k), CAUSAL)
    assert round(counter.get_total_flops() / 2e6, 1) == expected


def test_operators_are_what_the_layer_calls() -> None:
    """One attention, a projection and a merge by experts: what a rewritten model has to hold."""
    mixture = Mixture(2, 5, 2)
    weights, x = drawn(mixture), normal(B, T, D)

    def layer(x: Tensor) -> Tensor:
        return switchhead_attention(x, x, weights, mixture, CAUSAL)

    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(layer)(x)
    targets = [node.target for node in graph.graph.nodes]
    for operator in (attention, expert_project, expert_merge):
        assert targets.count(operator) == 1
    torch.testing.assert_close(graph(x), layer(x))


def test_compiles_whole() -> None:
    mixture = Mixture(2, 5, 2)
    weights, x = drawn(mixture), normal(B, T, D).requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return switchhead_attention(x, x, weights, mixture, CAUSAL)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found, expected = compiled(x), layer(x)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected))
    torch.testing.assert_close(ours, theirs)
