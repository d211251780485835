"""A layer of SwitchHead, composed of the operators: projections by experts around an attention.

    k_h = x_kv W_K^h        v_h = sum_{e in I_S} g_S,e x_kv W_V^{h,e}        q_h = x_q W_Q^h
    r_h = attention(q_h, k_h, v_h)        y = sum_h sum_{e in I_D} g_D,e r_h W_O^{h,e}

`keys_values` is what a cache holds, narrow keys and mixed values, final when they are written;
`attend` is the rest; `switchhead_attention` is both. Any program of attention works: masks, biases,
windows. No residual, no norm, no biases.

Source: SwitchHead (arXiv 2312.07987v3), equations 7 to 10. One expert a head on the outputs alone,
`Mixture(H, 1, 1, ("o",))`, is the form of it that its author calls faster: a gate for each head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_compiler.errors import UnsupportedCall
from attn_compiler.ir.score import Program
from attn_compiler.kernels.experts import expert_merge, expert_project, in_one_dtype
from attn_compiler.kernels.library import attention
from attn_compiler.kernels.relative import Relative, attend_by_distance
from attn_compiler.kernels.routing import Routes, route

Rotate = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Mixture:
    """The sizes of a layer, and what is an expert in it.

    Attributes:
        heads: H.
        experts: E, of each head.
        k: of them active for a token.
        experts_on: which projections are experts, out of q, k, v, o.
        shared: one router for both sides.
        dropout: of experts; a call with it needs a seed.
    """

    heads: int
    experts: int
    k: int
    experts_on: tuple[str, ...] = ("v", "o")
    shared: bool = False
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class Weights:
    """The parameters of a layer. A projection that is no expert has H matrices instead of H E.

    Attributes:
        w_q, w_k, w_v: [H E, D, c].
        w_o: [H E, c, D].
        w_s: [H E, D], the router of the keys' side; None if it chooses nothing, or is shared.
        w_d: [H E, D], the router of the queries' side, or the shared one; None if there is none.
    """

    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    w_o: Tensor
    w_s: Tensor | None
    w_d: Tensor | None


@dataclass(frozen=True, slots=True)
class Scores:
    """What happens between the products of an attention.

    Attributes:
        program: the text of an `ir.score` program, over `reads` and `ints`.
        scale: of the dot products; c ** -0.5 / gain if None.
        gain: what the program multiplies them by.
        offsets: projected distances, whose products with queries are one more read, the last: see
            `relative`, whose `programs` make `program` and `later`.
        dropout: of the weights of attention, drawn anew in every call.
    """

    program: str = str(Program())
    reads: Sequence[Tensor] = ()
    ints: Sequence[int] = ()
    scale: float | None = None
    gain: float = 1.0
    offsets: Tensor | None = None
    later: str = ""
    dropout: float = 0.0


PLAIN = Scores()


@dataclass(frozen=True, slots=True)
class Written:
    """What a layer knows of its keys' side.

    Attributes:
        k: [B, H, S, c], turned if it had to be.
        v: [B, H, S, c], mixed.
        routes: how values were mixed; None where nothing was chosen.
    """

    k: Tensor
    v: Tensor
    routes: Routes | None = None


def switchhead_attention(
    x_q: Tensor,
    x_kv: Tensor,
    weights: Weights,
    mixture: Mixture,
    scores: Scores = PLAIN,
    *,
    rotate: tuple[Rotate, Rotate] | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """A layer: [B, T, D].

    Args:
        x_q: [B, T, D].
        x_kv: [B, S, D]; the same tensor as `x_q` is self-attention.
        rotate: applied to q and to k, [B, H, rows, c] each.
        seed: int64, one element, iff experts are dropped.
    """
    rotate_q, rotate_k = rotate or (None, None)
    written = keys_values(x_kv, weights, mixture, rotate=rotate_k, seed=seed)
    # one choice serves both sides of a layer that has one router and one input
    routes = written.routes if mixture.shared and x_q is x_kv else None
    routes = routes or destination(x_q, weights, mixture, seed)
    return attend(x_q, written, weights, mixture, scores, rotate=rotate_q, routes=routes)


def keys_values(
    x_k: Tensor,
    weights: Weights,
    mixture: Mixture,
    *,
    x_v: Tensor | None = None,
    rotate: Rotate | None = None,
    seed: Tensor | None = None,
    routes: Routes | None = None,
) -> Written:
    """Keys and mixed values of some tokens.

    Args:
        x_k: [B, S, D]; routers read it too.
        x_v: what values are projected from, if it is not `x_k`.
        routes: choices that were made elsewhere.
    """
    if routes is None:
        routes = _choose(x_k, weights.w_d if mixture.shared else weights.w_s, mixture, seed)
    k = _project("k", x_k, weights.w_k, mixture, routes)
    v = _project("v", x_k if x_v is None else x_v, weights.w_v, mixture, routes)
    return Written(k if rotate is None else rotate(k), v, routes)


def destination(
    x_q: Tensor, weights: Weights, mixture: Mixture, seed: Tensor | None = None
) -> Routes | None:
    """The choices of the queries' side; with dropout another draw than that of the keys' side."""
    own = seed if seed is None or mixture.shared else seed + 1
    return _choose(x_q, weights.w_d, mixture, own)


def attend(
    x_q: Tensor,
    written: Written,
    weights: Weights,
    mixture: Mixture,
    scores: Scores = PLAIN,
    *,
    rotate: Rotate | None = None,
    routes: Routes | None = None,
) -> Tensor:
    """The queries' side of a layer, over keys and values that may come out of a cache: [B, T, D].

    Args:
        routes: of `x_q`, from `destination`.
    """
    q = _project("q", x_q, weights.w_q, mixture, routes)
    q = q if rotate is None else rotate(q)
    scale = q.shape[-1] ** -0.5 / scores.gain if scores.scale is None else scores.scale
    seed = drawn(q) if scores.dropout else None
    if scores.offsets is None:
        out, _ = attention(
            q, written.k, written.v, list(scores.reads), list(scores.ints), seed,
            program=scores.program, scale=scale, dropout=scores.dropout,
        )  # fmt: skip
    else:
        given = Relative(
            scores.program, scores.later, scores.reads, scores.ints, scale, scores.dropout
        )
        out = attend_by_distance(q, written.k, written.v, scores.offsets, given, seed)
    if "o" not in mixture.experts_on:
        return torch.einsum("bhtc,hcd->btd", out, weights.w_o)
    return _by_experts(expert_merge, out, weights.w_o, mixture, routes)


def drawn(like: Tensor) -> Tensor:
    """A seed, from the global generator of the device."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=like.device)


