"""A bar of progress on a terminal: rich's where it is installed, else a line now and then.

with bar("layers", 500, 0) as advance:  advance(0.031)

Both go to standard error. A bar needs a terminal; a log gets lines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

Advance = Callable[[float], None]
_LINES = 10


@contextmanager
def bar(title: str, steps: int, done: int, *, shown: bool = True) -> Iterator[Advance]:
    """One phase of training.

    Args:
        done: steps of an earlier run.

    Yields:
        What is to be called after each step, with its loss.
    """
    if not shown:
        yield lambda loss: None
    elif sys.stderr.isatty() and find_spec("rich") is not None:
        yield from _drawn(title, steps, done)
    else:
        yield _lines(title, steps, done)


def _drawn(title: str, steps: int, done: int) -> Iterator[Advance]:
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
        TextColumn("loss {task.fields[loss]:.4g}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=steps, completed=done, loss=float("nan"))
        yield lambda loss: progress.update(task, advance=1, loss=loss)


def _lines(title: str, steps: int, done: int) -> Advance:
    every = max(1, steps // _LINES)
    count = done

    def advance(loss: float) -> None:
        nonlocal count
        count += 1
        if count % every == 0 or count == steps:
            print(f"{title} {count}/{steps}  loss {loss:.4g}", file=sys.stderr, flush=True)

    return advance
