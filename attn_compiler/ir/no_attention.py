"""The refusal of a candidate that is no attention, or none that can be replaced."""

from __future__ import annotations

from torch import fx


class NotAttention(Exception):
    """What looked like attention is something else; `code` and `text` go into the report."""

    def __init__(self, code: str, text: str, node: fx.Node | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.node = node
