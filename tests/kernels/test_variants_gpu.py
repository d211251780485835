"""The variants' own kernels on a GPU: numbers and gradients against float64, in turns of dtypes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import attention_cases
import el_cases
import gau_cases
import pytest
import torch
from attention_cases import SCALE, Shape, double, within_budget
from gau_cases import Case as GauCase
from torch import Tensor
from torch.utils import _pytree as pytree

from attn_compiler.ir.score import Program
from attn_compiler.kernels import el, gau, gau_triton, gau_triton_backward
from attn_compiler.kernels.gau import gau_attention

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def in_turn(names: Iterable[str]) -> list[tuple[str, torch.dtype]]:
    """Each name with one dtype: compilation is most of the time."""
    return list(zip(names, itertools.cycle(DTYPES), strict=False))


def there(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a function on the GPU, with tensors that come from the CPU and go back to it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.cuda, (args, kwargs))
        return pytree.tree_map_only(Tensor, Tensor.cpu, function(*args, **kwargs))

    return run


def heard(monkeypatch: pytest.MonkeyPatch, home: Any, name: str) -> list[str]:
    """The calls of a function, which goes on as it was."""
    calls: list[str] = []
    plain = getattr(home, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return plain(*args, **kwargs)

    monkeypatch.setattr(home, name, run)
    return calls


@pytest.mark.parametrize(("name", "dtype"), in_turn(attention_cases.CASES), ids=str)
def test_el(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case, calls = attention_cases.CASES[name], heard(monkeypatch, el.el_triton, "forward")
    shape = (Shape(T=1, H=8, G=8, S=513, d=64, dv=64), Shape(T=3, H=6, G=2, S=1041, d=32, dv=24))
    s, width = list(zip(shape, (512, 768), strict=True))[DTYPES.index(dtype) % 2]
    given = el_cases.arguments(s, width, dtype, beams=2)
    reads, kwargs = case.reads(s), {"program": case.program, "scale": SCALE}
    out, _ = there(el.forward)(*given, reads, list(case.ints), **kwargs)
    wide = [double(t) for t in given], [double(r) for r in reads]
    exact, _ = el.reference(*wide[0], wide[1], list(case.ints), **kwargs)
    theirs = el_cases.plain(given, reads, case.ints, Program.parse(case.program))
    size = float(exact.nan_to_num(0.0).abs().max())
    within_budget(name, out, theirs, exact, 8 * torch.finfo(dtype).eps * size)
    assert calls


PAPER = GauCase(length=700, s=128, e=256, chunk=128)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "case",
    [
        PAPER,
        PAPER.but(causal=False, padded=True),
        PAPER.but(packed=True, inside=True, s=64),
        PAPER.but(gated=False, biased=False, e=100, padded=True),
        PAPER.but(chunk=None),
        PAPER.but(chunk=None, causal=False, packed=True, dropout=0.1),
    ],
    ids=["causal", "padded", "documents", "bare", "all pairs", "dropout"],
)
def test_gau(case: GauCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = heard(monkeypatch, gau_triton, "forward")
    backward = heard(monkeypatch, gau_triton_backward, "backward")
    drawn = case.drawn(dtype)
    ours = gau_cases.with_gradients(case, drawn, there(gau_attention))
    assert forward and backward
    monkeypatch.setattr(gau, "runs_triton", lambda given: False)
    plain = gau_cases.with_gradients(case, drawn)
    exact = gau_cases.with_gradients(
        case, {n: x.double() if x is not None and x.is_floating_point() else x
               for n, x in drawn.items()},
    )  # fmt: skip
    for a, b, c in zip(ours, plain, exact, strict=True):
        error, allowed = (a.double() - c).norm(), (b.double() - c).norm()
        assert error <= 2 * allowed + torch.finfo(dtype).eps / 2 * c.norm()


def test_gau_twice() -> None:
    """Nothing is added to from two places."""
    drawn = PAPER.drawn(torch.bfloat16)
    one, other = (gau_cases.with_gradients(PAPER, drawn, there(gau_attention)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
