"""A gated attention unit with its projections: parameters, a fresh start, the layer.

    [U | V | Z] = silu(x W_uvz + b_uvz)      q, k, q_lin, k_lin = rope(gamma * Z + beta)
    y = (U * mixed) W_o + b_o                mixed: see `gau_schema`

Norm and residual are outside, so two units take the places of attention and feed-forward net:

    x + attention(norm1 x), x + net(norm2 x)     ->   x + unit1(norm1 x), x + unit2(norm2 x)
    norm1(x + attention(x)), norm2(x + net(x))   ->   norm1(x + unit1(x)), norm2(x + unit2(x))

Source: Transformer Quality in Linear Time (arXiv 2202.10447); rotation of both halves of the
channels and biases of 0 as published programs have them; scales of 1 as some of them. Relative
positions: a table over distances, or, for any length, <rope(a)_i, rope(a')_j> with learned a, a'.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from attn_compiler.errors import BadOption, UnsupportedCall
from attn_compiler.kernels.frame import accumulator
from attn_compiler.kernels.gau import gau_attention

# published programs draw every weight with 0.02, at a width of about 768: the same at any width
_WEIGHT = 0.02 * 768**0.5
# of relative positions; with 0.02 a square of about 0.0004 would be all that mixes tokens at first
_POSITIONS = 0.3
_BASE = 10000.0


@dataclass(frozen=True, slots=True)
class GauParameters:
    """The weights of one unit; D width of the model, e expanded width, s width of q and k.

    Attributes:
        w_uvz: [D, 2 e + s], columns of U, V, Z.
        b_uvz: [2 e + s] or None.
        gamma, beta: [2, s] for q, k; [4, s] for q, k, q_lin, k_lin where there are chunks.
        w_o: [e, D].
        b_o: [D] or None.
        rel_bias: [2 R - 1] by distance, entry j - i + R - 1; [2, s] rotated, s even; or None.
    """

    w_uvz: Tensor
    b_uvz: Tensor | None
    gamma: Tensor
    beta: Tensor
    w_o: Tensor
    b_o: Tensor | None
    rel_bias: Tensor | None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """D, e, s."""
        return self.w_o.shape[1], self.w_o.shape[0], self.gamma.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class GauForm:
    """What a unit computes with its weights.

    Attributes:
        chunk: tokens of a chunk, None for all pairs.
        causal: a token sees those before it.
        scale_mode, inside: what sums over keys are divided by, and where; see `gau_schema`.
        scale: of the scores, None for 1 / sqrt(s).
        rope: rotate queries and keys, s even.
        dropout: of A.
    """

    chunk: int | None
    causal: bool
    scale_mode: str = "rowcount"
    inside: bool = False
    scale: float | None = None
    rope: bool = True
    dropout: float = 0.0


def fresh(
    sizes: tuple[int, int, int],
    *,
    chunk: int | None,
    relative_bias: bool = True,
    biases: bool = True,
    generator: torch.Generator | None = None,
    like: Tensor | None = None,
) -> GauParameters:
    """New weights, normal with the standard deviations of `deviations`; gamma 1, beta and biases 0.

    Args:
        sizes: D, e, s.
        chunk: as in `GauForm`: with one, four rows of gamma and a table of 2 chunk - 1 distances.
        relative_bias: learn one, else None.
        biases: of the projections, else None.
        generator: where numbers are drawn from.
        like: gives dtype and device.

    Raises:
        BadOption: a relative bias of all pairs needs an even s.
    """
    width, expanded, s = sizes
    like = torch.empty(0) if like is None else like
    if relative_bias and chunk is None and s % 2:
        raise BadOption(f"a rotated relative bias has s={s}", where="option s", do="make it even")

    of = deviations(sizes, chunk)

    def drawn(name: str, *shape: int) -> Tensor:
        return like.new_empty(shape).normal_(0.0, of[name], generator=generator)

    rows = 2 if chunk is None else 4
    table = (2, s) if chunk is None else (2 * chunk - 1,)
    return GauParameters(
        w_uvz=drawn("w_uvz", width, 2 * expanded + s),
        b_uvz=like.new_zeros(2 * expanded + s) if biases else None,
        gamma=like.new_ones(rows, s),
        beta=like.new_zeros(rows, s),
        w_o=drawn("w_o", expanded, width),
        b_o=like.new_zeros(width) if biases else None,
        rel_bias=drawn("rel_bias", *table) if relative_bias else None,
    )


def deviations(sizes: tuple[int, int, int], chunk: int | None) -> dict[str, float]:
    """Standard deviations at the start, by name: 0.55 / sqrt(inputs) for weights, 0.3 for relative
    positions.

    Args:
        sizes: D, e, s.
        chunk: as in `fresh`; without one, positions are sums of s products of two numbers.
    """
    width, expanded, s = sizes
    table = _POSITIONS if chunk is not None else (_POSITIONS / s**0.5) ** 0.5
    return {
        "w_uvz": _WEIGHT / width**0.5,
        "w_o": _WEIGHT / expanded**0.5,
        "rel_bias": table,
    }


def gau_layer(
    x: Tensor,
    weights: GauParameters,
    form: GauForm,
    *,
    valid: Tensor | None = None,
    documents: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """A unit on x [B, T, D], normed outside.

    Args:
        valid: [B, T] bool, False for padding; such rows of the result are b_o.
        documents: [B, T] integers, equal in a row for tokens of one document.
        seed: int64 of one element, exactly where `form.dropout` is above 0.

    Raises:
        UnsupportedCall: see `gau_schema.check_gau`; gamma has no rows for what the form needs.
    """
    gate, v, z = projected(x, weights)
    q, k, *linear = queries_and_keys(z, weights, form)
    out, _ = gau_attention(
        q,
        k,
        v,
        *(linear or (None, None)),
        gate,
        relative(weights, form, x.shape[1]),
        valid,
        documents,
        seed,
        chunk=form.chunk,
        causal=form.causal,
        scale=scale_of(weights, form),
        scale_mode=form.scale_mode,
        inside=form.inside,
        dropout=form.dropout,
    )
    return leave(out, weights)


# ---------------------------------------------------------------- parts


def projected(x: Tensor, weights: GauParameters) -> tuple[Tensor, Tensor, Tensor]:
    """U and V [B, T, e], Z [B, T, s]."""
    _, expanded, s = weights.sizes
    wide = x @ weights.w_uvz
    if weights.b_uvz is not None:
        wide = wide + weights.b_uvz
    gate, v, z = silu(wide).split((expanded, expanded, s), -1)
    return gate, v, z


def queries_and_keys(
    z: Tensor, weights: GauParameters, form: GauForm, start: int = 0
) -> tuple[Tensor, ...]:
    """q, k and, in chunks, q_lin, k_lin [B, T, s] of tokens from position `start` on."""
    rows = 2 if form.chunk is None else 4
    if weights.gamma.shape[0] < rows or weights.beta.shape[0] < rows:
        raise UnsupportedCall(
            f"gamma and beta have {weights.gamma.shape[0]} rows and not {rows}",
            why=("chunks have linear queries and keys of their own",),
            do="give four rows, or chunk=None",
        )
    found = z.unsqueeze(1) * weights.gamma[:rows, None] + weights.beta[:rows, None]
    if form.rope:
        positions = torch.arange(start, start + z.shape[1], device=z.device)
        found = rotated(found, positions)
    return found.unbind(1)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """x [..., T, s] turned by its positions [T]; channel c and c + s / 2 are a pair."""
    half = x.shape[-1] // 2
    if 2 * half != x.shape[-1]:
        raise UnsupportedCall("a rotation turns channels in pairs", do="give an even s")
    dtype = accumulator(x)
    speeds = _BASE ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angles = positions.to(dtype)[:, None] * speeds
    cos, sin = angles.cos(), angles.sin()
    first, second = x.to(dtype).split(half, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def relative(weights: GauParameters, form: GauForm, length: int) -> Tensor | None:
    """The bias by distance, [2 R - 1], for squares of A of a sequence."""
    table = weights.rel_bias
    if table is None or table.dim() == 1:
        return table
    span = max(1, length if form.chunk is None else min(form.chunk, length))
    distances = torch.arange(1 - span, span, device=table.device)
    left, right = table.to(accumulator(table))
    bias: Tensor = rotated(right.expand(2 * span - 1, -1), distances) @ left
    return bias


def scale_of(weights: GauParameters, form: GauForm) -> float:
    return weights.gamma.shape[1] ** -0.5 if form.scale is None else form.scale


def leave(mixed: Tensor, weights: GauParameters) -> Tensor:
    """The second projection of what is mixed and gated."""
    y = mixed @ weights.w_o
    return y if weights.b_o is None else y + weights.b_o
