"""Parameters of SwitchHead out of a trained layer of ordinary attention.

    H_b heads  ->  H groups of E = H_b / H heads that attend alike; one map and E experts for each

`convert` changes the function: distil afterwards. `duplicated` does not, and saves no map; it is
where training with experts can start from a trained layer.

The steps of `convert`: groups by the divergence of attention maps; the map of a group is that of
its medoid; inner bases of values are whitened and turned towards each other, so that products of
one head's values with another's outputs are near the right ones; routers by regression to each
head's share of the group's output; the outputs scaled once to the teacher's.

Source: the combination is ours. Heads that attend alike: DHA (arXiv 2406.06567); turning bases:
generalised Procrustes analysis (Gower 1975).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_compiler.errors import BadOption
from attn_compiler.ir.expr import DOT
from attn_compiler.ir.score import Program
from attn_compiler.kernels.switchhead import Mixture, Rotate, Weights, switchhead_attention
from attn_compiler.variants.conversion.alike import balanced_groups, medoid, similarity
from attn_compiler.variants.conversion.bases import aligned, narrowed, without_bias
from attn_compiler.variants.conversion.ordinary import (
    Batches,
    Moments,
    Ordinary,
    attended,
    in_double,
    moments,
    projected,
)

_LEAST_SHARE = 0.02


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
    gain = _gain(wide, weights, mixture, batches)
    found = replace(weights, w_o=weights.w_o * gain)
    narrow = {n: getattr(found, n) for n in Weights.__slots__}
    narrow = {n: None if x is None else x.to(layer.w_q.dtype) for n, x in narrow.items()}
    return Converted(Weights(**narrow), layer.bias, groups)


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
    for x_q, x_kv in in_double(batches):
        v = projected(x_kv, layer.w_v, None)
        r = attended(layer, x_q, x_kv, v)
        for side, (x, y) in enumerate(((x_kv, v), (x_q, r))):
            norms = torch.einsum("bhtc,hce,bhte->bth", y, size, y).clamp_min(0).sqrt()[..., order]
            total = norms.sum(-1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
            share = (norms / total).clamp(_LEAST_SHARE, 1 - _LEAST_SHARE)
            sums[side] = sums[side] + torch.einsum("btd,btn->dn", x, share.logit().flatten(2))
            rows[side] += x.shape[0] * x.shape[1]
    target, source = sides
    w_s = torch.linalg.solve(source.second, sums[0] / rows[0]).mT
    w_d = torch.linalg.solve(target.second, sums[1] / rows[1]).mT
    return w_s, w_d


def _gain(layer: Ordinary, weights: Weights, mixture: Mixture, batches: Batches) -> Tensor:
    """The number that brings the new outputs nearest to the old: <old, new> / |new|^2."""
    rotate = layer.rotate and (
        first_channels(layer.rotate[0], layer.head_dim),
        first_channels(layer.rotate[1], layer.head_dim),
    )
    scores = replace(layer.scores, scale=None)
    both = square = torch.zeros(())
    for x_q, x_kv in in_double(batches):
        new = switchhead_attention(x_q, x_kv, weights, mixture, scores, rotate=rotate)
        values = projected(x_kv, layer.w_v, None)
        old = torch.einsum("bhtc,hcd->btd", attended(layer, x_q, x_kv, values), layer.w_o)
        both, square = both + (old * new).sum(), square + new.square().sum()
    return both / square.clamp_min(torch.finfo(square.dtype).tiny)
