"""Selective attention in living models: budgets, memory loss, a head of its own, calibration."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from doors.test_selective import D, H, Model, T, draw
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attn_compiler as ac
from attn_compiler.errors import BadOption, UnsupportedCall
from attn_compiler.train.selective import memories

PATHS = ["layers.0", "layers.1"]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    found = Model()
    for parameter in found.parameters():
        parameter.data *= 2  # logits that mask something
    return found


def masked(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and F of a layer, by definition."""
    z, length = layer.logits(x), x.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool).tril(-1)
    earlier[:, 0] = False
    chosen = torch.where(earlier, torch.relu(z[:, 0]), 0.0)
    return z, chosen.cumsum(1) - chosen


def pruned(layer: Any, x: Tensor, budget: int) -> Tensor:
    """The definition: before a row attends the most masked key goes, never the first or its own."""
    z, amount = masked(layer, x)
    out = torch.full_like(z, -torch.inf)
    for b in range(x.shape[0]):
        cache: list[int] = []
        for i in range(x.shape[1]):
            cache.append(i)
            if len(cache) > budget:
                cache.remove(max(cache[1:-1], key=lambda j: (float(amount[b, i, j].detach()), -j)))
            out[b, :, i, cache] = z[b, :, i, cache] - amount[b, i, cache]
    value = layer.parts(x)[2]
    return layer.out((out.softmax(-1) @ value).transpose(1, 2).flatten(2))


def test_budgets_prune_in_evaluation_alone(model: Model) -> None:
    x = draw()
    plain = ac.rewrite(model, (x,), to=ac.Selective())
    new = ac.rewrite(model, (x,), to=ac.Selective(budgets={PATHS[1]: 5, PATHS[0]: T}))
    new.eval()
    exact = pruned(copy.deepcopy(model.layers[1]).double(), x.double(), 5)
    torch.testing.assert_close(new.layers[1](x).double(), exact, rtol=1e-5, atol=1e-5)
    # a budget of all tokens changes nothing
    torch.testing.assert_close(new.layers[0](x), plain.layers[0](x), rtol=1e-6, atol=1e-6)
    new.train()
    torch.testing.assert_close(new(x), plain(x), rtol=1e-6, atol=1e-6)
    for again in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(again.eval()(x), new.eval()(x))
    ac.set_budgets(new, None)
    torch.testing.assert_close(new(x), plain.eval()(x), rtol=1e-6, atol=1e-6)


def test_budgets_that_do_not_fit(model: Model) -> None:
    x = draw()
    with pytest.raises(BadOption, match="3 budgets for 2 layers"):
        ac.rewrite(model, (x,), to=ac.Selective(budgets=[4, 4, 4]))
    with pytest.raises(BadOption, match=r"no Selective attention is at 'layers\.7'"):
        ac.rewrite(model, (x,), to=ac.Selective(budgets={"layers.7": 4}))
    with pytest.raises(BadOption, match="has no Selective attention"):
        ac.set_budgets(model, [4, 4])
    new = ac.rewrite(model, (x,), to=ac.Selective())
    with pytest.raises(BadOption, match="below 2"):
        ac.set_budgets(new, [4, 1])
    # a backend has no module to keep a budget in
    torch._dynamo.reset()
    options = {"to": ac.Selective(budgets=[4, 4]), "then": "eager"}
    torch.compile(model, backend="attn_compiler", options=options)(x)
    codes = {r.code for s in ac.last_report().sites for r in s.decision.reasons}
    assert codes == {"needs_rewrite"}


def test_budgets_are_part_of_the_state(model: Model, tmp_path: Path) -> None:
    x = draw()
    new = ac.rewrite(model, (x,), to=ac.Selective())
    plain = new.eval()(x)
    # without budgets the state is that of the model, and fits either way
    assert set(new.state_dict()) == set(model.state_dict())
    new.load_state_dict(model.state_dict())
    ac.set_budgets(new, {PATHS[1]: 5})
    kept = {f"{PATHS[1]}.attn_memory_0.budget"}
    assert set(new.state_dict()) == set(model.state_dict()) | kept
    torch.save(new.state_dict(), tmp_path / "state.pt")
    other = ac.rewrite(copy.deepcopy(model), (x,), to=ac.Selective()).eval()
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert ac.get_budgets(other) == {PATHS[1]: 5}
    assert torch.equal(other(x), new(x)) and not torch.equal(other(x), plain)
    # by hand, and a state that says nothing changes nothing
    third = ac.rewrite(model, (x,), to=ac.Selective(budgets=ac.get_budgets(new))).eval()
    third.load_state_dict(model.state_dict())
    assert torch.equal(third(x), new(x))
    with pytest.raises(BadOption, match="has no Selective attention"):
        ac.get_budgets(model)


