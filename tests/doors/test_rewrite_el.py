"""rewrite(model, to=ELAttention()): which attention with a cache is rewritten, which is not and
why, and that every call computes what it did.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import attn_compiler as ac

tf = pytest.importorskip("transformers")
nbytes = pytest.importorskip("attn_compiler.cache.el").nbytes
layer = pytest.importorskip("attn_compiler.cache.layer")

WIDTH, HEADS, FEATURES = 23, 3, 5
INNER = HEADS * FEATURES
Sides = tuple[Tensor, Tensor]


class Counted(TorchDispatchMode):
    """How often the operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.found = {"el_attention": 0, "attention": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(getattr(func, "overloadpacket", func)).rpartition(".")[2]
        if "attn_compiler" in str(func) and name in self.found:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class Matrix(nn.Module):
    """A linear map as one library spells it: the weight is [inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.size()[:-1], self.bias.shape[0])
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, FEATURES)).transpose(1, 2)


class Attend(nn.Module):
    """Causal attention over what a cache holds."""

    def __init__(self, groups: int = HEADS, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(WIDTH, INNER)
        self.k = nn.Linear(WIDTH, groups * FEATURES, bias=bias)
        self.v = nn.Linear(WIDTH, groups * FEATURES, bias=bias)
        self.out = nn.Linear(INNER, WIDTH)

    def sides(self, x: Tensor) -> Sides:
        return heads(self.k(x)), heads(self.v(x))

    def cached(self, sides: Sides, past: Any) -> Sides:
        return past.update(*sides, 0)  # type: ignore[no-any-return]

    def scores(self, dot: Tensor) -> Tensor:
        rows, keys = dot.shape[-2:]
        seen = torch.arange(keys) <= torch.arange(rows)[:, None] + (keys - rows)
        return dot.masked_fill(~seen, float("-inf"))

    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def forward(self, x: Tensor, past: Any) -> Tensor:
        q = heads(self.q(x))
        k, v = self.cached(self.sides(x), past)
        k, v = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
        weights = self.weights(self.scores(q @ k.transpose(-1, -2) * FEATURES**-0.5))
        return self.out((weights @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def draw(rows: int, length: int) -> Tensor:
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(length))


def rewritten(model: nn.Module, *args: Any) -> tuple[nn.Module, Any]:
    new = ac.rewrite(model.eval(), args or (draw(2, 7), tf.DynamicCache()), to=ac.ELAttention())
    report = ac.last_report()
    assert len(report.sites) == 1, str(report)
    return new, report.sites[0].decision


def steps(model: nn.Module, past: Any) -> list[Tensor]:
    """A prompt, single tokens, several at once, a reordering of the batch in between."""
    found = []
    for number, length in enumerate((7, 1, 1, 3, 1)):
        with torch.no_grad():
            found.append(model(draw(2, length), past))
        if number == 2 and hasattr(past, "reorder_cache"):
            past.reorder_cache(torch.tensor([1, 0]))
    return found


def same(model: nn.Module, new: nn.Module, make: Callable[[], Any] = tf.DynamicCache) -> Any:
    """Every step is as near to float64 as the original's."""
    past = make()
    ours, theirs = steps(new, past), steps(model, make())
    # a deep copy in float64 sees the same inputs
    wide = copy.deepcopy(model).double()
    wide.register_forward_pre_hook(lambda m, args: (args[0].double(), *args[1:]))
    for mine, other, exact in zip(ours, theirs, steps(wide, make()), strict=True):
        budget = 4 * float((other - exact).abs().max()) + 8 * 2**-23 * float(exact.abs().max())
        assert float((mine - exact).abs().max()) <= budget
    return past


# ---------------------------------------------------------------- what is rewritten


class Packed(Attend):
    """Queries, keys and values in one map, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * INNER)

    def sides(self, x: Tensor) -> Sides:
        _, k, v = self.qkv(x).split(INNER, dim=2)
        return heads(k), heads(v)


class Interleaved(Attend):
    """In one map, head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * INNER)

    def sides(self, x: Tensor) -> Sides:
        _, k, v = self.qkv(x).unflatten(-1, (HEADS, 3, FEATURES)).transpose(1, 2).unbind(3)
        return k, v


