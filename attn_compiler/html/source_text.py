"""Python text in pieces with the class of each, for colouring.

"def f(): return 1"   ->   ("keyword", "def"), ("", " "), ("name", "f"), ...
"""

from __future__ import annotations

import io
import keyword
import token
import tokenize
from collections.abc import Iterator

Piece = tuple[str, str]


def pieces(source: str) -> list[Piece]:
    """What to colour how; the texts put together are the source again."""
    try:
        found = list(_pieces(source))
    except (tokenize.TokenError, SyntaxError):
        return [("", source)]
    return _joined(found)


def _pieces(source: str) -> Iterator[Piece]:
    lines = source.splitlines(keepends=True)
    row, column = 1, 0
    before = ""
    for found in tokenize.generate_tokens(io.StringIO(source).readline):
        if found.start < (row, column) or not found.string:
            continue
        yield "", _between(lines, (row, column), found.start)
        kind = _kind(found, before)
        yield kind, found.string
        before = found.string
        row, column = found.end
    yield "", _between(lines, (row, column), (len(lines) + 1, 0))


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    (row, column), (last, until) = start, end
    if row == last:
        return lines[row - 1][column:until] if row <= len(lines) else ""
    middle = lines[row - 1 : last - 1]
    first = middle[0][column:] if middle else ""
    rest = lines[last - 1][:until] if last <= len(lines) else ""
    return first + "".join(middle[1:]) + rest


def _kind(found: tokenize.TokenInfo, before: str) -> str:
    if found.type == token.COMMENT:
        return "comment"
    if found.type == token.STRING:
        return "string"
    if found.type == token.NUMBER:
        return "number"
    if found.type == token.NAME and keyword.iskeyword(found.string):
        return "keyword"
    if found.type == token.NAME and before in ("def", "class"):
        return "defined"
    if before == "@" or found.string == "@":
        return "decorator"
    return ""


def _joined(found: list[Piece]) -> list[Piece]:
    """Neighbours of one class as one."""
    joined: list[Piece] = []
    for kind, text in found:
        if joined and joined[-1][0] == kind:
            joined[-1] = (kind, joined[-1][1] + text)
        elif text:
            joined.append((kind, text))
    return joined
