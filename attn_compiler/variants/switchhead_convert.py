"""Parameters of SwitchHead out of a trained layer of ordinary attention.

    H_b heads  ->  H groups of E = H_b / H heads that attend alike; one map and E experts for each

`convert` changes the function: distil afterwards. `duplicated` does not, and saves no map; it is
where training with experts can start from a trained layer.

The steps of `convert`: groups by the divergence of attention maps; the map of a group is that of
its medoid; inner bases of values are whitened and turned towards each other, so that products of
one head's values with another's outputs are near the right ones; routers by regression to each
head's share of the group's output; outputs by regression to the teacher's.

Source: the combination is ours. Heads that attend alike: DHA (arXiv 2406.06567); turning bases:
generalised Procrustes analysis (Gower 1975).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_compiler.errors import BadOption
from attn_compiler.ir.expr import DOT
from attn_compiler.ir.score import Program
from attn_compiler.kernels.switchhead import (
    Mixture,
    Rotate,
    Weights,
    destination,
    switchhead_attention,
)
from attn_compiler.variants.conversion.alike import balanced_groups, medoid, similarity
from attn_compiler.variants.conversion.bases import aligned, narrowed, without_bias
from attn_compiler.variants.conversion.ordinary import (
    Batches,
    Given,
    Moments,
    Ordinary,
    attended,
    calls,
    computed,
    moments,
    projected,
)

_LEAST_SHARE = 0.02
# of a mean square: how firmly outputs may hold on to those that were scaled alone; the first wins
# where no batch was kept back
_HOLDS = (math.inf, 10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4)
_KEPT_BACK = 4
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion gives.

    Attributes:
        weights: in the dtype of the trained layer.
        bias: [D], to be added to the outputs; None if the layer had no biases there.
        groups: for each new head, the trained heads that became its experts, in order.
    """

    weights: Weights
    bias: Tensor | None
    groups: tuple[tuple[int, ...], ...]


# ---------------------------------------------------------------- exact