class Transposed(Attend):
    def __init__(self) -> None:
        super().__init__()
        self.k = self.v = Matrix(WIDTH, INNER)


class Biased(Attend):
    """ALiBi."""

    def scores(self, dot: Tensor) -> Tensor:
        slopes = torch.tensor([0.5, 0.25, 0.125]).view(-1, 1, 1)
        return super().scores(dot + slopes * torch.arange(dot.shape[-1]))


class Capped(Attend):
    """The bias of the keys does not fall out here."""

    def scores(self, dot: Tensor) -> Tensor:
        return super().scores(2 * torch.tanh(dot / 2))


TURNED = 2


def turned(x: Tensor) -> Tensor:
    """Rotated by the position, which is read from nothing but the length."""
    angle = torch.arange(x.shape[2])[:, None] * torch.linspace(0.1, 1.0, x.shape[3])
    half = torch.cat([-x[..., 1:], x[..., :1]], -1)
    return x * angle.cos() + half * angle.sin()


class PartlyRotated(Attend):
    """Some features of a key are rotated, in front."""

    def parted(self, k: Tensor) -> Tensor:
        return torch.cat([turned(k[..., :TURNED]), k[..., TURNED:]], -1)

    def sides(self, x: Tensor) -> Sides:
        k, v = super().sides(x)
        return self.parted(k), v


class RotatedBehind(PartlyRotated):
    def parted(self, k: Tensor) -> Tensor:
        return torch.cat([k[..., :-TURNED], turned(k[..., -TURNED:])], -1)


class RotatedForAll(PartlyRotated):
    """Heads share the rotated features."""

    def parted(self, k: Tensor) -> Tensor:
        shared = turned(k[:, :1, :, :TURNED]).expand(-1, k.shape[1], -1, -1)
        return torch.cat([k[..., TURNED:], shared], -1)


class RotatedPacked(PartlyRotated):
    """The keys of a head behind its queries, in one map."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * INNER)

    def sides(self, x: Tensor) -> Sides:
        _, k, v = self.qkv(x).unflatten(-1, (HEADS, 3, FEATURES)).transpose(1, 2).unbind(3)
        return self.parted(k), v


class Size(nn.Module):
    """A norm as one library spells it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2.0, features))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        found = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)
        return self.weight * found.to(x.dtype)


def layer_norm() -> nn.LayerNorm:
    found = nn.LayerNorm(FEATURES)
    with torch.no_grad():
        found.weight.copy_(torch.linspace(0.5, 2.0, FEATURES))
        found.bias.copy_(torch.linspace(-1.0, 1.0, FEATURES))
    return found


class Normed(Attend):
    """The keys of a head are normalised."""

    def __init__(self, make: Callable[[], nn.Module], groups: int = HEADS) -> None:
        super().__init__(groups)
        self.norm = make()

    def sides(self, x: Tensor) -> Sides:
        k, v = super().sides(x)
        return self.norm(k), v


class NormedWhole(Normed):
    """All keys of a token are normalised together."""

    def sides(self, x: Tensor) -> Sides:
        return heads(self.norm(self.k(x))), heads(self.v(x))


class NormedAndRotated(Normed):
    def sides(self, x: Tensor) -> Sides:
        k, v = super().sides(x)
        return torch.cat([turned(k[..., :TURNED]), k[..., TURNED:]], -1), v


class NormedAndCapped(Normed):
    """The bias of the norm does not fall out here."""

    def scores(self, dot: Tensor) -> Tensor:
        return super().scores(2 * torch.tanh(dot / 2))


