"""Which blocks are found around an attention, what they are said to be, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from attn_compiler.ir.block import Block
from tests.ir.block_models import WIDTH, Attend, Net, Parallel, Post, Pre, RmsNorm, found_in


def block_of(model: nn.Module, *more: Any) -> Block:
    found = found_in(model, torch.randn(2, 7, WIDTH), *more)
    assert found.block is not None, found.obstacles
    return found.block


def refused(model: nn.Module, *more: Any) -> str:
    found = found_in(model, torch.randn(2, 7, WIDTH), *more)
    assert found.block is None
    (reason,) = found.obstacles
    return reason.code


FORMS: list[tuple[type[Pre], str]] = [(Pre, "pre"), (Post, "post"), (Parallel, "parallel")]


@pytest.mark.parametrize(("kind", "form"), FORMS, ids=[form for _, form in FORMS])
def test_forms(kind: type[Pre], form: str) -> None:
    model = kind()
    found = block_of(model)
    assert (found.form, found.norms) == (form, ("layer", "layer"))
    assert (found.width, found.batch_first, found.update) == (WIDTH, True, None)
    norms = {"first.weight", "first.bias", "second.weight", "second.bias"}
    rest = {n: p.numel() for n, p in model.named_parameters() if n not in norms}
    assert set(found.parameters) == set(rest)
    assert found.replaced == sum(rest.values())
    assert (found.net.width, found.net.activation, found.net.gated) == (20, "gelu", False)


def test_norms_are_known_by_what_they_do() -> None:
    assert block_of(Pre(norm=RmsNorm)).norms == ("rms", "rms")
    assert block_of(Post(norm=lambda: nn.RMSNorm(WIDTH))).norms == ("rms", "rms")


def spelled_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


ACTIVATIONS: list[tuple[Any, str]] = [
    (functional.relu, "relu"),
    (nn.ReLU(inplace=True), "relu"),
    (functional.silu, "silu"),
    (lambda x: x * torch.sigmoid(x), "silu"),
    (nn.GELU(approximate="tanh"), "gelu_tanh"),
    (spelled_gelu, "gelu_tanh"),
    (lambda x: functional.relu(x) ** 2, "relu_squared"),
]


@pytest.mark.parametrize(("act", "name"), ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_activations_are_known_by_their_values(act: Any, name: str, gated: bool) -> None:
    net = block_of(Pre(net=Net(act, gated=gated))).net
    assert (net.activation, net.gated) == (name, gated)
    assert net.gate is None or (net.gate.weight, net.up.weight) == (
        "net.gate.weight",
        "net.up.weight",
    )


class Packed(nn.Module):
    """gate and up in one map."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.both, self.down, self.last = nn.Linear(WIDTH, 22), nn.Linear(11, WIDTH), last

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.both(x).chunk(2, -1)
        hidden = one * functional.silu(other) if self.last else functional.silu(one) * other
        return self.down(functional.dropout(hidden, 0.25, True))  # type: ignore[no-any-return]


@pytest.mark.parametrize("last", [False, True])
def test_a_gate_may_be_half_of_a_map(last: bool) -> None:
    net = block_of(Pre(net=Packed(last))).net
    assert (net.packed, net.activation, net.width) == ("last" if last else "first", "silu", 11)
    assert net.gate is net.up
    assert net.dropout == 0.25


def test_dropout_upon_the_branches_is_said() -> None:
    found = block_of(Pre(rate=0.125).train())
    assert found.attention.dropout == found.feed_forward.dropout == (0.125,)
    assert block_of(Pre(rate=0.125).eval()).attention.dropout == (0.0,)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layers_of_torch(batch_first: bool, norm_first: bool) -> None:
    model = nn.TransformerEncoderLayer(
        WIDTH, 3, 20, batch_first=batch_first, norm_first=norm_first
    ).train()
    found = block_of(model)
    assert (found.form, found.batch_first) == ("pre" if norm_first else "post", batch_first)
    assert set(found.parameters) == {
        name for name, _ in model.named_parameters() if not name.startswith("norm")
    }


def test_blocks_of_a_library() -> None:
    tf = pytest.importorskip("transformers")
    small = {"hidden_size": WIDTH, "num_attention_heads": 3, "intermediate_size": 20}
    llama = tf.LlamaConfig(**small, num_key_value_heads=1, attn_implementation="sdpa")
    layer = tf.models.llama.modeling_llama.LlamaDecoderLayer(llama, 0)
    places = torch.rand(1, 7, 4), torch.rand(1, 7, 4)
    found = found_in(layer, torch.randn(2, 7, WIDTH), *(None,) * 4, places).block
    assert found is not None and (found.form, found.norms) == ("pre", ("rms", "rms"))
    assert found.net.gated and found.net.activation == "silu"
    assert len(found.parameters) == 7
    bert = tf.BertConfig(**small, attn_implementation="sdpa")
    layer = tf.models.bert.modeling_bert.BertLayer(bert)
    found = block_of(layer)
    assert (found.form, found.net.activation, len(found.parameters)) == ("post", "gelu", 12)


