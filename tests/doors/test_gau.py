"""rewrite(model, to=GAU()): blocks become pairs of gated units, in every way a module is used."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from doors.gated import IDS, SMALL, X, close, drawn, heads, rewritten
from torch import Tensor, nn
from torch.nn import functional

import attn_compiler as ac
from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels.gau_layer import GauForm, GauParameters, gau_layer
from attn_compiler.kernels.gau_unit import NAMES
from attn_compiler.train.distill import Recipe
from tests.ir.block_models import WIDTH, Net, Parallel, Post, Pre, RmsNorm

tf = pytest.importorskip("transformers")


def unit_of(module: nn.Module) -> GauParameters:
    return GauParameters(**{n: getattr(module, n) for n in NAMES})


FORM = GauForm(chunk=4, causal=True)


class Tabled(nn.Module):
    """Causal attention by a mask that it holds, as a buffer or as a plain tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        mask = torch.ones(16, 16).tril()
        if kind == "buffer":
            self.register_buffer("mask", mask)
        else:
            self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        seen = self.mask[: x.shape[1], : x.shape[1]] != 0
        weights = (q @ k.mT * 0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["buffer", "plain"])
def test_a_mask_that_a_block_holds_stays(kind: str) -> None:
    old = Pre()
    old.attend = Tabled(kind)
    new = rewritten(old, X).eval()
    assert torch.equal(new.attend.mask, old.attend.mask)
    assert "attend.qkv.weight" not in new.state_dict()
    later = X.clone()
    later[:, 4:] = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        same = (new(X) - new(later)).abs().amax((0, 2)) == 0
    assert same.tolist() == [True] * 4 + [False] * 3


@pytest.mark.parametrize("kind", [Pre, Post, Parallel])
def test_a_block_computes_its_two_units(kind: type[Pre]) -> None:
    old = kind(rate=0.25)
    new = rewritten(old, X).eval()
    units = unit_of(new.attend), unit_of(new.net)
    first, second = new.first, new.second
    a, f = (lambda x, u=u: gau_layer(x, u, FORM) for u in units)
    if kind is Pre:
        h = X + a(first(X))
        wanted = h + f(second(h))
    elif kind is Post:
        h = first(X + a(X))
        wanted = second(h + f(h))
    else:
        wanted = X + a(first(X)) + f(first(X))
    assert close(new(X), wanted)
    report = ac.last_report()
    (site,) = report.sites
    assert (site.decision.variant, site.decision.fidelity) == ("gau", "retrained")
    assert "two units, s 6, 18 wide, chunks of 4" in site.facts["gau"]
    assert "and these are 7" in site.facts["gau"]
    assert {n for n, _ in old.named_parameters() if "qkv" in n or "up" in n}.isdisjoint(
        n for n, _ in new.named_parameters()
    )


def test_weights_are_dropped_in_training_alone() -> None:
    old = Pre()
    old.attend.dropout = 0.5
    new = rewritten(old.train(), X)
    first, second = new(X), new(X)
    assert not torch.equal(first, second)
    new.eval()
    h = X + gau_layer(new.first(X), unit_of(new.attend), FORM)
    assert close(new(X), h + gau_layer(new.second(h), unit_of(new.net), FORM))


@pytest.mark.slow
def test_what_a_module_has_to_bear() -> None:
    new = rewritten(Pre(net=Net(functional.silu, gated=True), norm=RmsNorm), X)
    y = new(X)
    for twin in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(twin(X), y)
    other = drawn(ac.rewrite(Pre(norm=RmsNorm), (X,), to=SMALL))
    other.load_state_dict(new.state_dict())
    assert torch.equal(other(X), y)
    assert close(new.double()(X.double()), y)
    new.float()
    longer = torch.randn(3, 11, WIDTH)
    assert close(new(longer)[:, :6], new(longer[:, :6]))
    assert torch.equal(torch.compile(new, backend="eager", fullgraph=True)(X), new(X))


