"""Forwards that keep something in the module: a mask, a cache, a counter. A rewritten module keeps
the same, and `rewrite` leaves nothing behind.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import claims
import pytest
import torch
from torch import Tensor, nn

import attn_compiler as ac

WIDTH = 8


class Attention(nn.Module):
    """One head; `step` may change queries, keys, values and scores, and keep what it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.q(x), self.k(x), self.v(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v


class KeepsKeys(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.last = k.detach()
        self.rows = q.shape[1]
        return super().attend(q, k, v)


class Counts(Attention):
    calls = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.calls += 1
        return super().attend(q / self.calls, k, v)


class Slices(Attention):
    """A list of modules that the forward makes is nobody's."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        late = self.norms[1:]
        late.name = "late"
        del late.name
        for norm in late:
            q = norm(q)
        return super().attend(q, k, v)


class LazyMask(Attention):
    mask: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q.shape[1]
        if self.mask is None or self.mask.shape[0] < rows:
            self.mask = torch.ones(rows, rows).tril().bool()
        return (q @ k.mT).masked_fill(~self.mask[:rows, :rows], -torch.inf).softmax(-1) @ v


class LateBuffer(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q.shape[1]
        if not hasattr(self, "mask") or self.mask.shape[0] != rows:
            self.register_buffer("mask", torch.ones(rows, rows).tril().bool(), persistent=False)
        return (q @ k.mT).masked_fill(~self.mask, -torch.inf).softmax(-1) @ v


class MovingMean(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + v.mean((0, 1)).detach()
        return super().attend(q, k, v - self.mean)


class Pair(Attention):
    past: tuple[Tensor, Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.past is not None:
            k, v = (torch.cat(two, 1) for two in zip(self.past, (k, v), strict=True))
        self.past = k, v
        return super().attend(q, k, v)


class Listed(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.past: list[Tensor] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.past:
            k, v = (torch.cat(two, 1) for two in zip(self.past, (k, v), strict=True))
        self.past = [k, v]
        return super().attend(q, k, v)


class Biases(Attention):
    """A bias is made once for each length."""

    def __init__(self) -> None:
        super().__init__()
        self.distance = nn.Parameter(torch.randn(64))
        self.made: dict[str, Tensor] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = torch.arange(q.shape[1])
        if str(q.shape[1]) not in self.made:
            self.made[str(q.shape[1])] = self.distance[(rows[:, None] - rows).abs()]
        return (q @ k.mT + self.made[str(q.shape[1])]).softmax(-1) @ v


class Slots(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("held", torch.zeros(2, 64, WIDTH))
        self.filled = 0

    def add(self, new: Tensor) -> Tensor:
        self.held[:, self.filled : self.filled + new.shape[1]] = new.detach()
        self.filled = self.filled + new.shape[1]
        return self.held[:, : self.filled]


class InSlots(Attention):
    """A submodule that is never called itself keeps the state."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = Slots(), Slots()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, self.keys.add(k), self.values.add(v))


class Table(nn.Module):
    """Stays a call: what it builds for fake tensors must not stay."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or self.table.shape[0] < x.shape[1]:
            self.table = torch.arange(x.shape[1] * 1.0)[:, None].cos()
        return x * self.table[: x.shape[1]]


class InTable(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.turn = Table()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(self.turn(q), self.turn(k), v)


class Once(Attention):
    @functools.cached_property
    def temperature(self) -> Tensor:
        return torch.tensor(4.0) ** -0.5

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q * self.temperature, k, v)


class History(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen.append(k.detach())
        return super().attend(q, k, v)


class FilledLater(Attention):
    """What is stored is changed after it was stored."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen = [k.detach()]
        self.seen.append(v.detach())
        return super().attend(q, k, v)


class Weights(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.weights = (q @ k.mT).softmax(-1)
        return self.weights @ v


class Passing(Attention):
    """A module that is made for one call."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.Softmax(dim=-1)(q @ k.mT) @ v


REWRITTEN = (
    KeepsKeys, Counts, Slices, LazyMask, LateBuffer, MovingMean, Pair, Listed, InSlots, InTable,
    Passing, Biases,
)  # fmt: skip
REFUSED = {
    History: "owner.not_pure",
    FilledLater: "owner.not_pure",
    Weights: "attention.second_reader",
}


def state(model: nn.Module) -> dict[str, Any]:
    """What the modules hold beside parameters, tensors as they are."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in {**module.__dict__, **module._buffers}.items()
        if not name.startswith("_")
    }


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    mine, other = state(ours), state(theirs)
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, other[name], msg=lambda text, at=name: f"{at}: {text}")


def test_a_property_that_is_computed_once() -> None:
    model, x = Once().eval(), torch.randn(2, 7, WIDTH)
    new = ac.rewrite(model, (x,), on_reject="raise")
    assert type(new) is not Once
    for _ in range(2):
        torch.testing.assert_close(new(x), model(x))
    assert isinstance(new.temperature, Tensor) and type(new.temperature) is Tensor


@pytest.mark.parametrize("kind", [*REWRITTEN, *REFUSED])
def test_what_is_kept_is_the_same(kind: type[Attention]) -> None:
    model = kind().eval()
    new = ac.rewrite(model, (torch.randn(2, 7, WIDTH),))
    report = ac.last_report()
    assert claims.refusals(report) == ([REFUSED[kind]] if kind in REFUSED else []), (
        claims.decisions(report)
    )
    fresh = kind()
    fresh.load_state_dict(model.state_dict())
    assert_same_state(new, fresh.eval())
    with torch.no_grad():
        for rows in (7, 7, 3, 11, 7, 1, 5):
            x = torch.randn(2, rows, WIDTH)
            torch.testing.assert_close(new(x), model(x))
            assert_same_state(new, model)
    copy.deepcopy(new)


def test_calls_of_one_kind_are_not_analysed_again(caplog: pytest.LogCaptureFixture) -> None:
    new = ac.rewrite(KeepsKeys().eval(), (torch.randn(2, 7, WIDTH),))
    with caplog.at_level("INFO", "attn_compiler"), torch.no_grad():
        for rows in (7, 3, 11):
            new(torch.randn(2, rows, WIDTH))
    assert "unlike the example" not in caplog.text
    assert new.last.shape == (2, 11, WIDTH) and new.rows == 11


def test_two_layers_keep_their_own() -> None:
    """The second layer follows the trace of the first."""
    model = nn.Sequential(KeepsKeys(), MovingMean(), KeepsKeys(), MovingMean()).eval()
    new = ac.rewrite(model, (torch.randn(2, 7, WIDTH),))
    assert claims.accepted(ac.last_report()) == 4
    with torch.no_grad():
        for rows in (7, 5):
            x = torch.randn(2, rows, WIDTH)
            torch.testing.assert_close(new(x), model(x))
            assert_same_state(new, model)


@dataclass
class Modulation:
    shift: Tensor
    scale: Tensor


class Modulates(nn.Module):
    """What a diffusion block does with its time step, as an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, time: Tensor) -> tuple[Modulation, None]:
        return Modulation(*self.lin(time)[:, None].chunk(2, -1)), None


class Modulated(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.modulation = Modulates()

    def forward(self, x: Tensor) -> Tensor:
        by, _ = self.modulation(x[:, 0])
        return super().forward(x * (1 + by.scale) + by.shift)


def test_a_submodule_that_gives_an_object_is_traced_through() -> None:
    model = nn.Sequential(Modulated(), Modulated()).eval()
    new = ac.rewrite(model, (torch.randn(2, 7, WIDTH),))
    assert claims.accepted(ac.last_report()) == 2, claims.decisions(ac.last_report())
    for rows in (7, 5):
        claims.same_numbers(model, new, (torch.randn(2, rows, WIDTH),), training=True, owner=new)


def test_an_outer_compilation_keeps_the_same() -> None:
    model = KeepsKeys().eval()
    new = ac.rewrite(model, (torch.randn(2, 7, WIDTH),))
    x = torch.randn(2, 7, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(new, backend="eager")(x), model(x))
    assert_same_state(new, model)


def test_explain_leaves_nothing_behind() -> None:
    for kind in (Counts, Listed, LateBuffer, History, InSlots):
        model = kind().eval()
        before = copy.deepcopy(model)
        ac.explain(model, (torch.randn(2, 7, WIDTH),))
        assert_same_state(model, before)


def test_what_a_dict_holds_is_read_from_it() -> None:
    model, x = Biases().eval(), torch.randn(2, 7, WIDTH)
    with torch.no_grad():
        model(x)
        new = ac.rewrite(model, (x,), on_reject="raise")
        for kept in (new.made["7"], model.made["7"]):
            kept.mul_(2)
        torch.testing.assert_close(new(x), model(x))
