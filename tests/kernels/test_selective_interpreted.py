"""The generated kernels of Selective attention in Triton's interpreter.

Run in a process of its own, with TRITON_INTERPRET=1 from the start.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from attention_cases import text
from selective_cases import (
    CASES,
    WINDOW,
    B,
    Case,
    call,
    eager,
    judged,
    qkv,
    weights,
    with_gradients,
)
from torch import Tensor

from attn_compiler.cost.subtracting import Form
from attn_compiler.kernels import (
    devices,
    eviction,
    eviction_triton,
    gpu,
    masking_triton,
    selective_inside,
    selective_paths,
    selective_tiles,
)
from attn_compiler.kernels.eviction import selective_deaths
from attn_compiler.kernels.launch import Tile
from attn_compiler.kernels.selective import reference, selective_attention

pytestmark = pytest.mark.interpret

# both ways of the two sizes of a tile
TILES = (Tile(16, 32), Tile(32, 16))
# their selecting head has a tensor that wants a gradient
LEARNED = ("alibi selects", "learned bias selects", "temperature", "negative index")
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
    as_form(monkeypatch, "tensor", 4096)


def as_form(monkeypatch: pytest.MonkeyPatch, kind: Any, rows: int) -> None:
    """What the cost model says."""
    form = Form(kind, rows, 0.0, 0.0)
    monkeypatch.setattr(selective_paths, "form_of", lambda *args, **options: form)
    monkeypatch.setattr(eviction, "form_of", lambda *args, **options: form)


def attention_tiles(monkeypatch: pytest.MonkeyPatch, tile: Tile) -> None:
    monkeypatch.setattr(gpu, "forward_tile", lambda given, family, hardware: tile)
    monkeypatch.setattr(gpu, "backward_tiles", lambda given, family, hardware: (tile, tile))


def compared(name: str, monkeypatch: pytest.MonkeyPatch, whole: bool = False) -> None:
    """Numbers and gradients of a case; the attention itself by its own kernel where `whole`."""
    if name != ATTENDED and not whole:
        monkeypatch.setitem(devices.IMPLEMENTATIONS, "cpu", devices.COMPOSITE)
    case = CASES[name]
    ours = with_gradients(case, selective_attention, torch.float32)
    usual = with_gradients(case, eager, torch.float32)
    exact = with_gradients(case, reference, torch.float32, wide=True)
    judged(case, ours, usual, exact)


@pytest.mark.parametrize("name", CASES)
def test_f_as_a_tensor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    plain = masking_triton.Scan.launch

    def launch(scan: Any, kernel: str, *args: Any) -> Any:
        ran.append(kernel)
        return plain(scan, kernel, *args)

    monkeypatch.setattr(masking_triton.Scan, "launch", launch)
    monkeypatch.setitem(masking_triton.TILES_32_BITS, 64, TILES[list(CASES).index(name) % 2])
    compared(name, monkeypatch)
    made = ["sums", "amounts"]
    assert ran == (made if name in LEARNED else [*made, *made, "unmask"])


@pytest.mark.parametrize(
    "name",
    [
        "another head",
        "padding, absorbed",
        "documents",
        "alibi",
        "sink",
        "dropout",
        "softcap, gate, selector",
    ],
)
def test_f_made_inside(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel writes it; its gradient is a tensor of a band of rows."""
    as_form(monkeypatch, "inside", 32)
    monkeypatch.setitem(masking_triton.TILES_32_BITS, 64, Tile(16, 32))
    tiles = Tile(32, 32), Tile(16, 32), Tile(32, 16)
    monkeypatch.setattr(selective_inside, "tiles", lambda *_: tiles)
    ran: list[tuple[str, int]] = []
    plain = masking_triton.Scan.launch

    def launch(scan: Any, kernel: str, tensors: Any, rows: Any = (0, 0)) -> Any:
        ran.append((kernel, rows[1]))
        return plain(scan, kernel, tensors, rows if rows[1] else None)

    monkeypatch.setattr(masking_triton.Scan, "launch", launch)
    compared(name, monkeypatch, whole=True)
    assert ran == [("sums", 0), ("sums", 0), ("unmask", 5), ("unmask", 32)]