def test_every_new_parameter_learns() -> None:
    torch.manual_seed(0)
    new = rewritten(Pre(rate=0.25), X).train()
    names = dict(new.named_parameters())
    optimiser = torch.optim.AdamW(new.parameters(), lr=1e-2)
    goal = torch.randn_like(X)
    losses = []
    for step in range(12):
        loss = (new(X) - goal).square().mean()
        optimiser.zero_grad()
        loss.backward()
        if step == 0:
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in names.values())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("width", "hidden"), [(48, 192), pytest.param(32, 70, marks=pytest.mark.slow)]
)
def test_sizes_match_the_block(width: int, hidden: int) -> None:
    model = nn.TransformerEncoderLayer(width, 2, hidden, batch_first=True).train()
    new = ac.rewrite(model, (torch.randn(2, 7, width),), to=ac.GAU())
    norms = 4 * width
    replaced = sum(p.numel() for p in model.parameters()) - norms
    units = sum(p.numel() for n, p in new.named_parameters() if not n.endswith("rel_bias")) - norms
    assert abs(units / replaced - 1) <= 0.02


@pytest.mark.parametrize("batch_first", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_encoder_layers_with_padding(batch_first: bool) -> None:
    old = nn.TransformerEncoderLayer(WIDTH, 3, 20, dropout=0.0, batch_first=batch_first).train()
    x = X if batch_first else X.transpose(0, 1)
    away = torch.zeros(2, 7, dtype=torch.bool)
    away[1, 5:] = True
    new = rewritten(old, x, src_key_padding_mask=away)
    form = GauForm(chunk=4, causal=False)
    h = new.norm1(X + gau_layer(X, unit_of(new.self_attn), form, valid=~away))
    wanted = new.norm2(h + gau_layer(h, unit_of(new), form, valid=~away))
    got = new(x, src_key_padding_mask=away)
    assert close(got if batch_first else got.transpose(0, 1), wanted)


class Packed(Pre):
    """Tokens see those of their own document."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = heads(self, self.first(x))
        same = (ids[:, None, :] == ids[:, :, None])[:, None]
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=same)
        x = x + self.attend.out(mixed.transpose(1, 2).flatten(2))
        return x + self.net(self.second(x))  # type: ignore[no-any-return]


def test_packed_documents() -> None:
    ids = torch.tensor([[3, 3, 3, 5, 5, 5, 5], [1, 1, 1, 1, 1, 2, 2]])
    new = rewritten(Packed(), X, ids)
    assert ac.last_report().sites[0].mask == "documents(ids)"
    form = GauForm(chunk=4, causal=False)
    h = X + gau_layer(new.first(X), unit_of(new.attend), form, documents=ids)
    wanted = h + gau_layer(new.second(h), unit_of(new.net), form, documents=ids)
    assert close(new(X, ids), wanted)


class Handed(Pre):
    """Is given the mask of rows and keys."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = heads(self, self.first(x))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
        x = x + self.attend.out(mixed.transpose(1, 2).flatten(2))
        return x + self.net(self.second(x))  # type: ignore[no-any-return]


def test_masks_that_are_handed_over() -> None:
    below = torch.ones(2, 7, 7, dtype=torch.bool).tril()
    new = rewritten(Handed(), X, below)
    packed = torch.tensor([[0, 0, 3, 3, 0, 1, 1], [5, 5, 5, 5, 5, 2, 0]])  # 0 is padding
    for ids, documents in ((packed, packed), (packed.clamp(max=1), None)):
        valid = ids != 0
        same = (ids[:, None, :] == ids[:, :, None]) & valid[:, None, :] & valid[:, :, None]
        for causal in (True, False):
            form = GauForm(chunk=4, causal=causal)
            seen = {"valid": valid, "documents": documents}
            h = X + gau_layer(new.first(X), unit_of(new.attend), form, **seen)
            wanted = h + gau_layer(new.second(h), unit_of(new.net), form, **seen)
            assert close(new(X, same & below if causal else same)[valid], wanted[valid])
    for wrong in (below & ~below.tril(-3), below.tril(-1), below | below.mT.tril(3)):
        with pytest.raises(UnsupportedCall, match="cannot keep to"):
            new(X, wrong)


class Windowed(Pre):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads(self, self.first(x))
        i = torch.arange(x.shape[1])
        near = (i[:, None] - i).abs() < 2
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=near)
        x = x + self.attend.out(mixed.transpose(1, 2).flatten(2))
        return x + self.net(self.second(x))  # type: ignore[no-any-return]


class Biased(Pre):
    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = heads(self, self.first(x))
        weights = (q @ k.transpose(-1, -2) + bias[:, None].sigmoid()).softmax(-1)
        x = x + self.attend.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.net(self.second(x))  # type: ignore[no-any-return]


