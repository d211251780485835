"""Positions of a layer of SwitchHead: rotary, Transformer-XL's, or none, whatever the model had."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as ac
from tests.doors import switched
from tests.doors.switched import D, below, draw, expected, gates, routed

NAMES = {"w_q", "w_k", "w_v", "w_o", "w_s", "w_d"}


def spec(positions: Any, **more: Any) -> ac.SwitchHead:
    return ac.SwitchHead(heads=2, experts=3, k=2, head_dim=11, positions=positions, **more)


def rewritten(model: nn.Module, *args: Tensor, to: Any) -> Any:
    torch.manual_seed(5)
    return ac.rewrite(model, args or (draw(),), to=to, on_reject="raise")


def close(ours: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=2e-6)


def by_equations(
    module: Any,
    x: Tensor,
    made: ac.SwitchHead,
    between: Callable[[Tensor], Tensor] = lambda scores: scores,
    causal: bool = True,
) -> Tensor:
    """q k^T + q p^T, one distance after the other, in float64."""
    h, e, k = made.heads, made.experts, made.k
    own = {n: p.detach().double() for n, p in module.named_parameters(recurse=False)}
    x = x.double()
    q, key = (torch.einsum("btd,hdc->bhtc", x, own[n]) for n in ("w_q", "w_k"))
    scores = q @ key.mT
    rates = 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    for i in range(x.shape[1]):
        for j in range(x.shape[1]):
            sinusoid = torch.cat([((i - j) * rates).sin(), ((i - j) * rates).cos()])
            p = torch.einsum("d,hdc->hc", sinusoid, own["w_p"])
            scores[:, :, i, j] += (q[:, :, i] * p).sum(-1)
    scores = between(scores / math.sqrt(q.shape[-1]))
    if causal:
        scores = scores.masked_fill(~below(x.shape[1]), float("-inf"))
    r = scores.softmax(-1) @ routed(x, own["w_v"], own["w_s"], h, e, k)
    gate = gates(x, own["w_d"], h, e, k)
    return torch.einsum("bhtc,hecd,bthe->btd", r, own["w_o"].unflatten(0, (-1, e)), gate)


@pytest.mark.parametrize("kind", [switched.Separate, switched.Rotary])
def test_relative_positions(kind: type[nn.Module]) -> None:
    to = spec("transformer_xl")
    new = rewritten(kind(), to=to)
    shapes = {n: tuple(p.shape) for n, p in new.named_parameters()}
    assert set(shapes) == NAMES | {"w_p"} and shapes["w_p"] == (2, D, 11)
    for x in (draw(2), draw(3, batch=2, length=5)):
        close(new(x), by_equations(new, x, to))
    x = draw(2).requires_grad_()
    new(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in new.parameters())
    again = copy.deepcopy(new)
    again.load_state_dict(new.state_dict())
    assert torch.equal(again(draw(4)), new(draw(4)))


def test_what_a_layer_did_not_have_and_what_it_loses() -> None:
    x = draw(2)
    new = rewritten(switched.Separate(), to=spec("rope"))
    close(new(x), expected(new, x, x, spec("rope"), below(11), turned=True))
    assert ac.last_report().sites[0].decision.spec.positions == "rope"
    new = rewritten(switched.Rotary(), to=spec("none"))
    close(new(x), expected(new, x, x, spec("none"), below(11)))
    new = rewritten(switched.Rotary(), to=spec("auto"))
    assert ac.last_report().sites[0].decision.spec.positions == "rope"


@pytest.mark.parametrize("positions", ["rope", "transformer_xl"])
def test_two_sequences_have_no_distances(positions: str) -> None:
    class Cross(switched.Separate):
        def scores(self, dot: Tensor) -> Tensor:
            return dot

    new = rewritten(Cross(), draw(), draw(2, length=5), to=spec(positions))
    assert {n for n, _ in new.named_parameters()} == NAMES
    x, y = draw(3), draw(4, length=7)
    close(new(x, y), expected(new, x, y, spec(positions)))
    assert ac.last_report().sites[0].decision.spec.positions == "none"


class Biased(switched.Separate):
    """A bias of pairs that is there already, and a cap on the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(11, 11))

    def scores(self, dot: Tensor) -> Tensor:
        return switched.causal(5.0 * torch.tanh((dot + self.bias) / 5.0))


def test_beside_what_the_scores_read() -> None:
    to = spec("transformer_xl")
    new = rewritten(Biased(), to=to)
    x, bias = draw(2), new.bias.detach().double()
    close(new(x), by_equations(new, x, to, lambda dot: 5.0 * torch.tanh((dot + bias) / 5.0)))


