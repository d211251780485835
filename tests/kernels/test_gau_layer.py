"""A gated attention unit: its equations, its start, generation from a state, conversion."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu, softmax

from attn_compiler.errors import BadOption, UnsupportedCall
from attn_compiler.kernels import gau_convert as convert
from attn_compiler.kernels.gau import reference
from attn_compiler.kernels.gau_layer import (
    GauForm,
    GauParameters,
    fresh,
    gau_layer,
    relative,
    rotated,
)
from attn_compiler.kernels.gau_state import GauState, empty_state, gau_keep, gau_step

TIGHT = {"rtol": 1e-11, "atol": 1e-12}
WIDTH, EXPANDED, S = 6, 13, 4
LIKE = torch.empty(0, dtype=torch.float64)


def trained(chunk: int | None, width: int = WIDTH, expanded: int = EXPANDED) -> GauParameters:
    """Weights of which every part matters."""
    draw = torch.Generator().manual_seed(0)
    unit = fresh((width, expanded, S), chunk=chunk, generator=draw, like=LIKE)

    def shaken(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=draw, dtype=x.dtype) * 0.7

    return GauParameters(**{f.name: shaken(getattr(unit, f.name)) for f in fields(unit)})


def tokens(length: int = 23, width: int = WIDTH) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(2, length, width, generator=draw, dtype=torch.float64)


# ---------------------------------------------------------------- the equations


def turned(x: Tensor) -> Tensor:
    """RoPE by complex numbers: channels c and c + s / 2 are one."""
    half = x.shape[-1] // 2
    speeds = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * speeds
    found = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angles)
    return torch.cat((found.real, found.imag), -1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk", [5, None])
def test_the_layer_is_its_equations(chunk: int | None, causal: bool) -> None:
    x, w = tokens(), trained(chunk)
    uvz = silu(x @ w.w_uvz + w.b_uvz)
    u, v, z = uvz[..., :13], uvz[..., 13:26], uvz[..., 26:]
    parts = [turned(w.gamma[n] * z + w.beta[n]) for n in range(len(w.gamma))]
    i = torch.arange(23)
    assert w.rel_bias is not None
    if chunk is None:  # <rope(a)_i, rope(a')_j>, positions by hand
        left, right = (turned(a.expand(1, 23, -1))[0] for a in w.rel_bias)
        bias = left @ right.T
        table = torch.cat((bias[:, 0].flip(0), bias[0, 1:]))
        assert torch.allclose(table[i - i[:, None] + 22], bias, **TIGHT)
    else:
        table = w.rel_bias
    rest = parts[2:] or [None, None]
    mixed, _ = reference(
        parts[0], parts[1], v, *rest, None, table, None, None, None,
        chunk=chunk, causal=causal, scale=0.5, scale_mode="rowcount", inside=False, dropout=0.0,
    )  # fmt: skip
    found = gau_layer(x, w, GauForm(chunk=chunk, causal=causal))
    assert torch.allclose(found, (u * mixed) @ w.w_o + w.b_o, **TIGHT)


@pytest.mark.parametrize("chunk", [5, None])
def test_a_shift_of_all_positions_changes_nothing(chunk: int | None) -> None:
    w, z = trained(chunk), tokens(11, S)
    here, there = (rotated(z, torch.arange(n, n + 11)) for n in (0, 40))
    assert torch.allclose(here @ here.mT, there @ there.mT, **TIGHT)
    form = GauForm(chunk=chunk, causal=True)
    short, long = relative(w, form, 7), relative(w, form, 23)
    assert short is not None and long is not None
    middle = long.shape[0] // 2 - short.shape[0] // 2
    assert torch.allclose(short, long[middle : middle + short.shape[0]], **TIGHT)


def test_gradients_reach_every_parameter() -> None:
    for chunk in (5, None):
        form, x = GauForm(chunk=chunk, causal=True), tokens(7)
        weights = trained(chunk)
        names = [f.name for f in fields(weights)]
        leaves = [getattr(weights, n).requires_grad_() for n in names]

        def layer(*given: Tensor, x: Tensor = x, form: GauForm = form) -> Tensor:
            return gau_layer(x, GauParameters(*given), form)

        assert torch.autograd.gradcheck(layer, leaves)
        grads = torch.autograd.grad(layer(*leaves).square().sum(), leaves)
        assert all(g.abs().max() > 0 for g in grads)


def test_dropout_is_a_function_of_the_seed() -> None:
    form, w, x = GauForm(chunk=5, causal=True, dropout=0.4), trained(5), tokens()
    one, same, other = (gau_layer(x, w, form, seed=torch.tensor([n])) for n in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)


# ---------------------------------------------------------------- a fresh start


def test_fresh_weights() -> None:
    unit = fresh((300, 600, 128), chunk=256, generator=torch.Generator().manual_seed(0))
    shapes = {f.name: tuple(getattr(unit, f.name).shape) for f in fields(unit)}
    assert shapes == {
        "w_uvz": (300, 1328), "b_uvz": (1328,), "gamma": (4, 128), "beta": (4, 128),
        "w_o": (600, 300), "b_o": (300,), "rel_bias": (511,),
    }  # fmt: skip
    for name, shape in shapes.items():
        x, count = getattr(unit, name), torch.Size(shape).numel()
        if name == "gamma":
            assert (x == 1).all()
        elif name in ("b_uvz", "beta", "b_o"):
            assert not x.any()
        else:  # five standard errors; 0.02 at a width of 768
            std = {"w_uvz": 0.032, "w_o": 0.0226274, "rel_bias": 0.3}[name]
            assert abs(x.mean()) < 5 * std / count**0.5
            assert abs(x.std() / std - 1) < 5 / (2 * count) ** 0.5


def test_fresh_positions_are_as_large_with_chunks_as_without() -> None:
    draw = torch.Generator().manual_seed(0)
    for chunk in (200, None):
        units = [fresh((6, 13, 64), chunk=chunk, generator=draw, like=LIKE) for _ in range(50)]
        form = GauForm(chunk=chunk, causal=True)
        table = torch.stack([relative(u, form, 200) for u in units])
        assert abs(table.std() / 0.3 - 1) < 0.1


def test_fresh_weights_without_chunks() -> None:
    unit = fresh((6, 13, 4), chunk=None, biases=False, like=torch.empty(0, dtype=torch.bfloat16))
    assert unit.gamma.shape == unit.beta.shape == unit.rel_bias.shape == (2, 4)
    assert unit.b_uvz is None and unit.b_o is None and unit.w_o.dtype == torch.bfloat16
    assert fresh((6, 13, 3), chunk=None, relative_bias=False).rel_bias is None
    with pytest.raises(BadOption, match="s=3"):
        fresh((6, 13, 3), chunk=None)
    assert gau_layer(tokens().bfloat16(), unit, GauForm(chunk=None, causal=False)).isfinite().all()


def test_refusals_of_the_layer() -> None:
    with pytest.raises(UnsupportedCall, match="2 rows and not 4"):
        gau_layer(tokens(), trained(None), GauForm(chunk=5, causal=True))
    odd = fresh((6, 13, 3), chunk=5, like=LIKE)
    with pytest.raises(UnsupportedCall, match="in pairs"):
        gau_layer(tokens(), odd, GauForm(chunk=5, causal=True))
    gau_layer(tokens(), odd, GauForm(chunk=5, causal=True, rope=False))


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("chunk", "mode", "inside"),
    [
        (4, "rowcount", False),
        (4, "chunk", True),
        (1, "rowcount", False),
        (50, "fixed(7)", False),
        (None, "rowcount", True),
    ],
)
def test_steps_are_the_rows_of_the_whole(
    chunk: int | None, mode: str, inside: bool, padded: bool
) -> None:
    form = GauForm(chunk=chunk, causal=True, scale_mode=mode, inside=inside)
    w, x = trained(chunk), tokens()
    draw = torch.Generator().manual_seed(2)
    valid = torch.rand(2, 23, generator=draw) > 0.3 if padded else None
    whole = gau_layer(x, w, form, valid=valid)
    for prompt in range(23):  # a prompt of every length, then token by token
        state = empty_state(2, w, form, capacity=None if chunk else 23)
        size, rows, start = state.nbytes, [], 0
        for number in [prompt] * (prompt > 0) + [1] * (23 - prompt):
            part = slice(start, start + number)
            count = None if valid is None else valid[:, part]
            row, state = gau_step(x[:, part], w, form, state, valid=count)
            rows.append(row)
            start += number
            assert state.nbytes == size and state.length == start
        assert torch.allclose(torch.cat(rows, 1), whole, **TIGHT)


@pytest.mark.parametrize("chunk", [4, None])
def test_tokens_that_are_only_kept(chunk: int | None) -> None:
    """The state is that of a step, also in the middle of a chunk, and no weights are made."""
    form = GauForm(chunk=chunk, causal=True)
    w, x = trained(chunk), tokens()
    valid = torch.rand(2, 23, generator=torch.Generator().manual_seed(2)) > 0.3
    kept, read = (empty_state(2, w, form, capacity=None if chunk else 23) for _ in range(2))
    for part in (slice(0, 3), slice(3, 17), slice(17, 23)):
        _, read = gau_step(x[:, part], w, form, read, valid=valid[:, part])
        kept = gau_keep(x[:, part], w, form, kept, valid=valid[:, part])
        for name in GauState.__slots__:
            assert torch.equal(*(torch.as_tensor(getattr(s, name)) for s in (kept, read))), name


def test_a_state_is_of_float32_and_the_open_chunk() -> None:
    unit = fresh((64, 128, 16), chunk=32, like=torch.empty(0, dtype=torch.bfloat16))
    state = empty_state(3, unit, GauForm(chunk=32, causal=True))
    assert state.memory.dtype == torch.float32 and state.v.dtype == torch.bfloat16
    assert state.nbytes == 3 * (4 * 16 * 128 + 32 * (2 * (16 + 16 + 128) + 1) + 8)


@pytest.mark.parametrize(
    ("form", "capacity", "message"),
    [
        (GauForm(chunk=4, causal=False), None, "after it"),
        (GauForm(chunk=4, causal=True, scale_mode="seqlen"), None, "not known"),
        (GauForm(chunk=4, causal=True, scale_mode="valid"), None, "not known"),
        (GauForm(chunk=4, causal=True), 9, "no chunks"),
        (GauForm(chunk=None, causal=True), None, "no chunks"),
    ],
)
def test_no_state(form: GauForm, capacity: int | None, message: str) -> None:
    with pytest.raises(UnsupportedCall, match=message):
        empty_state(2, trained(form.chunk), form, capacity=capacity)


def test_a_state_that_is_full() -> None:
    form, w = GauForm(chunk=None, causal=True), trained(None)
    _, state = gau_step(tokens(5), w, form, empty_state(2, w, form, capacity=6))
    with pytest.raises(UnsupportedCall, match="room for 6"):
        gau_step(tokens(2), w, form, state)


# ---------------------------------------------------------------- conversion


def test_linear_values_and_an_open_gate() -> None:
    x = tokens()
    into, out = trained(None).w_o.mT, trained(5).w_o
    left, right = convert.linear_values(into, out)
    assert torch.allclose(silu(x @ left) @ right, x @ into @ out, **TIGHT)
    assert abs(silu(torch.tensor(convert.OPEN_GATE, dtype=torch.float64)) - 1) < 1e-15


@pytest.mark.parametrize("chunk", [5, None])
def test_a_unit_that_starts_as_attention(chunk: int | None) -> None:
    x, unit, form = tokens(), trained(chunk), GauForm(chunk=chunk, causal=True)
    draw = torch.Generator().manual_seed(5)
    q_and_k = torch.randn(WIDTH, 10, generator=draw, dtype=torch.float64)
    values = torch.randn(WIDTH, WIDTH, generator=draw, dtype=torch.float64)
    covariance = x.flatten(0, 1).mT @ x.flatten(0, 1) / 46
    found = convert.attention_unit(unit, q_and_k, values, covariance)
    a = convert.mixing_map(x, found, form)
    assert torch.allclose(gau_layer(x, found, form), a @ x @ values + unit.b_o, **TIGHT)
    # Z has the most of the teacher's queries and keys that four directions can have
    z = x @ found.w_uvz[:, 2 * EXPANDED :]
    best = torch.linalg.svdvals((x @ q_and_k).flatten(0, 1))[:S].square().sum()
    assert torch.allclose(z.square().sum(), best)
    assert (found.gamma == 1).all() and not found.beta.any()


def test_few_channels_of_values_are_the_best() -> None:
    x = tokens()
    unit = trained(None, expanded=5)  # two channels
    values = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    covariance = x.flatten(0, 1).mT @ x.flatten(0, 1) / 46
    found = convert.attention_unit(unit, values, values, covariance)
    v = silu(x @ found.w_uvz[:, 5:10]) @ found.w_o
    exact = x @ values
    lost = torch.linalg.svdvals(exact.flatten(0, 1))[2:].square().sum()
    assert torch.allclose((v - exact).square().sum(), lost)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk", [5, 50])
def test_a_unit_that_starts_as_a_gated_net(chunk: int, causal: bool) -> None:
    x, unit = tokens(), trained(chunk)
    draw = torch.Generator().manual_seed(5)
    form = GauForm(chunk=chunk, causal=causal, scale_mode="fixed(1)")
    for f in (6, 11):
        gate, up = (torch.randn(WIDTH, f, generator=draw, dtype=torch.float64) for _ in range(2))
        down = torch.randn(f, WIDTH, generator=draw, dtype=torch.float64)
        found = gau_layer(x, convert.glu_unit(unit, gate, up, down), form)
        values = x @ up if f == 6 else silu(x @ up)  # 2 f fits, or f alone
        assert torch.allclose(found, (silu(x @ gate) * values) @ down, **TIGHT)


def test_refusals_of_conversion() -> None:
    unit, wide = trained(5), torch.zeros(WIDTH, 14, dtype=torch.float64)
    square = torch.eye(WIDTH, dtype=torch.float64)
    with pytest.raises(BadOption, match="width 14"):
        convert.glu_unit(unit, wide, wide, wide.mT)
    with pytest.raises(BadOption, match="table"):
        convert.glu_unit(trained(None), wide, wide, wide.mT)
    with pytest.raises(BadOption, match="gate to open"):
        convert.attention_unit(replace(unit, b_uvz=None), square, square, square)
    with pytest.raises(BadOption, match="3 columns"):
        convert.attention_unit(unit, square[:, :3], square, square)


def test_targets_of_distillation() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 7, 5, generator=draw, dtype=torch.float64)
    v = torch.randn(2, 3, 5, 4, generator=draw, dtype=torch.float64)
    p = softmax(scores, -1)
    target = convert.mean_map(p, v)
    assert torch.allclose(target.sum(-1), torch.ones(2, 7, dtype=torch.float64))
    assert torch.allclose(convert.mean_map(p, v * torch.tensor([0.0, 1, 0]).view(3, 1, 1)), p[:, 1])
    assert torch.allclose(convert.mean_map(p, torch.ones_like(v)), p.mean(1))
    student = torch.randn(2, 7, 6, generator=draw, dtype=torch.float64)
    teacher = 3 * student + torch.randn(2, 7, 6, generator=draw, dtype=torch.float64)
    best = convert.gain(teacher, student)
    losses = [(teacher - best * f * student).square().sum() for f in (0.99, 1, 1.01)]
    assert min(losses) == losses[1]


def test_a_map_can_be_trained_towards_a_teacher() -> None:
    form, unit = GauForm(chunk=5, causal=True), trained(5)
    gamma, x = unit.gamma.clone().requires_grad_(), tokens(11)
    target = torch.eye(11, dtype=torch.float64).expand(2, -1, -1)

    def loss() -> Tensor:
        return (convert.mixing_map(x, replace(unit, gamma=gamma), form) - target).square().mean()

    before = loss()
    (grad,) = torch.autograd.grad(before, gamma)
    with torch.no_grad():
        gamma -= 1e-3 * grad / grad.norm()
    assert loss() < before
