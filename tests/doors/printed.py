"""Pages of docs/ whose printed outputs come from a run.

    python tests/doors/printed.py [PAGE ...]    runs the code of pages and writes their outputs anew

A block of Python is followed by the block of text that it prints. All code of a page is one file,
`example.py`, so that lines have numbers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = tuple(ROOT / "docs" / f"{name}.md" for name in ("how_it_works", "variants"))
_BLOCKS = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
_MARK = "<<< end of a block >>>"


def parts(page: Path) -> list[tuple[str, str]]:
    """Code, and what the page says that it prints."""
    return _BLOCKS.findall(page.read_text(encoding="utf-8"))


def outputs(page: Path) -> list[str]:
    """What each block really prints."""
    code = "".join(f"{block}\nprint({_MARK!r})\n" for block, _ in parts(page))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "example.py"
        file.write_text(code, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("example", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["example"] = module
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            spec.loader.exec_module(module)
        del sys.modules["example"]
    return printed.getvalue().split(f"{_MARK}\n")[:-1]


def main() -> None:
    for page in [p for p in PAGES if p.stem in sys.argv[1:] or not sys.argv[1:]]:
        found = iter(outputs(page))

        def filled(block: re.Match[str], found: object = found) -> str:
            printed = next(found)  # type: ignore[call-overload]
            text = f"```python\n{block[1]}```"
            return f"{text}\n\n```text\n{printed}```" if printed else text

        text = page.read_text(encoding="utf-8")
        page.write_text(_BLOCKS.sub(filled, text), encoding="utf-8")


if __name__ == "__main__":
    main()
