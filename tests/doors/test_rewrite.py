"""rewrite(nn.Module): what comes back is an ordinary module that computes the same with the
operator.
"""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import claims
import pytest
import torch
import torch.multiprocessing as mp
from doors.living import WIDTH, Block, CausalAttention, Latents, calls, in_graph, train_together
from torch import nn
from torch.utils.checkpoint import checkpoint

import attn_compiler as ac
from attn_compiler import backend

SITES = 3


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def shared(original: nn.Module, x: torch.Tensor) -> nn.Module:
    return ac.rewrite(original, (x,))  # type: ignore[no-any-return]


@pytest.fixture
def new(shared: nn.Module) -> nn.Module:
    return copy.deepcopy(shared)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_same_numbers_with_the_operator_and_the_original_untouched(
    original: nn.Module, x: torch.Tensor
) -> None:
    new = ac.rewrite(original, (x,))
    report = ac.last_report()
    assert (len(report.sites), report.rewritten, report.missed) == (SITES, SITES, ())
    assert {s.path for s in report.sites} == {"own", "torchs", "layer.self_attn"}
    assert new is not original and calls(new, x) == SITES and calls(original, x) == 0
    claims.same_numbers(original, new, (x,))


def test_inplace_changes_the_model_itself(original: nn.Module, x: torch.Tensor) -> None:
    model = copy.deepcopy(original)
    weights = list(model.parameters())
    assert ac.rewrite(model, (x,), inplace=True) is model
    assert calls(model, x) == SITES
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))


def test_owner_keeps_name_signature_and_state(original: nn.Module, new: nn.Module) -> None:
    assert type(new.own).__name__ == "CausalAttention"
    assert isinstance(new.own, CausalAttention) and type(new.own) is not CausalAttention
    assert list(new.state_dict()) == list(original.state_dict())
    new.load_state_dict(original.state_dict())
    assert repr(new) == repr(original)


class Symbols(nn.Module):
    """Operators of tensors by their symbols; some are wrapped under other names."""

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        at = torch.arange(1, q.shape[1] + 1)
        by = 2.0**at + at**2 + at**0.5 + 3 / at + 7 // at + (5 - at) % 3 + abs(-at) + (~at & 1)
        by **= 0.5
        q = q * (by * 1e-2)[:, None]
        return (q @ q.mT).softmax(-1) @ q


def test_operators_by_their_symbols() -> None:
    model, q = Symbols(), torch.randn(2, 7, 8)
    new = ac.rewrite(model, (q,))
    assert ac.last_report().rewritten == 1
    torch.testing.assert_close(new(q), model(q))


def test_rewritten_forward_is_readable_python(new: nn.Module) -> None:
    source = new.own._attn_variants[0].source  # type: ignore[union-attr]
    claims.in_order(
        source,
        "def covers(self, x_):",
        "self.c_attn(x_)",
        "torch.ops.attn_compiler.attention.default(",
        "self.c_proj(",
        "def run(self, x_):",
    )


@pytest.mark.parametrize("shape", [(2, 7), (5, 7), (2, 1), (1, 1), (3, 20)], ids=str)
def test_other_sizes_are_covered(
    original: nn.Module, new: nn.Module, shape: tuple[int, int]
) -> None:
    y = torch.randn(*shape, WIDTH)
    assert calls(new, y) == SITES
    claims.same_numbers(original, new, (y,))


def test_deepcopy_computes_with_its_own_weights(
    original: nn.Module, new: nn.Module, x: Any
) -> None:
    twin, reference = copy.deepcopy(new), copy.deepcopy(original)
    before = new(x)
    for a, b in zip(twin.parameters(), reference.parameters(), strict=True):
        noise = torch.randn_like(a) * 0.1
        with torch.no_grad():
            a += noise
            b += noise
    claims.same_numbers(reference, twin, (x,))
    assert torch.equal(new(x), before) and calls(twin, x) == SITES


def test_pickle(original: nn.Module, new: nn.Module, x: torch.Tensor) -> None:
    again = pickle.loads(pickle.dumps(new))
    assert calls(again, x) == SITES
    claims.same_numbers(original, again, (x,))