LEGAL: dict[str, Callable[[], nn.Module]] = {
    "plain": Attend,
    "rotated in front": PartlyRotated,
    "rotated behind": RotatedBehind,
    "rotated once for all heads": RotatedForAll,
    "rotated, and packed": RotatedPacked,
    "a norm over each head": lambda: Normed(lambda: nn.RMSNorm(FEATURES)),
    "a norm of the user's own": lambda: Normed(lambda: Size(FEATURES)),
    "a norm that takes the mean off": lambda: Normed(layer_norm),
    "a norm over all heads": lambda: NormedWhole(lambda: Size(INNER)),
    "a norm, then a rotation": lambda: NormedAndRotated(layer_norm),
    "a norm with a bias under a cap": lambda: NormedAndCapped(layer_norm),
    "no bias": lambda: Attend(bias=False),
    "packed": Packed,
    "interleaved": Interleaved,
    "a map of the user's own": Transposed,
    "a bias of the scores": Biased,
    "a cap on the scores": Capped,
}


# numbers of a token that are kept besides x
BESIDE = {
    "rotated in front": HEADS * TURNED,
    "rotated behind": HEADS * TURNED,
    "rotated once for all heads": TURNED,
    "rotated, and packed": HEADS * TURNED,
    "a norm over each head": HEADS,
    "a norm of the user's own": HEADS,
    "a norm that takes the mean off": HEADS,
    "a norm over all heads": 1,
    "a norm, then a rotation": HEADS * (TURNED + 1),
    "a norm with a bias under a cap": HEADS,
}


QUICK = {"rotated in front", "a norm over all heads", "a norm, then a rotation"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in QUICK or n not in BESIDE else pytest.mark.slow)
        for n in LEGAL
    ],
)
def test_it_is_rewritten_and_the_same(name: str) -> None:
    model = LEGAL[name]()
    new, decision = rewritten(model)
    assert decision.accepted and decision.variant == "el", str(decision)
    past = same(model, new)
    assert type(past.layers[0]) is layer.StatesLayer
    kept = 2 * 13 * (WIDTH + BESIDE.get(name, 0)) * 4
    assert past.layers[0].nbytes == nbytes(past) == kept
    with Counted() as counted:
        steps(new, tf.DynamicCache())
    assert counted.found["el_attention"] >= 3


def test_a_prompt_runs_ordinary_attention_and_a_step_reads_states() -> None:
    new, _ = rewritten(Attend())
    past = tf.DynamicCache()
    for length, wanted in ((41, "attention"), (1, "el_attention")):
        with Counted() as counted, torch.no_grad():
            new(draw(2, length), past)
        assert counted.found == {"el_attention": 0, "attention": 0} | {wanted: 1}


class Kept:
    """A cache that somebody wrote."""

    def __init__(self) -> None:
        self.held: list[Sides] = []

    def update(self, k: Tensor, v: Tensor, index: int) -> Sides:
        if len(self.held) <= index:
            self.held.append((k, v))
        else:
            past = self.held[index]
            self.held[index] = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.held[index]


def test_a_cache_that_cannot_hold_states_goes_on_holding_keys() -> None:
    model = Attend()
    new, decision = rewritten(model)
    assert decision.accepted
    assert isinstance(same(model, new, Kept), Kept)
    config = tf.GPT2Config(n_layer=1, n_head=HEADS, n_embd=INNER)
    past = same(model, new, lambda: tf.DynamicCache(config=config))
    assert type(past.layers[0]) is layer.StatesLayer


def test_hooks_on_a_projection_are_not_passed_over() -> None:
    model = Attend()
    new, _ = rewritten(model)
    for module in (model, new):
        module.k.register_forward_hook(lambda m, a, out: out * 1.5)
    past = same(model, new)
    assert type(past.layers[0]) is not layer.StatesLayer