# ---------------------------------------------------------------- refusals


class NoResidual(Pre):
    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(self.first(x)).relu()
        return x + self.net(self.second(x))  # type: ignore[no-any-return]


class OtherResidual(Pre):
    def forward(self, x: Tensor) -> Tensor:
        x = x.sin() + self.attend(self.first(x))
        return x + self.net(self.second(x))  # type: ignore[no-any-return]


class NoNorm(Pre):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return x + self.net(x)  # type: ignore[no-any-return]


class HalfNormed(Pre):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.first(x))
        return x + self.net(x)  # type: ignore[no-any-return]


class NoNet(Pre):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(self.first(x))  # type: ignore[no-any-return]


class NoSecondResidual(Pre):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.first(x))
        return self.net(self.second(x))  # type: ignore[no-any-return]


class Twice(Pre):
    """Two attentions, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.first(x))
        return (x + self.attend(self.second(x))).sin()


class NoOutputMap(Pre):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend.mixed(self.first(x))
        return x + self.net(self.second(x))  # type: ignore[no-any-return]


class Cross(Pre):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        x = x + self.attend.out(self.attend.mixed(self.first(x), other))
        return x + self.net(self.second(x))  # type: ignore[no-any-return]


class ReadElsewhere(Pre):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        mixed = self.attend.mixed(self.first(x))
        x = x + self.attend.out(mixed)
        return x + self.net(self.second(x)), mixed


class HiddenReadElsewhere(Pre):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = x + self.attend(self.first(x))
        hidden = self.net.up(self.second(x))
        return x + self.net.down(functional.gelu(hidden)), hidden


class Written(Pre):
    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attend(self.first(x))
        kept = mixed[:, :1].sin()
        total = x + mixed
        mixed.zero_()
        return total + self.net(self.second(total)) + kept  # type: ignore[no-any-return]


class WritesInput(Pre):
    def forward(self, x: Tensor) -> Tensor:
        x += self.attend(self.first(x))
        return x + self.net(self.second(x))  # type: ignore[no-any-return]


class Past(Pre):
    """Keys that somebody else has made stand before those of the tokens."""

    def forward(self, x: Tensor, past: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = (
            t.unflatten(-1, (3, -1)).transpose(1, 2)
            for t in self.attend.qkv(self.first(x)).chunk(3, -1)
        )
        k, v = torch.cat((past, k), 2), torch.cat((past, v), 2)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.attend.out(mixed.transpose(1, 2).flatten(2))
        return x + self.net(self.second(x))  # type: ignore[no-any-return]


class Flat(Pre):
    """Tokens of one sequence, without a batch."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x[0]
        y = flat + self.attend(self.first(flat).unsqueeze(0)).squeeze(0)
        return y + self.net(self.second(y))  # type: ignore[no-any-return]


class Routed(Net):
    """The first of two experts by a softmax."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        return self.down(hidden * hidden.softmax(-1))  # type: ignore[no-any-return]


class Mixing(Net):
    """No tokens by themselves: a convolution along them."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.gelu(self.up(x))
        return self.down(hidden.cumprod(1))  # type: ignore[no-any-return]


class Picked(Net):
    """The tokens in another order."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x))[:, [6, 5, 4, 3, 2, 1, 0]])  # type: ignore[no-any-return]


class Deep(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


REFUSED: list[tuple[nn.Module, str]] = [
    (NoResidual(), "block.no_residual"),
    (OtherResidual(), "block.no_residual"),
    (NoNorm(), "block.no_norm"),
    (HalfNormed(), "block.no_norm"),
    (NoNet(), "block.outside"),
    (Attend(), "block.outside"),
    (Twice(), "feed_forward.unlike"),
    (NoSecondResidual(), "block.no_feed_forward"),
    (NoOutputMap(), "block.no_output_map"),
    (ReadElsewhere(), "block.read_elsewhere"),
    (HiddenReadElsewhere(), "block.read_elsewhere"),
    (Written(), "block.read_elsewhere"),
    (Flat(), "block.layout"),
    (WritesInput(), "block.written"),
    (Pre(net=Routed()), "feed_forward.routes"),
    (Pre(net=Mixing()), "feed_forward.unlike"),
    (Pre(net=Picked()), "feed_forward.unlike"),
    (Pre(net=Deep()), "feed_forward.unlike"),
    (Pre(net=Net(torch.sin)), "feed_forward.unlike"),
    (Pre(net=Net(lambda x: x.abs().exp())), "feed_forward.activation"),
]


@pytest.mark.parametrize(
    ("model", "code"), REFUSED, ids=[type(m).__name__ + f"-{i}" for i, (m, _) in enumerate(REFUSED)]
)
def test_what_is_no_such_block(model: nn.Module, code: str) -> None:
    assert refused(model) == code


def test_keys_of_another_tensor() -> None:
    assert refused(Cross(), torch.randn(2, 7, WIDTH)) == "block.sources"
    assert refused(Past(), torch.randn(2, 3, 5, 4)) == "block.other_keys"
