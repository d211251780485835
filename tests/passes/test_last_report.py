"""last_report(): what was compiled since the last torch.compile call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attn_compiler as ac

EAGER = {"then": "eager"}


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1) @ v


def qkv(t: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, t, 4), torch.randn(2, t, 4), torch.randn(2, t, 4)


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v)


def test_a_new_call_starts_again() -> None:
    torch.compile(attend, backend="attn_compiler", options=EAGER)(*qkv())
    assert ac.last_report().rewritten == 1
    other = torch.compile(lambda x: x * 2, backend="attn_compiler", options=EAGER)
    assert ac.last_report().sites == ()
    other(torch.ones(3))
    assert ac.last_report().sites == ()


def test_graphs_of_one_call_are_merged() -> None:
    fast = torch.compile(attend, backend="attn_compiler", options=EAGER, dynamic=False)
    fast(*qkv(5))
    fast(*qkv(6))
    assert ac.last_report().rewritten == 2


def test_a_rewrite_is_forgotten_by_a_later_call() -> None:
    """It was still there in a process that had not compiled anything before."""
    torch._dynamo.reset()
    ac.rewrite(Attend(), qkv())
    assert ac.last_report().rewritten == 1
    torch._dynamo.reset()
    torch.compile(attend, backend="attn_compiler", options=EAGER)(*qkv())
    assert ac.last_report().rewritten == 1


def test_reset() -> None:
    torch.compile(attend, backend="attn_compiler", options=EAGER)(*qkv())
    torch._dynamo.reset()
    assert ac.last_report().sites == ()