def _choose(
    x: Tensor, router: Tensor | None, mixture: Mixture, seed: Tensor | None
) -> Routes | None:
    if router is None:
        return None
    rate = 0.0 if seed is None else mixture.dropout
    seed = seed if rate else None
    return route(x, router, heads=mixture.heads, k=mixture.k, dropout=rate, seed=seed)


def _project(name: str, x: Tensor, w: Tensor, mixture: Mixture, routes: Routes | None) -> Tensor:
    """[B, H, T, c] in the memory of [B, T, H, c]."""
    if name not in mixture.experts_on:
        return torch.einsum("btd,hdc->bthc", x, w).transpose(1, 2)
    return _by_experts(expert_project, x, w, mixture, routes)


def _by_experts(
    operator: Callable[..., Any], x: Tensor, w: Tensor, mixture: Mixture, routes: Routes | None
) -> Tensor:
    if routes is None:
        raise UnsupportedCall(
            "a projection by experts has no routes",
            why=(f"experts are on {', '.join(mixture.experts_on)}",),
            do="give the router w_s of the keys' side, and w_d of the queries' side",
        )
    x, w = in_one_dtype(x, w)
    result: Tensor = operator(x, w, routes.index, routes.gate, experts=mixture.experts)
    return result


# ---------------------------------------------------------------- positions


def rotary(x: Tensor, positions: Tensor, *, share: float = 0.5, base: float = 10000.0) -> Tensor:
    """Turn the first channels of every head by angles that grow with the position.

    Channel i and channel i + n / 2 are a pair, i < n / 2, turned by p * base ** (-2 i / n), where n
    is the even number of channels nearest below share * c. Source: RoFormer (arXiv 2104.09864), in
    the layout of halves; the share of a half is SwitchHead's.

    Args:
        x: [B, H, T, c].
        positions: [T] or [B, 1, T].
    """
    n = int(share * x.shape[-1]) // 2 * 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    exponents = torch.arange(0, n, 2, device=x.device, dtype=dtype) / max(n, 1)
    return turned(x, positions, base**-exponents)


def turned(x: Tensor, positions: Tensor, speeds: Tensor) -> Tensor:
    """The same at any speeds: channel i and channel i + n are a pair, turned by p * speeds[i], and
    the channels from 2 n on stay.

    Args:
        x: [B, H, T, c].
        positions: [T] or [B, 1, T].
        speeds: [n], in radians a position.
    """
    n, dtype = len(speeds), torch.promote_types(x.dtype, torch.float32)
    angles = positions.to(dtype).unsqueeze(-1) * speeds.to(dtype)
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :n].to(dtype), x[..., n : 2 * n].to(dtype)
    pairs = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
    return torch.cat([pairs, x[..., 2 * n :]], -1)
