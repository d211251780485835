"""Weights of two gated attention units out of a trained block, by what it computes on data.

    attention   Z reads the main directions of queries and keys; A is fitted to the mean map of the
                heads; values and outputs by least squares for y = A x W
    net         U and V are those of its channels that matter most, W_o by least squares

The parts are those of `kernels.gau_convert`; this puts them together. It changes the function:
one map of relu^2 stands for several of softmax, so a conversion is where training starts.

Source: the steps are derived from the units' equations; least squares with a hold: `conversion`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from attn_compiler.kernels.gau_convert import (
    OPEN_GATE,
    Counted,
    attention_unit,
    glu_unit,
    mixed,
    mixing_map,
    with_values,
)
from attn_compiler.kernels.gau_layer import GauForm, GauParameters, projected
from attn_compiler.variants.conversion.regression import Products, regressed

# of the fit of A: steps, the highest rate relative to the size of a weight, sizes of Z that are
# tried, the longest sequence where a prefix is one too
_STEPS, _RATE, _SIZES, _LONGEST = 120, 0.03, (0.05, 0.25, 0.5, 1.0, 2.0), 512
# root mean square of what goes into a SiLU that is to be nearly linear: silu(z) is z / 2 + z^2 / 4
_SMALL = 0.125
# silu(k x) / k is nearly the activation
_SHARPNESS = {"gelu": 1.702, "gelu_tanh": 1.702, "gelu_sigmoid": 1.702, "relu": 8.0}
_KEPT_BACK = 4


C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Taught:
    """One call of a branch of the trained block.

    Attributes:
        x: [B, T, D] what it was given.
        y: [B, T, D] what it computed.
        seen: which tokens count, and of which document they are: [B, T] each, or None.
        target: [B, T, T] the mean map of an attention's heads; None of a net.
    """

    x: Tensor
    y: Tensor
    seen: Counted = (None, None)
    target: Tensor | None = None

    def rows(self, *values: Tensor) -> list[Tensor]:
        """Values [B, T, n] of the tokens that count, [N, n]."""
        valid = self.seen[0]
        return [v.flatten(0, 1) if valid is None else v[valid] for v in values]


@dataclass(frozen=True, slots=True)
class Heads:
    """Weights of a trained attention.

    Attributes:
        q_and_k: [D, n] all columns of W_q and W_k.
        value_output: [D, D] the sum over heads of W_v W_o.
    """

    q_and_k: Tensor
    value_output: Tensor


@dataclass(frozen=True, slots=True)
class Net:
    """Weights of a trained feed-forward net: [D, f], [f] or None, [f, D], [D] or None.

    Attributes:
        gate, up: gate is None where it has none.
        activation: of the gate's results, or of those of `up`.
    """

    up: Tensor
    b_up: Tensor | None
    down: Tensor
    b_down: Tensor | None
    activation: str
    gate: Tensor | None = None
    b_gate: Tensor | None = None


def kept_back(calls: Sequence[C]) -> tuple[list[C], list[C]]:
    """Those to fit, and every fourth or the last of a few to choose and judge by; none of one."""
    step = min(_KEPT_BACK, len(calls))
    kept = [c for i, c in enumerate(calls) if step > 1 and i % step == step - 1]
    return [c for i, c in enumerate(calls) if step <= 1 or i % step != step - 1], kept


def judged(calls: Sequence[C]) -> Sequence[C]:
    """Those that were kept back, or all where none were."""
    return kept_back(calls)[1] or calls


def missed(calls: Sequence[Taught], outputs: Sequence[Tensor]) -> float:
    """Squares of what outputs miss, over those of what there is, tokens that count alone."""
    off, whole = 0.0, torch.finfo(torch.float64).tiny
    for call, output in zip(calls, outputs, strict=True):
        wanted, got = (x.double() for x in call.rows(call.y, output))
        off, whole = (
            off + float((wanted - got).square().sum()),
            whole + float(wanted.square().sum()),
        )
    return off / whole


# ---------------------------------------------------------------- attention


def attention_start(
    like: GauParameters, form: GauForm, heads: Heads, calls: Sequence[Taught]
) -> GauParameters:
    """The unit in the place of attention.

    Args:
        like: a unit of its sizes, in float32 or wider.
        form: what it computes.
        heads: the trained weights.
        calls: of the trained attention.

    Raises:
        BadOption: queries and keys have fewer columns than s.
    """
    covariance = _covariance([call.rows(call.x)[0] for call in calls])
    unit = attention_unit(like, heads.q_and_k, heads.value_output, covariance.to(like.w_o))
    unit = _fitted_map(replace(unit, rel_bias=_flat(unit)), form, kept_back(calls)[0], covariance)

    def what_is_mixed(call: Taught) -> Tensor:
        return mixed(call.x, call.x, unit, form, call.seen)

    weights, normal = _regressed(what_is_mixed, calls, heads.value_output)
    unit = with_values(unit, weights[:-1].to(like.w_o), normal[:-1, :-1].to(like.w_o))
    return replace(unit, b_o=weights[-1].to(like.w_o))


def _regressed(
    features: Callable[[Taught], Tensor], calls: Sequence[Taught], start: Tensor
) -> tuple[Tensor, Tensor]:
    """W [n, D] with a last row for 1, and the mean square of features and 1."""
    sums: list[Products | None] = []
    for group in kept_back(calls):
        total: Products | None = None
        for call in group:
            x, y = call.rows(features(call), call.y)
            products = Products.of(pad(x, (0, 1), value=1.0), y)
            total = products if total is None else total + products
        sums.append(total)
    fitted, kept = sums
    assert fitted is not None  # there is a call
    normal = fitted.normal if kept is None else fitted.normal + kept.normal
    found = regressed(fitted, kept, pad(start, (0, 0, 0, 1)))
    return found, normal / normal[-1, -1].clamp_min(1)


def _covariance(rows: Sequence[Tensor]) -> Tensor:
    count = sum(len(x) for x in rows)
    total: Tensor = torch.stack([x.double().mT @ x.double() for x in rows]).sum(0)
    return total / max(count, 1)


def _flat(unit: GauParameters) -> Tensor:
    """A bias by distance that is 1: without scores, A is the mean over the keys that are seen."""
    table = unit.rel_bias
    assert table is not None
    if table.dim() == 1:
        return torch.ones_like(table)
    slowest = torch.zeros_like(table)
    slowest[:, table.shape[1] // 2 - 1] = 1
    return slowest


def _fitted_map(
    unit: GauParameters, form: GauForm, calls: Sequence[Taught], covariance: Tensor
) -> GauParameters:
    """A fitted to the targets: the size of Z that is best, then descent."""
    expanded = unit.sizes[1]
    z = unit.w_uvz[:, 2 * expanded :]
    large = (z.mT @ covariance.to(z) @ z).diagonal().mean().sqrt()
    data = [_part(call, form.causal) for call in calls]

    def sized(size: float) -> GauParameters:
        wide = unit.w_uvz.clone()
        wide[:, 2 * expanded :] *= size / large.clamp_min(torch.finfo(large.dtype).tiny)
        return replace(unit, w_uvz=wide)

    with torch.no_grad():
        start = min((sized(n) for n in _SIZES), key=lambda u: float(_map_loss(u, form, data)))
    return _descended(start, form, data)


def _part(call: Taught, causal: bool) -> Taught:
    """The first tokens alone, where they have the map that they have in the whole."""
    assert call.target is not None
    first = slice(0, _LONGEST if causal else None)
    valid, documents = (None if t is None else t[:, first] for t in call.seen)
    target = call.target[:, first, first]
    return Taught(call.x[:, first], call.y[:, first], (valid, documents), target)


def _map_loss(unit: GauParameters, form: GauForm, calls: Sequence[Taught]) -> Tensor:
    """|A - target|^2 / |target|^2, over rows that count."""
    off = whole = unit.w_o.new_zeros(())
    for call in calls:
        assert call.target is not None
        found, wanted = call.rows(mixing_map(call.x, unit, form, call.seen), call.target)
        off, whole = off + (found - wanted).square().sum(), whole + wanted.square().sum()
    return off / whole.clamp_min(torch.finfo(whole.dtype).tiny)


def _descended(unit: GauParameters, form: GauForm, calls: Sequence[Taught]) -> GauParameters:
    """Z, its scales and offsets and the bias by distance, after descent; the best that was met."""
    expanded = unit.sizes[1]
    assert unit.b_uvz is not None
    parts = {
        "w": unit.w_uvz[:, 2 * expanded :], "b": unit.b_uvz[2 * expanded :],
        "gamma": unit.gamma, "beta": unit.beta, "rel_bias": unit.rel_bias,
    }  # fmt: skip
    leaves = {n: p.detach().clone().requires_grad_() for n, p in parts.items() if p is not None}
    size = float(leaves["w"].detach().square().mean().sqrt())
    rates = [(p, _RATE * (size if n == "w" else 1.0)) for n, p in leaves.items()]
    optimiser = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in rates])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
    best, least, many = unit, float("inf"), min(_KEPT_BACK, len(calls))
    for step in range(_STEPS):
        with torch.enable_grad():
            found = _with_z(unit, leaves)
            loss = _map_loss(found, form, calls[step % many :: many])
            grads = torch.autograd.grad(loss, list(leaves.values()))
        for leaf, grad in zip(leaves.values(), grads, strict=True):
            leaf.grad = grad
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        for candidate in (unit, _with_z(unit, {n: p.detach() for n, p in leaves.items()})):
            loss_now = float(_map_loss(candidate, form, calls))
            best, least = (candidate, loss_now) if loss_now < least else (best, least)
    return best


def _with_z(unit: GauParameters, leaves: dict[str, Tensor]) -> GauParameters:
    expanded = unit.sizes[1]
    assert unit.b_uvz is not None
    wide = torch.cat((unit.w_uvz[:, : 2 * expanded], leaves["w"]), 1)
    bias = torch.cat((unit.b_uvz[: 2 * expanded], leaves["b"]))
    own = {n: leaves[n] for n in ("gamma", "beta", "rel_bias")}
    return replace(unit, w_uvz=wide, b_uvz=bias, **own)


# ---------------------------------------------------------------- the feed-forward net


def net_start(like: GauParameters, net: Net, calls: Sequence[Taught]) -> GauParameters:
    """The unit in the place of the feed-forward net, which sees a token itself alone.

    A gated net of SiLU is the same function where twice its channels fit. Otherwise those channels
    that add most to the outputs stay, as many as fit, and W_o makes the best of them.

    Args:
        like: a unit of its sizes, with a table of distances, in float32 or wider.
        net: the trained weights.
        calls: of the trained net.
    """
    _, expanded, _ = like.sizes
    width = net.up.shape[1]
    plain = net.b_up is None and net.b_gate is None
    if net.gate is not None and net.activation == "silu" and plain and 2 * width <= expanded:
        unit = glu_unit(like, net.gate, net.up, net.down)
        return unit if net.b_down is None else replace(unit, b_o=net.b_down)
    chosen = range(width) if width <= expanded else _largest(net, calls, expanded)
    unit = _channels(like, net, chosen, calls)

    def hidden(call: Taught) -> Tensor:
        gate, v, _ = projected(call.x, unit)
        return gate * v

    weights, _ = _regressed(hidden, calls, unit.w_o)
    return replace(unit, w_o=weights[:-1].to(unit.w_o), b_o=weights[-1].to(unit.w_o))


def _largest(net: Net, calls: Sequence[Taught], number: int) -> list[int]:
    """The channels whose mean square, times what they are multiplied with, is largest."""
    size = torch.zeros(net.up.shape[1], dtype=torch.float64, device=net.up.device)
    for call in calls:
        (x,) = call.rows(call.x)
        size += _hidden(net, x).double().square().sum(0)
    chosen = (size * net.down.double().square().sum(1)).topk(number).indices
    return sorted(chosen.tolist())


def _hidden(net: Net, x: Tensor) -> Tensor:
    """About the net's hidden features, by SiLU of the same sharpness."""
    k = _SHARPNESS.get(net.activation, 1.0)
    first, b_first = (net.up, net.b_up) if net.gate is None else (net.gate, net.b_gate)
    activated = silu(k * _affine(x, first, b_first)) / k
    return activated if net.gate is None else activated * _affine(x, net.up, net.b_up)


