"""From a Jinja template to a module of Triton kernels, by way of a readable file.

    forward.py.jinja, structure   ->   <cache>/kernels/forward_4f1c09....py   ->   module

The name of the file is the hash of its text, so equal kernels share one, and a file that does not
hold what its name says is written again. Files appear whole or not at all: many processes may
write at once. The folder is ATTN_COMPILER_CACHE, or `attn_compiler` in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from attn_compiler.cost import store

_TEMPLATES = Path(__file__).parent / "templates"
_LENGTH = 20


def cache_folder() -> Path:
    """Where generated kernels live."""
    return store.folder("kernels")


def render(name: str, **structure: Any) -> str:
    """The source of a kernel.

    Args:
        name: of the template, without `.py.jinja`.
        structure: what the template asks for; a name that it uses and that is missing is an error.
    """
    text: str = _environment().get_template(f"{name}.py.jinja").render(**structure)
    return text.rstrip() + "\n"


@cache
def _environment() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )


def write(name: str, source: str) -> Path:
    """The file that holds `source`; written if it is not there, or not whole."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:_LENGTH]
    path = cache_folder() / f"{name}_{digest}.py"
    if not _holds(path, source):
        store.put(path, source)
    return path


def _holds(path: Path, source: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == source
    except (OSError, UnicodeDecodeError):
        return False


@lru_cache(maxsize=512)
def load(name: str, source: str) -> ModuleType:
    """The module of a source; Triton reads the text of a kernel from its file."""
    path = write(name, source)
    module_name = f"attn_compiler_generated_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module