@pytest.mark.parametrize("name", ["left padding", "softcap, gate, selector", "alibi", "dropout"])
def test_bands_of_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """F is never a tensor of all rows: each band goes on with the sums of the one before."""
    as_form(monkeypatch, "tensor", 16)
    seen: list[int] = []
    plain = masking_triton.Scan._whole

    def whole(scan: Any, dtype: torch.dtype, rows: int) -> Tensor:
        seen.append(rows)
        return plain(scan, dtype, rows)

    monkeypatch.setattr(masking_triton.Scan, "_whole", whole)
    compared(name, monkeypatch)
    # 16 + 16 + 5 rows: forward, its sums again, and for each band F and its gradient
    assert seen == [16, 16, 5, 16, 16, 5, 5, 16, 16, 16, 16]


@pytest.mark.parametrize(
    ("gate", "trained", "kind"),
    [
        (None, True, "tensor"),
        (None, True, "inside"),
        (0.75, False, "inside"),
        (-0.01, False, "tensor"),
    ],
)
def test_tiles_that_are_masked_away_are_left_out(
    gate: float | None, trained: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second sample every token masks all before it, by 4: two tiles away only the first
    token is left. In the first sample nobody masks.
    """
    monkeypatch.setattr(selective_tiles, "SIDE", 16)
    monkeypatch.setattr(selective_tiles.blocks, "_LEAST", 0)
    monkeypatch.setitem(masking_triton.TILES_32_BITS, 64, Tile(16, 16))
    attention_tiles(monkeypatch, Tile(16, 16))
    monkeypatch.setattr(selective_inside, "tiles", lambda *_: (Tile(16, 16),) * 3)
    as_form(monkeypatch, kind, 32 if kind == "inside" else 64)
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
    """The kernel evicts what the loop over rows does, also of equals, in a prompt that is longer
    than what a program holds.
    """
    case, (q, k, _) = CASES[name], (x.round() for x in qkv(torch.float32))
    selector = [x.round() for x in case.options(q.shape[2]).get("selector", [])]
    reads, ints = case.reads(q.shape[2]), list(case.ints)
    options: dict[str, Any] = {"program": case.program, "scale": 0.5, "head": 4, "budget": 7}
    args = (q, k, reads, ints, selector)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eviction_triton, "_MOST", 0)
        exact = selective_deaths(*args, select_from="qk", **options)
    if way == "by bands":
        as_form(monkeypatch, "tensor", 16)
    launched = []
    plain = eviction_triton.evict

    def evict(*given: Any) -> None:
        assert given[4].shape[1] == 16 < q.shape[2]
        launched.append(1)
        plain(*given)

    monkeypatch.setattr(eviction_triton, "evict", evict)
    found = selective_deaths(*args, select_from="qk", **options)
    assert torch.equal(found, exact) and len(launched) == (1 if way == "whole" else 3)
    assert (exact < q.shape[2]).any()


@pytest.mark.parametrize("kind", ["tensor", "inside"])
def test_a_carry(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows after others: what they carried is subtracted, protected and handed on; it and what F is
    multiplied with get gradients.
    """
    as_form(monkeypatch, kind, 32)
    monkeypatch.setattr(selective_inside, "tiles", lambda *_: (Tile(32, 32),) * 3)
    q, k, v = qkv(torch.float32)
    case = Case(text(mask=WINDOW.replace("q", "(q + (S - T))")), ints=(23,))
    carry, gate = torch.rand(B, 11) * 3, torch.tensor([0.7])
    carry[:, 2] = -1
    results = []
    for fn, dtype in ((selective_attention, torch.float32), (reference, torch.float64)):
        given = [x.to(dtype).requires_grad_() for x in (q[:, :, 11:], k, v, carry, gate)]
        extra = {"carry": given[3], "gate": given[4]}
        found = call(case, fn, given[:3], extra, [])
        results.append([*found, *torch.autograd.grad(found[0], given, weights(found[0]))])
    for a, b in zip(*results, strict=True):
        scale = float(b.detach().abs().max())
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * max(1.0, scale))
    assert (results[0][2][:, 2] == -1).all()
