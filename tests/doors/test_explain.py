"""explain: the report without any change."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator

import pytest
import torch
from doors.living import WIDTH, Block, CausalAttention, Traceable, calls
from torch import fx, nn

import attn_compiler as ac


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def test_a_module(x: torch.Tensor) -> None:
    model = Block().eval()
    report = ac.explain(model, (x,))
    assert report.rewritten == len(report.sites) == 3
    site = next(s for s in report.sites if s.path == "own")
    assert (site.query_heads, site.kv_heads, site.head_dim) == (4, 4, 8)
    assert str(site.mask) == "tensor(bias)" and site.owner == "CausalAttention"
    assert site.location.startswith("living.py:")
    assert "softmax" in report.graph_before
    assert "attn_compiler.attention" in report.graph_after
    assert "attn_compiler.attention" not in report.graph_before
    assert calls(model, x) == 0 and type(model.own) is CausalAttention
    json.loads(report.to_json())


def test_nothing_is_changed(x: torch.Tensor) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)
            self.own = CausalAttention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.own(self.norm(x.mT).mT)  # type: ignore[no-any-return]

    model = Counting().train()
    state, random, given = copy.deepcopy(model.state_dict()), torch.get_rng_state(), x.clone()
    ac.explain(model, (x,))
    ac.rewrite(model, (x,))
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(x, given)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_many_modules_of_one_class() -> None:
    """More than Dynamo compiles of one forward."""
    for width in range(2, 13):
        report = ac.explain(SelfWeighted(width), (torch.randn(3, 5, width),))
        assert len(report.sites) == 1 and not report.breaks, width


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters,
    reason="this torch counts what is looked at among what it compiles",
)
def test_what_is_looked_at_does_not_count() -> None:
    traced = 0

    def counting(gm: fx.GraphModule, _: object) -> fx.GraphModule:
        nonlocal traced
        traced += 1
        return gm

    for width in range(2, 13):
        model = SelfWeighted(width)
        seen = (torch.randn(3, 5, width),)
        if width % 2:
            torch.compile(model, backend=counting)(*seen)
        ac.explain(model, seen)
    assert traced == 5


class SelfWeighted(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.query(x) @ x.mT, -1) @ x


def test_a_function() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT).softmax(-1) @ k

    report = ac.explain(attend, (torch.randn(2, 5, 8), torch.randn(2, 6, 8)))
    assert report.rewritten == 1


def test_a_graph_module(x: torch.Tensor) -> None:
    gm = fx.symbolic_trace(Traceable().eval())
    before = gm.code
    report = ac.explain(gm, (x, torch.zeros(2, 1, 7, 7)))
    assert report.rewritten == 2 and gm.code == before
    assert "attn_compiler.attention" in report.graph_after


def test_an_exported_program(x: torch.Tensor) -> None:
    program = torch.export.export(CausalAttention().eval(), (x,))
    before = str(program.graph)
    assert ac.explain(program).rewritten == 1
    assert str(program.graph) == before


def test_a_model_that_breaks_the_graph(x: torch.Tensor) -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = CausalAttention(), CausalAttention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)  # type: ignore[no-any-return]

    model = Breaks().eval()
    assert ac.explain(model, (x,)).rewritten == 2
    new = ac.rewrite(model, (x,))
    assert calls(new, x) == 2


def test_a_model_without_attention(x: torch.Tensor) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU())
    for report in (ac.explain(model, (x,)), (ac.rewrite(model, (x,)), ac.last_report())[1]):
        assert report.sites == () and report.missed == ()
    gm = fx.symbolic_trace(model)
    assert not ac.fx_pass()(gm, x).modified
    torch.testing.assert_close(ac.rewrite(model, (x,))(x), model(x))


@pytest.mark.parametrize("own", [True, False])
def test_keys_behind_a_cache_belong_to_the_queries_sequence(own: bool) -> None:
    class Decoding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(
            self, x: torch.Tensor, other: torch.Tensor, cache: list[torch.Tensor]
        ) -> torch.Tensor:
            of = (x, x, x) if own else (x, other, other)
            pairs = zip(self.maps, of, strict=True)
            q, k, v = (f(y).unflatten(-1, (4, -1)).transpose(1, 2) for f, y in pairs)
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            return nn.functional.scaled_dot_product_attention(q, k, v)

    x, other = torch.randn(2, 1, WIDTH), torch.randn(2, 3, WIDTH)
    cache = [torch.randn(2, 4, 11, WIDTH // 4) for _ in range(2)]
    (site,) = ac.explain(Decoding(), (x, other, cache)).sites
    assert str(site.kind) == ("self" if own else "cross")


@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_in_one_dimension_with_batches_are_rows(batch: int) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = torch.addmm(self.qkv.bias, x.view(-1, x.shape[-1]), self.qkv.weight.T)
            q, k, v = flat.view(*x.shape[:2], 3, 4, -1).permute(2, 0, 3, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    (site,) = ac.explain(Flat(), (torch.randn(batch, 7, WIDTH),)).sites
    assert (site.query_heads, site.kv_heads, site.head_dim) == (4, 4, WIDTH // 4)
    assert str(site.mask) == "causal" and [str(p) for p in site.phases] == ["prefill"]