def _affine(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return x @ w if b is None else x @ w + b


def _channels(
    like: GauParameters, net: Net, chosen: Sequence[int], calls: Sequence[Taught]
) -> GauParameters:
    """U and V of some channels: silu(k x gate) and a nearly linear x up, or 1; W_o of the net."""
    width, expanded, _ = like.sizes
    k, count = _SHARPNESS.get(net.activation, 1.0), len(chosen)
    at = torch.tensor(list(chosen), device=net.up.device)
    nothing = like.w_o.new_zeros(width, 0)
    unit = glu_unit(like, nothing, nothing, nothing.mT)
    w_uvz, w_o, b_uvz = unit.w_uvz, unit.w_o, unit.b_uvz
    assert b_uvz is not None
    second = slice(expanded, expanded + count)
    first, b_first = (net.up, net.b_up) if net.gate is None else (net.gate, net.b_gate)
    w_uvz[:, :count] = k * first[:, at]
    if b_first is not None:
        b_uvz[:count] = k * b_first[at]
    if net.gate is None:
        b_uvz[second] = OPEN_GATE
        w_o[:count] = net.down[at] / k
        return unit
    values = torch.cat([_affine(call.rows(call.x)[0], net.up, net.b_up) for call in calls])
    tiny = torch.finfo(values.dtype).tiny
    small = _SMALL / values.square().mean(0).sqrt().clamp_min(tiny)[at]
    w_uvz[:, second] = small * net.up[:, at]
    if net.b_up is not None:
        b_uvz[second] = small * net.b_up[at]
    w_o[:count] = net.down[at] * (2 / (small * k))[:, None]
    return unit
