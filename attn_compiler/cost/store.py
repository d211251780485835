"""What was measured on this machine, kept in the cache folder until the model that uses it changes.

    <cache>/measured/hardware_4f1c09....json     {"device": "NVIDIA H200", "hardware": {...}}

A file is found by what it is about and by a hash of the cost model's and the templates' sources. It
appears whole or not at all, since many processes may write at once; one that cannot be read is
ignored. The folder is ATTN_COMPILER_CACHE, or `attn_compiler` in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

log = logging.getLogger("attn_compiler")
_LENGTH = 20


def folder(name: str) -> Path:
    """A folder of the cache."""
    named = os.environ.get("ATTN_COMPILER_CACHE")
    if named:
        return Path(named) / name
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "attn_compiler" / name


def put(path: Path, text: str) -> None:
    """Write a file as a whole, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}_", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@cache
def version() -> str:
    """Hash of the cost model and of the kernels' templates."""
    digest, home = hashlib.sha256(), files("attn_compiler")
    for room in (home / "cost", home / "kernels" / "templates"):
        for file in sorted(room.iterdir(), key=lambda f: f.name):
            if file.name.endswith((".py", ".json", ".jinja")):
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def place(kind: str, *about: str) -> Path:
    """The file that keeps what was measured about something."""
    digest = hashlib.sha256("\n".join((version(), *about)).encode()).hexdigest()[:_LENGTH]
    return folder("measured") / f"{kind}_{digest}.json"


def read(path: Path) -> dict[str, Any]:
    """The object of a file; empty where there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s is ignored, measure again: %s", path, error)
        return {}
    if isinstance(found, dict):
        return found
    log.warning("%s is ignored, measure again: it holds no JSON object", path)
    return {}