class Two(nn.Module):
    """Two layers, of which the second does not do what the first does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attend(), Attend()
        self.second.k.register_forward_hook(lambda m, args, out: out * 1.5)

    def forward(self, x: Tensor, past: Any, other: Any) -> Tensor:
        return self.second(self.first(x, past), other)  # type: ignore[no-any-return]


def test_a_layer_with_a_hook_does_not_follow_one_without() -> None:
    model = Two().eval()
    new = ac.rewrite(model, (draw(2, 7), tf.DynamicCache(), tf.DynamicCache()), to=ac.ELAttention())
    assert [s.decision.variant for s in ac.last_report().sites] == ["el", ""]
    pasts = [[tf.DynamicCache(), tf.DynamicCache()] for _ in range(2)]
    for length in (7, 1, 1):
        with torch.no_grad():
            ours, theirs = (
                m(draw(2, length), *past) for m, past in zip((new, model), pasts, strict=True)
            )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert type(pasts[0][0].layers[0]) is layer.StatesLayer
    assert type(pasts[0][1].layers[0]) is not layer.StatesLayer


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_computes_with_its_own_weights(again: Any) -> None:
    model = Attend()
    new, _ = rewritten(model)
    twin, other = again(new), copy.deepcopy(model)
    for module in (twin, other):
        with torch.no_grad():
            module.k.weight.mul_(1.3)
            module.v.weight.mul_(0.7)
    same(other, twin)
    same(model, new)


def test_training_runs_the_ordinary_attention() -> None:
    class Dropped(Attend):
        def weights(self, scores: Tensor) -> Tensor:
            return torch.nn.functional.dropout(scores.softmax(-1), 0.5, self.training)

    model = Dropped()
    new, decision = rewritten(model)
    assert decision.accepted
    new.train()
    past = tf.DynamicCache()
    new(draw(2, 7), past).sum().backward()
    assert type(past.layers[0]) is not layer.StatesLayer
    assert new.k.weight.grad is not None and new.v.weight.grad is not None
    same(model, new.eval())


def test_inference_mode() -> None:
    new, _ = rewritten(Attend())
    past = tf.DynamicCache()
    with torch.inference_mode(), Counted() as counted:
        for length in (7, 1, 1):
            new(draw(2, length), past)
    assert counted.found["el_attention"] >= 2 and type(past.layers[0]) is layer.StatesLayer


def test_gradients() -> None:
    model = Attend()
    new, _ = rewritten(model)
    grads = []
    for module in (new, model):
        past = tf.DynamicCache()
        sum(module(draw(2, length), past).square().sum() for length in (7, 1)).backward()
        grads.append([p.grad for p in module.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what is refused


class NoCache(Attend):
    def cached(self, sides: Sides, past: Any) -> Sides:
        return sides


class Form(Attend):
    """Keys and values by two calls."""

    def cached(self, sides: Sides, past: Any) -> Sides:
        k, _ = past.update(*sides, 0)
        return k, past.layers[0].values


class Part(Attend):
    def cached(self, sides: Sides, past: Any) -> Sides:
        k, v = past.update(*sides, 0)
        return k[:, :, 1:], v[:, :, 1:]


class Deep(Attend):
    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Sequential(nn.Linear(WIDTH, 19), nn.GELU(), nn.Linear(19, INNER))


class Twofold(Attend):
    """Positions are added to what the keys are made of."""

    def sides(self, x: Tensor) -> Sides:
        return heads(self.k(x + 1)), heads(self.v(x))


class Rotated(Attend):
    def sides(self, x: Tensor) -> Sides:
        k, v = super().sides(x)
        angle = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.2, 0.3])
        turned = torch.cat([-k[..., 2:], k[..., :2]], -1)
        return k * angle.cos() + turned * angle.sin(), v


class RotatedAround(Attend):
    """Rotated features stand on both sides of the others."""

    def sides(self, x: Tensor) -> Sides:
        k, v = super().sides(x)
        parts = [turned(k[..., :1].repeat(1, 1, 1, 2))[..., :1], k[..., 1:3], turned(k[..., 3:])]
        return torch.cat(parts, -1), v


class NormedByHand(Attend):
    """By no module."""

    def sides(self, x: Tensor) -> Sides:
        k, v = super().sides(x)
        return k * torch.rsqrt(k.square().mean(-1, keepdim=True) + 1e-3), v


class Scaled(Attend):
    def sides(self, x: Tensor) -> Sides:
        k, v = super().sides(x)
        return k * 0.5, v


class Convolved(Attend):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, INNER, 3, padding=1)

    def sides(self, x: Tensor) -> Sides:
        return heads(self.conv(x.transpose(1, 2)).transpose(1, 2)), heads(self.v(x))


class Strided(Attend):
    """The features of a head are not neighbours."""

    def sides(self, x: Tensor) -> Sides:
        k, v = self.k(x), self.v(x)
        return k.unflatten(-1, (FEATURES, HEADS)).permute(0, 3, 1, 2), heads(v)


class Overwritten(Attend):
    def sides(self, x: Tensor) -> Sides:
        made = x + 1
        sides = heads(self.k(made)), heads(self.v(made))
        made.mul_(2)
        return sides


class Dropping(Attend):
    def weights(self, scores: Tensor) -> Tensor:
        return torch.nn.functional.dropout(scores.softmax(-1), 0.5)


class Shown(Attend):
    """Somebody else reads the keys."""

    def forward(self, x: Tensor, past: Any) -> Tensor:
        q = heads(self.q(x))
        k, v = past.update(*self.sides(x), 0)
        weights = self.scores(q @ k.transpose(-1, -2)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)) + k.mean()  # type: ignore[no-any-return]


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "el.no_cache": NoCache,
    "el.cache_form": Form,
    "el.cache_layout": Part,
    "el.cache_larger": lambda: Attend(groups=1),
    "el.no_projection": Deep,
    "el.kv_sources_differ": Twofold,
    "el.rope_on_key": Rotated,
    "el.partial_rope": RotatedAround,
    "el.key_norm": NormedByHand,
    "el.key_scaled": Scaled,
    "el.convolved": Convolved,
    "el.head_layout": Strided,
    "el.overwritten": Overwritten,
    "el.dropout": Dropping,
    "el.kv_read_elsewhere": Shown,
}


@pytest.mark.parametrize("code", REFUSED)
def test_it_is_refused(code: str) -> None:
    model = REFUSED[code]()
    new, decision = rewritten(model)
    assert not decision.accepted
    found = {reason.code: reason for reason in decision.reasons}
    assert code in found, str(decision)
    assert "test_rewrite_el.py" in found[code].location or code == "el.kv_read_elsewhere"
    assert type(new) is type(model)


def test_another_dtype_under_autocast_is_refused() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        _, decision = rewritten(Attend())
    assert "el.dtype" in {reason.code for reason in decision.reasons}


@pytest.mark.parametrize("make", [Attend, Rotated])
def test_explain_says_what_rewrite_does(make: Callable[[], nn.Module]) -> None:
    model, to = make().eval(), ac.ELAttention()
    told = ac.explain(model, (draw(2, 7), tf.DynamicCache()), to=to)
    assert type(model) is make
    _, done = rewritten(model)
    assert [s.decision for s in told.sites] == [done]
    assert done.accepted is ("attend" in told.graph_after) and "softmax" in told.graph_before


def test_explain_of_a_graph_cannot_change_a_cache() -> None:
    def attend(x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x

    (site,) = ac.explain(attend, (draw(2, 7),), to=ac.ELAttention()).sites
    assert [reason.code for reason in site.decision.reasons] == ["el.needs_rewrite"]


def test_a_backend_cannot_change_a_cache() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        Attend().eval(), backend="attn_compiler", options={"to": ac.ELAttention(), "then": "eager"}
    )
    with torch.no_grad():
        compiled(draw(2, 7), tf.DynamicCache())
    (site,) = ac.last_report().sites
    assert [reason.code for reason in site.decision.reasons] == ["el.needs_rewrite"]
    torch._dynamo.reset()
