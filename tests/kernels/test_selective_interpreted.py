"""The generated kernels of Selective attention in Triton's interpreter.

Run in a process of its own, with TRITON_INTERPRET=1 from the start.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from attention_cases import text
from selective_cases import CASES, WINDOW, B, Case, call, eager, judged, qkv, with_gradients
from torch import Tensor

from attn_compiler.kernels import (
    devices,
    eviction_triton,
    gpu,
    masking_triton,
    selective_paths,
    selective_tiles,
)
from attn_compiler.kernels.eviction import selective_deaths
from attn_compiler.kernels.launch import Tile
from attn_compiler.kernels.selective import reference, selective_attention

pytestmark = pytest.mark.interpret

# both ways of the two sizes of a tile
TILES = (Tile(16, 32), Tile(32, 16))
# pow has no text, dropout's threshold is the attention kernel's own
NAMES = [name for name in CASES if name != "dropout"]
# where attention's own kernel reads F as well, which takes longest; others run PyTorch's operators
ATTENDED = "padding, absorbed"


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("ATTN_COMPILER_CACHE", str(tmp_path_factory.getbasetemp()))
    monkeypatch.setitem(
        devices.IMPLEMENTATIONS, "cpu", devices.Implementation(gpu.forward, gpu.backward)
    )
    monkeypatch.setattr(gpu, "family", lambda device: "ampere")
    monkeypatch.setattr(gpu, "hardware", lambda device: None)
    monkeypatch.setattr(gpu, "backends", lambda device: ())
    attention_tiles(monkeypatch, Tile(64, 64))


def attention_tiles(monkeypatch: pytest.MonkeyPatch, tile: Tile) -> None:
    monkeypatch.setattr(gpu, "forward_tile", lambda given, family, hardware: tile)
    monkeypatch.setattr(gpu, "backward_tiles", lambda given, family, hardware: (tile, tile))


def compared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers and gradients of a case."""
    if name != ATTENDED:
        monkeypatch.setitem(devices.IMPLEMENTATIONS, "cpu", devices.COMPOSITE)
    case = CASES[name]
    ours = with_gradients(case, selective_attention, torch.float32)
    usual = with_gradients(case, eager, torch.float32)
    exact = with_gradients(case, reference, torch.float32, wide=True)
    judged(case, ours, usual, exact)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    plain = masking_triton.Scan.launch

    def launch(scan: Any, kernel: str, tensors: Any) -> Any:
        ran.append(kernel)
        return plain(scan, kernel, tensors)

    monkeypatch.setattr(masking_triton.Scan, "launch", launch)
    monkeypatch.setitem(masking_triton.TILES_32_BITS, 64, TILES[NAMES.index(name) % 2])
    compared(name, monkeypatch)
    case = CASES[name]
    own = case.grads and case.options(9).get("select_from") == "logits"
    assert ran == (
        ["amounts"] if own or name == "temperature" else ["amounts", "amounts", "unmask"]
    )


@pytest.mark.parametrize("name", ["left padding", "softcap, gate, selector", "alibi"])
def test_bands_of_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """F is never a tensor of all rows: each band goes on with the sums of the one before."""
    monkeypatch.setattr(selective_paths, "_LARGEST", 0)
    monkeypatch.setattr(selective_paths, "_TILE", 16)
    seen: list[int] = []
    plain = masking_triton.Scan._whole

    def whole(scan: Any, dtype: torch.dtype) -> Tensor:
        seen.append(scan.alone.q.shape[2])
        return plain(scan, dtype)

    monkeypatch.setattr(masking_triton.Scan, "_whole", whole)
    compared(name, monkeypatch)
    # 16 + 16 + 5 rows: forward, its sums again, and for each band F and its gradient
    assert seen == [16, 16, 5, 16, 16, 5, 5, 16, 16, 16, 16]


