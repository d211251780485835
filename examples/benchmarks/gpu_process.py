"""Measures in a process of its own, which may die or hang without losing what was measured.

    parent                          child
    gather(start, names, ...)  -->  works through the cases, a line of JSON for each event:
                                    {"case", "way"} begins, {"row"} is done, {"lost"} an error

A kernel that writes where it must not takes the whole process with it, and one that waits for
itself never returns. The way that did it is reported with what happened; a new process goes on.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PAUSE = 0.1
# processes that may be lost before the rest is given up
_MOST_LOST = 6
# a way that was lost so often is not tried any more
_TOO_OFTEN = 2


@dataclass(frozen=True, slots=True)
class Task:
    """What a child is to do.

    Attributes:
        names: of the cases without a row.
        lost: reasons why ways must not be tried, by case and way.
        seconds: it begins no case that needs more than is left of them.
        notes: the file for its lines.
    """

    names: Sequence[str]
    lost: dict[str, dict[str, str]]
    seconds: float
    notes: Path


@dataclass(slots=True)
class Gathered:
    """Rows of the cases by name, and what was lost on the way."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    lost: dict[str, dict[str, str]] = field(default_factory=dict)


def gather(
    start: Callable[[Task], subprocess.Popen[bytes]],
    names: Sequence[str],
    ways: dict[str, Sequence[str]],
    folder: Path,
    budget: float,
    patience: float,
) -> Gathered:
    """Rows of as many cases as the budget of seconds allows.

    Args:
        start: starts a child on a task.
        ways: of each case.
        folder: for the notes.
        patience: seconds without a line after which a child counts as hung; as long after the
            budget a child is ended in any case.
    """
    end, found = time.monotonic() + budget, Gathered()
    for turn in range(_MOST_LOST):
        left = end - time.monotonic()
        todo = [name for name in names if name not in found.rows]
        if left <= 0 or not todo:
            break
        task = Task(todo, found.lost, left, folder / f"notes{turn}.jsonl")
        task.notes.touch()
        reason = _follow(start(task), task, found, patience, end + patience)
        if not reason:
            break
        _remember(task, reason, found, ways)
    return found


def _follow(
    child: subprocess.Popen[bytes], task: Task, found: Gathered, patience: float, end: float
) -> str:
    """Wait for a child; why it was lost, empty if it finished."""
    heard, size = time.monotonic(), 0
    while child.poll() is None:
        time.sleep(_PAUSE)
        now, before, size = time.monotonic(), size, task.notes.stat().st_size
        if size != before:
            heard = now
        if now - heard > patience or now > end:
            child.kill()
            child.wait()
            _collect(task, found)
            return f"no answer for {now - heard:.0f} seconds" if now <= end else "out of time"
    _collect(task, found)
    return f"its process ended with code {child.returncode}" if child.returncode else ""


def _collect(task: Task, found: Gathered) -> None:
    found.rows.update({line["row"]["name"]: line["row"] for line in _lines(task) if "row" in line})


def _lines(task: Task) -> Iterator[dict[str, Any]]:
    for line in task.notes.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # the last one, cut off by the end of its process
            return


def _remember(task: Task, reason: str, found: Gathered, ways: dict[str, Sequence[str]]) -> None:
    """The way that was under way must not be tried again."""
    case = way = ""
    for line in _lines(task):
        case, way = line.get("case", case), line.get("way", way)
        reason = line.get("lost", reason)
        if "row" in line:
            case = way = ""
    if not case:
        return
    if way not in ways[case]:  # before the first way: the case itself cannot be made
        found.rows[case] = {"name": case, "error": reason}
        return
    print(f"lost: {case}, {way}: {reason}", flush=True)
    found.lost.setdefault(case, {})[way] = reason
    often = Counter(w for lost in found.lost.values() for w in lost)
    if often[way] >= _TOO_OFTEN:
        for other, its in ways.items():
            if way in its:
                text = f"not tried, it was lost {often[way]} times: {reason}"
                found.lost.setdefault(other, {}).setdefault(way, text)
