"""Peak memory of a call on a CPU, from the kernel's account of this process (Linux).

growth(call) -> MiB that the call adds to the largest resident set
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SELF = Path("/proc/self")


def growth(call: Callable[[], Any]) -> float:
    """MiB that `call` adds at its peak. What is loaded or compiled once should be there already."""
    # what others have freed goes back first, and the largest so far becomes what is there now
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    (_SELF / "clear_refs").write_text("5", encoding="ascii")
    before = _largest()
    call()
    return (_largest() - before) / 1024


def _largest() -> int:
    """Kibibytes of the largest resident set."""
    lines = (_SELF / "status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
