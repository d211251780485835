"""What submodules keep where nobody looks, in functions with a cache and dicts of a file, stays
real: a rewritten model is traced again where a call has another length.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import attn_compiler as ac
from attn_compiler.constants import RealConstants

KEPT: dict[int, Tensor] = {}


def angles(length: int) -> Tensor:
    """Written in place, as masks of windows often are."""
    made = torch.zeros(length, 8)
    made[:, :4] = torch.arange(length).unsqueeze(1) / torch.tensor([1.0, 4.0, 16.0, 64.0])
    made[:, 4:] = made[:, :4]
    return made


@functools.lru_cache
def cached(length: int) -> Tensor:
    return angles(length)


class Keeping(nn.Module):
    everywhere: dict[int, Tensor] = {}  # noqa: RUF012  # that is the point

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.length, self.table = way, -1, torch.zeros(0)
        self.by_length: dict[int, Tensor] = {}
        self.rows: list[Tensor | None] = [None] * 16

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = getattr(self, self.way)(x.shape[-2])
        return found.to(x)

    def attribute(self, n: int) -> Tensor:
        if n != self.length:
            self.length, self.table = n, angles(n)
        return self.table

    def dictionary(self, n: int) -> Tensor:
        return self._in(self.by_length, n)

    def items(self, n: int) -> Tensor:
        held = self.rows[n]
        if held is None:
            held = self.rows[n] = angles(n)
        return held

    def buffer(self, n: int) -> Tensor:
        if "held" not in self._buffers or self.held.shape[0] < n:
            self.register_buffer("held", angles(n), persistent=False)
        return self.held[:n]

    def function(self, n: int) -> Tensor:
        return cached(n)

    @functools.lru_cache  # noqa: B019  # users do
    def method(self, n: int) -> Tensor:
        return angles(n)

    def of_file(self, n: int) -> Tensor:
        return self._in(KEPT, n)

    def of_class(self, n: int) -> Tensor:
        return self._in(self.everywhere, n)

    @staticmethod
    def _in(held: dict[int, Tensor], n: int) -> Tensor:
        if n not in held:
            held[n] = angles(n)
        return held[n]


class Rotated(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.qkv, self.keeping = nn.Linear(16, 48), Keeping(way)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        turn = self.keeping(q)
        q, k = (t * turn.cos() + t.roll(4, -1) * turn.sin() for t in (q, k))
        return ((q @ k.mT * 8**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


WAYS = ("attribute", "dictionary", "items", "buffer", "function", "method", "of_file", "of_class")


@pytest.mark.parametrize("way", WAYS)
def test_what_is_kept_between_calls(way: str) -> None:
    torch.manual_seed(0)
    model = Rotated(way).eval()
    given = [torch.randn(2, n, 16) for n in (12, 7, 9)]
    with torch.no_grad():
        expected = [copy.deepcopy(model)(x) for x in given]
        for held in (KEPT, Keeping.everywhere):
            held.clear()
        cached.cache_clear()
        assert len(ac.explain(copy.deepcopy(model), (given[0],)).sites) == 1
        new = ac.rewrite(model, (given[0],), on_reject="raise")
        for x, y in [*zip(given, expected, strict=True)] * 2:
            for run in (new, model):
                torch.testing.assert_close(run(x), y)


def test_constants_in_a_fake_mode() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake, there = mode.from_tensor(torch.ones(2, 3)), torch.ones(3)
    with mode, RealConstants(mode):
        real: list[Any] = [torch.arange(3), torch.zeros(3), torch.tensor([1.0, 2.0])]
        real[1][1] = 5.0
        real[2][0] = there[0] + 6
        real += [real[1] + there, real[0].cos()[None]]
        partly = torch.zeros(2, 3)
        partly[:] = fake
        there.add_(1)
        fakes = [real[0] * fake, torch.rand(3), partly + 1, fake.new_zeros(2)]
        with pytest.raises(Exception, match="_local_scalar_dense"):
            partly.sum().item()
        assert real[1].sum().item() == 5
    assert [type(x) for x in real] == [Tensor] * 5
    assert real[1].tolist() == [0, 5, 0] and real[2].tolist() == [7, 2]
    assert there.tolist() == [1, 1, 1]
    assert Tensor not in [type(x) for x in fakes]


class Counting(nn.Module):
    """Training changes what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.norm(x.mT).mT


class Normed(Rotated):
    def __init__(self) -> None:
        super().__init__("attribute")
        self.before = Counting()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.before(x))


def test_a_call_counts_once() -> None:
    """Batch norms and buffers of a submodule, where the analysis runs it as well."""
    torch.manual_seed(0)
    model = Normed().train()
    new = ac.rewrite(model, (torch.randn(2, 12, 16),), on_reject="raise")
    for length in (12, 7, 7, 9):
        x = torch.randn(2, length, 16)
        torch.testing.assert_close(new(x), model(x))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(new.state_dict()[name], value, msg=name)


class Masking(nn.Module):
    """A mask that the attention's own code makes once for each length."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.length, self.future = 0, torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.length != x.shape[1]:
            self.length = x.shape[1]
            self.future = torch.ones(self.length, self.length).triu(1).bool()
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        scores = (q @ k.mT * 8**-0.5).masked_fill(self.future, -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_a_mask_of_each_length_where_no_original_could_run() -> None:
    """Selective attention is another function than the model's."""
    torch.manual_seed(0)
    model, given = Masking().eval(), [4 * torch.randn(2, n, 16) for n in (12, 7, 9)]
    new = ac.rewrite(model, (given[0],), to=ac.Selective(), on_reject="raise")
    expected = [ac.rewrite(model, (x,), to=ac.Selective(), on_reject="raise")(x) for x in given]
    for x, y in [*zip(given, expected, strict=True)] * 2:
        torch.testing.assert_close(new(x), y)
        assert not torch.allclose(y, model(x))
        assert type(new.future) is Tensor and new.future.shape[0] == x.shape[1]


class Scale:
    """What a caller hands over beside tensors."""

    def __init__(self, value: float) -> None:
        self.value = torch.tensor(value)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor, scale: Scale) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return torch.softmax(q @ k.mT * scale.value, -1) @ v


def test_a_number_that_an_object_holds_as_a_tensor_is_no_constant() -> None:
    model, x = Scaled().eval(), torch.randn(2, 5, 16)
    new = ac.rewrite(model, (x, Scale(0.5)), on_reject="raise")
    for scale in (Scale(0.5), Scale(2.0)):
        torch.testing.assert_close(new(x, scale), model(x, scale))
    assert ac.last_report().rewritten == 1
