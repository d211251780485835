"""Every exception of the package: one class, one message of four parts (what, where, why, what to
do).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class AttnCompilerError(Exception):
    """Base class.

    Args:
        what: one clause that says what is wrong.
        where: module path, option name or source line.
        why: one line per reason.
        do: what the reader can do about it.
    """

    def __init__(
        self, what: str, *, where: str = "", why: Iterable[str] = (), do: str = ""
    ) -> None:
        self.what = what
        self.where = where
        self.why = tuple(why)
        self.do = do
        head = f"{what} at {where}" if where else what
        lines = [head, *(f"  {line}" for line in self.why)]
        if do:
            lines.append(f"  do: {do}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.why, self.do)


class NoLegalVariant(AttnCompilerError):
    """`on_reject="raise"` and a site cannot be rewritten as asked."""


class BadOption(AttnCompilerError):
    """An option, a spec or an argument of a door is unknown or has a wrong value."""


class UnsupportedCall(AttnCompilerError):
    """A rewritten module was called in a way its analysis does not cover."""


class VerificationFailed(AttnCompilerError):
    """A rewritten graph does not compute what the original computes."""


def require(condition: Any, text: str) -> None:
    """Check, while a variant runs, what could not be checked before.

    Raises:
        UnsupportedCall: the assumption does not hold.
    """
    if not condition:
        raise UnsupportedCall(
            "a rewritten module was called in a way that its analysis does not cover",
            why=[f"assumed: {text}"],
            do="rewrite the model with arguments like these, or call the original model",
        )


def _rebuild(
    cls: type[AttnCompilerError], what: str, where: str, why: tuple[str, ...], do: str
) -> AttnCompilerError:
    return cls(what, where=where, why=why, do=do)
