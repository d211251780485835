"""Gated attention units from a trained block: exact pieces, starting points, distillation targets.

    silu(z) - silu(-z) = z            V = silu(x [W, -W]), W_o = [O; -O]   carries x W O
    silu(u) = 1                       a bias of U that opens the gate
    gamma = 0, a bias of distance 0   A = I: the unit is a gated linear unit

Several maps of softmax and one of relu^2 are different functions: a converted unit is where
training starts, layer by layer towards `mean_map` and the teacher's outputs, `gain` first. A net of
width 4 D without a gate has no such start. Source: derived from the equations of the unit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attn_compiler.errors import BadOption
from attn_compiler.kernels.frame import accumulator
from attn_compiler.kernels.gau import gau_attention
from attn_compiler.kernels.gau_layer import (
    GauForm,
    GauParameters,
    projected,
    queries_and_keys,
    relative,
    scale_of,
)

# silu of it is 1
OPEN_GATE = 1.2784645427610740
_BIASES = ("b_uvz", "b_o")
# which tokens are no padding, and of which document they are
Counted = tuple[Tensor | None, Tensor | None]


def linear_values(into: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [D, 2 n] and [2 n, D] that with silu between them compute x into out.

    Args:
        into: [D, n].
        out: [n, D].
    """
    return torch.cat((into, -into), 1), torch.cat((out, -out), 0)


def attention_unit(
    like: GauParameters, q_and_k: Tensor, value_output: Tensor, covariance: Tensor
) -> GauParameters:
    """A unit that starts with linear values and an open gate, so that y = A x value_output + b_o.

    Before its activation Z is the s main directions of the teacher's queries and keys; gamma is 1.
    Fewer than D channels of values, e < 2 D, are those that lose least on the teacher's inputs.

    Args:
        like: a unit of the right sizes, with biases; its table and b_o are kept.
        q_and_k: [D, n] all columns of the teacher's W_q and W_k, n at least s.
        value_output: [D, D] sum over the heads of W_v W_o.
        covariance: [D, D] mean of x^T x over the teacher's inputs.

    Raises:
        BadOption: there is no bias to open the gate with, or n is below s.
    """
    _, expanded, s = like.sizes
    if like.b_uvz is None:
        raise BadOption("a unit without biases has no gate to open", where="option biases")
    if q_and_k.shape[1] < s:
        what = f"queries and keys of the teacher have {q_and_k.shape[1]} columns and not {s}"
        raise BadOption(what, where="option s", do="give a unit of a smaller s")
    w_uvz, b_uvz = torch.zeros_like(like.w_uvz), torch.zeros_like(like.b_uvz)
    w_uvz[:, 2 * expanded :] = q_and_k @ _directions(q_and_k, covariance, s)
    b_uvz[:expanded] = OPEN_GATE
    ones, zeros = torch.ones_like(like.gamma), torch.zeros_like(like.beta)
    found = replace(like, w_uvz=w_uvz, b_uvz=b_uvz, gamma=ones, beta=zeros)
    return with_values(found, value_output, covariance)


