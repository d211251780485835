"""Every reason code of the package, with its words, read from the sources.

python tests/doors/reasons.py     writes the table in docs/limits.md anew
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "limits.md"
START, END = "<!-- codes -->", "<!-- end of codes -->"
_RAISERS = {"Reason", "NotAttention", "RegionError", "CaptureError", "Blocked"}
_CODE = re.compile(r"[a-z_]+(\.[a-z_]+)?")
# sources that name a code without its family
_FAMILY = dict.fromkeys(("affine.py", "states.py", "sides.py", "key_parts.py"), "el.")


# words that are put together when it happens: what they say
_GENERAL = {
    "el.cache_larger": "a cache would hold more numbers than keys and values",
    "feed_forward.unlike": "it is no net of linear maps with an activation between them: …",
    "gau.sizes": "no sizes of the units match the block: …",
    "region.untraceable": "an operation in between cannot be traced alone: …",
    "spion.pattern": "the pattern that is given does not fit the sequence: …",
    "switchall.sizes": "no sizes of the experts match the feed-forward net: …",
}


def codes() -> dict[str, list[str]]:
    """Words by code."""
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / "attn_compiler").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            for code, text in _said(function, file.name in _FAMILY):
                full = code if "." in code else _FAMILY.get(file.name, "") + code
                words = found.setdefault(full, [])
                if text and text not in words:
                    words.append(text)
    return dict(sorted(found.items()))


def _said(function: ast.FunctionDef, pairs: bool) -> Iterator[tuple[str, str]]:
    """Codes with their words, in calls of the raisers, in pairs with a family, and, where `pairs`
    holds, in pairs without one."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in _RAISERS and len(node.args) >= 2:
                parts = node.args[:2]
            else:
                continue
        elif isinstance(node, ast.Tuple) and len(node.elts) == 2:
            parts = node.elts
            if not pairs and "." not in str(getattr(parts[0], "value", "")):
                continue
        else:
            continue
        code, text = parts
        if isinstance(code, ast.Constant) and _CODE.fullmatch(str(code.value)):
            words = _words(text, function, node.lineno)
            handed_on = isinstance(text, ast.Name) and text.id == "text"
            if isinstance(node, ast.Call) or handed_on or " " in words:
                yield str(code.value), words


def _words(node: ast.expr, function: ast.FunctionDef, line: int) -> str:
    """The text of an expression; what is filled in when it happens is an ellipsis."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
    if isinstance(node, ast.Name):
        given = [
            a
            for a in ast.walk(function)
            if isinstance(a, ast.Assign)
            and a.lineno <= line
            and any(isinstance(t, ast.Name) and t.id == node.id for t in a.targets)
        ]
        if given:
            last = max(given, key=lambda a: a.lineno)
            if not isinstance(last.value, ast.Name):
                return _words(last.value, function, line)
    return ""


def table() -> str:
    """As Markdown."""
    rows = ["| code | what it says |", "|---|---|"]
    for code, found in codes().items():
        words = [_GENERAL[code]] if code in _GENERAL else found
        rows.append(f"| `{code}` | {'<br>'.join(words).replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
