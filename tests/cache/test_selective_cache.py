"""Pruned caches against the loop that defines them, one token after the other, on whole tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import draw, text
from torch import Tensor

from attn_compiler.cache.selective import SelectiveCache, SelectiveLayer
from attn_compiler.errors import BadOption, UnsupportedCall
from attn_compiler.kernels.eviction import selective_deaths
from attn_compiler.kernels.selective import selective_attention
from attn_compiler.kernels.slots import Rule, Slots, Token, prompt, step

B, H, G, T, D, DV, E = 2, 6, 2, 29, 8, 5, 3
SQUARE = Rule(text(mask="(k <= q)"), 0.4, square=True)
LATE = Rule(text(mask="(k <= q + (S - T))"), 0.4)


def token(length: int = T) -> Token:
    sizes = ((length, H, D), (length, G, D), (length, G, DV))
    return Token(*(draw(B, *size).double().transpose(1, 2) * 1.5 for size in sizes))


def with_selector(given: Token, values: bool = False) -> Token:
    length, widths = given.q.shape[2], (E, E, 4)[: 3 if values else 2]
    own = tuple(draw(B, 1, length, w + i).double()[..., :w] * 2 for i, w in enumerate(widths))
    return replace(given, selector=own)


def by_definition(
    given: Token, budget: int, first: Tensor, gate: float = 1.0, bias: Any = None
) -> tuple[Tensor, list[list[int]], Tensor]:
    """Outputs [B, H, T, dv], the tokens kept by each sample, F: loops over samples, rows, tokens.

    `first` is the first valid token of each sample; `bias(h, i, j)` is added to the logits.
    """
    batch, heads, length, _ = given.q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (given.k, given.v))
    z = given.q @ k.transpose(-1, -2) * 0.4
    own = z[:, 0]
    if given.selector:
        own = (given.selector[0] @ given.selector[1].transpose(-1, -2) * 0.4)[:, 0]
    out, kept, state = torch.zeros(batch, heads, length, v.shape[3]).double(), [], []
    for b in range(batch):
        cache: list[int] = []
        amount = torch.zeros(length, dtype=torch.float64)
        for i in range(int(first[b]), length):
            cache.append(i)
            if len(cache) > budget:
                others = [j for j in cache if j not in (int(first[b]), i)]
                cache.remove(max(others, key=lambda j: (float(amount[j]), -j)))
            for h in range(heads):
                logits = torch.stack(
                    [
                        z[b, h, i, j] - gate * amount[j] + (bias(h, i, j) if bias else 0)
                        for j in cache
                    ]
                )
                out[b, h, i] = torch.softmax(logits, 0) @ v[b, h, cache]
            for j in cache:
                if j not in (int(first[b]), i):
                    amount[j] += own[b, i, j].clamp(min=0)
        kept.append(sorted(cache))
        state.append(amount)
    return out, kept, torch.stack(state)


def stepped(rule: Rule, given: Token, budget: int) -> tuple[Tensor, Slots]:
    slots, parts = Slots.empty(given, budget), []
    for i in range(given.q.shape[2]):
        parts.append(step(slots, rule, given.row(i), i)[0])
    return torch.cat(parts, 2), slots


def tokens_in(slots: Slots) -> list[list[int]]:
    return [sorted(int(p) for p in row if p >= 0) for row in slots.positions]


def amounts_in(slots: Slots, length: int) -> Tensor:
    found = torch.full((len(slots.amount), length + 1), math.nan, dtype=torch.float64)
    index = torch.where(slots.positions < 0, length, slots.positions).long()
    return found.scatter_(1, index, slots.amount.double())[:, :length]


def same(slots: Slots, kept: list[list[int]], amount: Tensor, first: Tensor) -> None:
    assert tokens_in(slots) == kept
    found = amounts_in(slots, amount.shape[1])
    for b, positions in enumerate(kept):
        for j in positions:
            expected = -1.0 if j == int(first[b]) else float(amount[b, j])
            assert float(found[b, j]) == pytest.approx(expected, abs=1e-12)


# ---------------------------------------------------------------- the definition


@pytest.mark.parametrize("budget", [2, 3, 7, 19, T, T + 5])
@pytest.mark.parametrize("rule", [SQUARE, LATE])
def test_steps_are_the_definition(rule: Rule, budget: int) -> None:
    given, first = token(), torch.zeros(B)
    exact, kept, amount = by_definition(given, budget, first)
    out, slots = stepped(rule, given, budget)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-12)
    same(slots, kept, amount, first)
    assert all(len(row) <= budget and 0 in row and T - 1 in row for row in kept)


@pytest.mark.parametrize("budget", [2, 3, 7, 19, T, T + 5])
def test_a_prompt_is_its_steps(budget: int) -> None:
    given, first = token(), torch.zeros(B)
    exact, kept, amount = by_definition(given, budget, first)
    slots, (out,) = prompt(SQUARE, given, budget)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-12)
    same(slots, kept, amount, first)


def test_enough_room_prunes_nothing() -> None:
    given = token()
    _, (out,) = prompt(SQUARE, given, T)
    plain, _, _ = selective_attention(
        given.q, given.k, given.v, [], [], None, [], None, None,
        program=SQUARE.program, scale=0.4, dropout=0.0, head=0, select_from="qk",
    )  # fmt: skip
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-13)


def test_worked_case_with_a_budget() -> None:
    """Three tokens stay: row 3 drops token 1, row 4 drops token 2."""
    z = torch.zeros(5, 5, dtype=torch.float64)
    for i, row in enumerate([[1], [2, 1], [1, 3, 0.5], [0.5, -1, 2, 1], [1.5, 1, 0.25, 0.5, 2]]):
        z[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    one_hot = torch.eye(5).double()[None, None]
    given = Token(one_hot, z.T[None, None], one_hot)
    rule = replace(SQUARE, scale=1.0)
    options: dict[str, Any] = {"program": rule.program, "scale": 1.0, "head": 0}
    options |= {"select_from": "qk"}
    death = selective_deaths(given.q, given.k, [], [], [], **options, budget=3)
    assert death.tolist() == [[5, 3, 4, 5, 5]]
    for length, budget in ((5, 1), (4, 3)):
        with pytest.raises(UnsupportedCall, match="at least 2, and a whole sequence"):
            selective_deaths(given.q[:, :, :length], given.k, [], [], [], **options, budget=budget)
    for out in (prompt(rule, given, 3)[1][0], stepped(rule, given, 3)[0]):
        row3 = torch.softmax(torch.tensor([0.5, 2.0, 1.0]).double(), 0)
        row4 = torch.softmax(torch.tensor([1.5, 0.5, 2.0]).double(), 0)
        torch.testing.assert_close(out[0, 0, 3, [0, 2, 3]], row3, rtol=0, atol=1e-14)
        torch.testing.assert_close(out[0, 0, 4, [0, 3, 4]], row4, rtol=0, atol=1e-14)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("split", [1, 11, 20])
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("kind", ["plain", "gate", "selector", "padding", "alibi"])
def test_prompt_and_generation(kind: str, split: int, chunk: int) -> None:
    """A layer that reads a prompt and then tokens, one or a few at a time."""
    given, first, budget = token(), torch.zeros(B), 6
    gate, bias = 1.0, None
    square, late = SQUARE, LATE
    if kind == "gate":
        gate = 0.25
        square, late = (replace(r, gate=torch.tensor([0.25])) for r in (SQUARE, LATE))
    if kind == "selector":
        given = with_selector(given)
    if kind == "padding":
        split = max(split, 4)
        first = torch.tensor([0, 3])
        keep = torch.arange(T + 9) >= first[:, None]
        square = replace(
            SQUARE, program=text(mask="(k <= q) & t0[b, k]", empty="zero"), reads=[keep]
        )
        mask = "(k <= q + (S - T)) & t0[b, k]"
        late = replace(LATE, program=text(mask=mask, empty="zero"), reads=[keep])
    if kind == "alibi":
        slopes = draw(H).abs().double()
        score = "dot - t0[h] * float(q{} - k)"
        square = replace(SQUARE, program=text(score.format(""), "(k <= q)"), reads=[slopes])
        late = replace(
            LATE,
            program=text(score.format(" + (S - T)"), "(k <= q + (S - T))"),
            reads=[slopes],
        )

        def bias(h: int, i: int, j: int) -> Tensor:
            return -slopes[h] * (i - j)

    exact, kept, amount = by_definition(given, budget, first, gate, bias)
    for rule in (square, late):
        layer, parts = SelectiveLayer(budget), []
        for start, end in [(0, split)] + [(i, min(i + chunk, T)) for i in range(split, T, chunk)]:
            q, k, v, *selector = (
                x[:, :, start:end] for x in (given.q, given.k, given.v, *given.selector)
            )
            layer.update(k, v)
            parts.append(layer.attend(q, rule, tuple(selector))[0])
            assert layer.get_seq_length() == end
        torch.testing.assert_close(torch.cat(parts, 2), exact, rtol=0, atol=1e-12)
        assert layer.slots is not None
        same(layer.slots, kept, amount, first)


def test_a_dedicated_head_has_an_output() -> None:
    """Its values are weighed with its own logits and the same F."""
    given, budget = with_selector(token(), values=True), 5
    alone = Token(*given.selector)
    exact, kept, amount = by_definition(alone, budget, torch.zeros(B))
    slots, (_, out) = prompt(SQUARE, given, budget)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-12)
    same(slots, kept, amount, torch.zeros(B))
    again = Slots.empty(given, budget)
    parts = [step(again, SQUARE, given.row(i), i)[1] for i in range(T)]
    torch.testing.assert_close(torch.cat(parts, 2), exact, rtol=0, atol=1e-12)


def test_equals_are_evicted_in_order() -> None:
    """Logits of zero mask nobody: the oldest after the first goes."""
    given = token()
    given = replace(given, q=torch.zeros_like(given.q))
    slots, _ = prompt(SQUARE, given, 4)
    assert tokens_in(slots) == [[0, T - 3, T - 2, T - 1]] * B
    assert tokens_in(stepped(SQUARE, given, 4)[1]) == [[0, T - 3, T - 2, T - 1]] * B


# ---------------------------------------------------------------- the cache of transformers


def test_bytes_are_proportional_to_the_budget() -> None:
    sizes = {}
    given = Token(*(x.bfloat16() for x in (token().q, token().k, token().v)))
    for budget in (8, 16, 24):
        cache = SelectiveCache((budget, budget))
        for layer in cache.layers:
            layer.update(given.k, given.v)
            layer.attend(given.q, SQUARE)
        sizes[budget] = cache.nbytes
        assert cache.nbytes == 2 * B * budget * (2 * G * (D + DV) + 8)
    assert sizes[16] == 2 * sizes[8] and sizes[24] == 3 * sizes[8]


def test_tensors_stay_where_they_are() -> None:
    given, layer = token(), SelectiveLayer(5)
    layer.update(given.k[:, :, :9], given.v[:, :, :9])
    layer.attend(given.q[:, :, :9], SQUARE)
    assert layer.slots is not None
    places = [x.data_ptr() for x in layer.slots.tensors]
    for i in range(9, T):
        layer.update(given.k[:, :, i : i + 1], given.v[:, :, i : i + 1])
        layer.attend(given.q[:, :, i : i + 1], SQUARE)
    layer.reorder_cache(torch.tensor([1, 0]))
    assert places == [x.data_ptr() for x in layer.slots.tensors]


def test_beams() -> None:
    """After a beam took another's place it goes on as the other would."""
    given = token()
    rest = [x[:, :, 20:21] for x in (given.q, given.k, given.v)]

    def go_on(change: Any) -> Tensor:
        layer = SelectiveLayer(7)
        layer.update(given.k[:, :, :20], given.v[:, :, :20])
        layer.attend(given.q[:, :, :20], SQUARE)
        change(layer)
        index = torch.tensor([1, 1])
        q, k, v = (x[index] for x in rest)
        layer.update(k, v)
        return layer.attend(q, SQUARE)[0]

    def repeat(layer: SelectiveLayer) -> None:
        layer.batch_select_indices(torch.tensor([1]))
        layer.batch_repeat_interleave(2)

    exact, _, _ = by_definition(token(), 7, torch.zeros(B))
    for change in (lambda x: x.reorder_cache(torch.tensor([1, 1])), repeat):
        out = go_on(change)
        assert torch.equal(out[0], out[1])
        torch.testing.assert_close(out[:1], exact[1:, :, 20:21], rtol=0, atol=1e-12)


