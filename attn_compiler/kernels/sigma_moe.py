"""The feed-forward net of SwitchAll: experts chosen for every token, all of one pool.

    y = sum_{e in top k} g_e relu(x W1_e) W2_e,   g = sigmoid(x W_sel^T)

Each choice of a token is a head of the operators of `experts`, with one expert, of a pool that all
heads share; so hidden channels of all choices lie beside each other, and merge like heads.

Source: sigma-MoE (arXiv 2310.10837); SwitchHead (arXiv 2312.07987v3), section 3.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_compiler.kernels.experts import expert_merge, expert_project, in_one_dtype
from attn_compiler.kernels.routing import Routes, route
from attn_compiler.kernels.switchhead import drawn

NAMES = ("w_sel", "w_1", "w_2")


def sigma_moe(
    x: Tensor,
    w_sel: Tensor,
    w_1: Tensor,
    w_2: Tensor,
    *,
    k: int,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    hidden_dropout: float = 0.0,
) -> tuple[Tensor, Routes]:
    """The feed-forward net: [B, T, D], and the choices [B, T, 1, k].

    Args:
        x: [B, T, D].
        w_sel: [N, D], the router of N experts.
        w_1: [N, D, G], G hidden channels of an expert.
        w_2: [N, G, D].
        k: experts of a token.
        dropout: probability that an expert is dropped; one that is chosen all the same has gate 0.
        seed: int64, one element, iff dropout > 0.
        hidden_dropout: rate of an ordinary dropout on the hidden channels.
    """
    routes = route(x, w_sel, heads=1, k=k, dropout=dropout, seed=seed, silent=True)
    index, gate = routes.index.transpose(2, 3), routes.gate.transpose(2, 3)
    experts = w_sel.shape[0]
    rows, up = in_one_dtype(x, w_1)
    hidden = expert_project(rows, up, index, torch.ones_like(gate), experts=experts)
    hidden = hidden.relu()
    if hidden_dropout:
        hidden = torch.dropout(hidden, hidden_dropout, train=True)
    hidden, down = in_one_dtype(hidden, w_2)
    return expert_merge(hidden, down, index, gate, experts=experts), routes


def net(
    x: Tensor, /, *weights: Tensor, k: int, expert_dropout: float, hidden_dropout: float
) -> Tensor:
    """The net of a rewritten module: [B, T, D].

    Args:
        x: [B, T, D].
        weights: `NAMES`.
        k, hidden_dropout: see `sigma_moe`.
        expert_dropout: its `dropout`, 0 in evaluation.
    """
    seed = drawn(x) if expert_dropout else None
    w_sel, w_1, w_2 = weights
    y, _ = sigma_moe(
        x, w_sel, w_1, w_2, k=k, dropout=expert_dropout, seed=seed, hidden_dropout=hidden_dropout
    )
    return y
