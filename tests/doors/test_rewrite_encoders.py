"""PyTorch's own encoder: in inference a native call of a whole layer stands for its attention, and
padded batches are packed before it. What replaces the attention must not be passed over.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as ac

WIDTH, HEADS, LENGTH = 32, 4, 64
SPECS = {
    "selective": ac.Selective(start="gate"),
    "switchhead": ac.SwitchHead(heads=2),
    "gau": ac.GAU(),
    "spion": ac.SPION(pattern=torch.eye(4, dtype=torch.bool), block=16),
}
# what masks earlier tokens for later ones has no meaning where rows see all keys
CASES = [
    (name, causal) for name in SPECS for causal in (True, False) if causal or name != "selective"
]


class Model(nn.Module):
    """Ids [B, T], where 0 is padding, to states [B, T, WIDTH]."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.embed = nn.Embedding(20, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids.new_ones(ids.shape[1], ids.shape[1]).triu(1).bool() if self.causal else None
        x = self.embed(ids)
        return self.encoder(x, mask, src_key_padding_mask=ids == 0, is_causal=self.causal)


def padded(batch: int = 2, length: int = LENGTH) -> Tensor:
    ids = torch.randint(1, 20, (batch, length))
    ids[0, length - 9 :] = 0
    return ids


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "causal"), CASES)
def test_another_function_runs_in_inference_too(name: str, causal: bool, training: bool) -> None:
    model, ids = Model(causal).train(training), padded()
    new = ac.rewrite(model, (ids,), to=SPECS[name], on_reject="raise").eval()
    keep = ids != 0
    with_gradients = new(ids)
    with torch.no_grad():
        without, original = new(ids), model.eval()(ids)
    torch.testing.assert_close(without[keep], with_gradients[keep], rtol=1e-4, atol=1e-5)
    if name != "selective":  # which starts as the original
        assert (without - original)[keep].abs().max() > 0.01


def test_the_gate_of_selective_attention_is_read_in_inference() -> None:
    model, ids = Model(causal=True), padded()
    new = ac.rewrite(model, (ids,), to=SPECS["selective"], on_reject="raise").eval()
    gates = [p for n, p in new.named_parameters() if n not in dict(model.named_parameters())]
    with torch.no_grad():
        before = new(ids)
        for gate in gates:
            gate.fill_(2.0)
        assert (new(ids) - before)[ids != 0].abs().max() > 0.01


class Alone(nn.Module):
    """One causal nn.MultiheadAttention, with or without the weights that nobody reads."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.weights = weights
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        return self.inner(x, x, x, attn_mask=mask, need_weights=self.weights)[0]


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize(
    "spec",
    ["fastest", ac.Selective(), SPECS["spion"], SPECS["switchhead"], ac.LinearAttention(window=16)],
    ids=str,
)
def test_no_call_of_the_original_is_left(spec: Any, weights: bool) -> None:
    model, x = Alone(weights), torch.randn(2, LENGTH, WIDTH)
    new = ac.rewrite(model, (x,), to=spec, on_reject="raise")
    (owner,) = (m for m in new.modules() if hasattr(m, "_attn_variants"))
    assert all("multi_head_attention_forward(" not in v.source for v in owner._attn_variants)
    if isinstance(spec, ac.Selective):
        assert (new(x) - model(x)).abs().max() > 0.01


@pytest.mark.parametrize("training", [True, False])
def test_the_same_function_with_its_packed_batches(training: bool, caplog: Any) -> None:
    model, ids = Model().train(training), padded()
    new = ac.rewrite(model, (ids,), on_reject="raise").eval()
    model.eval()
    with torch.no_grad():
        for _ in range(6):
            torch.testing.assert_close(new(ids), model(ids))
        assert new(ids)[0, -1].count_nonzero() == 0
    whole = torch.randint(1, 20, (3, 40))
    assert not caplog.records
    torch.testing.assert_close(new(whole), model(whole), rtol=1e-4, atol=1e-5)
    assert [len(layer._attn_variants) for layer in new.encoder.layers] == [2, 2]
