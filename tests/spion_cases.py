"""A small model with attention for the tests of SPION, its inputs, and its training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import attn_compiler as ac

T, D, H, BLOCK = 96, 24, 3, 16
SPEC = ac.SPION(block=BLOCK, alpha=0.7, filter=5)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) * (D // H) ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, mask)
        return x


def draw(seed: int = 1, batch: int = 2) -> Tensor:
    return torch.randn(batch, T, D, generator=torch.Generator().manual_seed(seed))


def rewritten_model() -> Model:
    torch.manual_seed(0)
    return ac.rewrite(Model(), (draw(),), to=SPEC, calibration="later").train()


class Training:
    """An ordinary loop: a model, its optimiser, its schedule."""

    def __init__(self, **options: Any) -> None:
        self.model = rewritten_model()
        # these few steps teach it nothing
        self.schedule = ac.SpionSchedule(
            self.model, SPEC, **{"every": 2, "skewness": None, **options}
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3)
        self.call: nn.Module = self.model

    def run(self, first: int, last: int) -> list[int]:
        """Batches, and after which of them the model turned sparse."""
        turned = []
        for index in range(first, last):
            self.optimizer.zero_grad()
            self.call(draw(index)).square().mean().backward()
            self.optimizer.step()
            if self.schedule.step(index):
                turned.append(index)
        return turned

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "schedule": self.schedule, "optimizer": self.optimizer}
        return {name: part.state_dict() for name, part in parts.items()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.schedule.load_state_dict(state["schedule"])
        self.optimizer.load_state_dict(state["optimizer"])


def patterns(model: nn.Module) -> list[Tensor]:
    return list(ac.spion_patterns(model).values())


def train_together(rank: int, file: str, results: Any) -> None:
    """One of two processes, and in `results` what became of it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    training = Training(most=6)
    training.call = nn.parallel.DistributedDataParallel(training.model, broadcast_buffers=False)
    turned = []
    for index in range(8):
        training.optimizer.zero_grad()
        training.call(draw(2 * index + rank)).square().mean().backward()
        training.optimizer.step()
        turned += [index] if training.schedule.step(index) else []
    results.put((turned, [p.tolist() for p in patterns(training.model)]))
    torch.distributed.destroy_process_group()
