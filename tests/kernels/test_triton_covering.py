"""The options of the generated kernels, every two values of which meet: forward and backward in
Triton's interpreter against float64.

Run in a process of its own, with TRITON_INTERPRET=1 from the start. The lengths leave ragged edges
and at least two tiles to every loop.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from attention_cases import SCALE, SOFTCAP, WINDOW, B, Case, Shape, draw, judge, tensors, text
from covering import Row, covering, pairs
from torch import Tensor

from attn_compiler.kernels import blocks, devices, flash_triton, gpu, launch
from attn_compiler.kernels.frame import Frame, Inputs
from attn_compiler.kernels.launch import Tile, keys_visited, with_descriptors

OPTIONS: dict[str, tuple[Any, ...]] = {
    "mask": ("none", "causal", "window", "prefix", "padding", "documents", "blocks"),
    "empty": ("zero", "nan", "uniform", "absorbed", "sink", "learned sink"),
    "score": ("dot", "softcap", "bias", "alibi", "half"),
    # of keys and of values
    "dims": ((16, 16), (24, 40), (80, 16), (13, 32)),
    # of queries and of keys
    "heads": ((2, 2), (2, 1), (1, 1)),
    "lengths": ((37, 45), (45, 37), (41, 41)),
    "tile": ((16, 32), (32, 16), (32, 32)),
    "layout": ("model", "heads", "turned"),
    "dtype": (torch.float32, torch.float16),
    "rate": (0.0, 0.3),
    "splits": (1, 3),
    "index": (32, 64),
    "precision": ("ieee", "tf32"),
    "packed": (False, True),
    "descriptors": (False, True),
    "lists": (False, True),
    "folded": (False, True),
}


def valid(row: Row) -> bool:
    """Is there such a kernel? What is not in the row yet may be anything."""
    mean = row.get("empty") in ("uniform", "absorbed")
    if row.get("lists") and (
        row.get("mask", "blocks") not in ("padding", "documents", "blocks")
        or row.get("empty") == "nan"
        or mean
    ):
        return False
    if row.get("descriptors") and (row.get("dims") == (13, 32) or row.get("layout") == "turned"):
        return False
    return not (
        (row.get("packed") and row.get("heads") in ((2, 2), (1, 1)))
        or (row.get("folded") and (row.get("splits", 1) > 1 or row.get("heads") == (1, 1)))
    )


ROWS = covering(OPTIONS, valid)


def said(row: Row) -> str:
    return " ".join(str(value).removeprefix("torch.") for value in row.values())


def test_every_two_values_meet() -> None:
    left = {
        pair
        for pair in pairs(OPTIONS, valid)
        if not any(all(row[name] == OPTIONS[name][i] for name, i in pair) for row in ROWS)
    }
    assert not left and all(valid(row) for row in ROWS) and 35 <= len(ROWS) <= 60
    for name, values in OPTIONS.items():
        assert {row[name] for row in ROWS} == set(values)


# ---------------------------------------------------------------- what a row says


def case_of(row: Row, s: Shape) -> tuple[Case, list[Tensor]]:
    """The program of a row, with its tensors."""
    reads: list[Tensor] = []
    grads: list[int] = []

    def read(tensor: Tensor, index: str, learned: bool = False) -> str:
        if learned:
            grads.append(len(reads))
        reads.append(tensor)
        return f"t{len(reads) - 1}[{index}]"

    ints = (9,) if row["mask"] in ("window", "prefix") else ()
    mask = _mask(row["mask"], s, read)
    score = {
        "dot": lambda: "dot",
        "softcap": lambda: SOFTCAP,
        "bias": lambda: f"dot + {read(draw(1, s.H, s.T, s.S), '0, h, q, k', True)}",
        "alibi": lambda: f"dot - {read(draw(s.H).abs(), 'h', True)} * (float(abs(q - k)) / 9.0)",
        "half": lambda: f"dot + {read(draw(B, 1, 1, s.S).bfloat16(), 'b, 0, 0, k')}",
    }[row["score"]]()
    sink = {"sink": "0.5", "learned sink": ""}.get(row["empty"], "")
    if row["empty"] == "learned sink":
        sink = read(draw(s.H), "h", True)
    empty = "any" if sink else row["empty"]
    return Case(text(score, mask, sink, empty), grads=tuple(grads), ints=ints), reads


def _mask(name: str, s: Shape, read: Any) -> str:
    if name == "padding":
        keep = torch.ones(B, s.S, dtype=torch.bool)
        keep[0, : s.S // 3], keep[1] = False, False  # one sequence has no key at all
        return str(read(keep, "b, k"))
    if name == "documents":
        ids = torch.arange(max(s.T, s.S)).div(11, rounding_mode="floor").expand(B, -1)
        number = read(ids, "b, q")
        return f"({number} == {number.replace('q', 'k')}) & (k <= q)"
    if name == "blocks":
        kept = draw(s.H, 4, 4) > 0.0
        kept[:, 1] = False
        return str(read(kept, "h, q // 16, k // 16"))
    return {
        "none": "True",
        "causal": "k <= q + (S - T)",
        "window": WINDOW,
        "prefix": "(k <= q) | (k < n0)",
    }[name]


def laid_out(layout: str, x: Tensor) -> Tensor:
    """The same [B, heads, length, width] elsewhere in memory."""
    if layout == "heads":
        return x.contiguous()
    return x.transpose(2, 3).contiguous().transpose(2, 3) if layout == "turned" else x


@pytest.mark.interpret
@pytest.mark.parametrize("row", ROWS, ids=said)
def test_numbers_and_gradients(
    row: Row, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (heads, groups), (rows, keys), (d, dv) = row["heads"], row["lengths"], row["dims"]
    shape = Shape(heads, groups, rows, keys, d, dv)
    tile = Tile(*row["tile"], descriptors=row["descriptors"])
    ahead = Tile(
        *row["tile"],
        heads=heads // groups if row["packed"] else 1,
        splits=row["splits"],
        descriptors=row["descriptors"],
    )
    turned = Tile(tile.keys, tile.rows, descriptors=tile.descriptors)
    ours = devices.Implementation(gpu.forward, gpu.backward)
    monkeypatch.setenv("ATTN_COMPILER_CACHE", str(tmp_path_factory.getbasetemp()))
    monkeypatch.setitem(devices.IMPLEMENTATIONS, "cpu", ours)
    for name, value in (
        ("family", "ampere"), ("hardware", None), ("backends", ()), ("warp_specialises", False),
        ("forward_tile", ahead), ("backward_tiles", (tile, turned)),
    ):  # fmt: skip
        monkeypatch.setattr(gpu, name, lambda *_, value=value: value)
    monkeypatch.setattr(blocks, "_LEAST", 0 if row["lists"] else 2**40)
    monkeypatch.setattr(launch, "_FAR", 0 if row["index"] == 64 else 2**31)
    monkeypatch.setattr(launch, "precision", lambda: row["precision"])
    monkeypatch.setattr(launch, "MOST_OF_AN_AXIS", 3 if row["folded"] else 65535)
    launch.folded.cache_clear()

    case, reads = case_of(row, shape)
    given = [laid_out(row["layout"], x) for x in tensors(shape, row["dtype"])]
    seed = torch.tensor([17]) if row["rate"] else None
    inputs = Inputs.of(
        *given, reads, case.ints, seed, program=case.program, scale=SCALE, dropout=row["rate"]
    )
    assert next(gpu.candidates(inputs)) == "triton", flash_triton.refusal(inputs)
    assert keys_visited(Frame(inputs), tile).kind.endswith("lists") is row["lists"]
    assert with_descriptors(tile, *given[1:], 16)[0].descriptors is row["descriptors"]
    assert (launch.folded(B * heads)[1] > 1) is row["folded"]
    judge(case, given, reads, rate=row["rate"])
    launch.folded.cache_clear()