def duplicated(
    layer: Ordinary,
    experts: int,
    k: int,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Converted:
    """As many heads, each with equal experts: the same function, as long as `noise` is 0.

    Routers of zeros give gates of 1/2, k of them on each side, so values and outputs are scaled by
    2 / k. Equal experts with equal scores are never all used: `noise` is the deviation of logits
    for inputs of unit variance, and relative, of the experts; 0.01 to 0.05 are small.

    Raises:
        BadOption: a bias of queries or keys that changes scores: nothing in SwitchHead can hold it.
    """
    if _has_bias(layer):
        raise BadOption(
            "biases of queries and keys have no place in SwitchHead",
            where="option init",
            do="convert with calibration, which folds them into the weights",
        )
    each = layer.each()
    width = layer.w_q.shape[1]

    def noisy(x: Tensor) -> Tensor:
        return x + noise * x.std() * torch.randn(x.shape, generator=generator).to(x)

    def router() -> Tensor:
        drawn = torch.randn(layer.heads * experts, width, generator=generator)
        return torch.mul(drawn, noise / width**0.5).to(layer.w_q)

    w_v, w_o = (noisy((2 / k) * w.repeat_interleave(experts, 0)) for w in (each.w_v, each.w_o))
    w_q = layer.w_q * (layer.scale * layer.head_dim**0.5)
    weights = Weights(w_q, each.w_k, w_v, w_o, router(), router())
    return Converted(weights, layer.bias, tuple((head,) * experts for head in range(layer.heads)))


def embedded(layer: Ordinary, mixture: Mixture, head_dim: int, batches: Batches) -> Converted:
    """`duplicated`, at any width and with biases: those of queries and keys that change scores are
    folded into the weights, by least squares over the inputs. Without them it is exact.

    Args:
        layer: of H heads, which turns its first channels if any.
        mixture: H heads, with experts on v and o.
        head_dim: c, at least as wide as its heads.
    """
    wide = layer.wide()
    if _has_bias(layer):
        target, source = moments(batches)
        turns = wide.rotate is not None or Program.parse(layer.scores.program).score != DOT
        w_q = without_bias(wide.w_q, wide.b_q, target)
        w_k = without_bias(wide.w_k, wide.b_k if turns else None, source)
        wide = replace(wide, w_q=w_q, w_k=w_k, b_q=None, b_k=None)
    found = duplicated(wide, mixture.experts, mixture.k)
    old, scale = found.weights, (head_dim / layer.head_dim) ** 0.5
    w_q, w_k, w_v = (_padded(w, head_dim) for w in (old.w_q * scale, old.w_k, old.w_v))
    w_o = _padded(old.w_o.mT, head_dim).mT
    router = None if mixture.shared else old.w_s
    return replace(found, weights=Weights(w_q, w_k, w_v, w_o, router, old.w_d))


# ---------------------------------------------------------------- approximate


def convert(layer: Ordinary, mixture: Mixture, head_dim: int, batches: Batches) -> Converted:
    """Fewer heads with experts, as near to a trained layer as the steps above bring them.

    Args:
        layer: of H_b heads; without experts on q and k.
        mixture: H heads that divide H_b, with H_b / H experts each, on v and o.
        head_dim: c.
        batches: inputs of the layer, queries' side [B, T, D] and keys' side [B, S, D]; gone through
            three times.

    Raises:
        BadOption: sizes that do not fit, or heads that turn and would have to become narrower.
    """
    _check(layer, mixture, head_dim)
    wide = layer.wide().each()
    target, source = moments(batches)
    likeness = similarity(wide, batches)
    groups = balanced_groups(likeness, mixture.heads)
    w_q, w_k = _maps(wide, [medoid(likeness, g) for g in groups], head_dim, (target, source))
    values, outputs = zip(
        *(_experts(wide.w_v[list(g)], wide.w_o[list(g)], head_dim, source) for g in groups),
        strict=True,
    )
    w_s, w_d = _routers(wide, groups, batches, (target, source))
    weights = Weights(
        w_q,
        w_k,
        torch.cat(values),
        torch.cat(outputs),
        None if mixture.shared else w_s,
        (w_s + w_d) / 2 if mixture.shared else w_d,
    )
    w_o, bias = _outputs(wide, weights, mixture, batches)
    found = replace(weights, w_o=w_o)
    narrow = {n: getattr(found, n) for n in Weights.__slots__}
    narrow = {n: None if x is None else x.to(layer.w_q.dtype) for n, x in narrow.items()}
    if bias is not None and layer.bias is not None:
        bias = bias.to(layer.bias.dtype) + layer.bias
    return Converted(Weights(**narrow), bias, groups)


def missed(layer: Ordinary, found: Converted, mixture: Mixture, batches: Batches) -> float:
    """|new - old|^2 / |old|^2 over the rows that count."""
    weights = Weights(*(None if w is None else w.to(torch.float64) for w in _each(found.weights)))  # type: ignore[arg-type]
    gap, size = 0.0, 0.0
    for each, given in calls(layer.wide(), batches):
        scores = replace(each.scores, scale=None)
        new = switchhead_attention(
            given.x_q, given.x_kv, weights, mixture, scores, rotate=_rotation(layer)
        )
        new = new if found.bias is None else new + found.bias
        same, old = given.x_q is given.x_kv, computed(each, given)
        gap += float(given.counted(new - old, same).square().sum())
        size += float(given.counted(old, same).square().sum())
    return gap / max(size, _TINY)


def _each(weights: Weights) -> list[Tensor | None]:
    return [getattr(weights, name) for name in Weights.__slots__]


def _rotation(layer: Ordinary) -> tuple[Rotate, Rotate] | None:
    return layer.rotate and (
        first_channels(layer.rotate[0], layer.head_dim),
        first_channels(layer.rotate[1], layer.head_dim),
    )


def _check(layer: Ordinary, mixture: Mixture, head_dim: int) -> None:
    why = ""
    if mixture.heads * mixture.experts != layer.heads:
        why = f"{layer.heads} heads are not {mixture.heads} groups of {mixture.experts}"
    elif mixture.experts_on != ("v", "o"):
        why = "heads become experts on values and outputs"
    elif head_dim < layer.head_dim and layer.rotate is not None:
        why = f"turned channels of queries and keys cannot be mixed: {layer.head_dim} are needed"
    if why:
        raise BadOption(
            "trained attention cannot become such a SwitchHead",
            where="option init",
            why=[why],
            do="give heads and experts whose product is the number of heads, or start fresh",
        )


def _has_bias(layer: Ordinary) -> bool:
    """Do biases change attention? One of keys adds the same to all scores of a row, unless they
    are turned, or something else is done with them before the softmax.
    """
    program = Program.parse(layer.scores.program)
    plain = layer.rotate is None and program.score == DOT and program.sink is None
    biases = [layer.b_q] if plain else [layer.b_q, layer.b_k]
    return any(b is not None and bool(b.any()) for b in biases)


def first_channels(rotate: Rotate, width: int) -> Rotate:
    """Turn the first channels, which are those of the trained layer, and leave the others."""

    def turned(x: Tensor) -> Tensor:
        return torch.cat([rotate(x[..., :width]), x[..., width:]], -1)

    return turned


def _maps(
    layer: Ordinary, heads: Sequence[int], head_dim: int, sides: tuple[Moments, Moments]
) -> tuple[Tensor, Tensor]:
    """Queries and keys of some heads, [H, D, c], with the scale of heads that are c wide."""
    target, source = sides
    w_q = without_bias(layer.w_q, layer.b_q, target)[list(heads)]
    # unturned, a bias of keys changes nothing
    w_k = without_bias(layer.w_k, None if layer.rotate is None else layer.b_k, source)[list(heads)]
    if head_dim < layer.head_dim:
        w_q, w_k = narrowed(w_q, w_k, head_dim, (target.second, source.second))
    w_q = w_q * (layer.scale * head_dim**0.5)
    return _padded(w_q, head_dim), _padded(w_k, head_dim)


def _padded(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def _experts(w_v: Tensor, w_o: Tensor, head_dim: int, source: Moments) -> tuple[Tensor, Tensor]:
    """Values [E, D, c] and outputs [E, c, D] of one group of heads."""
    number, _, inner = w_v.shape
    if head_dim >= number * inner:  # each in channels of its own: no cross terms at all
        place = torch.eye(number).to(w_v)
        blocks_v = torch.einsum("edc,ef->edfc", w_v, place).flatten(2)
        blocks_o = torch.einsum("ecd,ef->efcd", w_o, place).flatten(1, 2)
        return _padded(blocks_v, head_dim), _padded(blocks_o.mT, head_dim).mT
    if head_dim < inner:
        w_v, outputs = narrowed(w_v, w_o.mT, head_dim, (source.second, None))
        w_o = outputs.mT
    w_v, w_o = aligned(w_v, w_o, source.second)
    return _padded(w_v, head_dim), _padded(w_o.mT, head_dim).mT


def _routers(
    layer: Ordinary,
    groups: Sequence[Sequence[int]],
    batches: Batches,
    sides: tuple[Moments, Moments],
) -> tuple[Tensor, Tensor]:
    """[H E, D] each: logits nearest to those of each head's share of what its group puts out, for
    values at their tokens, and for results at theirs.
    """
    order = torch.tensor(groups, device=layer.w_q.device)
    size = layer.w_o @ layer.w_o.mT  # |r W_O|^2 = r W_O W_O^T r^T
    sums = [torch.zeros(()), torch.zeros(())]
    rows = [0, 0]
    for each, given in calls(layer, batches):
        v = projected(given.x_kv, layer.w_v, None)
        r = attended(each, given.x_q, given.x_kv, v)
        same = given.x_q is given.x_kv
        for side, (x, y, here) in enumerate(((given.keys, v, True), (given.queries, r, same))):
            norms = torch.einsum("bhtc,hce,bhte->bth", y, size, y).clamp_min(0).sqrt()[..., order]
            total = norms.sum(-1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
            share = (norms / total).clamp(_LEAST_SHARE, 1 - _LEAST_SHARE)
            sums[side] = sums[side] + x.mT @ given.counted(share.logit().flatten(2), here)
            rows[side] += len(x)
    target, source = sides
    w_s = torch.linalg.solve(source.second, sums[0] / rows[0]).mT
    w_d = torch.linalg.solve(target.second, sums[1] / rows[1]).mT
    return w_s, w_d


def _outputs(
    layer: Ordinary, weights: Weights, mixture: Mixture, batches: Batches
) -> tuple[Tensor, Tensor | None]:
    """W_O [H E, c, D] and a bias [D], or None where the layer has none: the number <old, new> /
    |new|^2, then least squares that hold on to what that gave, as firmly as is best for the batches
    that were kept back.
    """
    width = weights.w_o.flatten(0, 1)
    size = len(width) + int(layer.bias is not None)
    zeros = (width.new_zeros(size, size), width.new_zeros(size, layer.w_o.shape[2]))
    fitted, kept = zeros, zeros  # products of what goes in with itself, and with what comes out
    bare = replace(layer, b_v=None, b_o=None)
    for number, (each, given) in enumerate(calls(bare, batches)):
        same = given.x_q is given.x_kv
        old = given.counted(computed(each, given), same)
        new = given.counted(_mixed(each, weights, mixture, given), same)
        new = torch.nn.functional.pad(new, (0, size - len(width)), value=1.0)
        products = new.mT @ new, new.mT @ old
        if number % _KEPT_BACK == _KEPT_BACK - 1:
            kept = kept[0] + products[0], kept[1] + products[1]
        else:
            fitted = fitted[0] + products[0], fitted[1] + products[1]
    both = fitted[0] + kept[0], fitted[1] + kept[1]
    start = torch.nn.functional.pad(width, (0, 0, 0, size - len(width)))
    gain = (start * both[1]).sum() / (start * (both[0] @ start)).sum().clamp_min(_TINY)
    start = gain * start
    hold = min(_HOLDS, key=lambda hold: _missed(_regressed(fitted, start, hold), kept))
    found = _regressed(both, start, hold)
    bias = None if layer.bias is None else found[-1]
    return found[: len(width)].view_as(weights.w_o), bias


def _regressed(products: tuple[Tensor, Tensor], start: Tensor, hold: float) -> Tensor:
    """The least squares, with a penalty on the way from `start`; infinite is `start`."""
    normal, right = products
    if math.isinf(hold):
        return start
    ridge = (hold * normal.diagonal().mean()).clamp_min(_TINY).expand(len(normal)).diag()
    way: Tensor = torch.linalg.solve(normal + ridge, right - normal @ start)
    return start + way


def _missed(found: Tensor, products: tuple[Tensor, Tensor]) -> float:
    """Square of what is missed, less what does not depend on `found`."""
    normal, right = products
    return float((found * (normal @ found - 2 * right)).sum())


def _mixed(layer: Ordinary, weights: Weights, mixture: Mixture, given: Given) -> Tensor:
    """Results of every head times the gates of its experts: what W_O multiplies, [B, T, H E c]."""
    heads, inner = mixture.heads, weights.w_o.shape[1]
    apart = torch.eye(heads * inner).to(weights.w_o).view(heads, inner, -1)
    on = tuple(name for name in mixture.experts_on if name != "o")
    scores = replace(layer.scores, scale=None)
    results = switchhead_attention(
        given.x_q, given.x_kv, replace(weights, w_o=apart), replace(mixture, experts_on=on),
        scores, rotate=_rotation(layer),
    )  # fmt: skip
    routes = destination(given.x_q, weights, mixture)
    assert routes is not None  # there are experts on o
    gates = torch.zeros_like(routes.logits).scatter(3, routes.index.long(), routes.gate)
    each: Tensor = gates.unsqueeze(-1) * results.unflatten(2, (heads, 1, inner))
    return each.flatten(2)