def test_positions_that_a_layer_makes_itself_leave_with_it() -> None:
    model, x = switched.Relative(), draw(2)
    new = rewritten(model, to=spec("auto"))
    report = str(ac.last_report())
    assert {n for n, _ in new.named_parameters()} == NAMES | {"w_p"}
    assert (
        not hasattr(new, "apart")
        and f"for {sum(p.numel() for p in model.parameters()):,}" in report
    )
    for given in (x, draw(3, batch=2, length=5)):
        close(new(given), by_equations(new, given, spec("auto")))
    for positions in ("none", "rope"):
        to = spec(positions)
        new = rewritten(switched.Relative(), to=to)
        assert {n for n, _ in new.named_parameters()} == NAMES
        close(new(x), expected(new, x, x, to, below(11), turned=positions == "rope"))


class MaskedByDistance(switched.Relative):
    """The mask is upon what leaves."""

    def sum(self, dot: Tensor, apart: Tensor) -> Tensor:
        return dot + switched.causal(apart) + 0.0


def test_a_mask_upon_positions_that_leave_stays() -> None:
    new, x = rewritten(MaskedByDistance(), to=spec("auto")), draw(2)
    close(new(x), by_equations(new, x, spec("auto")))


def test_positions_of_its_own_in_two_layers_and_a_library() -> None:
    new = rewritten(switched.Stack(switched.Relative), to=spec("auto"))
    assert ac.last_report().rewritten == 2 and len(list(new.parameters())) == 14
    conformer = pytest.importorskip("transformers.models.wav2vec2_conformer")
    configs, code = (
        conformer.configuration_wav2vec2_conformer,
        conformer.modeling_wav2vec2_conformer,
    )
    config = configs.Wav2Vec2ConformerConfig(
        hidden_size=D, num_attention_heads=6, attention_dropout=0.0, max_source_positions=50
    )

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = code.Wav2Vec2ConformerSelfAttention(config)
            self.positions = code.Wav2Vec2ConformerRelPositionalEmbedding(config)

        def forward(self, x: Tensor) -> Tensor:
            given = {"relative_position_embeddings": self.positions(x)}
            return self.attention(x, **given)[0]  # type: ignore[no-any-return]

    new, x = rewritten(Encoder().eval(), to=spec("auto")), draw(2)
    assert {n for n, _ in new.attention.named_parameters()} == NAMES | {"w_p"}
    close(new(x), by_equations(new.attention, x, spec("auto"), causal=False))


def test_trained_heads_keep_positions_of_their_own() -> None:
    to = ac.SwitchHead(init="convert")
    ac.rewrite(switched.Relative(), (draw(),), to=to, calibration=[((draw(),), {})])
    (site,) = ac.last_report().sites
    assert [r.code for r in site.decision.reasons] == ["switchhead.positions"]


def test_sizes_cost_what_is_replaced() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(412, 1230), nn.Linear(410, 412)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                t.unflatten(-1, (10, 41)).transpose(1, 2) for t in self.qkv(x).split(410, -1)
            )
            out = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    model = Wide()
    to = ac.SwitchHead(positions="transformer_xl")
    new = rewritten(model, torch.randn(1, 3, 412), to=to)
    ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (new, model))
    assert abs(ours - theirs) <= 0.01 * theirs
    assert f"{ours:,} parameters" in str(ac.last_report())


@pytest.mark.parametrize("more", [{}, {"feed_forward": "sigma_moe"}])
def test_a_cache_gives_what_the_whole_gives(more: dict[str, Any]) -> None:
    """Padding in front shifts all tokens and no distance."""
    tf = pytest.importorskip("transformers")
    config = tf.GPT2Config(
        vocab_size=101, n_positions=64, n_embd=48, n_layer=2, n_head=4, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    ids = torch.randint(3, 101, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    to = ac.SwitchHead(heads=2, experts=2, k=1, positions="transformer_xl", **more)
    torch.manual_seed(5)
    new = ac.rewrite(tf.GPT2LMHeadModel(config).eval(), (), given, to=to, on_reject="raise")
    assert sum(n.endswith("w_p") for n, _ in new.named_parameters()) == 2
    written = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    whole = new.generate(**given, use_cache=False, **written)
    for cache in ("dynamic", "static"):
        found = new.generate(**given, cache_implementation=cache, **written)
        assert torch.equal(found, whole), cache
