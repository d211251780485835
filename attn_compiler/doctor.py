"""What is here and what works: versions, devices, compilers, folders.

examine()   ->   checks, each ok, missing (something does not work) or absent (can be had)
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

import attn_compiler
from attn_compiler.cost.hardware import Hardware
from attn_compiler.errors import BadOption
from attn_compiler.kernels.template import cache_folder

State = Literal["ok", "missing", "absent"]
_LEAST_TORCH = (2, 11)
_OPTIONAL = {
    "transformers": "its models are found and rewritten too: pip install transformers",
    "rich": "colours and bars of progress: pip install rich",
}
# how far a row of the hardware table can be trusted
_MARKS = {
    "=": "its peak is the product of published parts",
    "~": "as the vendor publishes it",
    "?": "partly assumed: predictions are rough",
}


@dataclass(frozen=True, slots=True)
class Check:
    """One line.

    Attributes:
        name: what was looked at.
        state: "ok"; "missing" where something does not work; "absent" where more would be possible.
        text: what was found.
        do: what to do about it.
    """

    name: str
    state: State
    text: str
    do: str = ""


def examine() -> list[Check]:
    """Look at everything; nothing is changed."""
    return [
        Check("attn_compiler", "ok", attn_compiler.__version__),
        Check("python", "ok", platform.python_version()),
        _torch(),
        *(_package(name, do) for name, do in _OPTIONAL.items()),
        *_devices(),
        *_calibration(),
        _triton(),
        _compiler(),
        *_folders(),
        _backend(),
        _operator(),
    ]


def table(checks: list[Check]) -> str:
    """As text."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:<8} {check.name:<{width}}  {check.text}")
        if check.do:
            lines.append(f"{'':<8} {'':<{width}}  do: {check.do}")
    return "\n".join(lines)


# ---------------------------------------------------------------- one by one


def _torch() -> Check:
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < _LEAST_TORCH:
        least = ".".join(map(str, _LEAST_TORCH))
        return Check("torch", "missing", torch.__version__, f'pip install "torch>={least}"')
    return Check("torch", "ok", torch.__version__)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _package(name: str, do: str) -> Check:
    found = _installed(name)
    return Check(name, "ok", found) if found else Check(name, "absent", "not installed", do)


def _devices() -> Iterator[Check]:
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield _device("GPU", torch.device("cuda", number), torch.cuda.get_device_name(number))
    else:
        yield Check("GPU", "absent", "none that this build of torch can use")
    yield _device("CPU", torch.device("cpu"), f"{torch.get_num_threads()} threads")


def _device(name: str, device: torch.device, text: str) -> Check:
    try:
        row = Hardware.from_device(device)
    except BadOption as error:
        return Check(name, "missing", f"{text}: {error.what}", error.do)
    return Check(name, "ok", f'{text}; row "{row.name}", {row.arch}: {_MARKS[row.mark]}')


def _calibration() -> Iterator[Check]:
    """Was anything fitted, and to what: one line for each kernel or way."""
    name = "GPU" if torch.cuda.is_available() else "CPU"
    try:
        fitted = Hardware.from_device().constants
    except BadOption:
        fitted = ()
    if not fitted:
        text = f"predictions for this {name} come from its data sheet"
        yield Check("calibration", "absent", text, "attn-compiler calibrate")
        return
    yield Check("calibration", "ok", f"the cost model was fitted to this {name}")
    for template, constants in fitted:
        text = ", ".join(f"{key} {value:.3g}" for key, value in asdict(constants).items())
        yield Check(f"fit of {template}", "ok", text)


def _triton() -> Check:
    found, gpu = _installed("triton"), torch.cuda.is_available()
    if found is None:
        do = "pip install triton, the version that this torch names"
        text = "not installed: generated kernels cannot run"
        return Check("triton", "missing", text, do) if gpu else Check("triton", "absent", text, do)
    if not gpu:
        return Check("triton", "ok", f"{found}; without a GPU nothing here runs it")
    return Check("triton", "ok", found)


def _compiler() -> Check:
    """Inductor writes C++ for CPUs."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return Check("C++", "ok", get_cpp_compiler())
    except Exception:  # each version of torch has its own
        do = 'install g++ or clang++, or name one in CXX; options={"then": "eager"} needs none'
        return Check("C++", "missing", "no compiler: Inductor cannot compile for CPUs", do)


def _folders() -> Iterator[Check]:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for name, folder, variable in (
        ("our cache", cache_folder(), "ATTN_COMPILER_CACHE"),
        ("its cache", Path(cache_dir()), "TORCHINDUCTOR_CACHE_DIR"),
    ):
        yield _folder(name, folder, variable)


def _folder(name: str, folder: Path, variable: str) -> Check:
    there = next(f for f in (folder, *folder.parents) if f.exists())
    try:
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError:
        do = f"name a folder that can be written to in {variable}"
        return Check(name, "missing", f"{folder} cannot be written to", do)
    return Check(name, "ok", str(folder))


def _backend() -> Check:
    if "attn_compiler" in torch.compiler.list_backends():
        return Check("backend", "ok", 'torch.compile(model, backend="attn_compiler")')
    do = "pip install attn-compiler, or call attn_compiler.backend.register()"
    return Check("backend", "missing", "torch.compile does not know its name", do)


def _operator() -> Check:
    def run() -> None:
        import attn_compiler.kernels.operators  # noqa: F401  (registers them)

        q = torch.ones(1, 1, 2, 4)
        operator = torch.ops.attn_compiler.attention
        program = "score: dot; mask: k <= q; empty: any"
        operator(q, q, q, [], [], None, program=program, scale=0.5, dropout=0.0)

    return _works("operators", run, "attn_compiler::attention computes")


def _works(name: str, run: Callable[[], None], text: str) -> Check:
    try:
        run()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return Check(
            name, "missing", f"{type(error).__name__}: {first}", "install the package again"
        )
    return Check(name, "ok", text)
