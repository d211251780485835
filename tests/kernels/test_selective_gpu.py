"""The generated kernels of Selective attention on a GPU: numbers, gradients, and who is evicted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import double, text
from selective_cases import CASES, Case, call, eager, judged, qkv, weights
from torch import Tensor
from torch.utils._pytree import tree_map_only

from attn_compiler.kernels import masking_triton
from attn_compiler.kernels.eviction import selective_deaths
from attn_compiler.kernels.selective import reference, selective_attention

pytestmark = pytest.mark.gpu

DEVICE, T = "cuda", 193
NAMES = ("causal", "left padding", "documents", "alibi selects", "softcap, gate, selector")


def there(x: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(DEVICE), x)


def results(case: Case, fn: Any, given: list[Tensor], extra: Any, reads: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in given]
    out, lse, state = call(case, fn, leaves, dict(extra), reads)
    grads = torch.autograd.grad(out, leaves, weights(out))
    return [x.detach().cpu() for x in (out, lse, state, *grads)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_numbers_and_gradients(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    plain = masking_triton.Scan.launch

    def launch(scan: Any, kernel: str, *args: Any) -> Any:
        ran.append(kernel)
        return plain(scan, kernel, *args)

    monkeypatch.setattr(masking_triton.Scan, "launch", launch)
    case = CASES[name]
    given = qkv(dtype, T, 64), case.options(T), case.reads(T)
    ours = results(case, selective_attention, *there(given))
    exact = results(case, reference, *tree_map_only(Tensor, double, given))
    judged(case, ours, results(case, eager, *given), exact)
    assert "unmask" in ran


def test_deaths() -> None:
    """Whole numbers, so that sums are exact and many are equal."""
    case = Case(text(mask="(k <= q)"))
    draw = torch.Generator().manual_seed(5)
    q, k = (torch.randint(-2, 3, (2, n, T, 16), generator=draw).float() for n in (4, 2))
    options: dict[str, Any] = {"program": case.program, "scale": 0.5, "head": 3, "budget": 23}
    options |= {"select_from": "qk"}
    exact = selective_deaths(q, k, [], [], [], **options)
    found = selective_deaths(*there((q, k)), [], [], [], **options)
    assert torch.equal(found.cpu(), exact) and (exact < T).any()
