"""Parameters that are taken out of a module, and others that are put in."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import Tensor, nn

from attn_compiler import swap
from attn_compiler.installed import Variant, as_before, install, restore, settle
from attn_compiler.ir.mask import classify
from attn_compiler.ir.score import Program
from attn_compiler.ir.site import AttentionSite, Decision, Kind
from attn_compiler.variants.base import NewTensor
from attn_compiler.variants.starts import Start

TEXT = """
def covers(self, x):
    return True


def run(self, x):
    return x @ self.inner.w_q
"""


def constant(tensor: Tensor, value: float, step: float) -> None:
    tensor.fill_(value + step)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.proj, self.last = nn.Linear(5, 5), nn.Linear(5, 7), nn.Linear(7, 5)
        self.table, self.other = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3))


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Inner(), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.last(self.inner.proj(x))


TENSORS = (
    NewTensor("w_q", (5, 11), torch.float32, Start(constant, (2.0, 1.0)), True, home="inner"),
    NewTensor("kept", (3,), torch.bool, True, home="inner"),
)
TAKEN = ("inner.proj", "inner.table", "inner.last")


def site() -> AttentionSite:
    decision = Decision(True, "new", fidelity="retrained", tensors=TENSORS, taken=TAKEN)
    program = Program()
    return AttentionSite(
        "inner", "Inner", "", Kind.SELF, (), 1, 1, 5, 5, classify(program.mask, (), ()), "dot",
        program, 1.0, "float32", 0.0, decision,
    )  # fmt: skip


def put(owner: Owner) -> None:
    install(owner, [Variant(TEXT, {})], None, (site(),))


def names(owner: nn.Module) -> list[str]:
    return [name for name, _ in owner.named_parameters()]


def test_what_is_replaced_leaves_and_comes_back_in_order() -> None:
    owner = Owner()
    before, parameters = owner.state_dict(keep_vars=True), list(owner.parameters())
    put(owner)
    assert names(owner) == [
        "inner.other", "inner.w_q", "inner.first.weight", "inner.first.bias",
        "head.weight", "head.bias",
    ]  # fmt: skip
    assert owner.inner.w_q.eq(3).all() and owner.inner.kept.all()
    assert "inner.kept" in owner.state_dict() and not hasattr(owner.inner, "proj")
    restore(owner)
    after = owner.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[n] is before[n] for n in before)
    assert all(a is b for a, b in zip(owner.parameters(), parameters, strict=True))
    assert list(owner.inner._modules) == ["first", "proj", "last"] and type(owner) is Owner


def test_what_settled_has_no_memory_and_its_shapes_serve_a_trace() -> None:
    owner = Owner()
    put(owner)
    settle(owner)
    for found in (owner, copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))):
        held = found.__dict__["_attn_taken"]
        assert all(t.is_meta for item in held for t in _tensors(item.value))
        found.to(torch.float64)
        inside, state = names(found), list(found.state_dict())
        with as_before(found):
            assert found.inner.proj.weight.shape == (7, 5)
            assert found.inner.proj.weight.dtype == torch.float64
            assert found.inner.table.device == found.inner.w_q.device
        assert names(found) == inside and list(found.state_dict()) == state
        x = torch.ones(2, 5, dtype=torch.float64)
        assert found(x).eq(15).all()
        found.load_state_dict(found.state_dict())


def _tensors(value: nn.Module | nn.Parameter) -> list[Tensor]:
    return [value] if isinstance(value, nn.Parameter) else list(value.parameters())


def obstacle(model: nn.Module, owner: Owner) -> str:
    found = swap.obstacle(model, owner, TAKEN, TENSORS)
    return "" if found is None else found[0]


def test_a_weight_that_something_else_holds_too() -> None:
    owner = Owner()
    model = nn.ModuleDict({"a": owner, "b": nn.Linear(5, 7)})
    assert obstacle(model, owner) == ""
    model["b"].weight = owner.inner.proj.weight
    assert obstacle(model, owner) == "rewrite.shared_weight"
    model["b"] = owner.inner.proj
    assert obstacle(model, owner) == "rewrite.shared_weight"


def test_the_name_of_a_new_parameter_is_the_modules_own() -> None:
    owner = Owner()
    owner.inner.w_q = nn.Parameter(torch.ones(2))
    assert obstacle(owner, owner) == "rewrite.name_taken"
    found = swap.obstacle(owner, owner, (*TAKEN, "inner.w_q"), TENSORS)
    assert found is None
