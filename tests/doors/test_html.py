"""The report as a page, read without a browser: whole, harmless, alone, and true to the report."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from doors.pages import LENGTH, Page, explained

import attn_compiler as ac
from attn_compiler.html import words
from attn_compiler.ir.listing import Line, Listing
from attn_compiler.ir.site import Break, Missed, Reason
from attn_compiler.report import Report

EVIL = '</script></style><script>window.owned = 1</script><img src="x" onerror="window.owned=1">&'


def page_of(report: Report, folder: Path) -> Page:
    report.to_html(folder / "page.html")
    return Page((folder / "page.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report() -> Report:
    return explained()


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(report, tmp_path_factory.mktemp("page"))


def test_it_is_well_formed(page: Page) -> None:
    assert page.complaints == []
    inner = [address[1:] for address in page.addresses]
    assert inner and set(inner) <= set(page.ids)
    for name in ("aria-controls", "aria-labelledby"):
        named = [found[name] for _, found in page.elements if name in found]
        assert named and set(named) <= set(page.ids)


def test_it_asks_for_nothing(page: Page, report: Report, tmp_path: Path) -> None:
    assert all(address.startswith("#") for address in page.addresses)
    report.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|//[a-z0-9-]+\.", text.partition("</style>")[0])
    assert set(re.findall(r"url\((.*?)\)", text)) <= {"#hatch"}
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'")
    own = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(own[0].encode()).digest()).decode()
    assert len(own) == 1 and f"script-src 'sha256-{digest}'" in policy


def test_every_site_and_near_miss_is_there(page: Page, report: Report) -> None:
    assert report.rewritten == 3 and len(report.sites) == 4 and len(report.missed) == 1
    for site in report.sites:
        assert site.path in page.text and site.location in page.text
        assert str(site.mask) in page.text
        for reason in site.decision.reasons:
            assert reason.code in page.text and reason.text in page.text
    (missed,) = report.missed
    for text in (missed.path, missed.location, missed.code, missed.text):
        assert text in page.text
    for source in report.kernels.values():
        assert source in "".join(page.texts)
    # of the two rows one is kept, though its program is the same: it runs no kernel
    assert page.text.count("Kernels: forward , backward") == 1


def test_its_numbers_are_those_of_the_report(page: Page, report: Report) -> None:
    found = json.loads(report.to_json())
    (data,) = page.data
    assert json.loads(data) == {name: found[name] for name in ("sites", "missed", "breaks")}
    rows = [found for found in page.all("tbody") if found.get("class") == "site"]
    assert sum(int(row["data-count"]) for row in rows) == len(report.sites)
    seconds = {site.decision.predicted_seconds for site in report.sites} - {None}
    shown = {float(found["value"]) for found in page.all("data")}
    assert seconds <= shown and len(seconds) == 1
    assert words.seconds(*seconds) in page.text
    totals = re.search(r"attention sites (\d+) rewritten (\d+) kept .*? (\d+) look", page.text)
    assert totals is not None and [int(n) for n in totals.groups()] == [4, 3, 1]


def test_layers_that_are_alike_are_one_row(page: Page) -> None:
    rows = [found for found in page.all("tbody") if found.get("class") == "site"]
    assert [int(row["data-count"]) for row in rows] == [3, 1]
    assert "layers.0.attention … layers.2.attention 3 alike" in page.text
    assert "layers.1 … layers.2 2 modules like layers.0" in page.text


def test_what_was_done_and_why_not(page: Page) -> None:
    assert "matmul" in page.text and "became" in page.text and "In the graph" in page.text
    assert "attention.second_reader" in page.text and "It runs as it is written." in page.text
    assert "score = tanh(dot) * 5.0" in page.text
    assert "a query sees the keys up to its own position" in page.text
    assert f"batch 2, {LENGTH} queries, {LENGTH} keys" in page.text
    # the user's own lines
    assert "weights = scores.masked_fill(above," in page.text
    assert "out = (used @ v).transpose(1, 2).flatten(2)" in page.text
    assert "layers.4.attention" in page.text and "attention.weights_changed" in page.text


def test_the_cost_of_a_site(page: Page) -> None:
    for text in ("triton (chosen)", "the code as it is written", "flop per second", "Limit:"):
        assert text in page.text
    assert [m["class"] for m in page.all("g") if "chosen" in m["class"]] == ["mark chosen"]


def test_what_a_site_costs_in_letters(page: Page, report: Report, tmp_path: Path) -> None:
    """Also where no device is named, of what a variant puts there."""
    text = page.text
    assert "In letters" in text and "B · H · S · T · (d + e)" in text
    (site, *_) = report.sites
    gated = replace(site, decision=replace(site.decision, call=None, variant="switchhead",
                    spec=ac.SwitchHead(heads=2, experts=2, k=1, head_dim=16)))  # fmt: skip
    shown = page_of(replace(report, sites=(gated,)), tmp_path).text
    assert "In letters" in shown and "No device was named" in shown and "D" in shown


def test_nothing_of_a_model_is_markup(report: Report, tmp_path: Path) -> None:
    site = report.sites[0]
    bad = replace(
        site, path=EVIL, owner=EVIL, location=EVIL, score=EVIL, facts={EVIL: EVIL, "kernel": EVIL},
        decision=replace(site.decision, accepted=False, reasons=(Reason(EVIL, EVIL, EVIL),)),
    )  # fmt: skip
    graph = report.graphs[0]
    line = replace(graph.before[-1], name=EVIL, text=EVIL, place=EVIL, code=EVIL, type=EVIL)
    line = replace(line, modules=((EVIL, EVIL),), kind="call")
    hostile = Report(
        (site, bad), (Missed(EVIL, EVIL, EVIL, EVIL),), "", "", {EVIL: EVIL},
        (replace(graph, name=EVIL, before=(*graph.before, line), after=graph.after),),
    )  # fmt: skip
    page = page_of(hostile, tmp_path)
    assert page.complaints == [] and not page.all("img") and len(page.all("script")) == 2
    assert "".join(page.texts).count(EVIL) >= 12
    assert json.loads(page.data[0])["missed"][0]["code"] == EVIL


def test_without_a_device_it_says_how_to_name_one(report: Report, tmp_path: Path) -> None:
    sites = tuple(
        replace(
            site,
            facts={name: fact for name, fact in site.facts.items() if name != "kernel"},
            decision=replace(site.decision, call=None, tile=None, predicted_seconds=None),
        )
        for site in report.sites
    )
    page = page_of(replace(report, sites=sites, kernels={}), tmp_path)
    assert page.complaints == []
    assert "Kernels depend on the device" in page.text and "No device was named" in page.text
    assert f"{LENGTH} queries and keys" in page.text and "sizes made up" not in page.text
    unknown = replace(sites[0], length=None)
    assert "sizes made up" in page_of(Report((unknown,)), tmp_path).text


def test_a_report_without_graphs(report: Report, tmp_path: Path) -> None:
    page = page_of(replace(report, graphs=()), tmp_path)
    assert page.complaints == [] and "This report holds no graphs" in page.text
    assert "became" not in page.text and "In the graph" not in page.text


def test_a_report_of_nothing(tmp_path: Path) -> None:
    page = page_of(Report(), tmp_path)
    assert page.complaints == [] and "No attention was found" in page.text


def test_a_pattern_of_blocks(report: Report, tmp_path: Path) -> None:
    fact = {
        "text": "half of the blocks", "block": 16, "kept": [[1, 0], [2, 2]], "of": 2,
        "pooled": [[0.25, 0.0], [0.01, 0.16]], "density": 0.625, "lost_mass": 0.031,
    }  # fmt: skip
    site = report.sites[0]
    made = replace(
        site, facts={"spion": fact}, decision=replace(site.decision, variant="spion", call=None)
    )
    page = page_of(Report((made,)), tmp_path)
    assert page.complaints == [] and "half of the blocks" in page.text
    assert "2 × 2 blocks of 16 × 16; 62.5 % are kept, the mean of 2 heads" in page.text
    assert "3.1 % of the attention is left out." in page.text
    paths = {p["class"]: p["d"] for p in page.all("path") if "d" in p}
    # shades go by the square root: 0.5, 0.1 and 0.4 of nine
    assert paths["kept-blocks"] == "M0 0h1v1h-1zM0 1h2v1h-2z"
    assert paths["shade s9"] == "M0 0h1v1h-1z" and paths["shade s8"] == "M1 1h1v1h-1z"
    assert paths["shade s2"] == "M0 1h1v1h-1z"


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "most"), [(12, 2_000_000), (48, 2_000_000)])
def test_gpt2(layers: int, most: int, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=layers, n_embd=96, n_head=3, vocab_size=211)
    config._attn_implementation = "eager"
    ids = torch.randint(0, 211, (2, 64))
    ones = {"attention_mask": torch.ones(2, 64, dtype=torch.long)}
    found = ac.explain(GPT2LMHeadModel(config).eval(), (ids,), ones, hardware="h200")
    page = page_of(found, tmp_path)
    assert found.rewritten == layers and page.complaints == []
    assert (tmp_path / "page.html").stat().st_size < most
    assert all(site.path in page.text for site in found.sites)
    assert f"{layers} alike" in page.text and f"{layers - 1} modules like" in page.text


def test_where_the_tracer_let_go_is_said(tmp_path: Path) -> None:
    cut = Break("model.py:7", "Call to <print>", "print(x)")
    page = page_of(Report(breaks=(cut,)), tmp_path)
    assert page.complaints == [] and "let go of it at 1 place" in page.text
    for said in ("model.py:7", "print(x)", "Call to <print>"):
        assert said in page.text
    (numbers,) = page.data
    assert json.loads(numbers)["breaks"][0]["location"] == "model.py:7"


def test_parameters_of_repeated_layers_are_one_line(tmp_path: Path) -> None:
    names = [f"layers.{i}.attention.weight" for i in range(48)]
    output = Line("output", "output", "", "", "(x,)", "", "", ())
    lines = (*(Line(n, "input", "float32[3]", "", "", "", "", ()) for n in names), output)
    odd = Line("layers.7.attention.bias", "input", "float32[3]", "", "", "", "", ())
    page = page_of(Report(graphs=(Listing("", (odd, *lines), (odd, *lines)),)), tmp_path)
    assert f"{names[0]} … {names[-1]} float32[3] 48 alike" in page.text
    assert "inputs and parameters 49" in page.text and "layers.7.attention.bias" in page.text
    assert "layers.5.attention.weight" not in page.text
