"""fx_pass and rewrite on graphs: symbolic_trace, Dynamo's, exported programs, Inductor's hook."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import claims
import pytest
import torch
from doors.living import WIDTH, Traceable, calls, in_graph
from torch import fx, nn

import attn_compiler as ac


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Traceable().eval()


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 7, WIDTH, generator=g), torch.randn(2, 1, 7, 7, generator=g)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def test_a_symbolically_traced_model(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    gm = fx.symbolic_trace(model)
    result = ac.fx_pass()(gm, *inputs)
    assert result.modified and result.graph_module is gm
    assert in_graph(gm.graph) == 2 and ac.last_report().rewritten == 2
    claims.same_numbers(model, gm, inputs)
    assert gm.qkv is model.qkv


def test_other_sizes(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    gm = fx.symbolic_trace(model)
    ac.fx_pass()(gm, *inputs)
    for b, t in [(3, 5), (1, 1), (2, 1)]:
        other = torch.randn(b, t, WIDTH), torch.randn(b, 1, t, t)
        claims.same_numbers(model, gm, other)


def test_the_other_mode_is_refused_not_wrong(
    model: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> None:
    gm = fx.symbolic_trace(model)
    ac.fx_pass()(gm, *inputs)
    gm.train()
    with pytest.raises(ac.UnsupportedCall, match="evaluation mode"):
        gm(*inputs)


def test_what_is_not_rewritten_is_put_back(inputs: tuple[torch.Tensor, ...]) -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.softmax = nn.Softmax(dim=1)
            self.mha = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y, weights = self.mha(x, x, x)
            return (self.softmax(y) * y).sum(1), weights

    model = Pool().eval()
    gm = fx.symbolic_trace(model)
    before = gm.code
    result = ac.fx_pass()(gm, inputs[0])
    assert not result.modified and gm.code == before
    claims.same_numbers(model, gm, inputs[:1])


def test_rewrite_of_a_graph_module_leaves_the_given_one(
    model: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> None:
    gm = fx.symbolic_trace(model)
    before = gm.code
    new = ac.rewrite(gm, inputs)
    assert isinstance(new, fx.GraphModule) and in_graph(new.graph) == 2
    assert gm.code == before and new.qkv is not gm.qkv
    claims.same_numbers(model, new, inputs)


def test_a_graph_with_values_needs_no_inputs(
    model: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> None:
    program = torch.export.export(model, inputs)
    gm = copy.deepcopy(program.graph_module)
    assert ac.fx_pass()(gm).modified
    assert in_graph(gm.graph) == 2


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("decomposed", [False, True])
def test_exported_program(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], strict: bool, decomposed: bool
) -> None:
    program = torch.export.export(model, inputs, strict=strict)
    program = program.run_decompositions({}) if decomposed else program
    before = str(program.graph)
    new = ac.rewrite(program)
    assert ac.last_report().rewritten == 2 and in_graph(new.graph) == 2
    assert str(program.graph) == before
    assert new.call_spec == program.call_spec
    claims.same_numbers(model, new.module(), inputs)


def test_exported_program_with_symbolic_sizes(
    model: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> None:
    b, t = torch.export.Dim("b"), torch.export.Dim("t")
    sizes = {"x": {0: b, 1: t}, "mask": {0: b, 2: t, 3: t}}
    new = ac.rewrite(torch.export.export(model, inputs, dynamic_shapes=sizes))
    other = torch.randn(3, 11, WIDTH), torch.randn(3, 1, 11, 11)
    claims.same_numbers(model, new.module(), other)


def test_exported_program_can_be_saved(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], tmp_path: object
) -> None:
    new = ac.rewrite(torch.export.export(model, inputs))
    torch.export.save(new, f"{tmp_path}/program.pt2")
    again = torch.export.load(f"{tmp_path}/program.pt2")
    assert calls(again.module(), *inputs) == 2


def test_as_a_pass_of_inductor(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    before = ac.last_report().rewritten
    compiled = torch.compile(model, options={"pre_grad_custom_pass": ac.fx_pass()})
    with torch.no_grad():
        claims.same_numbers(model, compiled, inputs)
    assert ac.last_report().rewritten == before + 2


def test_uuid_tells_options_apart() -> None:
    one, two = ac.fx_pass(), ac.fx_pass(to={"a.*": "fastest"})
    assert one.uuid() == ac.fx_pass().uuid() != two.uuid()
    assert one == ac.fx_pass() and hash(one) == hash(ac.fx_pass())