def test_memory_loss_is_the_definition(model: Model) -> None:
    x = draw()
    new = ac.rewrite(model, (x,), to=ac.Selective()).train()
    with pytest.raises(UnsupportedCall, match="no training pass"):
        ac.memory_loss(new)
    out = new(x)
    loss = ac.memory_loss(new, tau=0.75)
    double = copy.deepcopy(model).double()
    exact, y = [], x.double()
    for layer, own in zip(double.layers, new.layers, strict=True):
        alive = (1 - masked(layer, y)[1].clamp(max=0.75) / 0.75).tril()
        exact.append(alive.sum(-1).amax(1) / T)
        y = y + copy.deepcopy(own).double()(y)
    wanted = torch.stack([e.mean() for e in exact]).mean()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    # only selecting heads have a gradient, and it can be added to another loss
    (loss + 0 * out.sum()).backward()
    grad = new.layers[1].qkv.weight.grad.view(3, H, D // H, D)
    assert grad[:2, 0].abs().sum() > 0 and not grad[2].any() and not grad[:2, 1:].any()
    with torch.no_grad():
        new(x)
    with pytest.raises(UnsupportedCall, match="no training pass"):
        ac.memory_loss(new)
    with pytest.raises(BadOption, match="has no Selective attention"):
        ac.memory_loss(model)


def test_memory_loss_under_checkpoints_and_in_copies(model: Model) -> None:
    x = draw()
    new = ac.rewrite(model, (x,), to=ac.Selective()).train()
    y = new.layers[1](new.layers[0](x))
    (wanted,) = torch.autograd.grad(y.sum() + ac.memory_loss(new), new.layers[0].qkv.weight)
    y = x.clone().requires_grad_()
    for layer in new.layers:
        y = checkpoint(layer, y, use_reentrant=False)
    total = y.sum() + ac.memory_loss(new)
    assert all(memory.seen is not None for memory in memories(new).values())
    for again in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert all(memory.seen is None for memory in memories(again).values())
    (found,) = torch.autograd.grad(total, new.layers[0].qkv.weight)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


class Language(nn.Module):
    """Logits of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(31, D), Model(), nn.Linear(D, 31)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)))


def tokens(seed: int) -> Tensor:
    return torch.randint(31, (2, T), generator=torch.Generator().manual_seed(seed))


def test_search_finds_what_the_loss_allows() -> None:
    torch.manual_seed(1)
    new = ac.rewrite(Language(), (tokens(1),), to=ac.Selective(budgets=[9, 9]))
    batches = [((tokens(2),), {}), ((), {"tokens": tokens(3)})]
    calls = []

    def loss(output: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Each token that is gone costs something, in the second layer more."""
        calls.append(not new.training)
        kept = [memory.budget or T for memory in memories(new).values()]  # None keeps all
        return torch.tensor(sum((T - k) * c for k, c in zip(kept, (0.01, 0.1), strict=True)))

    new.train()
    options: dict[str, Any] = {"step": 5, "progress": False}
    found = ac.search_budgets(new, batches, loss=loss, target=0.9, **options)
    assert found == {"body.layers.0": 2, "body.layers.1": 24} and all(calls)
    assert new.training and [m.budget for m in memories(new).values()] == [9, 9]
    # its own loss: the next token's; no pruning is never worse than itself
    found = ac.search_budgets(new, batches, target=100.0, **options)
    assert set(found.values()) == {2}
    with pytest.raises(BadOption, match="above its target"):
        ac.search_budgets(new, batches, target=0.0, **options)
    with pytest.raises(BadOption, match="no batches"):
        ac.search_budgets(new, [], **options)
    with pytest.raises(BadOption, match="loss of this model is not known"):
        ac.search_budgets(new.body, [((draw(),), {})], **options)


def test_calibration_is_reported() -> None:
    torch.manual_seed(1)
    language, batches = Language(), [((tokens(2),), {}), ((tokens(3),), {})]
    new = ac.rewrite(language, (tokens(1),), to=ac.Selective(), calibration=batches)

    def mean(model: nn.Module) -> float:
        losses = [
            nn.functional.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
            for x in (tokens(2), tokens(3))
        ]
        return float(sum(losses) / 2)

    site = ac.last_report().sites[0]
    words = f"loss {mean(language):.4f} before, {mean(new):.4f} after"
    assert site.facts["calibration"].startswith(words)
    assert site.decision.fidelity == "calibrated" and words in ac.last_report().to_json()
    with pytest.raises(BadOption, match="calibration is given"):
        ac.rewrite(language, (tokens(1),), to=ac.Flash(), calibration=batches)


# ---------------------------------------------------------------- a head of its own


class Joint(nn.Module):
    """Queries, keys and values of one tensor; `other` makes values of another one."""

    def __init__(self, other: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.other = nn.Linear(D, 3 * D), nn.Linear(D, D), other

    def parts(self, x: Tensor) -> list[Tensor]:
        return [y.unflatten(-1, (H, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        if self.other:
            v = x.unflatten(-1, (H, -1)).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


def test_a_head_of_its_own_starts_exact_and_learns() -> None:
    torch.manual_seed(4)
    layer, x = Joint(), draw()
    new = ac.rewrite(layer, (x,), to=ac.Selective(start="dedicated_head"), on_reject="raise")
    own = {n: p for n, p in new.named_parameters() if "select" in n}
    assert [tuple(p.shape) for p in own.values()] == [(D, 8), (D, 8), (D, 8), (8, D)]
    torch.testing.assert_close(new(x), layer(x), rtol=1e-5, atol=1e-5)
    optimizer = torch.optim.SGD(own.values(), 0.1)
    moved = []
    for _ in range(3):
        optimizer.zero_grad()
        new(x).square().mean().backward()
        moved.append({n for n, p in own.items() if p.grad is not None and p.grad.any()})
        optimizer.step()
    # outputs first, through them values and keys, through keys queries
    assert moved[0] == {"attn_select_o_0"} and moved[2] == set(own)
    assert moved[1] == set(own) - {"attn_select_q_0"}


def test_a_head_of_its_own_by_definition() -> None:
    torch.manual_seed(4)
    layer, x = Joint(), draw(7)
    new = ac.rewrite(layer, (x,), to=ac.Selective(start="dedicated_head"))
    for parameter in new.parameters():
        nn.init.normal_(parameter, std=0.3)
    double, y = copy.deepcopy(new).double(), x.double()
    w_q, w_k, w_v, w_o = (getattr(double, f"attn_select_{c}_0") for c in "qkvo")
    scale, later = (D // H) ** -0.5, torch.ones(T, T, dtype=torch.bool).triu(1)
    own = (y @ w_q) @ (y @ w_k).transpose(1, 2) * scale
    earlier = ~torch.eye(T, dtype=torch.bool) & ~later
    earlier[:, 0] = False
    chosen = torch.where(earlier, torch.relu(own), 0.0)
    amount = chosen.cumsum(1) - chosen
    q, k, v = Joint.parts(double, y)
    heads = torch.cat([q @ k.transpose(-1, -2) * scale, own[:, None]], 1) - amount[:, None]
    weights = heads.masked_fill(later, -torch.inf).softmax(-1)
    out = (weights[:, :H] @ v).transpose(1, 2).flatten(2) + weights[:, H] @ (y @ w_v) @ w_o
    torch.testing.assert_close(new(x).double(), double.out(out), rtol=1e-4, atol=1e-4)
    ac.set_budgets(new, [T])
    torch.testing.assert_close(new.eval()(x).double(), double.out(out), rtol=1e-4, atol=1e-4)


def test_no_single_input_no_head_of_its_own() -> None:
    ac.rewrite(Joint(other=True), (draw(),), to=ac.Selective(start="dedicated_head"))
    codes = {r.code for s in ac.last_report().sites for r in s.decision.reasons}
    assert codes == {"selective.dedicated_head"}


def test_explain_says_what_rewrite_would_do() -> None:
    layer = Joint()
    for spec in (ac.Selective(start="dedicated_head"), ac.Selective(budgets=[5])):
        report = ac.explain(layer, (draw(),), to=spec)
        assert [site.decision.variant for site in report.sites] == ["selective"]
    assert set(layer.state_dict()) == {"qkv.weight", "qkv.bias", "out.weight", "out.bias"}
