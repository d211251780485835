"""What the pages of docs/ say is so: outputs come from a run, tables from the sources."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import printed, reasons

import attn_compiler as ac
from attn_compiler import cli

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("page", printed.PAGES, ids=lambda page: page.stem)
def test_outputs_come_from_a_run(page: Path) -> None:
    """If it says something else now, and that is right: python tests/doors/printed.py."""
    said = [text for _, text in printed.parts(page)]
    assert any(said)
    assert printed.outputs(page) == said


def test_the_table_of_codes_is_that_of_the_sources() -> None:
    """If a code was added: python tests/doors/reasons.py."""
    text = reasons.PAGE.read_text(encoding="utf-8")
    assert text.split(reasons.START)[1].split(reasons.END)[0].strip() == reasons.table()


def test_every_code_says_something() -> None:
    table = dict(re.findall(r"\| `([\w.]+)` \| (.*) \|", reasons.table()))
    assert table.keys() == reasons.codes().keys()
    assert [code for code, text in table.items() if not re.search(r"[a-z]{3}", text)] == []


def test_every_code_that_a_source_spells_is_found() -> None:
    """Whatever looks like a code of a known family is in the table."""
    known = reasons.codes()
    families = {code.split(".")[0] for code in known if "." in code}
    pattern = re.compile(rf'"((?:{"|".join(families)})\.[a-z_]+)"')
    for file in sorted((ROOT / "attn_compiler").rglob("*.py")):
        for code in pattern.findall(file.read_text(encoding="utf-8")):
            assert code in known, f"{file.name}: {code}"


def test_what_the_readme_shows_of_the_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(ROOT)
    command = "explain examples/03_inspect.py:make --hardware h200"
    assert f"`attn-compiler {command}`" in readme
    assert cli.main(command.split()) == 0
    assert f"```\n{capsys.readouterr().out}```" in readme
    assert cli.main(["explain", "tests/doors/given.py:broken"]) == 1
    assert f"```\n{capsys.readouterr().err}```" in readme


# "## GAU", then code; `py` is a recipe, `python` is printed and compared
RECIPES = {
    section.split("\n", 1)[0]: re.findall(r"```py\n(.*?)```", section, re.DOTALL)
    for section in (DOCS / "variants.md").read_text(encoding="utf-8").split("\n## ")[1:]
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name, found in RECIPES.items() if found])
def test_the_recipes_of_the_variants_run(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a language model, with the few names that a reader has: model, args, batches, a loss."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256, vocab_size=61)
    config.bos_token_id = config.eos_token_id = None
    ids = torch.randint(0, 61, (2, 128), generator=torch.Generator().manual_seed(1))

    def loss_of(output: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        (ids,) = inputs
        return torch.nn.functional.cross_entropy(output.logits[:, :-1].mT, ids[:, 1:])

    kwargs = {"use_cache": False}
    given = {"torch": torch, "ac": ac, "model": GPT2LMHeadModel(config).eval(), "kwargs": kwargs}
    given |= {"args": (ids,), "batches": [((ids,), kwargs)] * 2, "loss_of": loss_of}
    monkeypatch.chdir(tmp_path)
    for recipe in RECIPES[variant]:
        exec(recipe, given)
    report = ac.last_report()
    assert report.rewritten == len(report.sites) > 0, report
    assert given["new"] is not given["model"]


def test_every_variant_that_is_trained_has_a_recipe() -> None:
    assert [name for name, found in RECIPES.items() if not found] == ["What they cost", "Flash"]


def test_the_pieces_of_the_page_on_variants_are_the_example() -> None:
    example = (ROOT / "examples" / "04_add_a_variant.py").read_text(encoding="utf-8")
    page = (DOCS / "add_a_variant.md").read_text(encoding="utf-8")
    pieces = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(pieces) >= 3
    for piece in pieces:
        assert piece in example, piece


@pytest.mark.parametrize(
    "name", ["how_it_works", "limits", "add_a_variant", "variants", "performance"]
)
def test_links_and_names_of_files_are_there(name: str) -> None:
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:attn_compiler|docs|examples|tests)/[\w/.]+)`", text)
    named += [str(Path("docs") / link) for link in re.findall(r"\]\((?!http)([^)#]+)", text)]
    for file in named:
        assert (ROOT / file).exists(), file
