"""rewrite(model, to=GAU()): blocks become pairs of gated units, in every way a module is used."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import attn_compiler as ac
from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels.gau_layer import GauForm, GauParameters, gau_layer
from attn_compiler.kernels.gau_unit import NAMES
from attn_compiler.train.distill import Recipe
from tests.ir.block_models import WIDTH, Net, Parallel, Post, Pre, RmsNorm

tf = pytest.importorskip("transformers")
SMALL = ac.GAU(s=6, expansion=1.5, chunk=4)


def rewritten(model: nn.Module, *args: Any, to: Any = SMALL, **kwargs: Any) -> nn.Module:
    found: nn.Module = ac.rewrite(model, args, kwargs, to=to, on_reject="raise")
    return drawn(found)


def drawn(model: nn.Module) -> nn.Module:
    """New parameters large enough that everything is seen in the output."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in NAMES:
                parameter.normal_(0, 0.5, generator=draw)
    return model


def unit_of(module: nn.Module) -> GauParameters:
    return GauParameters(**{n: getattr(module, n) for n in NAMES})


def close(ours: Tensor, exact: Tensor) -> bool:
    """As near as float32 gets through a few layers."""
    return bool(((ours.double() - exact.double()).abs() <= 1e-4 * exact.abs().max()).all())


def heads(block: Pre, x: Tensor) -> tuple[Tensor, ...]:
    """Its queries, keys and values."""
    parts = block.attend.qkv(x).chunk(3, -1)
    return tuple(t.unflatten(-1, (3, -1)).transpose(1, 2) for t in parts)


X = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))
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


# ---------------------------------------------------------------- generation


def language_model(kind: str, layers: int = 1) -> Any:
    torch.manual_seed(0)
    none = {"bos_token_id": None, "eos_token_id": None, "vocab_size": 61}
    if kind == "gpt2":
        config = tf.GPT2Config(n_embd=12, n_layer=layers, n_head=2, n_positions=64, **none)
        return tf.GPT2LMHeadModel(config).eval()
    config = tf.LlamaConfig(
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=layers,
        num_attention_heads=2,
        **none,
    )
    return tf.LlamaForCausalLM(config).eval()


IDS = torch.randint(1, 61, (2, 7), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("kind", "chunk"), [pytest.param("gpt2", None, marks=pytest.mark.slow), ("llama", 4)]
)
def test_generation_is_the_full_pass(kind: str, chunk: int | None) -> None:
    new: Any = rewritten(language_model(kind, 2), IDS, to=ac.GAU(s=6, expansion=1.5, chunk=chunk))
    options = {"do_sample": False, "pad_token_id": 0}
    out = new.generate(
        IDS, max_new_tokens=6, output_logits=True, return_dict_in_generate=True, **options
    )
    full = new(out.sequences, use_cache=False).logits[:, 6:-1]
    assert close(torch.stack(out.logits, 1), full)
    layer, _ = out.past_key_values.layers
    assert layer.get_seq_length() == 12
    beams = {"max_new_tokens": 3, "num_beams": 3, **options}
    assert torch.equal(new.generate(IDS, **beams), new.generate(IDS, use_cache=False, **beams))


@pytest.mark.slow
def test_generation_with_padding_on_the_left() -> None:
    new: Any = rewritten(language_model("llama"), IDS, to=SMALL)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    out = new.generate(
        IDS, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    whole = functional.pad(mask, (0, 6), value=1)
    full = new(out.sequences, attention_mask=whole, use_cache=False).logits[:, 6:-1]
    assert close(torch.stack(out.logits, 1), full)


@pytest.mark.slow
def test_the_state_does_not_grow() -> None:
    new: Any = rewritten(language_model("llama"), IDS, to=SMALL)
    sizes = []
    for count in (6, 14):
        out = new.generate(
            IDS, max_new_tokens=count, do_sample=False, pad_token_id=0, return_dict_in_generate=True
        )
        sizes.append(sum(layer.nbytes for layer in out.past_key_values.layers))
    assert sizes[0] == sizes[1] > 0
    layer = new(IDS).past_key_values.layers[0]  # the first tokens themselves, of both units
    assert layer.nbytes == 2 * IDS.numel() * 12 * 4


class NetFirst(Parallel):
    def forward(self, x: Tensor, past: Any) -> Tensor:  # type: ignore[override]
        normed = self.first(x)
        made = self.net(normed)
        q, k, v = heads(self, normed)
        k, v = past.update(k, v, 0)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return made + self.attend.out(mixed.transpose(1, 2).flatten(2)) + x  # type: ignore[no-any-return]


def test_a_net_that_comes_before_the_cache() -> None:
    ac.rewrite(NetFirst(), (X, tf.DynamicCache()), to=SMALL)
    (site,) = ac.last_report().sites
    assert [r.code for r in site.decision.reasons] == ["block.order"]


def test_a_cache_that_cannot_hold_states() -> None:
    new: Any = rewritten(language_model("llama"), IDS, to=SMALL)
    cache = tf.StaticCache(new.config, max_cache_len=16)
    with pytest.raises(UnsupportedCall):
        new(IDS, past_key_values=cache)


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