class Sines(Pre):
    def __init__(self) -> None:
        super().__init__(net=Net(torch.sin))


@pytest.mark.parametrize(
    ("model", "more", "to", "code"),
    [
        (Windowed(), (), SMALL, "gau.mask"),
        (Biased(), (torch.randn(2, 7, 7),), SMALL, "gau.score"),
        (Pre(), (), ac.GAU(s=4096), "gau.sizes"),
        (Sines(), (), SMALL, "feed_forward.unlike"),
        (Pre().attend, (), SMALL, "block.outside"),
    ],
)
def test_what_is_left_alone(model: nn.Module, more: Any, to: Any, code: str) -> None:
    new = ac.rewrite(model, (X, *more), to=to)
    (site,) = ac.last_report().sites
    assert [r.code for r in site.decision.reasons] == [code]
    assert torch.equal(new(X, *more), model(X, *more))


def test_a_backend_has_no_place_for_parameters() -> None:
    model = Pre()
    compiled = torch.compile(model, backend="attn_compiler", options={"to": SMALL, "then": "eager"})
    assert close(compiled(X), model(X))
    (site,) = ac.last_report().sites
    assert [r.code for r in site.decision.reasons] == ["needs_rewrite"]


@pytest.mark.slow
def test_explain_says_what_would_be_done() -> None:
    (site,) = ac.explain(Pre(), (X,), to=SMALL).sites
    assert site.decision.accepted
    assert "18 wide" in site.facts["gau"]


@pytest.mark.slow
def test_units_learn_what_the_blocks_computed() -> None:
    teacher = nn.Sequential(Pre(), Post())
    student = ac.rewrite(teacher, (X,), to=SMALL)
    done = ac.distill(
        student, teacher, [((X,), {})], steps=(12, 0), lr=1e-2, recipe=Recipe(progress=False)
    )
    assert done.layers == ("0", "1")
    losses = done.losses["layers"]
    assert losses[-1] < losses[0]


# ---------------------------------------------------------------- a library's encoders


@pytest.mark.slow
def test_encoders_of_a_library() -> None:
    small = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 20}
    one = {"num_hidden_layers": 1}
    bert = tf.BertModel(tf.BertConfig(vocab_size=61, **small, **one)).eval()
    new: Any = rewritten(bert, IDS)
    mask = torch.ones_like(IDS)
    mask[0, 5:] = 0
    changed = IDS.clone()
    changed[0, 5:] += 0 if bool((IDS[0, 5:] == 60).any()) else 1
    seen = new(IDS, attention_mask=mask).last_hidden_state
    assert close(new(changed, attention_mask=mask).last_hidden_state[0, :5], seen[0, :5])
    assert not close(new(IDS).last_hidden_state[0, :5], seen[0, :5])
    config = tf.ViTConfig(image_size=8, patch_size=4, **small, **one)
    vit = rewritten(tf.ViTModel(config).eval(), torch.randn(2, 3, 8, 8))
    assert vit(torch.randn(3, 3, 8, 8)).last_hidden_state.shape == (3, 5, 12)


def test_a_table_that_is_read_outside_of_the_block_is_not_taken() -> None:
    """Its encoder adds one table of biases, which belongs to no layer, to the scores of all."""
    config = tf.MPNetConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=40, attn_implementation="eager",
    )  # fmt: skip
    model, ids = tf.MPNetModel(config).eval(), torch.randint(3, 20, (2, 9))
    new = ac.rewrite(model, (ids,), to=ac.GAU())
    assert not any(site.decision.accepted for site in ac.last_report().sites)
    assert torch.equal(new(ids).last_hidden_state, model(ids).last_hidden_state)


def test_outputs_start_at_the_scale_of_the_branches() -> None:
    torch.manual_seed(0)
    model = Pre()
    rms = {"attend": 0.003, "net": 0.2}
    nn.init.normal_(model.attend.out.weight, std=rms["attend"])
    nn.init.normal_(model.net.down.weight, std=rms["net"])
    inputs = {"attend": WIDTH, "net": model.net.down.in_features}
    new = ac.rewrite(model, (X,), to=SMALL, on_reject="raise")
    for name, scale in rms.items():
        w_o = getattr(new, name).w_o.detach()
        wanted = scale * (inputs[name] / w_o.shape[0]) ** 0.5
        torch.testing.assert_close(float(w_o.std()), wanted, rtol=0.2, atol=0)
