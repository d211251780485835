"""A variant from outside the package, named by its spec: through each door, and its refusals."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

import attn_compiler as ac
from attn_compiler.variants.base import VariantSpec

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "04_add_a_variant.py"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def own() -> ModuleType:
    spec = importlib.util.spec_from_file_location("own_variant", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def test_rewritten_and_called_with_another_length(own: ModuleType) -> None:
    model = own.Attention(28, 7).eval()
    new = ac.rewrite(model, (torch.randn(2, 31, 28),), to=own.Window(size=5))
    model.window = 5
    x, y = torch.randn(3, 53, 28), torch.randn(3, 53, 28)
    torch.testing.assert_close(new(x), model(x), rtol=0, atol=TOLERANCE)
    for one in (new, model):
        (one(x) * y).sum().backward()
    torch.testing.assert_close(new.qkv.weight.grad, model.qkv.weight.grad, rtol=1e-4, atol=1e-4)


def test_through_the_backend(own: ModuleType) -> None:
    model, x = own.Attention(28, 7).eval(), torch.randn(2, 31, 28)
    options = {"to": own.Window(size=5), "then": "eager"}
    out = torch.compile(model, backend="attn_compiler", options=options)(x)
    (site,) = ac.last_report().sites
    assert site.decision.variant == "window" and site.decision.fidelity == "calibrated"
    model.window = 5
    torch.testing.assert_close(out, model(x), rtol=0, atol=TOLERANCE)


def test_its_reasons_are_reported(own: ModuleType) -> None:
    model = own.Attention(28, 7, causal=False).eval()
    report = ac.explain(model, (torch.randn(2, 31, 28),), to=own.Window())
    (site,) = report.sites
    assert [reason.code for reason in site.decision.reasons] == ["window.not_causal"]


def test_its_spec_is_a_value(own: ModuleType) -> None:
    assert own.Window(size=3) == own.Window(size=3) != own.Window(size=4)
    assert pickle.loads(pickle.dumps(own.Window(size=3))) == own.Window(size=3)
    with pytest.raises(ac.BadOption):
        own.Window(size=0)


def test_a_spec_without_a_variant_is_refused(own: ModuleType) -> None:
    @dataclass(frozen=True, slots=True)
    class Nobody(VariantSpec):
        pass

    with pytest.raises(ac.BadOption, match="option to is"):
        ac.rewrite(own.Attention(28, 7), (torch.randn(2, 31, 28),), to=Nobody())


def test_its_costs_are_not_known(own: ModuleType) -> None:
    with pytest.raises(ac.BadOption, match="no costs are known of Window"):
        ac.plan(own.Window(), ac.Shape(1, 64, 64, 4, 16), hardware="h200")