@pytest.mark.parametrize(("gate", "trained"), [(None, True), (0.75, False), (-0.01, False)])
def test_tiles_that_are_masked_away_are_left_out(
    gate: float | None, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second sample every token masks all before it, by 4: two tiles away only the first
    token is left. In the first sample nobody masks.
    """
    monkeypatch.setattr(selective_tiles, "SIDE", 16)
    monkeypatch.setattr(selective_tiles.blocks, "_LEAST", 0)
    monkeypatch.setitem(masking_triton.TILES_32_BITS, 64, Tile(16, 16))
    attention_tiles(monkeypatch, Tile(16, 16))
    maps: list[Tensor] = []
    plain = selective_tiles._kept

    def kept(*args: Any) -> Tensor:
        maps.append(plain(*args))
        return maps[-1]

    monkeypatch.setattr(selective_tiles, "_kept", kept)
    options = {} if gate is None else {"gate": torch.tensor(gate)}
    q, k, v = (x[:, :n].clone() for x, n in zip(qkv(torch.float32, 61), (2, 1, 1), strict=True))
    q[0, 0], q[1, 0] = 0, q.new_tensor([4 / 0.3, *[0] * 15])
    k[:, 0] = k.new_tensor([1, *[0] * 15])
    found = []
    for fn, dtype in ((selective_attention, torch.float32), (reference, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out, _, state = call(Case(text(mask="(k <= q)")), fn, leaves, dict(options), [])
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        found.append([out, state, *(torch.autograd.grad(out, leaves, weight) if trained else [])])
    for a, b in zip(*found, strict=True):
        scale = float(b.detach().abs().max())
        torch.testing.assert_close(a.double(), b, rtol=0, atol=3e-6 * max(1.0, scale))
    assert len(maps) == 1 + trained and torch.equal(maps[0], maps[-1])
    assert maps[0].shape == (B, 2, 4, 4)
    # tiles between the first column, which holds the protected token, and those near the diagonal
    far = maps[0][..., 1:].tril(-3)
    assert maps[0][..., 0].all() and far[0].sum() == 2
    assert far[1].sum() == (2 if gate == -0.01 else 0)


@pytest.mark.parametrize(
    ("name", "way"), [("left padding", "by bands"), ("selector", "by bands"), ("window", "whole")]
)
def test_deaths(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel evicts what the loop over rows does."""
    case, (q, k, _) = CASES[name], qkv(torch.float32)
    selector = case.options(q.shape[2]).get("selector", [])
    reads, ints = case.reads(q.shape[2]), list(case.ints)
    options: dict[str, Any] = {"program": case.program, "scale": 0.3, "head": 4, "budget": 7}
    args = (q, k, reads, ints, selector)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eviction_triton, "_MOST", 0)
        exact = selective_deaths(*args, select_from="qk", **options)
    if way == "by bands":
        monkeypatch.setattr(selective_paths, "_LARGEST", 0)
        monkeypatch.setattr(selective_paths, "_TILE", 16)
    launched = []
    plain = eviction_triton.evict

    def evict(*given: Any) -> None:
        launched.append(1)
        plain(*given)

    monkeypatch.setattr(eviction_triton, "evict", evict)
    found = selective_deaths(*args, select_from="qk", **options)
    assert torch.equal(found, exact) and len(launched) == (1 if way == "whole" else 3)
    assert (exact < q.shape[2]).any()


def test_a_carry() -> None:
    """Rows after others: what they carried is subtracted, protected and handed on."""
    q, k, v = qkv(torch.float32)
    case = Case(text(mask=WINDOW.replace("q", "(q + (S - T))")), ints=(23,))
    carry = torch.rand(B, 11) * 3
    carry[:, 2] = -1
    given = [q[:, :, 11:], k, v]
    ours = call(case, selective_attention, given, {"carry": carry}, [])
    exact = call(case, reference, [x.double() for x in given], {"carry": carry.double()}, [])
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert (ours[2][:, 2] == -1).all()