def test_refusals() -> None:
    given, layer = token(3), SelectiveLayer(4)
    with pytest.raises(BadOption, match="too small"):
        SelectiveLayer(1)
    with pytest.raises(UnsupportedCall, match="no new tokens"):
        layer.attend(given.q, SQUARE)
    layer.update(given.k, given.v)
    with pytest.raises(UnsupportedCall, match="without attending"):
        layer.update(given.k, given.v)
    layer.crop(0)
    with pytest.raises(UnsupportedCall, match="cannot forget"):
        layer.crop(-1)
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.nbytes == 0


def test_new_tokens_count_from_their_update_on() -> None:
    """As in the library's layers: models ask between `update` and attending."""
    given, layer = token(3), SelectiveLayer(2)
    for seen in (3, 6):
        layer.update(given.k, given.v)
        assert layer.get_seq_length() == seen
        layer.attend(given.q, LATE)
        assert layer.get_seq_length() == seen


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small Llama whose attention is selective; with a cache, through the cache."""
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        LlamaConfig,
        LlamaForCausalLM,
    )
    from transformers.masking_utils import sdpa_mask

    current: list[SelectiveCache] = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kw: Any) -> Any:
        program = text(mask="t0[b, 0, q, k]", empty="zero")
        rule = Rule(program, kw["scaling"], reads=[mask])
        if current:
            out = current[0].layers[module.layer_idx].attend(query, rule)[0]
        else:
            out, _, _ = selective_attention(
                query, key, value, [mask], [], None, [], None, None,
                program=program, scale=kw["scaling"], dropout=0.0, head=0, select_from="qk",
            )  # fmt: skip
        return out.transpose(1, 2), None

    def mask(*args: Any, **kwargs: Any) -> Tensor:
        kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(*args, **kwargs)

    AttentionInterface.register("selective_test", attend)
    AttentionMaskInterface.register("selective_test", mask)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=61, max_position_embeddings=64,
        attn_implementation="selective_test", bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    for parameter in model.parameters():
        parameter.data *= 3  # logits that mask something
    return model, current


@pytest.mark.parametrize("beams", [1, 3])
def test_generate(llama: Any, beams: int) -> None:
    """With room for all tokens the same text as without any cache; with less, less memory."""
    model, current = llama
    ids = torch.tensor([[0, 0, 5, 7, 11, 13, 17], [3, 19, 23, 29, 31, 37, 41]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    options = {"max_new_tokens": 9, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    exact = model.generate(**inputs, **options, use_cache=False)
    sizes = []
    for budget in (32, 4):
        current[:] = [SelectiveCache((budget, budget))]
        found = model.generate(**inputs, **options, past_key_values=current[0])
        assert current[0].get_seq_length() == ids.shape[1] + 8
        sizes.append(current[0].nbytes)
        assert torch.equal(found, exact) == (budget == 32)
    assert sizes[0] == 8 * sizes[1]