def test_pickle_in_a_fresh_process(new: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save((new, x, new(x)), file)
    code = (
        "import sys, torch\n"
        f"sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(ac.__file__).parents[1])]!r}\n"
        f"model, x, expected = torch.load({str(file)!r}, weights_only=False)\n"
        "from doors.living import calls\n"
        f"assert calls(model, x) == {SITES}\n"
        "torch.testing.assert_close(model(x), expected)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["eager", "attn_compiler", "inductor"])
def test_outer_compile_sees_the_rewritten_function(
    original: nn.Module, new: nn.Module, x: torch.Tensor, name: str
) -> None:
    backend.register()
    seen: list[int] = []

    def look(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(in_graph(gm.graph))
        return gm.forward

    torch.compile(new, backend=look, fullgraph=True)(x)
    assert seen == [SITES]
    options = {"then": "eager"} if name == "attn_compiler" else None
    compiled = torch.compile(new, backend=name, fullgraph=True, options=options)
    with torch.no_grad():
        claims.same_numbers(original, compiled, (x,))


@pytest.mark.parametrize("strict", [True, False])
def test_export(original: nn.Module, new: nn.Module, x: torch.Tensor, strict: bool) -> None:
    sizes = {"x": {0: torch.export.Dim("b"), 1: torch.export.Dim("t", max=60)}}
    program = torch.export.export(new, (x,), strict=strict, dynamic_shapes=sizes)
    assert in_graph(program.graph) == SITES
    y = torch.randn(3, 11, WIDTH)
    claims.same_numbers(original, program.module(), (y,))


def test_force_eager(original: nn.Module, new: nn.Module, x: torch.Tensor) -> None:
    compiled = torch.compile(new, backend="eager")
    compiled(x)
    with torch.compiler.set_stance("force_eager"):
        assert calls(compiled, x) == SITES
        claims.same_numbers(original, compiled, (x,))


def test_hooks_of_the_owner_run(original: nn.Module, new: nn.Module, x: torch.Tensor) -> None:
    seen: list[str] = []
    for model in (original := copy.deepcopy(original), new):
        model.own.register_forward_pre_hook(lambda *_: seen.append("before"))
        model.own.register_forward_hook(lambda module, given, result: result * 2)
    claims.same_numbers(original, new, (x,))
    assert seen and calls(new, x) == SITES


def test_hook_within_the_attention_runs_the_original(
    original: nn.Module, new: nn.Module, x: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    for model in (original := copy.deepcopy(original), new):
        model.own.attn_dropout.register_forward_hook(lambda module, given, result: result * 2)
    with caplog.at_level(logging.WARNING, "attn_compiler"):
        claims.same_numbers(original, new, (x,))
    assert "runs the original code" in caplog.text
    assert calls(new, x) == SITES - 1


def test_a_changed_number_is_noticed(original: nn.Module, x: torch.Tensor) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 0.25

        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return (q @ q.mT * self.scale).softmax(-1) @ q

    model = Scaled()
    new = ac.rewrite(model, (x,))
    for module in (model, new):
        module.scale = 2.0
    claims.same_numbers(model, new, (x,))


def test_training_mode_honours_dropout(
    original: nn.Module, new: nn.Module, x: torch.Tensor
) -> None:
    new.train()
    torch.manual_seed(0)
    first, second = new(x), new(x)
    torch.manual_seed(0)
    assert not torch.equal(first, second) and torch.equal(first, new(x))
    assert calls(new, x) == SITES
    claims.same_numbers(original, new.eval(), (x,))


def test_gradients(x: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = Block(dropout=0.0)
    new = ac.rewrite(model, (x,))
    claims.same_numbers(model, new, (x.clone().requires_grad_(),), training=True, owner=new)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(x: torch.Tensor, reentrant: bool) -> None:
    torch.manual_seed(0)
    model = Block(dropout=0.0)
    new = ac.rewrite(model, (x,))
    found = []
    for module in (model, new):
        y = x.clone().requires_grad_()
        checkpoint(module, y, use_reentrant=reentrant).square().sum().backward()
        found.append(y.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_first_call_of_a_kind_within_a_checkpoint(x: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = Block(dropout=0.0)
    new = ac.rewrite(model, (x,)).double()
    found = []
    for module in (copy.deepcopy(model).double(), new):
        y = x.double().requires_grad_()
        checkpoint(module, y, use_reentrant=False).square().sum().backward()
        found.append(y.grad)
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_analysed_when_they_come(
    original: nn.Module, new: nn.Module, x: torch.Tensor, dtype: torch.dtype
) -> None:
    new.to(dtype)(x.to(dtype))
    assert calls(new, x.to(dtype)) == SITES
    claims.same_numbers(copy.deepcopy(original).to(dtype), new, (x.to(dtype),))


def test_autocast_leaves_nothing_behind(
    original: nn.Module, new: nn.Module, x: torch.Tensor
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        result = new(x)
        expected = original(x)
        assert calls(new, x) == SITES
    torch.testing.assert_close(result, expected, rtol=5e-2, atol=5e-2)
    claims.same_numbers(original, new, (x,))


def test_functional_transforms(original: nn.Module, new: nn.Module, x: torch.Tensor) -> None:
    torch.testing.assert_close(torch.vmap(new)(x[None])[0], original(x), rtol=1e-4, atol=1e-5)
    found = torch.func.functional_call(new, dict(new.named_parameters()), (x,))
    torch.testing.assert_close(found, new(x))


@pytest.mark.slow
def test_two_processes_under_ddp(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    results = context.Queue()
    address = f"file://{tmp_path}/together"
    mp.spawn(train_together, args=(address, results), nprocs=2, join=True)
    assert sorted(results.get(timeout=10) for _ in range(2)) == [(0, SITES), (1, SITES)]


# ---------------------------------------------------------------- what cannot be done


def test_weights_that_escape_are_kept() -> None:
    class Shows(nn.Module):
        def forward(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            weights = (q @ q.mT).softmax(-1)
            return weights @ q, weights

    model, q = Shows(), torch.randn(2, 5, 8)
    new = ac.rewrite(model, (q,))
    assert [c for s in ac.last_report().sites for c in (r.code for r in s.decision.reasons)] == [
        "attention.second_reader"
    ]
    assert type(new) is Shows


class Remembers(nn.Module):
    """Keeps what it made last, with its derivative, as does a norm of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.utils.weight_norm(nn.Linear(8, 8))
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = q = self.proj(x)
        return torch.softmax(q @ q.mT, -1) @ q


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_model_that_was_trained_before() -> None:
    model, x = Remembers(), torch.randn(2, 5, 8)
    model(x).sum().backward()
    new: Any = ac.rewrite(model, (x,))
    assert torch.equal(new.last, model.last) and ac.last_report().rewritten == 1
    assert calls(new, x) == 1
    grads = [torch.autograd.grad(m(x).cos().sum(), m.proj.weight_g) for m in (model, new)]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(new(x), model(x))


def test_owner_is_above_the_module_that_returns_the_weights() -> None:
    class Inner(nn.Module):
        def forward(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            weights = (q @ q.mT).softmax(-1)
            return weights @ q, weights

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return self.inner(q)[0] + q  # type: ignore[no-any-return]

    model, q = Outer(), torch.randn(2, 5, 8)
    new = ac.rewrite(model, (q,))
    assert type(new) is not Outer and type(new.inner) is Inner
    assert calls(new, q) == 1 and calls(new.inner, q) == 0
    claims.same_numbers(model, new, (q,))


def test_an_impure_owner_is_refused_with_a_reason() -> None:
    table = torch.randn(5, 8)

    class Impure(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            q = q + table
            return (q @ q.mT).softmax(-1) @ q

    new = ac.rewrite(Impure(), (torch.randn(2, 5, 8),))
    assert [m.code for m in ac.last_report().missed] == ["owner.not_pure"]
    assert type(new) is Impure


def test_data_dependent_code_is_refused_with_a_reason() -> None:
    class Looks(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            if q.sum() > 0:
                q = q + 1
            return (q @ q.mT).softmax(-1) @ q

    ac.rewrite(Looks(), (torch.randn(2, 5, 8),))
    assert [m.code for m in ac.last_report().missed] == ["owner.untraceable"]


def test_verify_restores_what_is_wrong(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_compiler import verify

    monkeypatch.setattr(verify, "disagreement", lambda *_: "error 1 to float64, allowed are 0")
    model = CausalAttention().eval()
    new = ac.rewrite(model, (x,))
    assert type(new) is CausalAttention and not hasattr(new, "_attn_variants")
    (site,) = ac.last_report().sites
    assert [r.code for r in site.decision.reasons] == ["verify.failed"]


def test_a_function_can_be_rewritten() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
        return (q @ k.mT * scale).softmax(-1) @ k

    q, k = torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    new = ac.rewrite(attend, (q, k))
    assert calls(new, q, k) == 1
    torch.testing.assert_close(new(q, k, scale=2.0), attend(q, k, scale=2.0), rtol=1e-4, atol=1e-5)


def test_a_parameter_may_be_handed_to_a_submodule(x: torch.Tensor) -> None:
    model = Latents()
    new = ac.rewrite(model, (x,))
    assert calls(new, x) == 1
    claims.same_numbers(model, new, (x,), training=True, owner=new)
