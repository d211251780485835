"""The generated kernels against PyTorch's own on one GPU: speed, error, and what a launch costs.

    python examples/benchmarks/gpu_speed.py [--out FOLDER] [--budget SECONDS] [--only SECTION ...]
    python examples/benchmarks/gpu_speed.py --table [RESULT.json ...]
    python examples/benchmarks/gpu_speed.py --fit RESULT.json

Random data in bfloat16, all ways of a case alternated in one process. What fails is reported with
its error and stops nothing else. The folder gets two files: the seconds of every round as JSON,
with what they were measured on, and the table; with --only they keep what is there of the rest.
TFLOP/s count 4 B H T S d for a forward (the part of it that the mask leaves; half where causal) and
2.5 times that for a backward. FlexAttention's lists of blocks are made before, ours are made in
each call.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, get_args

# its own folder, also where PYTHONSAFEPATH keeps it off the path
sys.path.insert(0, str(Path(__file__).parent))

import gpu_compile
import gpu_fit
import gpu_table
import torch
from gpu_cases import Case, Section, cases, next_case, shrunk
from gpu_process import Task, gather
from gpu_sections import run
from gpu_timing import METHOD, DeviceLost, Machine, Note, failure
from gpu_ways import TILED

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
ROUNDS = 11
BUDGET = 330.0
# seconds in which a way is compiled and measured, or it hangs
_PATIENCE = 75.0
# of which compiling the kernels of all tiles may take so many
_COMPILING = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    if given.table is not None:
        found = [json.loads(path.read_text()) for path in given.table]
        # the folder holds results of CPUs too, by other scripts
        gpu_table.write(given.page, [result for result in found if "gpu" in result])
        return 0
    if given.fit is not None:
        print(gpu_fit.report(json.loads(given.fit.read_text())))
        return 0
    if given.device == "cuda" and not torch.cuda.is_available():
        print("gpu_speed needs a GPU, and there is none (--device cpu runs its code, tiny)")
        return 1
    if given.compile is not None:
        section, number, of = given.compile
        machine = Machine.of(given.device)
        chosen = _sized([case for case in cases() if case.section == section], machine)
        gpu_compile.call_once(chosen, machine, int(number), int(of))
        return 0
    if given.child is not None:
        return _child(given.child)
    result = measured(given)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        name = result["gpu"].replace(" ", "-").replace("/", "-")
        if given.only is not None:
            result = _joined(given.out / f"{name}.json", result)
        (given.out / f"{name}.json").write_text(json.dumps(result, indent=1))
        (given.out / f"{name}.md").write_text(gpu_table.table([result]) + "\n")
    print(gpu_table.table([result]))
    return 0


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--out", type=Path, help="folder for the result")
    found.add_argument("--budget", type=float, default=BUDGET, help="seconds; drops the rest")
    found.add_argument("--only", nargs="+", choices=get_args(Section), help="some sections")
    found.add_argument("--rounds", type=int, default=ROUNDS)
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    found.add_argument("--table", type=Path, nargs="*", help="write results into the page")
    found.add_argument("--page", type=Path, default=PAGE)
    found.add_argument("--fit", type=Path, help="print the cost model's constants")
    found.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    found.add_argument("--compile", nargs=3, help=argparse.SUPPRESS)
    return found


# ---------------------------------------------------------------- the whole


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """The result: what was measured on, a row for each case, what was dropped."""
    began = time.monotonic()
    chosen = [case for case in cases() if given.only is None or case.section in given.only]
    ways = {case.name: case.ways for case in chosen}
    with tempfile.TemporaryDirectory() as folder:
        start = partial(_start, given.device, given.rounds, Path(folder))
        found = gather(start, list(ways), ways, Path(folder), given.budget, _PATIENCE)
    dropped = [name for name in ways if name not in found.rows]
    for name in dropped:
        print(f"dropped, out of time: {name}")
    return {
        **_described(given.device),
        "method": METHOD if given.device == "cuda" else "A clock and tiny sizes: no measurement.",
        "rounds": given.rounds,
        "seconds": time.monotonic() - began,
        "dropped": dropped,
        "lost": found.lost,
        "rows": [found.rows[name] for name in ways if name in found.rows],
    }


def _joined(path: Path, new: dict[str, Any]) -> dict[str, Any]:
    """Some sections with the others of the same machine that are kept in a file already."""
    old: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    same = ("torch", "triton", "gpu", "driver", "dtype", "method", "rounds")
    if any(old.get(key) != new[key] for key in same):
        return new
    rows = {row["name"]: row for row in (*old["rows"], *new["rows"])}
    return {
        **new,
        "seconds": old["seconds"] + new["seconds"],
        "dropped": [n for n in dict.fromkeys(old["dropped"] + new["dropped"]) if n not in rows],
        "lost": old["lost"] | new["lost"],
        "rows": [rows[case.name] for case in cases() if case.name in rows],
    }


def _described(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    found: dict[str, Any] = {"torch": torch.__version__, "triton": triton}
    if device == "cpu":
        return found | {"gpu": "cpu", "driver": "none", "dtype": "float32"}
    here = torch.cuda.get_device_properties(0)
    return found | {
        "gpu": here.name,
        "driver": _driver(),
        "cudnn": torch.backends.cudnn.version(),
        "arch": f"sm_{here.major}{here.minor}",
        "processors": here.multi_processor_count,
        "memory": here.total_memory,
        "dtype": "bfloat16",
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.split("\n")[0].strip()


# ---------------------------------------------------------------- one process


def _start(device: str, rounds: int, folder: Path, task: Task) -> subprocess.Popen[bytes]:
    work = folder / f"{task.notes.stem}.json"
    told = {**asdict(task), "notes": str(task.notes), "device": device, "rounds": rounds}
    work.write_text(json.dumps(told))
    command = [sys.executable, __file__, "--device", device, "--child", str(work)]
    return subprocess.Popen(command, env=os.environ)


def _child(work: Path) -> int:
    told = json.loads(work.read_text())
    task = Task(told["names"], told["lost"], told["seconds"], Path(told["notes"]))
    return work_through(task, Machine.of(told["device"]), told["rounds"])


def work_through(task: Task, machine: Machine, rounds: int) -> int:
    """Measure the cases of a task, the most important first; 3 if the device was lost."""
    end = time.monotonic() + task.seconds
    left = [case for case in cases() if case.name in task.names]
    uncompiled = set(TILED) if machine.cuda else set()
    with task.notes.open("a", encoding="utf-8") as notes:

        def tell(**line: Any) -> None:
            notes.write(json.dumps(line) + "\n")
            notes.flush()

        while (case := next_case(left, end - time.monotonic())) is not None:
            if case.section in uncompiled:
                uncompiled.remove(case.section)
                seconds = min(_COMPILING, end - time.monotonic())
                gpu_compile.together(_compilers(case.section), seconds)
                continue
            left.remove(case)
            (small,) = _sized([case], machine)
            tell(case=case.name)
            try:
                row = _row(
                    small, machine, rounds,
                    lambda way, name=case.name: tell(case=name, way=way),
                    task.lost.get(case.name, {}),
                )  # fmt: skip
            except DeviceLost as error:
                tell(lost=str(error))
                return 3
            tell(row={**row, "name": case.name})
            print(f"{end - time.monotonic():6.0f} s left  {_told(case, row)}", flush=True)
    return 0


def _sized(found: Sequence[Case], machine: Machine) -> list[Case]:
    return [case if machine.cuda else shrunk(case) for case in found]


def _compilers(section: str) -> list[list[str]]:
    of = gpu_compile.PROCESSES
    return [[sys.executable, __file__, "--compile", section, f"{n}", f"{of}"] for n in range(of)]


def _row(
    case: Case, machine: Machine, rounds: int, note: Note, lost: dict[str, str]
) -> dict[str, Any]:
    try:
        return run(case, machine, rounds, note, lost)
    except DeviceLost:
        raise
    except Exception as error:  # the case itself cannot be made
        return {"section": case.section, **failure(machine, error)}


def _told(case: Case, row: dict[str, Any]) -> str:
    ways = row.get("ways", {})
    parts = []
    for way, found in ways.items():
        seconds = found.get("seconds")
        text = "failed" if "error" in found else ""
        parts.append(f"{way} {1e3 * median(seconds):.3f} ms" if seconds else f"{way} {text}")
    return f"{case.name}: {', '.join(parts) or row.get('error', '')}"


if __name__ == "__main__":
    sys.exit(main())
