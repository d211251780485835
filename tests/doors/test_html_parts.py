"""What the page is made of: rows that face each other, folded layers, pictures, times, colours."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from doors.pages import explained
from hypothesis import given
from hypothesis import strategies as st

from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.problem import Problem
from attn_compiler.html.mask_picture import picture
from attn_compiler.html.roofline_picture import HEIGHT, WIDTH
from attn_compiler.html.roofline_picture import picture as roofs
from attn_compiler.html.side_by_side import Part, Row, aligned, tree
from attn_compiler.html.source_text import pieces
from attn_compiler.html.squares import outlines
from attn_compiler.html.ways import drawn, ways
from attn_compiler.html.words import amount, seconds
from attn_compiler.ir.evaluate import evaluate
from attn_compiler.ir.expr import parse
from attn_compiler.ir.listing import Line, Listing
from attn_compiler.ir.mask import classify


def line(name: str, text: str = "", modules: tuple[str, ...] = ()) -> Line:
    known = tuple((path, "Module") for path in modules)
    return Line(name, "call", "", "", text or f"f_{name}", "m.py:1", "", known)


# ---------------------------------------------------------------- rows


@given(
    st.lists(st.sampled_from("abcdefgh"), unique=True),
    st.lists(st.sampled_from("abcdefghxyz"), unique=True),
)
def test_every_line_is_in_one_row_and_in_order(left: list[str], right: list[str]) -> None:
    before, after = [line(n) for n in left], [line(n) for n in sorted(right)]
    rows = aligned(before, after)
    assert [row.before for row in rows if row.before] == before
    assert [row.after for row in rows if row.after and row.kind != "same"] == [
        x for x in after if x not in [row.before for row in rows if row.kind == "same"]
    ]
    assert all(row.before == row.after for row in rows if row.kind == "same")


def test_lines_of_one_name_face_each_other() -> None:
    before = [line("q"), line("s"), line("p"), line("out", "p @ v"), line("y")]
    after = [line("q"), line("op"), line("out", "op[0]"), line("y")]
    found = [(r.before and r.before.name, r.after and r.after.name, r.kind) for r in
             aligned(before, after)]  # fmt: skip
    assert found == [
        ("q", "q", "same"), ("s", "op", "changed"), ("p", None, "removed"),
        ("out", "out", "changed"), ("y", "y", "same"),
    ]  # fmt: skip


def layer(number: int, width: int = 7) -> list[Line]:
    home = f"layers.{number}"
    return [
        line(f"n_{number}", f"norm(x_{number}, {home}.norm.weight)", (home, f"{home}.norm")),
        line(f"a_{number}", f"attend(n_{number}, {width}, x='a_{number}')", (home,)),
        line(f"x_{number + 1}", f"a_{number} + x_{number}", (home,)),
    ]


def test_forty_eight_layers_are_as_long_as_one() -> None:
    wide = (5, 29)
    lines = [x for n in range(48) for x in layer(n, 11 if n in wide else 7)]
    # what is quoted is no name of a value: the text of each layer is its own
    lines = [line(x.name, x.text.replace(f"'{x.name}'", "'a'"), tuple(p for p, _ in x.modules))
             for x in lines]  # fmt: skip
    named = [line(f"layers.{n}.norm.weight") for n in range(48)]
    inputs = [Line(x.name, "input", "", "", "", "", "", ()) for x in (*named, line("x_0"))]
    top = tree(Listing("", (*inputs, *lines), (*inputs, *lines)))
    parts = [part for part in top.parts if isinstance(part, Part)]
    assert len(parts) == 48 and top.size == 3 * 48
    assert [part.path for part in parts if not part.like] == ["layers.0", "layers.5"]
    assert parts[29].like == "layers.5" and parts[47].like == "layers.0"


def test_a_line_of_no_module_stays_between_its_neighbours() -> None:
    lines = [line("a", modules=("m",)), line("switch"), line("b", modules=("m",)), line("end")]
    top = tree(Listing("", tuple(lines), tuple(lines)))
    names = [[r.line.name for r in p.rows()] if isinstance(p, Part) else p.line.name
             for p in top.parts]  # fmt: skip
    assert names == [["a", "switch", "b"], "end"]


def test_a_real_graph() -> None:
    """Of a model: what is not as before lies in the modules that were rewritten."""
    report = explained()
    (graph,) = report.graphs
    top = tree(graph)
    rows = [row for row in top.rows() if isinstance(row, Row)]
    paths = {row.line.modules[-1][0] for row in rows if row.kind != "same"}
    assert paths == {site.path for site in report.sites if site.decision.accepted}
    new = [row.after.op for row in rows if row.after and row.kind in ("added", "changed")]
    assert new.count("attention") == report.rewritten
    gone = [row.before.op for row in rows if row.before and row.kind in ("removed", "changed")]
    assert gone.count("softmax") == report.rewritten
    (softmax,) = [x for x in graph.before if x.op == "softmax" and "layers.0." in str(x.modules)]
    assert softmax.place == report.missed[0].location
    assert softmax.code.endswith(".softmax(-1)") and softmax.type == "float32[2, 2, 53, 53]"


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("text", [
    "True", "k <= q", "k <= q + S - T", "(k <= q) & (k > q - 7)", "(k // 8) == (q // 8)",
    "(k <= q) | (k < 5)", "(k <= q) & t0[b, k]", "t0[q, k]", "(k <= q) & (t0[b, k] | (q == k))",
])  # fmt: skip
@pytest.mark.parametrize(("rows", "keys"), [(31, 31), (37, 67)])
def test_a_mask_is_drawn_as_it_is(text: str, rows: int, keys: int) -> None:
    """Against every element, under two tensors: one that forbids all, one that allows all."""
    mask = classify(parse(text), ("t",), ("bool",))
    found = picture(mask, rows, keys, 2, 1, example=True)
    assert (found.height, found.width) == (-(-rows // found.step), -(-keys // found.step))
    shape = (rows, keys) if "t0[q" in text else (2, keys)
    env = {"b": torch.tensor(0), "h": torch.tensor(0), "B": 2, "H": 1, "T": rows, "S": keys,
           "q": torch.arange(rows)[:, None], "k": torch.arange(keys)}  # fmt: skip
    with_none, with_all = (
        evaluate(mask.expr, env, [torch.full(shape, on)]).expand(rows, keys) for on in (False, True)
    )
    for y, x in product(range(found.height), range(found.width)):
        square = (
            slice(y * found.step, (y + 1) * found.step),
            slice(x * found.step, (x + 1) * found.step),
        )
        least, most = with_none[square], with_all[square]
        match found.classes[y][x]:
            case "never":
                assert not most.any()
            case "always":
                assert least.all()
            case "data":
                assert most.all() and not least.all()
            case "edge":
                assert most.any() and not most.all()


@given(st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=1, max_size=4))
def test_squares_are_each_drawn_once(rows: list[list[int]]) -> None:
    drawn_squares: dict[tuple[int, int], int] = {}
    for look, path in outlines(rows).items():
        for run in path.removesuffix("z").split("z"):
            (x, y), length = map(int, run[1:].split("h")[0].split()), int(run.split("h")[1][:-2])
            for i in range(length):
                assert drawn_squares.setdefault((int(y), int(x) + i), look) == look
    assert drawn_squares == {(y, x): n for y, row in enumerate(rows) for x, n in enumerate(row)}


# ---------------------------------------------------------------- costs


@pytest.mark.parametrize("hardware", ["h200", "a100", "t4", "mi300x", "cpu"])
@pytest.mark.parametrize("rows", [1, 1031])
def test_the_ways_of_a_call(hardware: str, rows: int) -> None:
    machine = Hardware.named(hardware)
    problem = Problem(2, 8, 2, rows, 1031, 64, 64, right=0 if rows > 1 else None)
    found = ways(problem, machine)
    assert "keep" in [way.name for way in found]
    assert [w.time.seconds for w in found] == sorted(w.time.seconds for w in found)
    assert all(way.flops > 0 and way.bytes > 0 for way in found)
    shown = roofs(drawn(problem, machine, found))
    assert [mark.number for mark in shown.marks] == list(range(1, len(found) + 1))
    for mark in shown.marks:
        assert 0 <= mark.x <= WIDTH and 0 <= mark.y <= HEIGHT
    corners = [tuple(map(float, c.split(","))) for c in shown.roof.split()]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in corners)
    assert corners == sorted(corners) and [y for _, y in corners] == sorted(
        (y for _, y in corners), reverse=True
    )


def test_amounts() -> None:
    times = [seconds(x) for x in (0, 2.5, 0.0123, 4.2e-6, 7e-9)]
    assert times == ["0", "2.5 s", "12.3 ms", "4.2 µs", "7 ns"]
    assert [amount(x, "B") for x in (12, 34e3, 5.67e6, 8e9, 1.2e13)] == [
        "12 B", "34 kB", "5.67 MB", "8 GB", "12 TB",
    ]  # fmt: skip


# ---------------------------------------------------------------- source


@pytest.mark.parametrize(
    "source", ["", "x = (", "'''", "\tif x:\n  pass", "a\\\n= 1\n", 'é = "→"  # ∞\n', "f'{x!r}'\n"]
)
def test_no_letter_is_lost(source: str) -> None:
    assert "".join(text for _, text in pieces(source)) == source


def test_kernels_are_coloured() -> None:
    for source in explained().kernels.values():
        found = pieces(source)
        assert "".join(text for _, text in found) == source
        kinds = {text: kind for kind, text in found}
        assert kinds["def"] == "keyword" and kinds["@triton"] == "decorator"
        assert {"string", "number", "defined"} <= set(kinds.values())