def with_values(unit: GauParameters, value_output: Tensor, covariance: Tensor) -> GauParameters:
    """A unit whose gate is open, with linear values of a product: the channels that lose least.

    Args:
        value_output: [D, D].
        covariance: [D, D] mean of m^T m over what the product is applied to, mixed or not.
    """
    width, expanded, _ = unit.sizes
    channels = min(expanded // 2, width)
    outputs = _directions(value_output, covariance, channels)
    v, o = linear_values(value_output @ outputs, outputs.mT)
    w_uvz, w_o = unit.w_uvz.clone(), torch.zeros_like(unit.w_o)
    w_uvz[:, expanded : 2 * expanded] = 0
    w_uvz[:, expanded : expanded + 2 * channels] = v
    w_o[: 2 * channels] = o
    return replace(unit, w_uvz=w_uvz, w_o=w_o)


def _directions(weights: Tensor, covariance: Tensor, number: int) -> Tensor:
    """[n, number] orthonormal directions in which x weights [D, n] is largest."""
    found: Tensor = torch.linalg.eigh(weights.mT @ covariance @ weights).eigenvectors
    return found[:, weights.shape[1] - number :]


def glu_unit(like: GauParameters, gate: Tensor, up: Tensor, down: Tensor) -> GauParameters:
    """A unit that starts as  (silu(x gate) * x up) down,  and attends to the token itself.

    The same function where 2 f <= e; where f <= e alone, the values pass through silu. Its form has
    the scale mode "fixed(1)", no dropout and `inside` False, and any chunk.

    Args:
        like: a unit of the right sizes; its relative bias is a table.
        gate, up: [D, f].
        down: [f, D].

    Raises:
        BadOption: e is below f, or there is no table.
    """
    _, expanded, _ = like.sizes
    table, f = like.rel_bias, gate.shape[1]
    if table is None or table.dim() != 1:
        raise BadOption("a unit without a table cannot see one token", where="option relative_bias")
    if f > expanded:
        what = f"a net of width {f} does not fit in an expanded width of {expanded}"
        raise BadOption(what, where="option expansion", do="give more, or a fresh unit")
    if 2 * f <= expanded:
        gate, (up, down) = torch.cat((gate, gate), 1), linear_values(up, down)
        f = 2 * f
    w_uvz, w_o = torch.zeros_like(like.w_uvz), torch.zeros_like(like.w_o)
    w_uvz[:, :f], w_uvz[:, expanded : expanded + f], w_o[:f] = gate, up, down
    near = torch.zeros_like(table)
    near[table.shape[0] // 2] = 1
    biases = {n: None if (x := getattr(like, n)) is None else torch.zeros_like(x) for n in _BIASES}
    zeros = torch.zeros_like(like.gamma)
    return replace(like, w_uvz=w_uvz, w_o=w_o, rel_bias=near, gamma=zeros, beta=zeros, **biases)


# ---------------------------------------------------------------- targets


def mixing_map(
    x: Tensor, weights: GauParameters, form: GauForm, seen: Counted = (None, None)
) -> Tensor:
    """[B, T, T] what a unit multiplies values with, A and the linear part: to be trained towards
    `mean_map`. Differentiable; without dropout.
    """
    each = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(x.shape[0], -1, -1)
    return mixed(x, each, weights, form, seen)


def mixed(
    x: Tensor, values: Tensor, weights: GauParameters, form: GauForm, seen: Counted = (None, None)
) -> Tensor:
    """[B, T, dv] the map of a unit times values [B, T, dv], which its gate and its own values have
    no part in.

    Args:
        seen: `valid` and `documents` of `gau_layer`.
    """
    _, _, z = projected(x, weights)
    q, k, *linear = queries_and_keys(z, weights, form)
    table = relative(weights, form, x.shape[1])
    found: Tensor
    found, _ = gau_attention(
        q,
        k,
        values,
        *(linear or (None, None)),
        None,
        table,
        *seen,
        None,
        chunk=form.chunk,
        causal=form.causal,
        scale=scale_of(weights, form),
        scale_mode=form.scale_mode,
        inside=form.inside,
        dropout=0.0,
    )
    return found


def mean_map(probabilities: Tensor, v: Tensor) -> Tensor:
    """[B, T, S] the mean of the teacher's maps, weighted with how large a head's values are.

    Args:
        probabilities: [B, H, T, S].
        v: [B, H, S, dv]; a head weighs the root of the mean square length of its values.
    """
    dtype = accumulator(probabilities, v)
    lengths = v.to(dtype).square().sum(-1).mean(-1).sqrt()
    shares = lengths / lengths.sum(1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    return torch.einsum("bhts,bh->bts", probabilities.to(dtype), shares)


def gain(teacher: Tensor, student: Tensor) -> Tensor:
    """<t, s> / |s|^2: the factor of W_o with which a student's outputs, [..., D] without biases,
    are nearest to the teacher's.
    """
    dtype = accumulator(teacher, student)
    t, s = teacher.to(dtype).flatten(), student.to(dtype).flatten()
    return t @ s / (s @ s).clamp(min=torch.finfo(dtype).tiny)
