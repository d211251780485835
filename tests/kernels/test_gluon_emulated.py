"""The Hopper kernel run on the CPU by an emulator: its numbers, and that its warps never get stuck.

The order in which its warps run and its copies arrive is drawn anew for every seed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from attention_cases import (
    CAUSAL,
    OFFSET,
    SCALE,
    SOFTCAP,
    WINDOW,
    Case,
    Shape,
    double,
    tensors,
    text,
    within_budget,
)
from gluon_emulated import Deadlock, run
from torch import Tensor

from attn_compiler.ir.evaluate import evaluate
from attn_compiler.ir.score import Program
from attn_compiler.kernels import flash_gluon
from attn_compiler.kernels.attention import reference
from attn_compiler.kernels.dropout import Drop
from attn_compiler.kernels.frame import Frame, Inputs, empty_heads
from attn_compiler.kernels.launch import Tile, rows_visited, structure_of

PROGRAMS = {
    "none": Case(text()),
    "causal": Case(text(mask=CAUSAL)),
    "offset": Case(text(mask=OFFSET, empty="zero")),
    "rows without keys, nan": Case(text(mask=OFFSET, empty="nan")),
    "window": Case(text(mask=WINDOW, empty="zero"), ints=(7,)),
    "prefix": Case(text(mask="(k <= q) | (k < n0)"), ints=(9,)),
    "hole": Case(text(mask="((k < n0) | (k > n0 + 10)) & (k <= q + 13)"), ints=(5,)),
    "softcap": Case(text(SOFTCAP, CAUSAL)),
    "slope": Case(text("dot - 0.25 * float(abs(q - k))")),
    "no keys at all": Case(text(mask="(k <= q) & (k > q)", empty="zero")),
    "one head": Case(text(mask="(k <= q) | (h == 1)")),
}
SHAPES = (Shape(H=4, G=2, T=13, S=23), Shape(H=2, G=1, T=23, S=17, d=40, dv=24))


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "ATTN_COMPILER_CACHE"
    monkeypatch.setenv("ATTN_COMPILER_CACHE", str(folder))


def emulate(
    given: Inputs,
    tile: Tile,
    seed: int,
    change: tuple[str, str] = ("", ""),
    started: list[list[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    frame, q = Frame(given), given.q
    out = empty_heads(q, (*q.shape[:3], given.v.shape[3])).fill_(float("nan"))
    lse = empty_heads(q, q.shape[:3], torch.float32).fill_(float("nan"))
    source = flash_gluon.source(structure_of(frame, tile, rows_visited(frame, tile).kind))
    if change[0]:
        assert change[0] in source
    order = run(source.replace(*change), flash_gluon.prepare(frame, tile, out, lse), seed)
    if started is not None:
        started += order
    return out, lse


def inputs(case: Case, shape: Shape, dtype: torch.dtype = torch.float16) -> Inputs:
    return Inputs.of(
        *tensors(shape, dtype), [], case.ints, None,
        program=case.program, scale=SCALE, dropout=0.0,
    )  # fmt: skip


def judged(case: Case, given: Inputs, found: tuple[Tensor, Tensor]) -> None:
    program = Program.parse(case.program)
    expected = [
        reference(*tensors, [], case.ints, program, SCALE)
        for tensors in (given.qkv, [double(x) for x in given.qkv])
    ]
    for name, ours, plain, exact in zip(("out", "lse"), found, *expected, strict=True):
        finite = exact.isfinite()
        assert torch.equal(ours.isneginf(), exact.isneginf()), name
        size = float(exact.masked_fill(~finite, 0.0).abs().max())
        floor = 8 * torch.finfo(given.q.dtype).eps * size
        within_budget(
            name, *(x.masked_fill(x == -torch.inf, 0.0) for x in (ours, plain, exact)), floor
        )


@pytest.mark.parametrize("name", PROGRAMS)
def test_numbers(name: str) -> None:
    case, turn = PROGRAMS[name], list(PROGRAMS).index(name)
    for seed, shape in enumerate(SHAPES):
        given = inputs(case, shape, (torch.float16, torch.bfloat16)[seed % 2])
        assert not flash_gluon.refusal(given)
        tile = Tile((8, 16)[seed % 2], (8, 4)[turn % 2], 4, 1 + (turn + seed) % 3)
        judged(case, given, emulate(given, tile, seed))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"reads": [torch.ones(2, 3)]}, "reads a tensor"),
        ({"program": text(sink="1.0")}, "sink"),
        ({"drop": Drop(None, 0.1)}, "dropout"),
        ({"scale": -1.0}, "scale"),
        ({"program": text(mask=OFFSET, empty="uniform")}, "mean"),
        ({"q": torch.empty(2, 4, 29, 64)}, "q, k and v are"),
        ({"v": torch.empty(2, 2, 17, 96, dtype=torch.half)}, "head dims"),
        ({"k": torch.empty(2, 2, 17, 65, dtype=torch.half)[..., 1:]}, "k: its address"),
        ({"k": torch.empty(2, 2, 17, 68, dtype=torch.half)[..., :64]}, "k: a stride of 1156"),
        (
            {"k": torch.empty(2, 1, 17, 64, dtype=torch.half).expand(2, 2, 17, 64)},
            "k: a stride of 0",
        ),
        ({"v": torch.empty(2, 2, 64, 17, dtype=torch.half).mT}, "v: "),
        ({"v": torch.empty(2, 2, 17, 60, dtype=torch.half)}, "v: a head dim of 60"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_refuses(change: dict[str, Any], why: str) -> None:
    given = inputs(PROGRAMS["offset"], Shape(H=4, G=2, T=29, S=17, d=64, dv=64))
    assert not flash_gluon.refusal(given)
    assert why in flash_gluon.refusal(replace(given, **change))


@pytest.mark.parametrize(
    ("mask", "ints", "sees"),
    [(CAUSAL, (), True), (OFFSET, (), False), (WINDOW, (130,), True), (WINDOW, (0,), False)],
)
def test_the_mean_of_all_values_where_no_row_needs_it(
    mask: str, ints: tuple[int, ...], sees: bool
) -> None:
    case = Case(text(mask=mask, empty="uniform"), ints=ints)
    given = inputs(case, Shape(H=1, G=1, T=521, S=509))
    assert (flash_gluon.refusal(given) == "") is sees
    rows, keys = torch.arange(521)[:, None], torch.arange(509)
    seen = evaluate(
        Program.parse(case.program).mask, {"q": rows, "k": keys, "T": 521, "S": 509}, ints=ints
    )
    assert bool(seen.any(1).all()) is sees


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("tiles", [0, 1, 2, 5])
def test_any_order_of_the_warps(tiles: int, stages: int) -> None:
    # 0 tiles: the mask forbids everything
    case = PROGRAMS["none"] if tiles else PROGRAMS["no keys at all"]
    given = inputs(case, Shape(H=1, G=1, T=7, S=4 * max(tiles, 1)))
    for seed in range(4):
        judged(case, given, emulate(given, Tile(8, 4, 4, stages), seed))


def test_the_groups_take_turns() -> None:
    given, started, tiles = inputs(PROGRAMS["none"], Shape(H=1, G=1, T=8, S=20)), [], 5
    for seed in range(4):
        emulate(given, Tile(8, 4, 4, 2), seed, started=started)
    for order in started:
        first, second = ([i for i, g in enumerate(order) if g == group] for group in (0, 1))
        # the scores of a tile and the values of the one before; the last values in any order
        for step in range(tiles):
            own = slice(max(0, 2 * step - 1), 2 * step + 1)
            assert max(first[own]) < min(second[own])
            if step < tiles - 1:
                assert max(second[own]) < first[2 * step + 1]


@pytest.mark.parametrize(
    "change",
    [
        ("k_empty.index(i), count=2", "k_empty.index(i), count=1"),
        ("v_empty.index(i), count=2", "v_empty.index(i), count=1"),
        ("mbarrier.arrive(turn.index(1 - GROUP), count=1)", "pass"),
        ("phase ^ 1", "phase"),
        ("warpgroup_mma_wait(1, deps=[s])", "warpgroup_mma_wait(2, deps=[s])"),
    ],
    ids=lambda change: change[1],
)
def test_a_wrong_protocol_is_noticed(change: tuple[str, str]) -> None:
    case = PROGRAMS["none"]
    given = inputs(case, Shape(H=1, G=1, T=8, S=24))
    with pytest.raises((Deadlock, AssertionError)):
        for seed in range(12):
            judged(case, given, emulate(given, Tile(8, 4, 4, 1), seed, change))
