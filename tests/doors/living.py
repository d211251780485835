"""Small models that the tests of the doors rewrite, in a module that another process can import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

WIDTH, HEADS = 32, 4


class CausalAttention(nn.Module):
    """One layer for q, k and v, a tril buffer, dropout twice."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(WIDTH, dim=2)
        q, k, v = (y.view(b, t, HEADS, c // HEADS).transpose(1, 2) for y in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (c // HEADS) ** -0.5
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf")).softmax(dim=-1)
        y = (self.attn_dropout(att) @ v).transpose(1, 2).contiguous().view(b, t, c)
        return self.resid_dropout(self.c_proj(y))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention that a user wrote, torch's own module, and torch's own layer."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.own = CausalAttention(dropout)
        self.torchs = nn.MultiheadAttention(WIDTH, HEADS, dropout=dropout, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.own(self.norm(x))
        x = x + self.torchs(x, x, x, need_weights=False)[0]
        return self.layer(x)  # type: ignore[no-any-return]


class Traceable(nn.Module):
    """Without a loop or a slice that symbolic_trace cannot follow; with leaf modules."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.softmax, self.dropout = nn.Softmax(dim=-1), nn.Dropout(dropout)
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).split(WIDTH, 2)
        q = q.view(b, t, HEADS, -1).transpose(1, 2)
        k = k.view(b, t, HEADS, -1).transpose(1, 2)
        v = v.view(b, t, HEADS, -1).transpose(1, 2)
        weights = self.dropout(self.softmax(q @ k.transpose(-2, -1) * 0.125 + mask))
        x = x + self.out((weights @ v).transpose(1, 2).reshape(b, t, c))
        return x + self.mha(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


class Latents(nn.Module):
    """A parameter asks: it is handed to a submodule before anything else reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(3, WIDTH))
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.query(self.latents) @ self.key(x).mT, -1) @ self.value(x)


class Calls(TorchDispatchMode):
    """Counts the calls of the operator."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.attn_compiler.attention.default
        return func(*args, **(kwargs or {}))


def calls(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """How often the operator runs in this call."""
    with Calls() as counter, torch.no_grad():
        function(*args, **kwargs)
    return counter.count


def in_graph(graph: torch.fx.Graph) -> int:
    """How often the operator stands in a graph."""
    return sum("attn_compiler.attention" in str(node.target) for node in graph.nodes)


def train_together(rank: int, address: str, results: Any) -> None:
    """One of two processes: a rewritten model under DDP, one step."""
    import attn_compiler as ac

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Block(dropout=0.0)
    x = torch.randn(4, 7, WIDTH)
    new = ac.rewrite(model, (x[:2],))
    parallel = nn.parallel.DistributedDataParallel(new)
    parallel(x[2 * rank : 2 * rank + 2]).square().sum().backward()
    model(x).square().sum().backward()
    for mine, alone in zip(new.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(2 * mine.grad, alone.grad, rtol=1e-4, atol=1e-4)
    results.put((rank, calls(parallel, x[:2])))
    dist.destroy_process_group()
