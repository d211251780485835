"""Layers that SwitchHead does not replace, each with its reason; and who is left alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as ac
from attn_compiler.capture import each_graph
from attn_compiler.config import make_config
from attn_compiler.pipeline import compile_graph
from attn_compiler.variants.sites.switchhead import legality
from tests.doors.switched import (
    FEATURES,
    D,
    H,
    Relative,
    Separate,
    Stack,
    causal,
    draw,
    heads,
    rotated,
)

SPEC = ac.SwitchHead(heads=2, experts=3, k=2, head_dim=11)


class NormedKeys(Separate):
    def sides(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().sides(x, y)
        return nn.functional.normalize(q, dim=-1), k, v


class NormModule(Separate):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)

    def sides(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().sides(x, y)
        return q, self.norm(k), v


class TwoMaps(Separate):
    def sides(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().sides(x, y)
        return q + heads(self.k(y)), k, v


class Gated(Separate):
    """A parameter multiplies the values."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(FEATURES))

    def sides(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().sides(x, y)
        return q, k, v * self.gain


class HalfRotated(Separate):
    def sides(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().sides(x, y)
        return q, torch.cat([rotated(k[..., :-1], torch.arange(11)), k[..., -1:]], -1), v


class CrossRotary(Separate):
    def sides(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().sides(x, y + 1)
        q, k = (
            torch.cat([rotated(t[..., :-1], torch.arange(11)), t[..., -1:]], -1) for t in (q, k)
        )
        return q, k, v


class ReadTwice(Separate):
    def result(self, out: Tensor) -> Tensor:
        flat = out.transpose(1, 2).flatten(2)
        return self.out(flat) + flat  # type: ignore[no-any-return]


class NoOutput(Separate):
    def result(self, out: Tensor) -> Tensor:
        return out.transpose(1, 2).flatten(2).tanh()


class Adapter(nn.Module):
    """A matrix with another one of low rank beside."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(D, D), nn.Linear(D, 2), nn.Linear(2, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]


class Adapted(Separate):
    def __init__(self) -> None:
        super().__init__()
        self.v = Adapter()  # type: ignore[assignment]


class Hooked(Separate):
    def __init__(self) -> None:
        super().__init__()
        self.q.register_forward_hook(lambda *_: None)


class Alibi(Separate):
    def scores(self, dot: Tensor) -> Tensor:
        slopes = 2.0 ** -torch.arange(1, H + 1)
        return dot + slopes[:, None, None] * torch.arange(dot.shape[-1])


class ByDistance(Separate):
    """Products of queries and distances, moved by one column a row."""

    def __init__(self) -> None:
        super().__init__()
        self.distances = nn.Parameter(torch.randn(H, 11, FEATURES))

    def apart(self, q: Tensor) -> Tensor:
        found = nn.functional.pad(q @ self.distances.mT, (1, 0))
        return found.view(q.shape[0], H, 12, 11)[:, :, 1:]


class LeastByDistance(ByDistance):
    """They are not added to the scores."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        q, k, v = self.sides(x, x)
        return self.result(causal(torch.maximum(q @ k.mT, self.apart(q))).softmax(-1) @ v)


class CrossRelative(ByDistance):
    """Two sequences."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        q, k, v = self.sides(x, x + 1)
        return self.result((q @ k.mT + self.apart(q)).softmax(-1) @ v)


class Relations(Separate):
    """What each token is to each other is given, as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.relations = nn.Embedding(5, FEATURES)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self.sides(x, x)
        apart = torch.einsum("bhqf,bqkf->bhqk", q, self.relations(given))
        return self.result(causal(q @ k.mT + apart).softmax(-1) @ v)


class WatchedPositions(Relative):
    def __init__(self) -> None:
        super().__init__()
        self.apart.register_forward_hook(lambda *_: None)


class Sink(Separate):
    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.zeros(H))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        q, k, v = self.sides(x, x)
        dot = q @ k.mT
        column = self.sink[None, :, None, None].expand(*dot.shape[:3], 1)
        return self.result(torch.cat([dot, column], -1).softmax(-1)[..., :-1] @ v)


class Temperature(Separate):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def scores(self, dot: Tensor) -> Tensor:
        return dot * self.temperature


class KeptKeys(Separate):
    """Somebody else reads the keys."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(x, y) + self.k(x + 1)  # type: ignore[no-any-return]


class Overwritten(Separate):
    def sides(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x + 1
        q, k, v = super().sides(x, x)
        x.mul_(2)
        return q, k, v


class Square(Separate):
    """Four dimensions go in and come out."""

    def sides(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (m(x[:, None]).flatten(1, 2) for m in (self.q, self.k, self.v))
        return heads(q), heads(k), heads(v)


class TurnedOutput(Separate):
    """The result has its rows first."""

    def result(self, out: Tensor) -> Tensor:
        return self.out(out.permute(2, 0, 1, 3).flatten(2))  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[type[nn.Module], str]] = {
    "a normalisation": (NormedKeys, "switchhead.qk_norm"),
    "a module that normalises": (NormModule, "switchhead.qk_norm"),
    "two maps": (TwoMaps, "switchhead.no_projection"),
    "adapters": (Adapted, "switchhead.no_projection"),
    "hooks": (Hooked, "switchhead.no_projection"),
    "four dimensions": (Square, "switchhead.no_projection"),
    "a trained factor": (Gated, "switchhead.between"),
    "keys alone turn": (HalfRotated, "switchhead.rotation"),
    "two sequences turn": (CrossRotary, "switchhead.cross_rotary"),
    "the result is read twice": (ReadTwice, "switchhead.no_output"),
    "no output projection": (NoOutput, "switchhead.no_output"),
    "rows first in the end": (TurnedOutput, "switchhead.layout"),
    "a bias for each head": (Alibi, "switchhead.per_head"),
    "queries by distances": (LeastByDistance, "switchhead.positions"),
    "distances of two sequences": (CrossRelative, "switchhead.positions"),
    "watched positions": (WatchedPositions, "switchhead.positions"),
    "a sink": (Sink, "switchhead.sink"),
    "a trained temperature": (Temperature, "switchhead.scale"),
    "keys read elsewhere": (KeptKeys, "piece.read_elsewhere"),
    "an input is overwritten": (Overwritten, "piece.overwritten"),
}


def reasons(model: nn.Module, *args: Any) -> set[str]:
    names = list(model.state_dict())
    new = ac.rewrite(model, args or (draw(),), to=SPEC)
    assert list(new.state_dict()) == names and type(new) is type(model)
    found = ac.last_report()
    codes = {r.code for s in found.sites for r in s.decision.reasons}
    return codes | {m.code for m in found.missed}


# other ways to the same reason
SLOW = (
    "watched positions",
    "a module that normalises",
    "hooks",
    "four dimensions",
    "no output projection",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in REFUSED]
)
def test_it_is_refused_with_a_reason(name: str) -> None:
    kind, code = REFUSED[name]
    assert code in reasons(kind())


def test_relations_of_tokens_are_no_distances() -> None:
    assert "switchhead.positions" in reasons(Relations(), draw(), torch.ones(3, 11, 11).long())


def test_a_module_that_cannot_be_looked_into_hides_it() -> None:
    class After(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(D, D)
            self.register_forward_hook(lambda *_: None)

        def forward(self, x: Tensor) -> Tensor:
            return self.dense(x)  # type: ignore[no-any-return]

    model = Separate()
    model.out = After()  # type: ignore[assignment]
    assert "switchhead.hidden" in reasons(model)


def test_a_layer_with_a_hook_does_not_follow_one_without() -> None:
    model, calls = Stack(Separate), list[int]()
    model.layers[1].v.register_forward_hook(lambda *_: calls.append(1))
    new = ac.rewrite(model, (draw(),), to=SPEC)
    first, second = ac.last_report().sites
    assert first.decision.accepted
    assert {r.code for r in second.decision.reasons} == {"switchhead.no_projection"}
    calls.clear()
    new(draw())
    assert calls == [1]


def test_a_weight_that_the_embedding_holds_too() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = Separate(), nn.Linear(D, D, bias=False)
            self.head.weight = self.attention.out.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x))  # type: ignore[no-any-return]

    assert "rewrite.shared_weight" in reasons(Tied())


def test_a_weight_that_the_model_reads_itself() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Separate()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x.to(self.attention.q.weight.dtype))  # type: ignore[no-any-return]

    assert "rewrite.read_outside" in reasons(Model())


def test_a_name_that_is_taken() -> None:
    model = Separate()
    model.w_o = nn.Parameter(torch.ones(3))
    assert "rewrite.name_taken" in reasons(model)


def test_a_cache_that_is_read_in_part() -> None:
    tf = pytest.importorskip("transformers")

    class Window(Separate):
        def forward(self, x: Tensor, past: Any) -> Tensor:  # type: ignore[override]
            q, k, v = self.sides(x, x)
            k, v = past.update(k, v, 0)
            return self.result((q @ k[:, :, -5:].mT).softmax(-1) @ v[:, :, -5:])

    assert "switchhead.cache_form" in reasons(Window(), draw(), tf.DynamicCache())


def test_a_graph_of_no_living_module() -> None:
    config = replace(make_config({"to": SPEC}), installs=True)
    found: list[Any] = []
    torch._dynamo.reset()
    each_graph(Separate(), (draw(),), {}, lambda gm: found.append(compile_graph(gm, config)))
    codes = [r.code for report in found for s in report.sites for r in s.decision.reasons]
    assert codes == ["switchhead.nested"]


def test_sizes_that_are_not_known() -> None:
    ac.rewrite(Separate(), (draw(),), to=SPEC)
    site = replace(ac.last_report().sites[0], query_heads=None, obstacles=())
    assert [r.code for r in legality(site, SPEC)] == ["switchhead.sizes"]


def test_what_is_not_named_stays() -> None:
    model = Stack(Separate)
    new = ac.rewrite(model, (draw(),), to={"layers.1": SPEC})
    assert hasattr(new.layers[0], "q") and not hasattr(new.layers[1], "q")
    assert hasattr(model.layers[1], "q")
