"""PyTorch's own switches and tools around the backend, each in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attn_compiler.backend import register

# the derivative of each operator doubled
CHANGED = ("formula.backward(grad_out, *args", "formula.backward(2 * grad_out, *args")
PACKAGE = Path(__file__).parent.parent.parent / "attn_compiler"
MODEL = """
import sys
import torch
import attn_compiler as ac

def attend(q, k, v):
    return (q @ k.mT * 0.3).softmax(-1) @ v

def example(grad=False):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, n, 8, generator=draw).requires_grad_(grad) for n in (5, 7, 7)]

def compiled(then):
    from attn_compiler.backend import register
    register()
    return torch.compile(attend, backend="attn_compiler", options={"then": then})
"""
# a fresh cache folder: Inductor then asks the compiler of each vector extension whether it works
TRUSTED = {"TORCHINDUCTOR_VEC_ISA_OK": "1"}
# seconds of a process: some compile C++, on a machine that may be busy
PATIENCE = 600
EAGER = MODEL + 'compiled("eager")(*example())\n'


def _run(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | TRUSTED | environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        timeout=PATIENCE,
    )


def _output(code: str, cwd: Path, **environment: str) -> str:
    done = _run(code, cwd, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---------------------------------------------------------------- logs and traces


@pytest.mark.slow
def test_torch_logs_with_a_plus_shows_the_graphs(tmp_path: Path) -> None:
    """A package that can be imported needs no registration: its name is a logger's."""
    done = _run(EAGER, tmp_path, TORCH_LOGS="+attn_compiler")
    assert done.returncode == 0, done.stderr
    before, after = done.stderr.split("after:")
    assert "softmax" in before and "attn_compiler.attention" in after
    assert "1 attention site, 1 rewritten" in after


def _artifacts(folder: Path) -> dict[str, str]:
    """Payloads of the artifacts in a structured trace, by name, as tlparse reads them."""
    found: dict[str, str] = {}
    for file in folder.glob("dedicated_log_torch_trace_*"):
        name = ""
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("\t"):
                if name:
                    found[name] = found.get(name, "") + line[1:] + "\n"
                continue
            entry = json.loads(line[line.index("{") :])
            name = entry.get("artifact", {}).get("name", "") if "has_payload" in entry else ""
            if name.startswith("attn_compiler"):
                assert entry["frame_id"] == 0 and entry["frame_compile_id"] == 0
    return found


def test_torch_logs_says_what_is_decided_and_a_trace_holds_the_graphs(tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    done = _run(EAGER, tmp_path, TORCH_TRACE=str(folder), TORCH_LOGS="attn_compiler")
    assert done.returncode == 0, done.stderr
    assert "flash, mask none" in done.stderr and "softmax" not in done.stderr
    found = _artifacts(folder)
    report = json.loads(found["attn_compiler_report"])
    assert [site["decision"]["variant"] for site in report["sites"]] == ["flash"]
    assert "softmax" in found["attn_compiler_before"]
    assert "attn_compiler.attention" in found["attn_compiler_after"]


# ---------------------------------------------------------------- tools around the backend


def test_dynamo_explain() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        first = (q @ k.mT).softmax(-1) @ k
        torch._dynamo.graph_break()
        return (first @ k.mT).softmax(-1) @ k

    torch._dynamo.reset()
    register()
    compiled = torch.compile(attend, backend="attn_compiler", options={"then": "eager"})
    found = torch._dynamo.explain(compiled)(torch.randn(2, 5, 8), torch.randn(2, 7, 8))
    assert (found.graph_count, found.graph_break_count) == (2, 1)


@pytest.mark.slow
def test_debug_folder_of_inductor(tmp_path: Path) -> None:
    """The graph that Inductor writes down is the rewritten one."""
    code = MODEL + 'compiled("inductor")(*example())\n'
    _output(
        code,
        tmp_path,
        TORCH_COMPILE_DEBUG="1",
        TORCH_COMPILE_DEBUG_DIR=str(tmp_path),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
    )
    (graph,) = tmp_path.glob("torch_compile_debug/**/fx_graph_readable.py")
    text = graph.read_text(encoding="utf-8")
    assert "attn_compiler.attention" in text and "softmax" not in text


# ---------------------------------------------------------------- caches

GRADIENT = (
    MODEL
    + """
from torch._dynamo.utils import counters
q, k, v = example(grad=True)
compiled("inductor")(q, k, v).sum().backward()
print(v.grad.sum().item(), counters["aot_autograd"]["autograd_cache_hit"])
"""
)


@pytest.mark.slow
def test_a_new_process_sees_a_changed_derivative(tmp_path: Path) -> None:
    """AOTAutograd keeps the backward it traced, and does not see the formula it came from."""
    shutil.copytree(
        PACKAGE, tmp_path / "attn_compiler", ignore=shutil.ignore_patterns("__pycache__")
    )
    environment = {
        "PYTHONPATH": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }

    def gradient() -> tuple[float, int]:
        total, hits = _output(GRADIENT, tmp_path, **environment).split()
        return float(total), int(hits)

    first, hits = gradient()
    assert hits == 0
    assert gradient() == (pytest.approx(first), 1)

    source = tmp_path / "attn_compiler" / "kernels" / "derivatives.py"
    text = source.read_text(encoding="utf-8")
    assert text.count(CHANGED[0]) == 1
    source.write_text(text.replace(*CHANGED), encoding="utf-8")
    assert gradient() == (pytest.approx(2 * first), 0)


SAVED = (
    MODEL
    + """
from torch._dynamo.utils import counters
run = compiled("inductor")
if sys.argv[1:] == ["load"]:
    torch.compiler.load_cache_artifacts(open("artifacts", "rb").read())
print(run(*example()).sum().item())
if sys.argv[1:] != ["load"]:
    data, info = torch.compiler.save_cache_artifacts()
    open("artifacts", "wb").write(data)
print(counters["aot_autograd"]["autograd_cache_hit"])
"""
)


@pytest.mark.slow
def test_cache_artifacts_travel(tmp_path: Path) -> None:
    results = []
    for word in ("save", "load"):
        code = SAVED.replace("sys.argv[1:]", repr([word]))
        results.append(_output(code, tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / word)))
    (saved, missed), (loaded, hit) = (result.split() for result in results)
    assert saved == loaded and (missed, hit) == ("0", "1")
