"""A bar of progress on a terminal: rich's where it is installed, else a line now and then.

with bar("layers", 500, 0) as advance:  advance(0.031)
with bar("calibration", None) as advance:  advance()

Both go to standard error. A bar needs a terminal; a log gets lines: ten, or where nobody knows how
many steps there are, one after 1, 2, 4, 8, ... of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Protocol

_LINES = 10


class Advance(Protocol):
    """What is to be called after each step, with its loss if it has one."""

    def __call__(self, loss: float | None = None) -> None: ...


@contextmanager
def bar(title: str, steps: int | None, done: int = 0, *, shown: bool = True) -> Iterator[Advance]:
    """One phase of training, or of calibration.

    Args:
        title: what is going on.
        steps: how many there will be, None if that is not known.
        done: steps of an earlier run.
        shown: False draws nothing.

    Yields:
        What is to be called after each step.
    """
    if not shown:
        yield lambda loss=None: None
    elif sys.stderr.isatty() and find_spec("rich") is not None:
        yield from _drawn(title, steps, done)
    else:
        yield _lines(title, steps, done)


def _drawn(title: str, steps: int | None, done: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=steps, completed=done, loss="")
        yield lambda loss=None: progress.update(task, advance=1, loss=_worded(loss))


def _lines(title: str, steps: int | None, done: int) -> Advance:
    count = done

    def advance(loss: float | None = None) -> None:
        nonlocal count
        count += 1
        if count == steps or _tells(count, steps):
            of = "" if steps is None else f"/{steps}"
            line = f"{title} {count}{of}  {_worded(loss)}".rstrip()
            print(line, file=sys.stderr, flush=True)

    return advance


def _tells(count: int, steps: int | None) -> bool:
    """Is there a line after so many steps?"""
    if steps is None:
        return count.bit_count() == 1
    return count % max(1, steps // _LINES) == 0


def _worded(loss: float | None) -> str:
    return "" if loss is None else f"loss {loss:.4g}"
