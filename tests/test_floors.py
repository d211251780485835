"""The floors of ARCHITECTURE.md, and the limits on size, by tools and by the syntax tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "attn_compiler"
SOURCES = sorted(PACKAGE.rglob("*.py"))
LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 400, 60


def test_imports_go_down_only() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_file_keeps_to_its_room(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    room = file.relative_to(PACKAGE)
    assert ast.get_docstring(tree), "no module docstring"
    for name in _imported(tree):
        assert name.split(".")[0] not in ("passes", "kernels"), f"{name} is a signpost"
        if not name.startswith("attn_compiler.variants.") or room.name == "__init__.py":
            continue
        assert _may_see_variant(room, name), f"{room} reaches past a door: {name}"


def _may_see_variant(room: Path, name: str) -> bool:
    """A variant's file is seen by files of its own name, such as `train/spion.py`; `base`, `starts`
    and what the package exports, by all.
    """
    inside = name.removeprefix("attn_compiler.variants.").split(".")[0]
    return (
        inside in ("base", "starts", room.stem)
        or not (PACKAGE / "variants" / f"{inside}.py").exists()
    )


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_sizes(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= LINES_OF_A_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= LINES_OF_A_FUNCTION, f"{node.name}: {lines} lines"


def test_no_room_for_leftovers() -> None:
    forbidden = {"utils", "helpers", "common", "manager"}
    assert not [f for f in PACKAGE.rglob("*") if f.stem in forbidden]


@pytest.mark.parametrize("name", ["passes", "kernels"])
def test_signposts_point_into_the_package(name: str) -> None:
    assert (ROOT / name).resolve() == PACKAGE / name
